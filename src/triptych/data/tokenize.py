"""Samples to examples: ids, labels, kinds and weights come from one pass over the template's segments.

Rules, each shown by a test:

* A row is the tokenisation of the whole rendered text, cut only where generation starts. The tokens before an answer
  are exactly those inference encodes as its prompt, even where a merge across that border would be shorter; the
  answer continues them.
* A token belongs to the segment that holds its first character that is not white space (its first character if it has
  no other). So a separator that merges with the end of an answer is learned only if the token begins in the answer.
* Control tokens count only where the template writes them. Spelled out by a message they are encoded as letters, cut
  behind the first letter.
* A picture is the ids its processor names, put in at id level; every one of them has the kind IMAGE and no label.
* Nothing is cut off. A row that is too long is an error of that row.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from triptych.core.errors import DataError, ModelError
from triptych.core.protocols import PictureProcessor
from triptych.core.types import IGNORE, Branch, Example, ImageReference, Message, Origin, Sample, Text, TokenKind
from triptych.data.formats.base import located
from triptych.data.images import describe, read_size
from triptych.data.segments import Segment
from triptych.data.templates import build_template
from triptych.data.text import TextEncoder

ImageSize = Callable[[ImageReference], tuple[int, int]]
"""Picture -> (width, height) as decoded."""

_PROMPT = Origin("prompt", 1)
_NO_PICTURES = "<image>"
"""Placeholder handed to the template of a model without pictures; never written."""


@dataclass
class Row:
    """The columns of one tokenised conversation, all of the same length."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    images: list[ImageReference] = field(default_factory=list)
    """The pictures in order."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of each."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """[start, stop) of the tokens of each."""

    def append(self, ids: Sequence[int], segment: Segment) -> None:
        """Add tokens that belong to `segment`."""
        self.labels += ids if segment.supervised else [IGNORE] * len(ids)
        if not self.ids:
            self.labels[:1] = [IGNORE] * len(ids[:1])  # nothing predicts the first token of a row: it cannot be learned
        self.ids += ids
        self.kinds += [int(segment.kind)] * len(ids)
        self.weights += [segment.weight] * len(ids)

    def append_picture(self, ids: Sequence[int], size: tuple[int, int], segment: Segment) -> None:
        """Add the tokens of a picture."""
        assert segment.image is not None
        self.spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.images.append(segment.image)
        self.sizes.append(size)
        self.append(ids, replace(segment, supervised=False))

    def num_pictures(self, stop: int) -> int:
        """Pictures that lie wholly before token `stop`."""
        return sum(span[1] <= stop for span in self.spans)

    def key(self, position: int) -> tuple[int, int, int, float]:
        """What must agree for two rows to share a token."""
        return self.ids[position], self.labels[position], self.kinds[position], self.weights[position]


class ConversationEncoder:
    """Turns conversations and preferences into examples for a model that writes."""

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        pictures: PictureProcessor | None,
        max_length: int,
        image_size: ImageSize = read_size,
        content_tokens: Collection[str] = (),
    ) -> None:
        """Args:
            tokenizer: a Hugging Face fast tokenizer with all its tokens already added; later additions are not seen.
            template: a name of `triptych.data.templates.TEMPLATES`.
            pictures: the model's vision side, None for a model of text alone.
            max_length: most tokens of a row, those of pictures included.
            image_size: how the size of a picture is read.
            content_tokens: special tokens that messages may use, such as box markers; all others that a message spells
                out are encoded as letters.

        Raises:
            ModelError: the tokenizer is not a fast one, lacks a token of the template, or spells the placeholder of a
                picture in letters.
        """
        self._text = TextEncoder(tokenizer, content_tokens)
        self._pictures = pictures
        self._max_length = max_length
        self._image_size = image_size
        if pictures is not None:
            self._text.require_tokens(pictures.placeholder)
        self.template = build_template(template, tokenizer, pictures.placeholder if pictures else _NO_PICTURES)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: generation stops at the first of them."""
        probe = (Message("user", (Text("x"),)), Message("assistant", (Text("y"),)))
        row = self.encode_segments(self.template.segments(probe))
        ends = [token for token, kind in zip(row.ids, row.kinds, strict=True) if kind == TokenKind.END_OF_TURN]
        return (ends[-1],)

    def encode(self, sample: Sample) -> Example:
        """Tokenise a sample as a tree.

        The trunk of a plain conversation is everything before its first learned token. The answers of a preference
        share their longest common prefix that holds whole pictures; the prompt's own answers are not learned.

        Raises:
            DataError: naming file and line: the row is longer than `max_length`, teaches nothing, has an empty answer,
                a picture that cannot be read, an order of turns the template cannot express, or a winner equal to its
                loser.
            ModelError: the model's chat template cannot be split, or a token straddles a picture.
        """
        with at_row(sample.origin):
            if sample.preference is None:
                row = self._encode_row(sample.messages, 0, sample.weight)
                first = next((index for index, label in enumerate(row.labels) if label != IGNORE), None)
                if first is None:
                    raise DataError(
                        f"none of the {len(row.ids)} tokens is learned",
                        remedy="give the row an assistant turn with a weight above 0, or drop it",
                    )
                return _build_tree([row], first, sample)
            prompt = sample.messages
            rows = [
                self._encode_row((*prompt, *answer), len(prompt), sample.weight) for answer in sample.preference.answers
            ]
            for pair in sample.preference.pairs:
                if rows[pair.winner].ids == rows[pair.loser].ids:
                    raise DataError(
                        f"answers {pair.winner + 1} and {pair.loser + 1}, winner and loser of a pair, are equal",
                        remedy="drop the row: it says nothing about which answer is better",
                    )
            return _build_tree(rows, _common_prefix(rows), sample)

    def encode_prompt(self, messages: Sequence[Message], origin: Origin = _PROMPT) -> Example:
        """Tokenise what the model is to answer: a trunk with the generation prompt and one empty branch, no labels.

        Args:
            messages: what comes before the answer.
            origin: the row it was taken from, for errors.

        Raises:
            DataError: as `encode`.
        """
        with at_row(origin):
            row = self.encode_segments(
                self.template.segments(messages, add_generation_prompt=True, supervise_from=len(messages))
            )
            self._require_length(row)
        return Example(
            trunk=_branch(row, 0, len(row.ids), range(len(row.images))),
            branches=(_branch(row, len(row.ids), len(row.ids), ()),),
            images=tuple(row.images),
            image_sizes=tuple(row.sizes),
            origin=origin,
        )

    def encode_segments(self, segments: Sequence[Segment], image_size: ImageSize | None = None) -> Row:
        """Tokenise rendered segments, without any limit of length."""
        row = Row()
        starts = [index for index, segment in enumerate(segments) if segment.starts_answer]
        borders = [0, *(index for index in starts if index > 0), len(segments)]
        for start, stop in itertools.pairwise(borders):
            self._append(row, segments[start:stop], start > 0, image_size or self._image_size)
        return row

    def _encode_row(self, messages: Sequence[Message], supervise_from: int, sample_weight: float) -> Row:
        for index, message in enumerate(messages):
            is_learned = message.role == "assistant" and index >= supervise_from and message.weight > 0
            if is_learned and not message.text.strip() and not message.images:
                raise DataError(f"turn {index + 1} is an empty answer", remedy="write the answer, or drop the row")
        row = self.encode_segments(self.template.segments(messages, supervise_from=supervise_from))
        self._require_length(row)
        row.weights = [weight * sample_weight for weight in row.weights]
        return row

    def _append(self, row: Row, segments: Sequence[Segment], continues: bool, image_size: ImageSize) -> None:
        text = "".join(segment.text for segment in segments)
        stops = list(itertools.accumulate(len(segment.text) for segment in segments))
        done: set[int] = set()
        plain: list[int] = []  # tokens of the segment `owner`, added together
        owner = segments[0]
        low, high = 0, stops[0]  # where its text begins and ends
        for token, start, stop in self._text.encode(text, continues):
            if low <= start < stop <= high and owner.image is None and token not in self._text.control_ids:
                plain.append(token)  # as most are: all of it lies in the same segment
                continue
            first, last = _trim(text, start, stop)
            index = min(bisect.bisect_right(stops, first), len(segments) - 1)
            end_index = min(bisect.bisect_right(stops, last), len(segments) - 1)
            segment = segments[index]
            is_picture = segment.image is not None or segments[end_index].image is not None
            is_spelled = token in self._text.control_ids and (segment.is_content or segments[end_index].is_content)
            if is_picture or is_spelled or segment is not owner:
                row.append(plain, owner)
                plain, owner = [], segment
                low, high = stops[index] - len(segment.text), stops[index]
            if is_picture:
                if index != end_index:
                    raise ModelError(
                        f"the token `{text[start:stop]}` reaches across the border of a picture",
                        remedy="add the picture's placeholder to the tokenizer as a special token",
                    )
                if index not in done:
                    done.add(index)
                    self._append_picture(row, segment, image_size)
            elif is_spelled:
                row.append(self._text.spell(text[start:stop]), segment)
            else:
                plain.append(token)
        row.append(plain, owner)
        if len(done) != sum(segment.image is not None for segment in segments):
            raise ModelError("a picture's placeholder became no token", remedy="add it as a special token")

    def _append_picture(self, row: Row, segment: Segment, image_size: ImageSize) -> None:
        assert segment.image is not None
        if self._pictures is None:
            raise DataError(
                f"picture {describe(segment.image)}, but the model takes text alone",
                remedy="drop the row, or train a model with a vision tower",
            )
        size = image_size(segment.image)
        row.append_picture(self._pictures.token_ids(*size), size, segment)

    def _require_length(self, row: Row) -> None:
        if len(row.ids) <= self._max_length:
            return
        num_picture_tokens = sum(stop - start for start, stop in row.spans)
        raise DataError(
            f"{len(row.ids)} tokens, more than max_length {self._max_length}; {num_picture_tokens} of them are for "
            f"{len(row.images)} pictures",
            remedy="raise `max_length`, make the pictures smaller, or shorten or drop the row; nothing is cut off",
        )


class CaptionEncoder:
    """Turns picture-caption samples into examples for a dual encoder."""

    def __init__(
        self, tokenizer: Any, max_length: int, truncate_captions: bool = False, image_size: ImageSize = read_size
    ) -> None:
        """Args:
        tokenizer: the tokenizer of the text tower; its own special tokens are added.
        max_length: most tokens of a caption, special tokens included.
        truncate_captions: cut longer captions at the end, keeping the closing special token, instead of raising.
        image_size: how the size of a picture is read.
        """
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._truncate = truncate_captions
        self._image_size = image_size

    def encode(self, sample: Sample) -> Example:
        """Caption ids [n] without labels in the branch (the first of them in the trunk), the picture in `images`.

        Raises:
            DataError: naming file and line: not exactly one picture, no caption, or one that is too long.
        """
        with at_row(sample.origin):
            if len(sample.images) != 1:
                raise DataError(
                    f"{len(sample.images)} pictures, a dual encoder takes exactly 1", remedy="drop or split the row"
                )
            if sample.weight != 1:
                raise DataError(
                    f"the row has weight {sample.weight}, but a contrastive loss weighs all pairs alike",
                    remedy="remove the weight; `weight:` of a data set decides how often its rows are drawn",
                )
            caption = " ".join(message.text.strip() for message in sample.messages if message.role == "assistant")
            if not caption.strip():
                raise DataError("the caption is empty", remedy="write one, or drop the row")
            ids = self._encode_caption(caption)
            size = self._image_size(sample.images[0])
        kinds = [int(TokenKind.RESPONSE)] * len(ids)
        row = Row(ids, [IGNORE] * len(ids), kinds, [sample.weight] * len(ids))
        return Example(
            trunk=_branch(row, 0, 1, (0,)),
            branches=(_branch(row, 1, len(ids), ()),),
            images=sample.images,
            image_sizes=(size,),
            origin=sample.origin,
            task=sample.task,
            text_key=caption_key(caption),
        )

    def _encode_caption(self, caption: str) -> list[int]:
        # Special tokens that a caption spells out are letters.
        options: dict[str, Any] = {"split_special_tokens": True}
        if self._truncate:
            options |= {"truncation": True, "max_length": self._max_length}
        ids = list(self._tokenizer(caption, **options)["input_ids"])
        if len(ids) > self._max_length:
            raise DataError(
                f"the caption has {len(ids)} tokens, more than max_length {self._max_length}",
                remedy="raise `max_length`, or set `truncate_captions: true`",
            )
        return ids


def caption_key(caption: str) -> int:
    """Stable 63-bit key of a caption: equal for captions that differ only in case, white space or Unicode form."""
    normal = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def at_row(origin: Origin) -> Iterator[None]:
    """Give problems raised inside, where they name no file, the place of this row."""
    try:
        yield
    except DataError as error:
        raise located(error, origin) from error


def _trim(text: str, start: int, stop: int) -> tuple[int, int]:
    """First and last character of a token that are not white space; those of the whole token if it has no other."""
    first, last = start, stop - 1  # a token without characters has stop == start
    while first < last and text[first].isspace():
        first += 1
    while last > first and text[last].isspace():
        last -= 1
    return (start, max(start, stop - 1)) if first < len(text) and text[first].isspace() else (first, max(first, last))


def _common_prefix(rows: Sequence[Row]) -> int:
    """Length of the longest common prefix of the rows that leaves each a token and cuts no picture.

    Raises:
        DataError: the rows share not even the first token.
    """
    length = min(len(row.ids) for row in rows) - 1
    for row in rows[1:]:
        length = next((index for index in range(length) if row.key(index) != rows[0].key(index)), length)
        for index, (start, stop) in enumerate(row.spans):
            is_same = index < len(rows[0].images) and row.images[index] == rows[0].images[index]
            if start < length and (stop > length or not is_same):
                length = start
    if length < 1:
        raise DataError("the answers share no prompt", remedy="give the row a prompt")
    return length


def _build_tree(rows: Sequence[Row], trunk_length: int, sample: Sample) -> Example:
    trunk_row = rows[0]
    shared = trunk_row.num_pictures(trunk_length)
    images = list(trunk_row.images[:shared])
    sizes = list(trunk_row.sizes[:shared])
    branches = []
    for row in rows:
        numbers = range(len(images), len(images) + len(row.images) - shared)
        branches.append(_branch(row, trunk_length, len(row.ids), numbers))
        images += row.images[shared:]
        sizes += row.sizes[shared:]
    return Example(
        trunk=_branch(trunk_row, 0, trunk_length, range(shared)),
        branches=tuple(branches),
        images=tuple(images),
        image_sizes=tuple(sizes),
        origin=sample.origin,
        pairs=sample.preference.pairs if sample.preference else (),
        task=sample.task,
    )


def _branch(row: Row, start: int, stop: int, images: Sequence[int]) -> Branch:
    return Branch(
        input_ids=torch.tensor(row.ids[start:stop], dtype=torch.int64),
        labels=torch.tensor(row.labels[start:stop], dtype=torch.int64),
        kinds=torch.tensor(row.kinds[start:stop], dtype=torch.uint8),
        weights=torch.tensor(row.weights[start:stop], dtype=torch.float32),
        images=tuple(images),
    )
