"""Templates judged by what the tokens still tell."""

from __future__ import annotations

import itertools

import pytest

from tests.fake_pictures import FakePictures
from tests.real_tokenizers import smollm2, with_template, with_tokens
from tests.unit.data.test_chat_template import PICTURES_FIRST
from triptych.data.template_lint import lint_template
from triptych.data.tokenize import ConversationEncoder


@pytest.mark.requirement("A-13")
@pytest.mark.parametrize(
    ("name", "template"),
    [*itertools.product(["smollm2", "mistral"], ["basic", "vicuna_v1", "llama2", "chatml"]), ("qwen", "chatml")],
)
def test_the_built_in_templates_are_sound(name: str, template: str) -> None:
    tokenizer = with_tokens(name)
    assert lint_template(ConversationEncoder(tokenizer, template, FakePictures(tokenizer), 999), tokenizer) == []


@pytest.mark.requirement("A-13")
def test_a_models_own_template_is_checked_too() -> None:
    tokenizer = smollm2()
    assert lint_template(ConversationEncoder(tokenizer, "model", None, 999), tokenizer, has_pictures=False) == []


@pytest.mark.requirement("A-10", "A-13")
def test_a_template_that_moves_pictures_and_does_not_close_answers_breaks_two_principles() -> None:
    tokenizer = with_template(with_tokens("smollm2"), PICTURES_FIRST)
    problems = lint_template(ConversationEncoder(tokenizer, "model", FakePictures(tokenizer), 999), tokenizer)
    assert [problem.message.split(":")[0] for problem in problems] == [
        "template `model`, principle 1",
        "template `model`, principle 3",
    ]
    assert "answers do not close with the same token: '', '<|im_end|>'" in problems[1].message


@pytest.mark.requirement("A-13")
def test_a_template_without_role_markers_breaks_the_second_principle() -> None:
    bare = "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}<|im_end|>"
    tokenizer = with_template(with_tokens("smollm2"), bare + "{% endif %}{% endfor %}")
    problems = lint_template(ConversationEncoder(tokenizer, "model", FakePictures(tokenizer), 999), tokenizer)
    assert [problem.message.split(":")[0] for problem in problems] == ["template `model`, principle 2"]
