"""The built-in templates, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from triptych.core.config import did_you_mean
from triptych.core.errors import DataError, ModelError
from triptych.core.types import Message, TokenKind
from triptych.data.chat_template import ChatTemplate
from triptych.data.segments import (
    Segment,
    Template,
    added_bos,
    first_token,
    fixed,
    learn,
    message_segments,
    require_token,
)


def build_template(name: str, tokenizer: Any, placeholder: str) -> Template:
    """Make a template of the table.

    Args:
        name: a key of `TEMPLATES`.
        tokenizer: a Hugging Face fast tokenizer.
        placeholder: the text that stands for one picture.

    Raises:
        ModelError: the name is unknown, or the tokenizer lacks what the template needs.
    """
    if name not in TEMPLATES:
        raise ModelError(f"unknown template `{name}`", remedy=did_you_mean(name, TEMPLATES))
    return TEMPLATES[name](tokenizer, placeholder)


@dataclass(frozen=True)
class TurnStyle:
    """The fixed texts of a template whose turns are written one after another."""

    user_open: str
    user_close: str
    assistant_open: str
    """Ends the generation prompt."""
    answer_lead: str
    """First characters of every answer; learned, so that no space dangles at the end of the prompt."""
    end_of_turn: str | None
    """Token that closes an answer; None: the tokenizer's own end of sequence."""
    assistant_close: str
    """Separator behind the end of an answer; not learned."""
    system_open: str
    system_close: str
    default_system: str = ""
    """Used where the conversation has no system message; an empty system message leaves the block out."""
    system_inside_user: bool = False
    """Write the system block inside the first user turn."""
    bos_every_round: bool = False
    """Begin every round with the beginning-of-sequence token, not the row alone."""
    pictures_first: bool = False
    """Write the pictures that lead a user turn before its role marker, each with a newline. A row then begins with the
    beginning-of-sequence token wherever the vocabulary has one, see `first_token`."""


VICUNA_V1: Final = TurnStyle(
    user_open="USER: ",
    user_close=" ",
    assistant_open="ASSISTANT:",
    answer_lead=" ",
    end_of_turn=None,
    assistant_close="",
    system_open="",
    system_close=" ",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
)
LLAMA2: Final = TurnStyle(
    user_open="[INST] ",
    user_close=" [/INST]",
    assistant_open="",
    answer_lead=" ",
    end_of_turn=None,
    assistant_close="",
    system_open="<<SYS>>\n",
    system_close="\n<</SYS>>\n\n",
    default_system=("You are a helpful, respectful and honest assistant. Always answer as helpfully as possible."),
    system_inside_user=True,
    bos_every_round=True,
)
CHATML: Final = TurnStyle(
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
    assistant_open="<|im_start|>assistant\n",
    answer_lead="",
    end_of_turn="<|im_end|>",
    assistant_close="\n",
    system_open="<|im_start|>system\n",
    system_close="<|im_end|>\n",
    default_system="You are a helpful assistant.",
)
BASIC: Final = TurnStyle(
    user_open="User: ",
    user_close="\n",
    assistant_open="Assistant:",
    answer_lead=" ",
    end_of_turn=None,
    assistant_close="\n",
    system_open="System: ",
    system_close="\n",
    pictures_first=True,
)


class TurnTemplate:
    """Writes turns one after another in a `TurnStyle`."""

    def __init__(self, name: str, style: TurnStyle, tokenizer: Any, placeholder: str) -> None:
        """Args:
            name: for messages.
            style: the fixed texts.
            tokenizer: a Hugging Face fast tokenizer.
            placeholder: the text that stands for one picture.

        Raises:
            ModelError: the tokenizer lacks the token that closes an answer.
        """
        self._name = name
        self._style = style
        self._placeholder = placeholder
        self._end = require_token(tokenizer, style.end_of_turn or tokenizer.eos_token, name)
        if style.end_of_turn is not None:
            require_token(tokenizer, style.user_open.partition(">")[0] + ">", name)
        if style.bos_every_round:
            self._bos = tokenizer.bos_token or ""
        else:
            self._bos = first_token(tokenizer) if style.pictures_first else added_bos(tokenizer)
        if style.user_open.startswith(self._bos):  # some ChatML vocabularies name `<|im_start|>` as their bos
            self._bos = ""

    @property
    def name(self) -> str:
        """For messages."""
        return self._name

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, supervise_from: int = 0
    ) -> list[Segment]:
        """See `Template.segments`."""
        _require_order(messages, self._name)
        style = self._style
        has_system = bool(messages) and messages[0].role == "system"
        turns = messages[1:] if has_system else messages
        system = self._system_segments(messages[0] if has_system else None)
        result: list[Segment] = [fixed(self._bos)]
        if not style.system_inside_user:
            result += system
        for index, message in enumerate(turns):
            if message.role == "user":
                if style.bos_every_round and index > 0:
                    result.append(fixed(self._bos))
                result += self._user_segments(message, system if style.system_inside_user and index == 0 else [])
            else:
                position = index + (1 if has_system else 0)
                result += self._assistant_segments(message, position >= supervise_from and message.weight > 0)
        if add_generation_prompt:
            result.append(fixed(style.assistant_open))
        return [segment for segment in result if segment.text]

    def _system_segments(self, message: Message | None) -> list[Segment]:
        if message is None:
            words = [Segment(self._style.default_system, TokenKind.SYSTEM)] if self._style.default_system else []
        else:
            words = message_segments(message, TokenKind.SYSTEM, self._placeholder)
        if not words:
            return []
        return [fixed(self._style.system_open), *words, fixed(self._style.system_close)]

    def _user_segments(self, message: Message, system: list[Segment]) -> list[Segment]:
        words = message_segments(message, TokenKind.INSTRUCTION, self._placeholder)
        lead: list[Segment] = []
        while self._style.pictures_first and words and words[0].image is not None:
            lead += [words.pop(0), fixed("\n")]
        if lead and words:
            words[0] = replace(words[0], text=words[0].text.removeprefix("\n"))
        return [*lead, fixed(self._style.user_open), *system, *words, fixed(self._style.user_close)]

    def _assistant_segments(self, message: Message, supervised: bool) -> list[Segment]:
        answer = [
            Segment(self._style.answer_lead, TokenKind.RESPONSE),
            *message_segments(message, TokenKind.RESPONSE, self._placeholder),
            Segment(self._end, TokenKind.END_OF_TURN),
        ]
        return [
            fixed(self._style.assistant_open),
            *learn(answer, supervised, message.weight),
            fixed(self._style.assistant_close),
        ]


class PlainTemplate:
    """Pictures and caption only, for training a connector: the words of the user are dropped."""

    name = "plain"

    def __init__(self, tokenizer: Any, placeholder: str) -> None:
        """See `build_template`."""
        self._placeholder = placeholder
        self._bos = first_token(tokenizer)
        self._end = require_token(tokenizer, tokenizer.eos_token, self.name)

    def segments(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, supervise_from: int = 0
    ) -> list[Segment]:
        """See `Template.segments`. One user turn and one assistant turn; a system message is dropped."""
        turns = [message for message in messages if message.role != "system"]
        roles = [message.role for message in turns]
        if roles != (["user"] if add_generation_prompt else ["user", "assistant"]):
            raise DataError(
                f"template `plain` takes one user and one assistant turn, found: {', '.join(roles) or 'none'}",
                remedy="use a conversation template such as `vicuna_v1` for this data set",
            )
        pictures = [item for item in message_segments(turns[0], TokenKind.INSTRUCTION, self._placeholder) if item.image]
        result = [fixed(self._bos), *pictures]
        if not add_generation_prompt:
            answer = message_segments(turns[1], TokenKind.RESPONSE, self._placeholder)
            end = Segment(self._end, TokenKind.END_OF_TURN)
            supervised = len(messages) > supervise_from and turns[1].weight > 0
            result += learn([*answer, end], supervised, turns[1].weight)
        return [segment for segment in result if segment.text]


def _require_order(messages: Sequence[Message], name: str) -> None:
    """System first if at all, then user and assistant in turn."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for index, role in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise DataError(
                f"turn {index + 1} is `{role}`, but template `{name}` expects `{expected}` there; roles: "
                + ", ".join(roles),
                remedy="turns must alternate user, assistant; a system message may only come first",
            )


TEMPLATES: Mapping[str, Callable[[Any, str], Template]] = {
    "plain": PlainTemplate,
    "basic": lambda tokenizer, placeholder: TurnTemplate("basic", BASIC, tokenizer, placeholder),
    "vicuna_v1": lambda tokenizer, placeholder: TurnTemplate("vicuna_v1", VICUNA_V1, tokenizer, placeholder),
    "llama2": lambda tokenizer, placeholder: TurnTemplate("llama2", LLAMA2, tokenizer, placeholder),
    "chatml": lambda tokenizer, placeholder: TurnTemplate("chatml", CHATML, tokenizer, placeholder),
    "model": ChatTemplate,
}
"""Name -> template; `model` is the chat template that comes with the model."""
