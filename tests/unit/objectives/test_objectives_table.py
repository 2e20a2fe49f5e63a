import pytest
from pydantic import TypeAdapter, ValidationError

from triptych.core.protocols import Objective, WindowObjective
from triptych.objectives import OBJECTIVES, ObjectiveConfig, build_objective

CONFIG = TypeAdapter(ObjectiveConfig)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_every_kind_is_built_from_its_configuration(kind):
    objective = build_objective(CONFIG.validate_python({"kind": kind}))
    assert type(objective) is OBJECTIVES[kind]
    assert isinstance(objective, Objective)
    assert isinstance(objective, WindowObjective) == (kind == "contrastive")


def test_table_and_union_hold_the_same_kinds():
    tags = CONFIG.json_schema()["discriminator"]["mapping"]
    assert set(tags) == set(OBJECTIVES) == {"language", "bag_of_words", "contrastive", "dpo"}


def test_unknown_kind_and_unknown_key_are_refused():
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        CONFIG.validate_python({"kind": "languag"})
    with pytest.raises(ValidationError, match="Extra inputs"):
        CONFIG.validate_python({"kind": "dpo", "betta": 0.1})
