"""Every assistant turn is asked, with the true turns before it; accuracy by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conversations import conversation, say
from tests.tiny import noise, tiny_family
from triptych.core.types import Example, ImageReference, Message, Origin, Sample
from triptych.data.tokenize import ConversationEncoder
from triptych.evaluation.answers import Answer, AnswerAccuracy, Answering, accuracy_by_task
from triptych.models.generation import Prompt, generate
from triptych.models.pictures import make_pictures

PICTURE = ImageReference(path="/a.png", name="a.png")
SAMPLE = conversation(
    say("user", PICTURE, "\nWho?"), say("assistant", "dog"), say("user", "And here?", PICTURE), say("assistant", "cat")
)


class Asked:
    """Remembers the prompts that were encoded."""

    def __init__(self, encoder: ConversationEncoder) -> None:
        self.encoder = encoder
        self.prompts: list[list[str]] = []

    def __call__(self, messages: Sequence[Message], origin: Origin) -> Example:
        self.prompts.append([message.text for message in messages])
        return self.encoder.encode_prompt(messages, origin)


def answering(batch_size: int) -> tuple[Answering, Asked]:
    model, tokenizer, processor = tiny_family("llava", dtype=torch.float64, seed=2)
    pictures = make_pictures(model.config, processor, tokenizer)
    asked = Asked(ConversationEncoder(tokenizer, "chatml", pictures, 512, lambda image: (32, 32)))

    def decode(image: ImageReference) -> Image.Image:
        return noise()

    def answer(prompts: Sequence[Prompt], **options: Any) -> list[list[int]]:
        return generate(model, prompts, pictures, **options)

    return Answering(answer, tokenizer, asked, decode, asked.encoder.stop_ids, 4, batch_size), asked


def test_every_assistant_turn_is_asked_with_the_true_turns_before_it() -> None:
    subject, asked = answering(2)
    counts: list[int] = []
    answers = subject.run([SAMPLE, SAMPLE], advance=counts.append)
    # Those of like length together, the results in order.
    assert asked.prompts == [["\nWho?"]] * 2 + [["\nWho?", "dog", "And here?"]] * 2 and counts == [2, 2]
    assert [(answer.question, answer.truth) for answer in answers] == [("Who?", "dog"), ("And here?", "cat")] * 2
    assert answers[0].origin == "data.jsonl:7 (row-7)"
    assert answers[0].prediction == answers[2].prediction != answers[1].prediction
    assert [answer.pictures for answer in answers[:2]] == [("a.png",), ("a.png", "a.png")]


def test_answers_do_not_depend_on_the_batch() -> None:
    predictions = [[item.prediction for item in answering(size)[0].run([SAMPLE, SAMPLE])] for size in (1, 3, 16)]
    assert predictions[0] == predictions[1] == predictions[2]


def answer(task: str, truth: str, prediction: str) -> Answer:
    return Answer("a.json:1", task, "?", truth, prediction)


def test_accuracy_by_task() -> None:
    answers = [
        answer("vqa", "dog", "A dog."),
        answer("vqa", "cat", "dog"),
        answer("", "2", "2"),
        answer("ocr", "x", ""),
    ]
    assert accuracy_by_task(answers) == {"all": (0.5, 4), "vqa": (0.5, 2), "ocr": (0.0, 1)}
    assert accuracy_by_task([]) == {}
    assert answers[0].row()["is_right"] is True and answers[1].row()["prediction"] == "dog"


def test_the_evaluator_names_its_results() -> None:
    subject, _ = answering(4)
    (first, second) = (item.prediction for item in subject.run([SAMPLE]))
    truth = Sample(
        (SAMPLE.messages[0], say("assistant", first), SAMPLE.messages[2], say("assistant", "no such answer")),
        SAMPLE.origin,
        task="vqa",
    )
    assert second != "no such answer"
    assert AnswerAccuracy(subject, [truth]).run() == {"accuracy": 0.5, "accuracy/vqa": 0.5}


def test_a_conversation_that_does_not_fit_is_an_error() -> None:
    subject, _ = answering(1)
    with pytest.raises(Exception, match="more than max_length 512"):
        subject.answer([[say("user", "x" * 600)]])
