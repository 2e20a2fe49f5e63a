"""The stages a recipe can name."""

from __future__ import annotations

from collections.abc import Callable

from triptych.stages.build import Built
from triptych.stages.contrastive import build_contrastive
from triptych.stages.preference import build_preference
from triptych.stages.recipe import ContrastiveRecipe, PreferenceRecipe, StageRecipe, TuneRecipe
from triptych.stages.tune import build_tune

STAGES: dict[str, tuple[type[StageRecipe], Callable[..., Built]]] = {
    "contrastive": (ContrastiveRecipe, build_contrastive),
    "tune": (TuneRecipe, build_tune),
    "preference": (PreferenceRecipe, build_preference),
}
"""`stage:` of a recipe -> its schema and the function that builds it, which takes recipes of that schema only."""
