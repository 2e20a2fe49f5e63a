"""The chat template that comes with a model, split into segments without searching tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from triptych.core.errors import DataError, ModelError
from triptych.core.types import ImageReference, Message, Text, TokenKind
from triptych.data.segments import Segment, fixed, learn, part_segment, require_token

_MARK = re.compile("\ue000(\\d+)\\.(\\d+)\ue001")
_REMEDY = "choose a built-in template, for example `template: chatml`"
_KINDS: Mapping[str, TokenKind] = {
    "system": TokenKind.SYSTEM,
    "user": TokenKind.INSTRUCTION,
    "assistant": TokenKind.RESPONSE,
}

Address = tuple[int, int]
"""(message, part)."""


@dataclass(frozen=True)
class _Piece:
    """A stretch of a template's output: the template's own text, or the place of a part of a message."""

    text: str = ""
    part: Address | None = None
    answer: int | None = None
    """The assistant message whose answer this belongs to."""
    is_end: bool = False


class ChatTemplate:
    """Renders with the model's own Jinja template.

    The template is rendered once per structure (roles and parts) with unique marks in place of the words: what stands
    between the marks is the template's own. An answer starts where the generation prompt of its turn ends, which must
    be a prefix of the conversation, and ends with the first special token behind its words; where there is none, the
    tokenizer's end of sequence closes the last answer. Every real conversation is rendered once more and compared with
    the joined segments, so that a template which changes the words is refused rather than mislabelled.
    """

    name = "model"

    def __init__(self, tokenizer: Any, placeholder: str) -> None:
        """Args:
            tokenizer: a Hugging Face fast tokenizer with a chat template.
            placeholder: the text that stands for one picture.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template", remedy=_REMEDY)
        self._tokenizer = tokenizer
        self._placeholder = placeholder
        self._control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._skeletons: dict[tuple[Any, ...], list[_Piece]] = {}
        self._takes_parts = False
        self._takes_parts = self._walks_parts()

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, supervise_from: int = 0
    ) -> list[Segment]:
        """See `triptych.data.segments.Template.segments`."""
        for prepare in (_drop_empty, _strip_ends, _strip_parts):
            turns = [prepare(message) for message in messages]
            structure = (tuple(_shape(turn) for turn in turns), add_generation_prompt)
            if structure not in self._skeletons:
                self._skeletons[structure] = self._split(turns, add_generation_prompt)
            skeleton = self._skeletons[structure]
            segments = self._fill(skeleton, turns, supervise_from)
            expected = self._render(turns, add_generation_prompt, lambda _, text: text)
            if "".join(segment.text for segment in segments) == expected:
                return self._close_last_answer(skeleton, segments, turns, supervise_from)
        raise ModelError(
            "the model's chat template changes the words of the messages, so answer and prompt cannot be told apart",
            remedy=_REMEDY,
        )

    def _split(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[_Piece]:
        whole = self._render(messages, add_generation_prompt, _mark)
        parts = self._locate_parts(whole, messages)
        answers: dict[int, tuple[int, int, int]] = {}
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._render(messages[:index], True, _mark)
            if not whole.startswith(prompt):
                raise ModelError(
                    f"in the model's chat template the generation prompt of turn {index + 1} is not a prefix of the "
                    "conversation: training and inference would see different tokens",
                    remedy=_REMEDY + ", or split conversations into single rounds",
                )
            words_stop = max((stop for (_, stop), part in parts if part[0] == index), default=len(prompt))
            answers[index] = (len(prompt), words_stop, words_stop + self._end_length(messages[: index + 1], whole))
        return _cut(whole, parts, answers)

    def _locate_parts(self, whole: str, messages: Sequence[Message]) -> list[tuple[tuple[int, int], Address]]:
        """Where each part of the messages stands in the marked rendering, in order."""
        texts = {(match.start(), match.end()): (int(match[1]), int(match[2])) for match in _MARK.finditer(whole)}
        wanted = [
            (index, position, part)
            for index, message in enumerate(messages)
            for position, part in enumerate(message.parts)
        ]
        pictures = [(index, position) for index, position, part in wanted if isinstance(part, ImageReference)]
        words = [(index, position) for index, position, part in wanted if isinstance(part, Text)]
        spans = [match.span() for match in re.finditer(re.escape(self._placeholder), whole)] if pictures else []
        if sorted(texts.values()) != words:
            raise ModelError("the model's chat template drops or repeats words of the messages", remedy=_REMEDY)
        if len(spans) != len(pictures):
            raise ModelError(
                f"the model's chat template writes `{self._placeholder}` {len(spans)} times "
                f"for {len(pictures)} pictures",
                remedy=_REMEDY,
            )
        return sorted([*texts.items(), *zip(spans, pictures, strict=True)])

    def _end_length(self, messages: Sequence[Message], whole: str) -> int:
        """Characters from the last word of the last message to the end of the first special token behind it."""
        closed = self._render(messages, False, _mark)
        words = _MARK.finditer(closed)
        start = max((match.end() for match in words if int(match[1]) == len(messages) - 1), default=len(closed))
        tail = closed[start:]
        ends = [tail.find(token) + len(token) for token in self._control if token in tail]
        return min(ends) if ends and whole.startswith(closed[: start + min(ends)]) else 0

    def _fill(self, skeleton: Sequence[_Piece], messages: Sequence[Message], supervise_from: int) -> list[Segment]:
        segments: list[Segment] = []
        answer: list[Segment] = []
        for piece, following in zip(skeleton, [*skeleton[1:], None], strict=True):
            if piece.part is not None:
                message = messages[piece.part[0]]
                part = message.parts[piece.part[1]]
                segment = part_segment(part, _KINDS[message.role], self._placeholder)
            elif piece.answer is None:
                segment = fixed(piece.text)
            else:
                segment = Segment(piece.text, TokenKind.END_OF_TURN if piece.is_end else TokenKind.RESPONSE)
            if piece.answer is None:
                segments.append(segment)
                continue
            answer.append(segment)
            if following is None or following.answer != piece.answer:
                weight = messages[piece.answer].weight
                segments += learn(answer, piece.answer >= supervise_from and weight > 0, weight)
                answer = []
        return segments

    def _close_last_answer(
        self, skeleton: Sequence[_Piece], segments: list[Segment], messages: Sequence[Message], supervise_from: int
    ) -> list[Segment]:
        last = len(messages) - 1
        own = [index for index, piece in enumerate(skeleton) if piece.answer == last]
        if not own or any(skeleton[index].is_end for index in own):
            return segments
        end = Segment(
            require_token(self._tokenizer, self._tokenizer.eos_token, self.name),
            TokenKind.END_OF_TURN,
            supervised=last >= supervise_from and messages[last].weight > 0,
            weight=messages[last].weight,
        )
        return [*segments[: own[-1] + 1], end]

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, write: Callable[[Address, str], str]
    ) -> str:
        conversation = []
        for index, message in enumerate(messages):
            parts: list[dict[str, str]] = []
            for position, part in enumerate(message.parts):
                if isinstance(part, Text):
                    parts.append({"type": "text", "text": write((index, position), part.text)})
                else:
                    parts.append({"type": "image"})
            joined = "".join(part.get("text", self._placeholder) for part in parts)
            conversation.append({"role": message.role, "content": parts if self._takes_parts else joined})
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"the model's chat template refuses this conversation: {error}",
                remedy="check the order of the roles, or choose a built-in template",
            ) from error
        return str(text)

    def _walks_parts(self) -> bool:
        """Whether the template walks a list of parts; one made for text alone would print the list."""
        self._takes_parts = True
        probe = [Message("user", (Text("x"),))]
        try:
            text = self._render(probe, False, _mark)
        except DataError:
            return False
        return _MARK.search(text) is not None and "'type'" not in text


def _cut(
    whole: str, parts: Sequence[tuple[tuple[int, int], Address]], answers: Mapping[int, tuple[int, int, int]]
) -> list[_Piece]:
    """Cut the marked rendering at parts, at the start of each answer and behind its end."""
    borders = {0, len(whole)}
    for start, words_stop, stop in answers.values():
        borders |= {start, words_stop, stop}
    for (start, stop), _ in parts:
        borders |= {start, stop}
    addresses = dict(parts)
    ordered = sorted(borders)
    pieces = []
    for start, stop in itertools.pairwise(ordered):
        owner = next((index for index, answer in answers.items() if answer[0] <= start < answer[2]), None)
        address = addresses.get((start, stop))
        is_end = owner is not None and address is None and start >= answers[owner][1]
        pieces.append(_Piece("" if address else whole[start:stop], address, owner, is_end))
    return pieces


def _mark(address: Address, _: str) -> str:
    return f"\ue000{address[0]}.{address[1]}\ue001"


def _shape(message: Message) -> tuple[str, tuple[bool, ...]]:
    return message.role, tuple(isinstance(part, Text) for part in message.parts)


def _drop_empty(message: Message) -> Message:
    return replace(message, parts=tuple(part for part in message.parts if part != Text("")))


def _strip_ends(message: Message) -> Message:
    """Without white space at the ends of the message: for templates that trim."""
    parts = list(message.parts)
    if parts and isinstance(parts[0], Text):
        parts[0] = replace(parts[0], text=parts[0].text.lstrip())
    if parts and isinstance(parts[-1], Text):
        parts[-1] = replace(parts[-1], text=parts[-1].text.rstrip())
    return _drop_empty(replace(message, parts=tuple(parts)))


def _strip_parts(message: Message) -> Message:
    """Without white space at the ends of every part."""
    parts = tuple(replace(part, text=part.text.strip()) if isinstance(part, Text) else part for part in message.parts)
    return _drop_empty(replace(message, parts=parts))
