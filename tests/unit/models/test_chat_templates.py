"""Templates written into checkpoints render what training rendered."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_tokenizer
from triptych.core.types import ImageReference, Message, Text
from triptych.data.templates import build_template
from triptych.models.chat_templates import CHATML, flatten_parts

PICTURE = ImageReference(path="/a.png")
CONVERSATIONS = [
    [Message("user", (PICTURE, Text("\nWhat is it?")))],
    [Message("system", (Text("Be brief."),)), Message("user", (Text("one "), PICTURE, Text(" two"), PICTURE))],
    [Message("system", ()), Message("user", (Text("a"),)), Message("assistant", (Text("b\n"),))],
    [Message("user", (Text("a"),)), Message("assistant", (Text(" b"),)), Message("user", (PICTURE,))],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chatml_equals_the_built_in_template_byte_for_byte(messages: list[Message]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = flatten_parts(CHATML, "<image>")
    for prompt in (True, False):
        segments = build_template("chatml", tokenizer, "<image>").segments(messages, add_generation_prompt=prompt)
        parts = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                    for part in message.parts
                ],
            }
            for message in messages
        ]
        text = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=prompt)
        assert text == "".join(segment.text for segment in segments)


def test_text_messages_render_as_without_flattening_and_twice_is_once() -> None:
    template = "{% for message in messages %}\n[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    messages = [{"role": "user", "content": "hi <image>"}, {"role": "assistant", "content": "yes"}]
    flattened = flatten_parts(template, "<image>")
    tokenizer = tiny_tokenizer()
    plain, wrapped = (
        tokenizer.apply_chat_template(messages, tokenize=False, chat_template=item) for item in (template, flattened)
    )
    assert wrapped == plain
    assert flatten_parts(flattened, "<image>") == flattened
