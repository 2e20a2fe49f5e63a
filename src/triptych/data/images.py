"""Pictures: from the spelling in a record to a file inside the image root, its size, and its pixels.

Nothing here replaces or repairs a picture. One that cannot be decoded whole is a `DataError` of its row.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from triptych.core.errors import DataError, Problem
from triptych.core.types import ImageReference

MAX_PIXELS = 89_478_485
"""Width x height above which a picture is refused as a decompression bomb (Pillow's own warning threshold)."""

DRAFT_MARGIN, AVERAGE_MARGIN = 1.05, 2.0
"""How much larger than wanted a picture at least is when it was decoded smaller, and when it was averaged. Averaging
saves less and loses more. Exactly at the wanted size the resize that follows would have nothing left to average and
let fine patterns through that it takes out of the whole picture (figures in docs/decisions.md)."""

# Formats that decode in process. Pillow also opens EPS (runs Ghostscript) and others that no data set needs.
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
Image.init()
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # AVIF and others depend on Pillow's build
_DRAFTED = ("JPEG", "MPO")
_ROTATED = frozenset({5, 6, 7, 8})
_END_FIRST = frozenset({2, 3, 4, 6, 7, 8})
"""EXIF orientations that bring the last column or row to the front."""
_MOST_DRAFTED = 8
"""The most that sides of JPEGs are divided by as they are decoded; the others, 2 and 4, divide it."""
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
_DATA_URL = re.compile(r"^data:([^,]*),(.*)$", re.DOTALL)
_PNG_METADATA = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})


def resolve_image(root: Path, name: str) -> ImageReference:
    """Find the picture that a record names. Does not open it.

    Args:
        root: the declared image root; the resolved file must lie inside it, symbolic links followed.
        name: a path relative to `root`, an absolute path or `file://` URL inside it, or a `data:` URL.

    Raises:
        DataError: the name is empty, a remote URL, malformed, leaves the root, or names no file.
    """
    if not name.strip():
        _refuse("the picture has an empty name", "give the path of the picture, or drop the field")
    scheme = _SCHEME.match(name)
    if scheme and scheme[1].lower() == "data":
        return ImageReference(data=_decode_data_url(name), name=_shorten(name))
    path_text = name
    if scheme and scheme[1].lower() == "file" and name[5:7] == "//":
        path_text = unquote(name[7:].removeprefix("localhost"))
    elif scheme and "://" in name:
        _refuse(
            f"picture `{_shorten(name)}` is a remote URL",
            "pictures must be on disk: download them once and put their paths into the record",
        )
    try:
        inner_root = root.resolve()
        path = (inner_root / path_text).resolve()
        is_inside = path.is_relative_to(inner_root)
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        _refuse(f"picture name `{_shorten(name)}` is not a path: {error}", "give the path of a file", error)
    if not is_inside:
        _refuse(
            f"picture `{_shorten(name)}` leaves the image root {root}",
            "move the picture below the image root, or set `images:` to a folder that holds all pictures",
        )
    if not is_file:
        _refuse(f"picture `{_shorten(name)}` is not a file in {root}", _advise_root(inner_root, path_text))
    return ImageReference(path=str(path), name=name)


def read_size(reference: ImageReference) -> tuple[int, int]:
    """(width, height) in pixels of the decoded picture, after EXIF rotation, from the header alone.

    Raises:
        DataError: as `decode`, as far as the header shows it.
    """
    with _opened(reference) as (image, stream):
        width, height = image.size
        if width == height or image.format == "TIFF":  # Pillow turns TIFF sizes itself
            return width, height
        if image.format == "PNG" and not _has_late_metadata(stream):
            # PngImageFile.getexif would decode the whole picture to look behind the pixels, where nothing is.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        else:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        return (height, width) if orientation in _ROTATED else (width, height)


def decode(reference: ImageReference) -> Image.Image:
    """Decode a picture completely to RGB.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled by 255/65535, of an animation the
    first frame is taken.

    Raises:
        DataError: not a picture, truncated, a decompression bomb, or of a mode without a defined white level.
    """
    with _opened(reference) as (image, _):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, reference)


def decode_reduced(
    reference: ImageReference, wanted_size: Callable[[int, int], tuple[int, int]]
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a picture at a half, a third, ... of its size, as small as what is made of it allows.

    JPEGs are decoded at 1/2, 1/4 or 1/8, which saves most of their decoding. What still is, or in other formats is,
    several times as large as needed is averaged over squares, which saves part of the resize that follows.

    Args:
        reference: the picture.
        wanted_size: (width, height) of a picture -> that of the pixels made from it. Neither side of what is returned
            is smaller than it times `DRAFT_MARGIN`, unless the picture itself is.

    Returns:
        As `decode`, with each side divided by a whole number and rounded up; and (width, height) of the whole picture.

    Raises:
        DataError: as `decode`; or what `wanted_size` raises.
    """
    with _opened(reference) as (image, _):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if image.format in _DRAFTED else 1
        is_turned = orientation in _ROTATED
        stored = image.size
        whole = stored[::-1] if is_turned else stored
        # What stands for less than a full square must come last, and a turn may bring it to the front.
        if image.format in _DRAFTED and (
            orientation not in _END_FIRST or all(side % _MOST_DRAFTED == 0 for side in stored)
        ):
            least = _least_size(wanted_size, whole, DRAFT_MARGIN)
            image.draft(None, least[::-1] if is_turned else least)
        image.load()
        is_drafted = image.size != stored
        ImageOps.exif_transpose(image, in_place=True)
        if not is_drafted:
            whole = image.size
        picture = _to_rgb(image, reference)
    least = _least_size(wanted_size, whole, AVERAGE_MARGIN)
    factor = min(picture.width // least[0], picture.height // least[1])
    return (picture.reduce(factor) if factor > 1 else picture), whole


def read_encoded(reference: ImageReference) -> bytes:
    """The encoded bytes of a picture, read anew each time.

    Raises:
        OSError: its file cannot be read.
    """
    if reference.data is not None:
        return reference.data
    if reference.rows is not None:
        return reference.rows.read_picture(reference.cell)
    assert reference.path is not None, "an ImageReference says where its picture is"
    # Opened for every read: no file position is shared between threads.
    with open(reference.path, "rb") as stream:
        stream.seek(reference.offset or 0)
        return stream.read(-1 if reference.size is None else reference.size)


def picture_key(reference: ImageReference) -> str:
    """Digest of a picture's encoded bytes.

    Raises:
        DataError: its file cannot be read.
    """
    try:
        return hashlib.blake2b(read_encoded(reference), digest_size=16).hexdigest()
    except OSError as error:
        _refuse(f"picture {describe(reference)} cannot be read: {error}", "check the file and its rights", error)


def describe(reference: ImageReference) -> str:
    """How messages name a picture."""
    return f"`{_shorten(reference.name or reference.path or '')}`"


@contextmanager
def _opened(reference: ImageReference) -> Iterator[tuple[Image.Image, IO[bytes]]]:
    """Open a picture; whatever goes wrong while the block uses it becomes a `DataError`."""
    try:
        with _open_stream(reference) as stream, Image.open(stream, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                _refuse(
                    f"picture {describe(reference)} has {width} x {height} pixels, more than {MAX_PIXELS}",
                    "make it smaller; a picture of this size is taken for a decompression bomb",
                )
            yield image, stream
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        _refuse(f"picture {describe(reference)} is a decompression bomb: {error}", "make it smaller", error)
    except UnidentifiedImageError as error:
        _refuse(
            f"picture {describe(reference)} is not a picture in a known format ({', '.join(_FORMATS)})",
            "replace the file, or drop the row",
            error,
        )
    # A damaged file makes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
    except Exception as error:
        _refuse(
            f"picture {describe(reference)} cannot be decoded: {error or type(error).__name__}",
            "the file is damaged or incomplete: fetch it again, or drop the row",
            error,
        )


def _open_stream(reference: ImageReference) -> IO[bytes]:
    if reference.path is not None and reference.offset is None:
        return open(reference.path, "rb")
    return io.BytesIO(read_encoded(reference))


def _to_rgb(image: Image.Image, reference: ImageReference) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() >= 0 and values.max() <= 65535:
            grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
            return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        _refuse(
            f"picture {describe(reference)} has mode `{image.mode}`, whose white level is not defined",
            "save it with 8 or 16 bits per channel",
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _least_size(
    wanted_size: Callable[[int, int], tuple[int, int]], whole: tuple[int, int], margin: float
) -> tuple[int, int]:
    width, height = wanted_size(*whole)
    return math.ceil(width * margin), math.ceil(height * margin)


def _has_late_metadata(stream: IO[bytes]) -> bool:
    """True when a PNG has chunks behind its pixels that may hold an orientation. Reads chunk headers only."""
    position = stream.tell()
    stream.seek(8)
    seen_pixels = False
    while len(header := stream.read(8)) == 8:
        name = header[4:]
        if seen_pixels and name in _PNG_METADATA:
            break
        seen_pixels |= name == b"IDAT"
        stream.seek(int.from_bytes(header[:4], "big") + 4, io.SEEK_CUR)
    stream.seek(position)
    return len(header) == 8


def _decode_data_url(name: str) -> bytes:
    match = _DATA_URL.match(name)
    if match is None:
        _refuse(f"picture `{_shorten(name)}` is not a valid data URL", "write data:image/png;base64,...")
    header, body = match.groups()
    try:
        data = base64.b64decode(body, validate=True) if header.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        _refuse(f"picture `{_shorten(name)}` is not valid base64: {error}", "encode the picture again", error)
    if not data:
        _refuse(f"picture `{_shorten(name)}` is empty", "encode the picture again")
    return data


def _advise_root(root: Path, name: str) -> str:
    """The commonest cause is a root one folder too deep or too high: say so when that would find the file."""
    if not Path(name).is_absolute():
        for folder in list(root.parents)[:3]:
            if (folder / name).is_file():
                return f"it is there below {folder}: set `images: {folder}`"
        for skipped in range(1, min(4, len(Path(name).parts))):
            shorter = Path(*Path(name).parts[skipped:])
            if (root / shorter).is_file():
                return f"{root / shorter} exists: drop `{Path(*Path(name).parts[:skipped])}/` from the record"
    return "put the file there, set `images:` to the folder that the paths are relative to, or drop the row"


def _shorten(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:60]}...{name[-20:]} ({len(name)} characters)"


def _refuse(message: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
    raise DataError(Problem(message, remedy=remedy)) from cause
