"""Stage `contrastive`: two towers, pictures and captions."""

from __future__ import annotations

from torch import nn

from triptych.core.protocols import Evaluator
from triptych.data.tokenize import CaptionEncoder
from triptych.engine.parallel import Runtime
from triptych.evaluation.held_out import HeldOutLoss
from triptych.evaluation.retrieval import Retrieval
from triptych.models.dual_encoder import DualEncoderScorer, LoadedDualEncoder, bound_scale, load_dual_encoder
from triptych.models.tuning import TuningPlan, apply_tuning
from triptych.objectives import build_objective
from triptych.stages.build import Built, make_held_out_loader, open_datasets, torch_dtype
from triptych.stages.recipe import ContrastiveRecipe
from triptych.stages.saving import save_finished


def build_contrastive(recipe: ContrastiveRecipe) -> Built:
    """Load or compose the towers, apply the tuning plan, open the captions."""
    datasets = open_datasets(recipe.data)
    loaded, plan = _load(recipe)
    scorer = DualEncoderScorer(loaded.model, loaded.components, loaded.max_scale)
    length = min(recipe.max_length, loaded.max_text_tokens)
    encoder = CaptionEncoder(loaded.tokenizer, length, truncate_captions=recipe.truncate_captions)
    objective = build_objective(recipe.objective)

    def evaluators(wrapped: nn.Module, runtime: Runtime) -> list[Evaluator]:
        if recipe.evaluation is None:
            return []
        held_out = open_datasets(recipe.evaluation.data)
        source = make_held_out_loader(held_out, encoder.encode, loaded.pictures, recipe.evaluation.batch)
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
        encode=encoder.encode,
        datasets=datasets,
        objective=objective,
        save=lambda folder: save_finished(folder, loaded, lambda: _load(recipe)[0]),
        evaluators=evaluators,
        after_step=lambda: bound_scale(loaded.model, loaded.max_scale),
    )


def _load(recipe: ContrastiveRecipe) -> tuple[LoadedDualEncoder, TuningPlan]:
    loaded = load_dual_encoder(recipe.model, dtype=torch_dtype(recipe.dtype))
    plan = apply_tuning(loaded.model, loaded.components, recipe.tuning, recipe.lr, recipe.weight_decay)
    return loaded, plan
