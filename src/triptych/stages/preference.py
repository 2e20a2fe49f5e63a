"""Stage `preference`: DPO on pairs of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import nn

from triptych.core.protocols import Evaluator, Reference
from triptych.engine.parallel import Runtime
from triptych.evaluation.held_out import HeldOutLoss
from triptych.models.reference import AdapterOffReference, FrozenReference
from triptych.models.tuning import TuningPlan
from triptych.objectives import build_objective
from triptych.stages.build import HELD_OUT_DECODE, Built, make_held_out_loader, open_datasets, pair_rows
from triptych.stages.precompute import PrecomputedReference
from triptych.stages.recipe import PreferenceRecipe, ReferenceKind
from triptych.stages.vlm import Vlm, build_vlm, picture_settings, vlm_stage

REFERENCES: Mapping[ReferenceKind, str] = {
    "precomputed": "precomputed, the log-probabilities of all rows are computed once before training",
    "frozen": "frozen, a copy of the model as it is before training",
    "adapter_off": "adapter_off, the model without its adapters",
}
"""What each kind is, for messages."""


def build_preference(recipe: PreferenceRecipe) -> Built:
    """Load the policy, take its reference before anything is trained, open the pairs."""
    datasets = open_datasets(recipe.data)
    vlm = build_vlm(recipe)
    encode = pair_rows(vlm.encoder.encode)
    objective = build_objective(recipe.objective)
    kind = reference_kind(recipe, vlm.plan, sum(len(item) for item in datasets))
    settings = {**picture_settings(vlm.loaded), "template": recipe.template, "max_length": recipe.max_length}
    known = PrecomputedReference(encode, vlm.loaded.pictures, settings)
    # Of their own: their pictures are decoded whole, whatever training does.
    known_held_out = PrecomputedReference(encode, vlm.loaded.pictures, settings, "held-out rows")
    encode_held_out = encode
    if kind == "precomputed":
        encode, encode_held_out = known.encode, known_held_out.encode
    reference = make_reference(kind, vlm)

    def prepare(runtime: Runtime, console: Console) -> None:
        if kind != "precomputed":
            return
        folder = Path(recipe.output) / "reference_logprobs"
        vlm.scorer.to(runtime.device)
        known.prepare(vlm.scorer, datasets, recipe.loader, folder, runtime, console)
        if recipe.evaluation is not None:
            whole = recipe.loader.model_copy(update={"decode": HELD_OUT_DECODE})
            held_out = open_datasets(recipe.evaluation.data)
            known_held_out.prepare(vlm.scorer, held_out, whole, folder, runtime, console)

    def evaluators(scorer: nn.Module, runtime: Runtime) -> list[Evaluator]:
        if recipe.evaluation is None:
            return []
        held_out = open_datasets(recipe.evaluation.data)
        store = vlm.scorer.vision.store
        source = make_held_out_loader(held_out, encode_held_out, vlm.loaded.pictures, recipe.evaluation.batch, store)
        return [HeldOutLoss(scorer, objective, source, reference, runtime)]

    built = vlm_stage(
        recipe,
        vlm,
        encode=encode,
        datasets=datasets,
        objective=objective,
        evaluators=evaluators,
        reference=reference,
    )
    notes = (f"reference: {REFERENCES[kind]}",)
    return replace(built, prepare=prepare, passes_before=int(kind == "precomputed"), notes=notes)


def reference_kind(recipe: PreferenceRecipe, plan: TuningPlan, rows: int) -> ReferenceKind:
    """What `auto` means for this recipe: computed before training where every row is used at least once.

    A model that the recipe shards may not fit whole on a device, which computing before training and a copy both need:
    there the adapters are switched off wherever they are all that trains.
    """
    if recipe.reference != "auto":
        return recipe.reference
    trains_adapters_only = bool(plan.adapters) and not plan.full_matches
    is_sharded = recipe.train.runtime.strategy == "fsdp"
    if recipe.loader.passes(rows) >= 1 and not (is_sharded and trains_adapters_only):
        return "precomputed"
    return "adapter_off" if trains_adapters_only else "frozen"


def make_reference(kind: ReferenceKind, vlm: Vlm) -> Reference | None:
    """The model as it is before training; None where its numbers stand in the rows."""
    if kind == "adapter_off":
        return AdapterOffReference(vlm.scorer, vlm.plan)
    return FrozenReference(vlm.scorer) if kind == "frozen" else None
