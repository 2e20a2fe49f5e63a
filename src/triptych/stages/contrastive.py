"""Stage `contrastive`: two towers, pictures and captions."""

from __future__ import annotations

from torch import nn

from triptych.core.errors import ModelError, Problem
from triptych.core.protocols import Evaluator
from triptych.data.tokenize import CaptionEncoder
from triptych.engine.parallel import Runtime
from triptych.evaluation.held_out import HeldOutLoss
from triptych.evaluation.retrieval import Retrieval
from triptych.models.dual_encoder import DualEncoderScorer, LoadedDualEncoder, bound_scale, load_dual_encoder
from triptych.models.tuning import TuningPlan, apply_tuning
from triptych.objectives import build_objective
from triptych.stages.build import Built, check_length, make_held_out_loader, open_datasets, plain_rows, torch_dtype
from triptych.stages.locate import at_key
from triptych.stages.recipe import ContrastiveRecipe
from triptych.stages.saving import save_finished


def build_contrastive(recipe: ContrastiveRecipe) -> Built:
    """Load or compose the towers, apply the tuning plan, open the captions."""
    datasets = open_datasets(recipe.data)
    loaded, plan = load_contrastive(recipe)
    scorer = DualEncoderScorer(loaded.model, loaded.components, loaded.max_scale)
    check_length(recipe.max_length, loaded.max_text_tokens, "text encoder")
    encoder = CaptionEncoder(loaded.tokenizer, recipe.max_length, truncate_captions=recipe.truncate_captions)
    encode = plain_rows(encoder.encode)
    objective = build_objective(recipe.objective)
    if "logit_bias" in objective.needs and scorer.scale_and_bias()[1] is None:
        remedy = "set model.bias_init (SigLIP starts at -10), or objective.loss to `clip`"
        raise ModelError(
            Problem("loss `siglip` adds a bias to every logit, the model has none", key="objective.loss", remedy=remedy)
        )

    def evaluators(wrapped: nn.Module, runtime: Runtime) -> list[Evaluator]:
        if recipe.evaluation is None:
            return []
        held_out = open_datasets(recipe.evaluation.data)
        source = make_held_out_loader(held_out, encode, loaded.pictures, recipe.evaluation.batch)
        return [
            HeldOutLoss(wrapped, objective, source, None, runtime),
            Retrieval(wrapped, source, device=runtime.device),
        ]

    return Built(
        scorer=scorer,
        components=loaded.components,
        plan=plan,
        tokenizer=loaded.tokenizer,
        pictures=loaded.pictures,
        encode=encode,
        datasets=datasets,
        objective=objective,
        by_picture=False,
        save=lambda folder: save_finished(folder, loaded, lambda: load_contrastive(recipe)[0]),
        evaluators=evaluators,
        after_step=lambda: bound_scale(loaded.model, loaded.max_scale),
    )


def load_contrastive(recipe: ContrastiveRecipe) -> tuple[LoadedDualEncoder, TuningPlan]:
    """The towers with the tuning plan applied; the same recipe and seed give the same weights."""
    with at_key("model"):
        loaded = load_dual_encoder(recipe.model, dtype=torch_dtype(recipe.dtype))
    with at_key("tuning"):
        plan = apply_tuning(loaded.model, loaded.components, recipe.tuning, recipe.lr, recipe.weight_decay)
    return loaded, plan
