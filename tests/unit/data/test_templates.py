"""The built-in templates, character for character."""

from __future__ import annotations

import pytest

from tests.conversations import OTHER, PICTURE, say
from tests.real_tokenizers import mistral, qwen, smollm2, with_tokens
from triptych.core.errors import DataError, ModelError
from triptych.core.types import TokenKind
from triptych.data.segments import Segment
from triptych.data.templates import TEMPLATES, build_template

ROUNDS = (
    say("user", PICTURE, "\nWho is it?"),
    say("assistant", "A dog."),
    say("user", "Why?"),
    say("assistant", "It barks."),
)
SYSTEM = say("system", "Be brief.")


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def learned(segments: list[Segment]) -> list[str]:
    """The text of each stretch that is learned."""
    stretches = [""]
    for segment in segments:
        if segment.supervised:
            stretches[-1] += segment.text
        elif stretches[-1]:
            stretches.append("")
    return [stretch for stretch in stretches if stretch]


@pytest.mark.requirement("A-4")
def test_plain_is_picture_and_caption_only() -> None:
    template = build_template("plain", mistral(), "<image>")
    segments = template.segments((say("user", PICTURE, "\nProvide a brief caption."), say("assistant", "A dog.")))
    assert text_of(segments) == "<s><image>A dog.</s>"
    assert learned(segments) == ["A dog.</s>"]
    assert text_of(template.segments((say("user", PICTURE, "Caption?"),), add_generation_prompt=True)) == "<s><image>"
    with pytest.raises(DataError, match="one user and one assistant turn, found: user, assistant, user, assistant"):
        template.segments(ROUNDS)


@pytest.mark.requirement("A-10", "A-11")
def test_basic_closes_each_answer_and_puts_leading_pictures_before_the_role() -> None:
    template = build_template("basic", mistral(), "<image>")
    segments = template.segments((SYSTEM, *ROUNDS))
    assert text_of(segments) == (
        "<s>System: Be brief.\n<image>\nUser: Who is it?\nAssistant: A dog.</s>\nUser: Why?\nAssistant: It barks.</s>\n"
    )
    assert learned(segments) == [" A dog.</s>", " It barks.</s>"]


@pytest.mark.requirement("A-12")
def test_pictures_inside_a_sentence_stay_there() -> None:
    template = build_template("basic", mistral(), "<image>")
    segments = template.segments((say("user", "比较这两张图片 ", PICTURE, " 和 ", OTHER, "，为什么？"),))
    assert text_of(segments) == "<s>User: 比较这两张图片 <image> 和 <image>，为什么？\n"
    assert [segment.image for segment in segments if segment.image] == [PICTURE, OTHER]


@pytest.mark.requirement("A-14", "A-15", "A-18")
def test_vicuna_joins_with_single_spaces_and_closes_each_answer() -> None:
    template = build_template("vicuna_v1", mistral(), "<image>")
    segments = template.segments(ROUNDS)
    assert text_of(segments) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWho is it? ASSISTANT: A dog.</s>USER: Why? ASSISTANT: It barks.</s>"
    )
    assert learned(segments) == [" A dog.</s>", " It barks.</s>"]
    prompt = text_of(template.segments(ROUNDS[:3], add_generation_prompt=True))
    assert prompt.endswith("</s>USER: Why? ASSISTANT:")


@pytest.mark.requirement("A-16", "A-18")
def test_llama2_puts_the_system_block_into_the_first_user_turn_and_begins_each_round() -> None:
    template = build_template("llama2", mistral(), "<image>")
    segments = template.segments((SYSTEM, *ROUNDS))
    assert text_of(segments) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWho is it? [/INST] A dog.</s>"
        "<s>[INST] Why? [/INST] It barks.</s>"
    )
    assert learned(segments) == [" A dog.</s>", " It barks.</s>"]
    assert [item.kind for item in segments if item.text == "Be brief."] == [TokenKind.SYSTEM]
    default = text_of(template.segments(ROUNDS[:1], add_generation_prompt=True))
    assert "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible.\n" in default
    assert default.endswith("Who is it? [/INST]")


@pytest.mark.requirement("A-17", "A-19", "C-3")
def test_chatml_learns_the_end_but_not_the_newline_behind_it() -> None:
    template = build_template("chatml", smollm2(), "<image>")
    segments = template.segments(ROUNDS)
    assert text_of(segments) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWho is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nIt barks.<|im_end|>\n"
    )
    assert learned(segments) == ["A dog.<|im_end|>", "It barks.<|im_end|>"]
    assert segments[-1].text == "\n"
    assert not segments[-1].supervised
    assert text_of(template.segments(ROUNDS[:1], add_generation_prompt=True)).endswith("<|im_start|>assistant\n")


def test_an_empty_system_message_leaves_the_block_out() -> None:
    template = build_template("chatml", smollm2(), "<image>")
    assert text_of(template.segments((say("system", ""), ROUNDS[2]))) == "<|im_start|>user\nWhy?<|im_end|>\n"


@pytest.mark.requirement("A-29")
def test_bos_stands_once() -> None:
    tokenizer = with_tokens("mistral")
    for name in ("plain", "basic", "vicuna_v1", "chatml"):
        turns = ROUNDS[:2]
        assert text_of(build_template(name, tokenizer, "<image>").segments(turns)).count("<s>") == 1
    assert text_of(build_template("llama2", qwen(), "<image>").segments(ROUNDS[:2])).startswith("[INST]")


def test_a_row_that_would_begin_with_a_picture_begins_with_bos_wherever_there_is_one() -> None:
    def written(name, tokenizer):
        return text_of(build_template(name, tokenizer, "<image>").segments(ROUNDS[:2]))

    for name in ("plain", "basic"):
        assert written(name, smollm2()).startswith("<|im_start|><image>")
        assert written(name, qwen()).startswith("<image>")
    assert written("vicuna_v1", smollm2()).startswith("A chat")


def test_turns_without_weight_or_before_the_answers_are_not_learned() -> None:
    template = build_template("chatml", smollm2(), "<image>")
    silent = (ROUNDS[0], say("assistant", "A dog.", weight=0.0), *ROUNDS[2:])
    assert learned(template.segments(silent)) == ["It barks.<|im_end|>"]
    assert learned(template.segments(ROUNDS, supervise_from=2)) == ["It barks.<|im_end|>"]
    assert learned(template.segments((SYSTEM, *ROUNDS), supervise_from=5)) == []


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ((say("assistant", "x"),), "turn 1 is `assistant`, but template `chatml` expects `user`"),
        ((say("user", "x"), say("user", "y")), "turn 2 is `user`, but template `chatml` expects `assistant`"),
        ((say("user", "x"), SYSTEM), "turn 2 is `system`"),
    ],
)
def test_turns_out_of_order_are_refused(messages: tuple[object, ...], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        build_template("chatml", smollm2(), "<image>").segments(messages)  # type: ignore[arg-type]


@pytest.mark.requirement("A-18")
def test_an_unknown_template_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ModelError, match="did you mean `vicuna_v1`"):
        build_template("vicuna", smollm2(), "<image>")


@pytest.mark.requirement("A-16", "A-19")
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"needs `<\|im_end\|>` as one token"):
        build_template("chatml", mistral(), "<image>")


def test_every_template_of_the_table_knows_its_name() -> None:
    tokenizer = smollm2()
    assert [build_template(name, tokenizer, "<image>").name for name in TEMPLATES] == list(TEMPLATES)
