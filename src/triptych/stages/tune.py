"""Stage `tune`: next-token training of a vision-language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from triptych.core.errors import ModelError, Problem
from triptych.core.protocols import Evaluator
from triptych.core.types import Example, Sample
from triptych.data.formats import Dataset
from triptych.data.rare_words import find_rare_words
from triptych.engine.parallel import Runtime
from triptych.evaluation.answers import AnswerAccuracy
from triptych.evaluation.held_out import HeldOutLoss
from triptych.models.picture_words import PictureWords, ReadingRules
from triptych.models.vlm import VlmScorer
from triptych.objectives import build_objective
from triptych.objectives.bag_of_words import BagOfWordsConfig
from triptych.stages.build import Built, make_held_out_loader, open_datasets, plain_rows
from triptych.stages.recipe import TuneRecipe
from triptych.stages.vlm import Vlm, build_vlm, read_samples, show_answers, vlm_stage


def build_tune(recipe: TuneRecipe) -> Built:
    """Load or compose the model, apply the tuning plan, open the data."""
    datasets = open_datasets(recipe.data)
    vlm, encode = with_objective(recipe, build_vlm(recipe), datasets)
    objective = build_objective(recipe.objective)

    def evaluators(scorer: nn.Module, runtime: Runtime) -> list[Evaluator]:
        if recipe.evaluation is None:
            return []
        return make_evaluators(recipe, vlm, encode, scorer, runtime)

    return vlm_stage(
        recipe,
        vlm,
        encode=encode,
        datasets=datasets,
        objective=objective,
        evaluators=evaluators,
        show_answers=lambda title: show_answers(recipe, vlm, title),
    )


def with_objective(recipe: TuneRecipe, vlm: Vlm, datasets: list[Dataset]) -> tuple[Vlm, Callable[[Sample], Example]]:
    """The model with a scorer that gives the objective what it needs, and what turns rows into its tokens.

    Raises:
        ModelError: `bag_of_words`, and weights are trained that it gives no gradient.
        DataError: `bag_of_words`, and no row can be used, or no word is rare.
    """
    encode = plain_rows(vlm.encoder.encode)
    objective = recipe.objective
    if not isinstance(objective, BagOfWordsConfig):
        return vlm, encode
    untouched = sorted({group.component for group in vlm.plan.groups} - {"vision", "connector"})
    if untouched:
        problem = f"`bag_of_words` trains vision and connector alone, the tuning plan trains {', '.join(untouched)} too"
        remedy = "freeze the language model here, and tune it in a later stage"
        raise ModelError(Problem(problem, key="objective.kind", remedy=remedy))
    words = find_rare_words(datasets, encode, objective.common_share)
    vocabulary = vlm.loaded.model.get_input_embeddings().num_embeddings
    count = min(objective.other_words, vocabulary)
    others = (index * vocabulary // count for index in range(count))
    rules = ReadingRules(objective.temperature, objective.silence, objective.context, objective.silent_commitment)
    scorer = VlmScorer(
        vlm.loaded.model,
        vlm.loaded.components,
        needs=build_objective(objective).needs,
        pictures=vlm.loaded.pictures,
        trees=vlm.scorer.packs_trees,
        words=PictureWords(sorted({*words.tokens, *others}), rules),
    )
    return replace(vlm, scorer=scorer), lambda sample: words.weigh(encode(sample))


def make_evaluators(
    recipe: TuneRecipe, vlm: Vlm, encode: Callable[[Sample], Example], scorer: nn.Module, runtime: Runtime
) -> list[Evaluator]:
    """The held-out loss and, where asked for, the share of generated answers that are right."""
    assert recipe.evaluation is not None
    datasets = open_datasets(recipe.evaluation.data)
    store = vlm.scorer.vision.store
    source = make_held_out_loader(datasets, encode, vlm.loaded.pictures, recipe.evaluation.batch, store)
    result: list[Evaluator] = [HeldOutLoss(scorer, build_objective(recipe.objective), source, None, runtime)]
    if recipe.evaluation.answers:
        answering = vlm.answering(recipe.evaluation.max_new_tokens, recipe.evaluation.batch)
        result.append(AnswerAccuracy(answering, read_samples(datasets), recipe.evaluation.metrics))
    return result
