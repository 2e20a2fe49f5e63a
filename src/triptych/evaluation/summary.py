"""From answers to tables: accuracy by task with its interval, count error, what is taken for what, differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from triptych.evaluation.answers import Answer
from triptych.evaluation.metrics import bare_number, bootstrap_interval, normalise_answer, number_of, share_interval

MOST_CHOICES = 12
"""A task whose truths are at most this many different answers has a confusion table."""


@dataclass(frozen=True)
class TaskSummary:
    """How well the questions of one task were answered."""

    accuracy: float
    """Share of right answers, 0 to 1."""
    low: float
    """Lower end of the 95 % interval of the accuracy, samples drawn as a whole, see `share_interval`."""
    high: float
    """Upper end."""
    n: int
    """Questions."""
    count_error: float | None
    """Mean absolute difference from a true number, over the answers that name one; None for other tasks."""
    without_number: int
    """Questions about a number whose answer names none; they have no part in `count_error`."""
    confusion: Mapping[str, Mapping[str, int]]
    """Truth -> answer -> how often; answers that are no truth of the task are `(other)`; empty for open tasks."""


def summarise(answers: Sequence[Answer]) -> dict[str, TaskSummary]:
    """Summaries by task, in order of first appearance; questions without a task are `-`; `all` comes first.

    Args:
        answers: at least one.
    """
    tasks: dict[str, list[Answer]] = {"all": list(answers)}
    for answer in answers:
        tasks.setdefault(answer.task or "-", []).append(answer)
    if len(tasks) == 2:
        del tasks[next(name for name in tasks if name != "all")]
    return {task: _summarise(found, is_task=task != "all") for task, found in tasks.items()}


def _summarise(answers: Sequence[Answer], is_task: bool) -> TaskSummary:
    right = [float(answer.is_right) for answer in answers]
    low, high = share_interval(right, [answer.origin for answer in answers])
    error, without = count_error(answers) if is_task else (None, 0)
    return TaskSummary(
        sum(right) / len(right), low, high, len(right), error, without, confusion(answers) if is_task else {}
    )


def count_error(answers: Sequence[Answer]) -> tuple[float | None, int]:
    """(mean absolute error of the numbers answered, questions answered without one), or (None, 0).

    Only where every true answer is a number and nothing else; "no" and "none" answer other questions too.
    """
    truths = [bare_number(answer.truth) for answer in answers]
    if None in truths:
        return None, 0
    pairs = [(number_of(answer.prediction), truth) for answer, truth in zip(answers, truths, strict=True)]
    errors = [abs(said - truth) for said, truth in pairs if said is not None and truth is not None]
    return (sum(errors) / len(errors) if errors else None), len(pairs) - len(errors)


def confusion(answers: Sequence[Answer]) -> dict[str, dict[str, int]]:
    """Truth -> answer -> count, both in the order of the truths; empty with more than `MOST_CHOICES` truths."""
    truths = list(dict.fromkeys(normalise_answer(answer.truth) for answer in answers))
    if not 2 <= len(truths) <= MOST_CHOICES:
        return {}
    table: dict[str, Counter[str]] = {truth: Counter() for truth in sorted(truths)}
    for answer in answers:
        said = normalise_answer(answer.prediction)
        table[normalise_answer(answer.truth)][said if said in table else "(other)"] += 1
    return {truth: {said: row[said] for said in (*table, "(other)") if row[said]} for truth, row in table.items()}


@dataclass(frozen=True)
class Difference:
    """How much more often one model is right than another on the same questions."""

    gain: float
    """Accuracy of the first less that of the second, -1 to 1."""
    low: float
    """Lower end of the 95 % paired bootstrap interval."""
    high: float
    """Upper end."""
    n: int
    """Questions that both answered."""


def compare(rivals: Sequence[tuple[Sequence[Answer], Sequence[Answer]]]) -> dict[str, Difference]:
    """The difference by task over the questions that both of a pair answered; `all` comes first.

    Args:
        rivals: answers of one model and of another, for one or more such pairs (the seeds of two ways to train).

    Raises:
        ValueError: no question was answered by both.
    """
    pairs = []
    for first, second in rivals:
        others = {(answer.origin, answer.question, answer.truth): answer for answer in second}
        keys = [(answer.origin, answer.question, answer.truth) for answer in first]
        pairs += [(answer, others[key]) for answer, key in zip(first, keys, strict=True) if key in others]
    if not pairs:
        raise ValueError("no question was answered by both")
    tasks: dict[str, list[tuple[Answer, Answer]]] = {"all": pairs}
    for pair in pairs:
        tasks.setdefault(pair[0].task or "-", []).append(pair)
    return {task: _difference(found) for task, found in tasks.items()}


def _difference(pairs: Sequence[tuple[Answer, Answer]]) -> Difference:
    gains = [float(one.is_right) - float(other.is_right) for one, other in pairs]
    low, high = bootstrap_interval(gains, [one.origin for one, _ in pairs])
    return Difference(sum(gains) / len(gains), low, high, len(gains))
