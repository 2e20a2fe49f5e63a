"""What a run minimises: pure loss functions, one file per objective, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from triptych.core.protocols import Objective
from triptych.objectives.bag_of_words import BagOfWordsConfig, BagOfWordsObjective
from triptych.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from triptych.objectives.language import LanguageConfig, LanguageObjective
from triptych.objectives.preference import DpoConfig, DpoObjective

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "language": LanguageObjective,
    "bag_of_words": BagOfWordsObjective,
    "contrastive": ContrastiveObjective,
    "dpo": DpoObjective,
}
"""`kind` -> class; each is made from its configuration alone."""

ObjectiveConfig = Annotated[
    LanguageConfig | BagOfWordsConfig | ContrastiveConfig | DpoConfig, Field(discriminator="kind")
]
"""The `objective:` section of a recipe, told apart by `kind`."""


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a configuration describes."""
    return OBJECTIVES[config.kind](config)


__all__ = ["OBJECTIVES", "ObjectiveConfig", "build_objective"]
