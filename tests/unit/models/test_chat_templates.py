"""Templates written into checkpoints render, and tokenise to, what training rendered."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conversations import OTHER, PICTURE, say
from tests.fake_pictures import PLACEHOLDER, FakePictures
from tests.real_tokenizers import REAL_TOKENIZERS, with_template, with_tokens
from tests.tiny import tiny_tokenizer
from triptych.core.errors import ModelError
from triptych.core.types import ImageReference, Message, Text
from triptych.data.segments import added_bos
from triptych.data.templates import TEMPLATES, build_template
from triptych.data.tokenize import ConversationEncoder
from triptych.models.chat_templates import CHAT_TEMPLATES, CHATML, chat_template, flatten_parts

CONVERSATIONS = [
    [say("user", PICTURE, "\nWhat is it?")],
    [say("user", PICTURE, OTHER, "\n\nWhat are they?")],
    [say("system", "Be brief. 简短一点。"), say("user", "one ", PICTURE, " two", OTHER)],
    [say("system"), say("user", "a"), say("assistant", "b"), say("user", "c?")],
    [say("user", "a"), say("assistant", "b's head."), say("user", PICTURE)],
    [say("user", 'Is 5 < 7 & "x"?'), say("assistant", "yes"), say("user", OTHER, " and 👍🏽?")],
]
SIZES = {PICTURE: (28, 14), OTHER: (14, 14)}
CAPTIONS = [[say("user", PICTURE)], [say("user", PICTURE, "\nDescribe it."), say("assistant", "A cat.")]]


def as_parts(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as transformers takes them."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def cases(name: str) -> list[list[Message]]:
    return CAPTIONS if name == "plain" else CONVERSATIONS


def test_every_built_in_template_has_a_jinja_form() -> None:
    assert [*CHAT_TEMPLATES, "model"] == list(TEMPLATES)
    with pytest.raises(ModelError, match=r"(?s)unknown template `chatlm`.*did you mean `chatml`"):
        chat_template("chatlm", PLACEHOLDER)


@pytest.mark.requirement("A-15", "A-16", "A-17", "A-18")
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("vocabulary", REAL_TOKENIZERS)
def test_jinja_equals_the_built_in_template_byte_for_byte(vocabulary: str, name: str) -> None:
    base = with_tokens(vocabulary)
    tokenizer = with_template(base, chat_template(name, PLACEHOLDER, added_bos(base)))
    template = build_template(name, base, PLACEHOLDER)
    for messages in cases(name):
        ends_with_answer = messages[-1].role == "assistant"
        for prompt in (not ends_with_answer,) if name == "plain" else (True, False):
            segments = template.segments(messages, add_generation_prompt=prompt)
            text = tokenizer.apply_chat_template(as_parts(messages), tokenize=False, add_generation_prompt=prompt)
            assert text == "".join(segment.text for segment in segments)


@pytest.mark.requirement("A-29")
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("vocabulary", REAL_TOKENIZERS)
def test_tokenising_the_rendering_gives_the_prompt_of_training(vocabulary: str, name: str) -> None:
    base = with_tokens(vocabulary)
    tokenizer = with_template(base, chat_template(name, PLACEHOLDER, added_bos(base)))
    pictures = FakePictures(base)
    encoder = ConversationEncoder(base, name, pictures, 4096, lambda image: SIZES[image])
    plain = [messages for messages in cases(name) if messages[-1].role == "user"]
    assert plain
    for messages in plain:
        text = tokenizer.apply_chat_template(as_parts(messages), tokenize=False, add_generation_prompt=True)
        sizes = iter(SIZES[image] for message in messages for image in message.images)
        # What a processor does: the placeholder becomes as many as the picture has tokens.
        expanded = "".join(
            PLACEHOLDER * len(pictures.token_ids(*next(sizes))) + rest if index else rest
            for index, rest in enumerate(text.split(PLACEHOLDER))
        )
        ids = tokenizer(expanded, add_special_tokens=False)["input_ids"]
        assert ids == encoder.encode_prompt(messages).trunk.input_ids.tolist()
        own = tokenizer.apply_chat_template(as_parts(messages), tokenize=True, add_generation_prompt=True)
        assert list(own["input_ids"]) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_caption_model_is_asked_with_the_picture_alone() -> None:
    tokenizer = with_template(tiny_tokenizer(), chat_template("plain", "<image>"))
    messages = [say("system", "Be brief."), say("user", "Describe ", PICTURE, " it.")]
    text = tokenizer.apply_chat_template(as_parts(messages), tokenize=False, add_generation_prompt=True)
    assert text == "<s><image>"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_model_s_own_placeholder_is_written_and_bos_once(name: str) -> None:
    tokenizer = with_template(tiny_tokenizer("qwen2_5_vl"), chat_template(name, "<|image_pad|>", "<s>"))
    messages = as_parts([Message("user", (ImageReference(path="/a.png"), Text("\nWho?")))])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.count("<|image_pad|>") == 1 and text.count("<s>") == 1 and text.startswith("<s>")


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
    assert flatten_parts(chat_template("chatml", "<image>"), "<image>").count(CHATML) == 1
