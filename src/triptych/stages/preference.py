"""Stage `preference`: DPO on pairs of answers."""

from __future__ import annotations

from torch import nn

from triptych.core.protocols import Evaluator, Reference
from triptych.engine.parallel import Runtime
from triptych.evaluation.held_out import HeldOutLoss
from triptych.models.reference import AdapterOffReference, FrozenReference
from triptych.objectives import build_objective
from triptych.stages.build import Built, make_held_out_loader, open_datasets, pair_rows
from triptych.stages.recipe import PreferenceRecipe
from triptych.stages.vlm import Vlm, build_vlm, vlm_stage


def build_preference(recipe: PreferenceRecipe) -> Built:
    """Load the policy, take its reference before anything is trained, open the pairs."""
    datasets = open_datasets(recipe.data)
    vlm = build_vlm(recipe)
    encode = pair_rows(vlm.encoder.encode)
    reference = make_reference(recipe, vlm)
    objective = build_objective(recipe.objective)

    def evaluators(scorer: nn.Module, runtime: Runtime) -> list[Evaluator]:
        if recipe.evaluation is None:
            return []
        held_out = open_datasets(recipe.evaluation.data)
        store = vlm.scorer.vision.store
        source = make_held_out_loader(held_out, encode, vlm.loaded.pictures, recipe.evaluation.batch, store)
        return [HeldOutLoss(scorer, objective, source, reference, runtime)]

    return vlm_stage(
        recipe,
        vlm,
        encode=encode,
        datasets=datasets,
        objective=objective,
        evaluators=evaluators,
        reference=reference,
    )


def make_reference(recipe: PreferenceRecipe, vlm: Vlm) -> Reference:
    """The model as it is before training, as the recipe asks for it."""
    kind = recipe.reference
    if kind == "auto":
        kind = "adapter_off" if vlm.plan.adapters and not vlm.plan.full_matches else "frozen"
    if kind == "adapter_off":
        return AdapterOffReference(vlm.scorer, vlm.plan)
    return FrozenReference(vlm.scorer)
