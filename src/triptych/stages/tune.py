"""Stage `tune`: next-token training of a vision-language model."""

from __future__ import annotations

from torch import nn

from triptych.core.protocols import Evaluator
from triptych.engine.parallel import Runtime
from triptych.evaluation.answers import AnswerAccuracy
from triptych.evaluation.held_out import HeldOutLoss
from triptych.objectives import build_objective
from triptych.stages.build import Built, make_held_out_loader, open_datasets, plain_rows
from triptych.stages.recipe import TuneRecipe
from triptych.stages.vlm import Vlm, build_vlm, read_samples, show_answers, vlm_stage


def build_tune(recipe: TuneRecipe) -> Built:
    """Load or compose the model, apply the tuning plan, open the data."""
    datasets = open_datasets(recipe.data)
    vlm = build_vlm(recipe)
    objective = build_objective(recipe.objective)

    def evaluators(scorer: nn.Module, runtime: Runtime) -> list[Evaluator]:
        if recipe.evaluation is None:
            return []
        return make_evaluators(recipe, vlm, scorer, runtime)

    return vlm_stage(
        recipe,
        vlm,
        encode=plain_rows(vlm.encoder.encode),
        datasets=datasets,
        objective=objective,
        evaluators=evaluators,
        show_answers=lambda title: show_answers(recipe, vlm, title),
    )


def make_evaluators(recipe: TuneRecipe, vlm: Vlm, scorer: nn.Module, runtime: Runtime) -> list[Evaluator]:
    """The held-out loss and, where asked for, exact match of generated answers."""
    assert recipe.evaluation is not None
    datasets = open_datasets(recipe.evaluation.data)
    source = make_held_out_loader(
        datasets, plain_rows(vlm.encoder.encode), vlm.loaded.pictures, recipe.evaluation.batch
    )
    result: list[Evaluator] = [HeldOutLoss(scorer, build_objective(recipe.objective), source, None, runtime)]
    if recipe.evaluation.answers:
        answering = vlm.answering(recipe.evaluation.max_new_tokens, recipe.evaluation.batch)
        result.append(AnswerAccuracy(answering, read_samples(datasets)))
    return result
