"""Answers of a model to the questions of a data set, and how many are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from PIL import Image
from transformers import PreTrainedTokenizerBase

from triptych.core.types import Example, ImageReference, Message, Origin, Sample
from triptych.data.tokenize import at_row
from triptych.evaluation.metrics import METRICS, MetricName
from triptych.models.generation import Prompt

_PROMPT = Origin("prompt", 1)


@dataclass(frozen=True)
class Answer:
    """One question, the truth and what the model said."""

    origin: str
    task: str
    question: str
    truth: str
    prediction: str
    metric: MetricName = "exact"
    """What decides whether it is right: a name of `METRICS`."""
    pictures: tuple[str, ...] = ()
    """Names of the pictures the question is about."""

    @property
    def is_right(self) -> bool:
        """Whether the prediction is right by the metric."""
        return METRICS[self.metric](self.prediction, self.truth)

    def row(self) -> dict[str, object]:
        """As one JSON line."""
        return {**asdict(self), "is_right": self.is_right}


@dataclass(frozen=True)
class Answering:
    """Everything that is needed to turn messages into an answer."""

    generate: Callable[..., list[list[int]]]
    """Prompts and the options of `models.generation.generate` -> new token ids of each."""
    tokenizer: PreTrainedTokenizerBase
    encode_prompt: Callable[[Sequence[Message], Origin], Example]
    """Messages and the place errors name -> prompt ids ending with the generation prompt."""
    decode: Callable[[ImageReference], Image.Image]
    stop_ids: tuple[int, ...]
    """Ids that end an assistant turn."""
    max_new_tokens: int = 64
    batch_size: int = 16

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        temperature: float = 0.0,
        origins: Sequence[Origin] | None = None,
    ) -> list[str]:
        """The reply to each conversation, which must end with a user turn.

        Args:
            conversations: at least one.
            temperature: 0 for greedy answers.
            origins: where each conversation came from, for errors.

        Raises:
            DataError: a conversation is too long or a picture cannot be decoded; names its origin.
        """
        prompts = []
        for messages, origin in zip(conversations, origins or [_PROMPT] * len(conversations), strict=True):
            with at_row(origin):
                example = self.encode_prompt(messages, origin)
                images = tuple(self.decode(image) for image in example.images)
            prompts.append(Prompt(example.trunk.input_ids, images))
        replies = self.generate(
            prompts,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            temperature=temperature,
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in replies]

    def run(
        self,
        samples: Iterable[Sample],
        metrics: Mapping[str, MetricName] | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Answer]:
        """Answer every assistant turn of every sample, the true earlier turns being given.

        Questions of like length are answered together: they need little padding, and are often of one task, so that no
        short answer waits for a caption.

        Args:
            samples: with their true answers.
            metrics: task -> metric; `exact` for tasks it does not name.
            advance: called with the number of questions answered, batch by batch.

        Returns:
            The answers in the order of the questions.
        """
        turns = [
            (sample, index)
            for sample in samples
            for index, message in enumerate(sample.messages)
            if message.role == "assistant"
        ]
        by_length = sorted(range(len(turns)), key=lambda number: _length(*turns[number]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(turns), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            found = self._answer_all([turns[number] for number in chosen], metrics or {})
            answers.update(zip(chosen, found, strict=True))
            advance(len(chosen))
        return [answers[number] for number in range(len(turns))]

    def _answer_all(self, turns: Sequence[tuple[Sample, int]], metrics: Mapping[str, MetricName]) -> Iterator[Answer]:
        replies = self.answer(
            [sample.messages[:index] for sample, index in turns], origins=[sample.origin for sample, _ in turns]
        )
        for (sample, index), reply in zip(turns, replies, strict=True):
            question = sample.messages[index - 1].text.strip() if index else ""
            truth = sample.messages[index].text.strip()
            metric = metrics.get(sample.task, "exact")
            pictures = tuple(image.name for message in sample.messages[:index] for image in message.images)
            yield Answer(str(sample.origin), sample.task, question, truth, reply, metric, pictures)


def _length(sample: Sample, index: int) -> tuple[int, int]:
    """Pictures and characters that stand before an answer."""
    before = sample.messages[:index]
    return sum(len(message.images) for message in before), sum(len(message.text) for message in before)


def accuracy_by_task(answers: Sequence[Answer]) -> Mapping[str, tuple[float, int]]:
    """Task -> (share of right answers, number of answers); the key `all` holds every answer."""
    groups: dict[str, list[bool]] = {"all": []}
    for answer in answers:
        groups["all"].append(answer.is_right)
        if answer.task:
            groups.setdefault(answer.task, []).append(answer.is_right)
    return {task: (sum(right) / len(right), len(right)) for task, right in groups.items() if right}


class AnswerAccuracy:
    """Evaluator: share of right answers by task on held-out samples."""

    def __init__(
        self, answering: Answering, samples: Sequence[Sample], metrics: Mapping[str, MetricName] | None = None
    ) -> None:
        self.answering = answering
        self.samples = samples
        self.metrics = metrics

    def run(self) -> Mapping[str, float]:
        """`accuracy` and `accuracy/<task>`."""
        results = accuracy_by_task(self.answering.run(self.samples, self.metrics))
        return {("accuracy" if task == "all" else f"accuracy/{task}"): value for task, (value, _) in results.items()}
