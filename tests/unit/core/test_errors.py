import pytest

from triptych.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    Problem,
    TrainingError,
    TriptychError,
)


def test_problem_names_place_key_message_and_remedy():
    problem = Problem("3 placeholders, 2 pictures", file="train.json", line=7, key="images", remedy="add a picture")
    assert str(problem) == "train.json:7: images: 3 placeholders, 2 pictures\n    -> add a picture"


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("broken"), "broken"),
        (Problem("broken", file="a.json"), "a.json: broken"),
        (Problem("broken", key="train.lr"), "train.lr: broken"),
        (Problem("broken", remedy="mend it"), "broken\n    -> mend it"),
    ],
)
def test_parts_that_are_unknown_are_left_out(problem, text):
    assert str(problem) == text


def test_an_error_is_made_from_a_sentence_a_problem_or_many():
    assert DataError("broken", file="a.json", line=2).problems == [Problem("broken", file="a.json", line=2)]
    assert str(DataError(Problem("broken"))) == "broken"
    many = DataError([Problem("first", file="a.json", line=1), Problem("second")])
    assert str(many) == "2 problems:\n  1. a.json:1: first\n  2. second"
    assert many.args == (str(many),)


def test_one_base_catches_every_error_meant_for_the_user():
    kinds = {ConfigError, DataError, ModelError, CheckpointError, TrainingError}
    assert set(TriptychError.__subclasses__()) >= kinds
