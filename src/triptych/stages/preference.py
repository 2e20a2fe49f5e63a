"""Stage `preference`: DPO on pairs of answers."""

from __future__ import annotations

from torch import nn

from triptych.core.protocols import Evaluator, Reference
from triptych.data.template_lint import lint_template
from triptych.engine.parallel import Runtime
from triptych.evaluation.held_out import HeldOutLoss
from triptych.models.reference import AdapterOffReference, FrozenReference
from triptych.objectives import build_objective
from triptych.stages.build import Built, make_held_out_loader, open_datasets, pair_rows
from triptych.stages.recipe import PreferenceRecipe
from triptych.stages.saving import save_finished
from triptych.stages.vlm import Vlm, build_vlm


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
        source = make_held_out_loader(held_out, encode, vlm.loaded.pictures, recipe.evaluation.batch)
        return [HeldOutLoss(scorer, objective, source, reference, runtime)]

    return Built(
        scorer=vlm.scorer,
        components=vlm.loaded.components,
        plan=vlm.plan,
        tokenizer=vlm.loaded.tokenizer,
        pictures=vlm.loaded.pictures,
        encode=encode,
        datasets=datasets,
        objective=objective,
        reference=reference,
        save=lambda folder: save_finished(folder, vlm.loaded, lambda: build_vlm(recipe).loaded),
        evaluators=evaluators,
        lint=lambda: lint_template(vlm.encoder, vlm.loaded.tokenizer),
    )


def make_reference(recipe: PreferenceRecipe, vlm: Vlm) -> Reference:
    """The model as it is before training, as the recipe asks for it."""
    kind = recipe.reference
    if kind == "auto":
        kind = "adapter_off" if vlm.plan.adapters and not vlm.plan.full_matches else "frozen"
    if kind == "adapter_off":
        return AdapterOffReference(vlm.scorer, vlm.plan)
    return FrozenReference(vlm.scorer)
