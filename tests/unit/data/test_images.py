"""Pictures: found inside the root only, decoded whole or refused, never changed without a word."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from triptych.core.errors import DataError
from triptych.core.types import ImageReference
from triptych.data.images import DRAFT_MARGIN, MAX_PIXELS, decode, decode_reduced, picture_key, read_size, resolve_image


def encode(image: Image.Image, kind: str, **options: Any) -> ImageReference:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return ImageReference(data=stream.getvalue(), name=f"test.{kind.lower()}")


def _noise(width: int = 31, height: int = 17) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


class TestResolve:
    def test_a_relative_path_inside_the_root(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        _noise().save(tmp_path / "a" / "1.png")
        reference = resolve_image(tmp_path, "a/1.png")
        assert (reference.path, reference.name) == (str((tmp_path / "a/1.png").resolve()), "a/1.png")
        for same in ("./a/1.png", "a/../a/1.png", str(tmp_path / "a/1.png"), f"file://{tmp_path}/a/1.png"):
            assert resolve_image(tmp_path, same).path == reference.path

    @pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "link.png", "folder/secret.png"])
    def test_no_path_leaves_the_root(self, tmp_path: Path, name: str) -> None:
        root = tmp_path / "root"
        (root / "a").mkdir(parents=True)
        _noise().save(tmp_path / "secret.png")
        (root / "link.png").symlink_to(tmp_path / "secret.png")
        (root / "folder").symlink_to(tmp_path)
        with pytest.raises(DataError, match="leaves the image root"):
            resolve_image(root, name)

    def test_an_absolute_path_outside_the_root(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        _noise().save(tmp_path / "secret.png")
        for name in (str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "/etc/passwd", "/dev/zero"):
            with pytest.raises(DataError, match="leaves the image root"):
                resolve_image(tmp_path / "root", name)

    @pytest.mark.parametrize("name", ["https://a.b/c.jpg", "http://a.b/c.jpg", "s3://bucket/c.jpg", "HTTPS://A.B/c"])
    def test_remote_pictures_must_be_on_disk(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match=r"is a remote URL\n.*must be on disk"):
            resolve_image(tmp_path, name)

    @pytest.mark.parametrize("name", ["", "  ", "a\0b", "x" * 5000, ".", "no.png"])
    def test_what_is_no_file_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError):
            resolve_image(tmp_path, name)

    def test_the_remedy_names_the_right_root(self, tmp_path: Path) -> None:
        (tmp_path / "demo/images").mkdir(parents=True)
        _noise().save(tmp_path / "demo/images/1.png")
        with pytest.raises(DataError, match=f"set `images: {tmp_path}`"):
            resolve_image(tmp_path / "demo", "demo/images/1.png")
        with pytest.raises(DataError, match="drop `data/` from the record"):
            resolve_image(tmp_path / "demo", "data/images/1.png")

    def test_data_urls(self, tmp_path: Path) -> None:
        data = encode(_noise(), "PNG").data
        assert data is not None
        text = base64.b64encode(data).decode()
        assert resolve_image(tmp_path, f"data:image/png;base64,{text}").data == data
        for broken in (f"data:image/png;base64,{text[:-3]}", "data:image/png;base64,", "data:nothing"):
            with pytest.raises(DataError):
                resolve_image(tmp_path, broken)


class TestDecode:
    """(255, 0, 0) and friends can be read off the pictures by hand."""

    def test_grey_palette_and_black_and_white(self) -> None:
        assert decode(encode(Image.new("L", (2, 2), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
        assert decode(encode(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
        palette = Image.new("RGB", (2, 2), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
        assert decode(encode(palette, "PNG")).getpixel((0, 0)) == (10, 200, 30)

    def test_transparency_is_laid_on_white(self) -> None:
        half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
        assert decode(encode(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)  # 255 * (1 - 128 / 255)
        clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
        for kind in ("PNG", "WEBP"):
            assert decode(encode(clear, kind, lossless=True)).getpixel((0, 0)) == (255, 255, 255)
        assert decode(encode(Image.new("LA", (2, 2), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)

    def test_a_transparent_colour_of_palette_grey_or_rgb(self) -> None:
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([255, 0, 0, 0, 255, 0])
        palette.putpixel((1, 0), 1)
        image = decode(encode(palette, "PNG", transparency=0))
        assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == ((255, 255, 255), (0, 255, 0))
        grey = Image.new("L", (2, 1), 5)
        assert decode(encode(grey, "PNG", transparency=5)).getpixel((0, 0)) == (255, 255, 255)
        rgb = Image.new("RGB", (2, 1), (1, 2, 3))
        assert decode(encode(rgb, "PNG", transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bit_grey_is_scaled_not_cut(self, kind: str) -> None:
        values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)  # 257 * 255 / 65535 = 1; 32768 -> 127.502
        image = decode(encode(Image.fromarray(values), kind))
        assert [image.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]

    def test_a_mode_without_a_white_level_is_refused(self) -> None:
        for values in (np.ones((2, 2), np.float32), np.full((2, 2), 100_000, np.int32)):
            with pytest.raises(DataError, match="white level"):
                decode(encode(Image.fromarray(values), "TIFF"))

    def test_cmyk(self) -> None:
        image = decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
        assert image.getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_rotation_moves_the_corner_and_the_size(self, kind: str, orientation: int) -> None:
        stored = Image.new("RGB", (32, 16), "white")
        ImageDraw.Draw(stored).rectangle((0, 0, 7, 7), fill="red")  # top left as stored
        exif = Image.Exif()
        exif[0x0112] = orientation
        reference = encode(stored, kind, exif=exif)
        upright = decode(reference)
        corners = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}  # EXIF 2.3, tag 0x0112
        size = (32, 16) if orientation < 5 else (16, 32)
        assert read_size(reference) == upright.size == size
        vertical, horizontal = corners[orientation]
        pixel = upright.getpixel((3 if horizontal == "l" else size[0] - 4, 3 if vertical == "t" else size[1] - 4))
        assert isinstance(pixel, tuple)
        assert pixel[0] > 200 and pixel[1] < 60

    def test_png_orientation_behind_the_pixels_counts_too(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        body = exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        data = encode(_noise(), "PNG").data or b""
        moved = ImageReference(data=data[:-12] + chunk + data[-12:])
        assert read_size(moved) == decode(moved).size == (17, 31)

    def test_png_size_is_read_without_decoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reference = encode(_noise(), "PNG")

        def refuse(self: object) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
        assert read_size(reference) == (31, 17)

    def test_an_animation_gives_its_first_frame(self) -> None:
        frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
        image = decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
        assert image.getpixel((0, 0)) == (255, 0, 0)


class TestRefuse:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_a_file_cut_anywhere_gives_all_its_pixels_or_an_error(self, kind: str) -> None:
        reference = encode(_noise(), kind)
        assert reference.data is not None
        whole = decode(reference).tobytes()
        outcomes = []
        for length in range(0, len(reference.data), 7):
            with contextlib.suppress(DataError):
                outcomes.append(decode(ImageReference(data=reference.data[:length])).tobytes() == whole)
        assert all(outcomes)
        assert len(outcomes) <= 3  # only the bytes behind the pixels may be missing

    def test_text_that_calls_itself_a_picture(self, tmp_path: Path) -> None:
        (tmp_path / "1.jpg").write_text("<html>404</html>")
        reference = resolve_image(tmp_path, "1.jpg")
        for read in (decode, read_size):
            with pytest.raises(DataError, match=r"picture `1.jpg` is not a picture in a known format") as caught:
                read(reference)
            assert caught.value.problems[0].remedy

    def test_postscript_is_never_run(self) -> None:
        with pytest.raises(DataError, match="known format"):
            decode(ImageReference(data=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", name="1.eps"))

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [9_500, 60_000])
    def test_a_decompression_bomb_is_refused_by_its_header(self, side: int) -> None:
        assert side * side > MAX_PIXELS
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n"
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
            data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for read in (decode, read_size):
            with pytest.raises(DataError, match="decompression bomb"):
                read(ImageReference(data=data, name="bomb.png"))

    def test_a_file_that_went_away(self) -> None:
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(ImageReference(path="/nowhere/1.png", name="1.png"))


def _photo(width: int = 640, height: int = 480) -> Image.Image:
    """Shapes of every size under some grain, as in photographs."""
    draw = np.random.default_rng(0)
    total = np.full((height, width, 3), 128.0)
    for cells, contrast in ((6, 60), (24, 30), (96, 20), (height, 8)):
        levels = draw.normal(0, contrast, (cells, cells * width // height, 3)) + 128
        coarse = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 128.0
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


class TestDecodeReduced:
    @pytest.mark.parametrize(
        ("kind", "wanted", "expected"),
        [
            ("JPEG", (224, 224), (320, 240)),  # a half; a quarter would be lower than 224
            ("JPEG", (100, 75), (160, 120)),
            ("JPEG", (20, 15), (40, 30)),  # an eighth, 80 x 60, and half of that
            ("JPEG", (310, 230), (640, 480)),  # 320 x 240 is within the margin of 5 %
            ("JPEG", (900, 900), (640, 480)),
            ("PNG", (100, 75), (214, 160)),  # a third, rounded up: twice what is wanted
            ("PNG", (170, 120), (640, 480)),
        ],
    )
    def test_sizes_by_hand(self, kind: str, wanted: tuple[int, int], expected: tuple[int, int]) -> None:
        reference = encode(_photo(), kind)
        asked: list[tuple[int, int]] = []

        def wanted_size(width: int, height: int) -> tuple[int, int]:
            asked.append((width, height))
            return wanted

        picture, whole = decode_reduced(reference, wanted_size)
        assert (picture.size, whole, picture.mode) == (expected, (640, 480), "RGB")
        assert set(asked) == {(640, 480)}
        if expected == (640, 480):
            assert picture.tobytes() == decode(reference).tobytes()

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("side", [64, 112, 150, 224])
    def test_what_is_made_of_it_differs_by_less_than_two_levels(self, kind: str, side: int) -> None:
        reference = encode(_photo(), kind)
        whole, (reduced, _) = decode(reference), decode_reduced(reference, lambda width, height: (side, side))
        assert min(reduced.size) >= side * DRAFT_MARGIN
        factor = math.ceil(640 / reduced.width)
        box = (0, 0, 640 / factor, 480 / factor)  # the last column may stand for less than `factor`
        expected = np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC), np.float64)
        found = np.asarray(reduced.resize((side, side), Image.Resampling.BICUBIC, box))
        assert abs(expected - found).mean() <= 2

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_rotation(self, kind: str, orientation: int) -> None:
        stored = _photo(160, 80)
        exif = Image.Exif()
        exif[0x0112] = orientation
        reference = encode(stored, kind, exif=exif)
        upright = decode(reference)
        # Of the upright picture the width may be halved, the height (or, turned, the other) not beyond that.
        wanted = {(160, 80): (40, 15), (80, 160): (20, 40)}
        picture, whole = decode_reduced(reference, lambda width, height: wanted[width, height])
        assert whole == upright.size == ((160, 80) if orientation < 5 else (80, 160))
        assert picture.size == (whole[0] // 2, whole[1] // 2)
        expected = np.asarray(upright.reduce(2), np.float64)
        assert abs(expected - np.asarray(picture)).mean() < 6 < abs(expected - expected[::-1, ::-1]).mean()

    @pytest.mark.parametrize("size", [(1281, 961), (1281, 960), (1280, 960)])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_last_column_is_never_the_first_after_a_turn(self, orientation: int, size: tuple[int, int]) -> None:
        """An eighth of 1,281 columns is 160 and one that stands for a single one."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        reference = encode(_photo(*size), "JPEG", exif=exif)
        whole, (reduced, _) = decode(reference), decode_reduced(reference, lambda width, height: (112, 112))
        factor = math.ceil(max(whole.size) / max(reduced.size))
        assert factor > 1
        box = (0, 0, whole.width / factor, whole.height / factor)
        expected = np.asarray(whole.resize((112, 112), Image.Resampling.BICUBIC), np.float64)
        found = np.asarray(reduced.resize((112, 112), Image.Resampling.BICUBIC, box))
        assert abs(expected - found).mean() <= 1.5

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_a_file_cut_anywhere_gives_all_its_pixels_or_an_error(self, kind: str) -> None:
        data = encode(_photo(160, 120), kind).data
        assert data is not None

        def read(length: int) -> bytes:
            reference = ImageReference(data=data[:length])
            return decode_reduced(reference, lambda width, height: (50, 40))[0].tobytes()

        whole, outcomes = read(len(data)), []
        for length in range(0, len(data), 97):
            with contextlib.suppress(DataError):
                outcomes.append(read(length) == whole)
        assert all(outcomes) and len(outcomes) <= 1

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_bomb_is_refused_however_small_it_would_become(self) -> None:
        data = encode(Image.new("RGB", (8, 8)), "JPEG").data
        assert data is not None
        frame = data.index(b"\xff\xc0") + 5  # marker, length, bits a value; then height and width
        bomb = ImageReference(data=data[:frame] + struct.pack(">HH", 60_000, 60_000) + data[frame + 4 :])
        with pytest.raises(DataError, match="decompression bomb"):
            decode_reduced(bomb, lambda width, height: (1, 1))


def test_equal_bytes_have_equal_keys(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "b.png").write_bytes(b"another")
    same = ImageReference(data=b"picture")
    assert picture_key(ImageReference(path=str(tmp_path / "a.png"))) == picture_key(same)
    assert picture_key(ImageReference(path=str(tmp_path / "b.png"))) != picture_key(same)
    with pytest.raises(DataError, match=r"picture `c\.png` cannot be read"):
        picture_key(ImageReference(path=str(tmp_path / "c.png"), name="c.png"))
