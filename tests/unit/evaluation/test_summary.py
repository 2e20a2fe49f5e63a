"""Tables of answers, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from triptych.evaluation.answers import Answer
from triptych.evaluation.metrics import MetricName
from triptych.evaluation.summary import compare, confusion, count_error, summarise


def answer(number: int, task: str, truth: str, prediction: str, metric: MetricName = "exact") -> Answer:
    return Answer(f"a.json:{number}", task, "?", truth, prediction, metric)


def test_tasks_are_summed_up_apart() -> None:
    answers = [
        answer(1, "counting", "two", "two"),
        answer(2, "counting", "three", "one"),
        answer(3, "counting", "four", "many"),
        answer(4, "position", "left", "right"),
        answer(5, "position", "right", "right"),
        answer(6, "caption", "A dog and two cats.", "two cats and a dog", "objects"),
    ]
    found = summarise(answers)
    assert list(found) == ["all", "counting", "position", "caption"]
    assert [found[task].n for task in found] == [6, 3, 2, 1]
    assert [found[task].accuracy for task in found] == [pytest.approx(0.5), pytest.approx(1 / 3), 0.5, 1.0]
    assert found["counting"].count_error == 1.0 and found["counting"].without_number == 1
    assert found["position"].count_error is None and found["all"].confusion == {}
    assert found["position"].confusion == {"left": {"right": 1}, "right": {"right": 1}}
    assert found["all"].low <= 0.5 <= found["all"].high and found["caption"].low == pytest.approx(
        1 / (1 + 1.96**2), abs=1e-4
    )


def test_one_task_has_one_line() -> None:
    assert list(summarise([answer(1, "", "x", "x")])) == ["all"]
    assert list(summarise([answer(1, "", "x", "x"), answer(2, "ocr", "x", "x")])) == ["all", "-", "ocr"]


def test_count_error_needs_numbers_everywhere() -> None:
    assert count_error([answer(1, "c", "two", "5"), answer(2, "c", "1", "one")]) == (1.5, 0)
    assert count_error([answer(1, "c", "two", "5"), answer(2, "c", "dog", "one")]) == (None, 0)
    assert count_error([answer(1, "c", "two", "several")]) == (None, 1)
    # Answers that hold a number without being one: a yes-or-no question, a caption.
    assert count_error([answer(1, "presence", "no", "no"), answer(2, "presence", "No.", "yes")]) == (None, 0)
    assert count_error([answer(1, "caption", "Two cats.", "two dogs")]) == (None, 0)


def test_several_pairs_of_models_are_compared_pair_by_pair() -> None:
    right, wrong = ([answer(n, "t", "x", said) for n in range(3)] for said in ("x", "y"))
    found = compare([(right, wrong), (right, right), (wrong[:2], right)])
    assert found["all"].n == 8 and found["all"].gain == pytest.approx((3 + 0 - 2) / 8)


def test_confusion_lumps_what_is_no_answer() -> None:
    answers = [answer(1, "p", "Left.", "left"), answer(2, "p", "right", "up"), answer(3, "p", "right", "the left")]
    assert confusion(answers) == {"left": {"left": 1}, "right": {"left": 1, "(other)": 1}}
    assert confusion(answers[:1]) == {}
    assert confusion([answer(number, "p", str(number), "") for number in range(13)]) == {}


def test_models_are_compared_on_the_questions_both_answered() -> None:
    first = [answer(n, "t", "x", "x") for n in range(8)]
    second = [answer(n, "t", "x", "x" if n < 2 else "y") for n in range(4)]
    found = compare([(first, second)])
    assert found["all"].n == 4 and found["t"].gain == 0.5
    assert 0 <= found["t"].low <= 0.5 <= found["t"].high <= 1
    with pytest.raises(ValueError, match="no question was answered by both"):
        compare([(first[4:], second)])
