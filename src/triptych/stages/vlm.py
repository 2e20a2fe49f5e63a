"""What the stages of vision-language models share: the model with its tuning, its encoder, its answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from triptych.core.distributed import call_on_main, is_main
from triptych.core.protocols import Evaluator, Objective, Reference
from triptych.core.types import Example, Sample
from triptych.data.formats import Dataset
from triptych.data.images import decode
from triptych.data.segments import added_bos
from triptych.data.template_lint import lint_template
from triptych.data.tokenize import ConversationEncoder
from triptych.engine.parallel import Runtime
from triptych.evaluation.answers import Answering
from triptych.models import generation
from triptych.models.chat_templates import CHAT_TEMPLATES, chat_template
from triptych.models.load import LoadedVlm, load_vlm
from triptych.models.new_tokens import cover_new_tokens, untrained_tokens
from triptych.models.tuning import TuningPlan, apply_tuning
from triptych.models.vlm import VlmScorer
from triptych.stages.build import Built, check_length, open_datasets, torch_dtype
from triptych.stages.locate import at_key
from triptych.stages.recipe import TuneRecipe, VlmRecipe
from triptych.stages.saving import save_finished
from triptych.stages.state_files import write_whole


@dataclass(frozen=True)
class Vlm:
    """A model ready to be trained and asked."""

    loaded: LoadedVlm
    plan: TuningPlan
    scorer: VlmScorer
    encoder: ConversationEncoder

    def answering(self, max_new_tokens: int, batch: int) -> Answering:
        """The model as something that answers; where its weights are sharded, on all ranks together."""
        # Looked up when it is called: sharding puts another function in the place of the scorer's.
        return make_answering(
            self.loaded,
            self.encoder,
            max_new_tokens,
            batch,
            generate=lambda prompts, **options: self.scorer.generate(prompts, **options),
        )


def build_vlm(recipe: VlmRecipe) -> Vlm:
    """Load or compose the model and apply the tuning plan; the same recipe and seed give the same weights."""
    with at_key("model"):
        loaded = load_vlm(recipe.model, dtype=torch_dtype(recipe.dtype))
    check_length(recipe.max_length, context_length(loaded), "language model")
    with at_key("template"):
        if recipe.template != "model":
            loaded = with_template(loaded, recipe.template)
        encoder = make_encoder(loaded, recipe.template, recipe.max_length)
        stop_at(loaded, encoder.stop_ids)
    with at_key("tuning"):
        rules = cover_new_tokens(loaded.model, loaded.components, recipe.tuning, untrained_tokens(loaded))
        plan = apply_tuning(loaded.model, loaded.components, rules, recipe.lr, recipe.weight_decay)
    scorer = VlmScorer(loaded.model, loaded.components, pictures=loaded.pictures, trees=recipe.trees)
    scorer.head_kernel = recipe.head_kernel
    return Vlm(loaded, plan, scorer, encoder)


def vlm_stage(
    recipe: VlmRecipe,
    vlm: Vlm,
    *,
    encode: Callable[[Sample], Example],
    datasets: list[Dataset],
    objective: Objective,
    evaluators: Callable[[nn.Module, Runtime], list[Evaluator]],
    reference: Reference | None = None,
    show_answers: Callable[[str], None] = lambda title: None,
) -> Built:
    """What a stage that trains `vlm` hands to the engine; the arguments are what the stages differ in."""
    return Built(
        scorer=vlm.scorer,
        packed=vlm.scorer.packs_trees,
        vision=vlm.scorer.vision,
        picture_settings=picture_settings(vlm.loaded),
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
        show_answers=show_answers,
    )


def picture_settings(loaded: LoadedVlm) -> dict[str, Any]:
    """What decides a picture's states beside weights and picture."""
    config = loaded.model.config.to_dict()
    selected = {name: value for name, value in config.items() if name.startswith("vision_")}
    return {"image_processor": loaded.image_processor.to_dict(), "model": selected}


def context_length(loaded: LoadedVlm) -> int | None:
    """Longest row of the language model in tokens; None where its configuration names no limit."""
    return getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)


def with_template(loaded: LoadedVlm, name: str) -> LoadedVlm:
    """The model with the chat template of a built-in template, which is saved along with it.

    Raises:
        ModelError: there is no template of this name.
    """
    template = chat_template(name, loaded.pictures.placeholder, added_bos(loaded.tokenizer))
    loaded.tokenizer.chat_template = template
    return replace(loaded, template=template)


def template_name(loaded: LoadedVlm) -> str:
    """The built-in template that a model was saved with, or `model` for any other.

    The built-in one is the same text, split into segments by what wrote it instead of by rendering marks; `plain`,
    which leaves words out, can be used in no other way.
    """
    begin = added_bos(loaded.tokenizer)
    for name in CHAT_TEMPLATES:
        if loaded.template == chat_template(name, loaded.pictures.placeholder, begin):
            return name
    return "model"


def stop_at(loaded: LoadedVlm, stop_ids: Iterable[int]) -> None:
    """Let plain `generate` stop, also after saving, at the tokens that end an answer in training."""
    settings = loaded.model.generation_config
    known = settings.eos_token_id
    present = [] if known is None else [known] if isinstance(known, int) else list(known)
    ids = list(dict.fromkeys([*present, *stop_ids]))
    settings.eos_token_id = ids[0] if len(ids) == 1 else ids


def make_encoder(loaded: LoadedVlm, template: str, max_length: int) -> ConversationEncoder:
    """The encoder of a loaded model."""
    return ConversationEncoder(loaded.tokenizer, template, loaded.pictures, max_length)


def make_answering(
    loaded: LoadedVlm,
    encoder: ConversationEncoder,
    max_new_tokens: int,
    batch: int,
    generate: Callable[..., list[list[int]]] | None = None,
) -> Answering:
    """A loaded model as something that answers."""
    return Answering(
        generate=generate
        or (lambda prompts, **options: generation.generate(loaded.model, prompts, loaded.pictures, **options)),
        tokenizer=loaded.tokenizer,
        encode_prompt=encoder.encode_prompt,
        decode=decode,
        stop_ids=encoder.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch,
    )


def read_samples(datasets: Iterable[Dataset], limit: int | None = None) -> list[Sample]:
    """The rows of data sets, in order."""
    rows = (dataset.sample(index) for dataset in datasets for index in range(len(dataset)))
    return list(itertools.islice(rows, limit))


def show_answers(recipe: TuneRecipe, vlm: Vlm, title: str) -> None:
    """Print the first held-out questions with the truth and the model's answers, and how many answers are right.

    With `evaluation.answers` the count is over every held-out row, otherwise over those shown. All answers that count
    are also written to the run's folder, one JSON line each.
    """
    evaluation = recipe.evaluation
    if evaluation is None or not evaluation.show:
        return
    samples = read_samples(open_datasets(evaluation.data), None if evaluation.answers else evaluation.show)
    pictures = {str(sample.origin): ", ".join(image.name for image in sample.images) for sample in samples}
    answers = vlm.answering(evaluation.max_new_tokens, evaluation.batch).run(samples, evaluation.metrics)
    # Sharded weights need every rank to get here.
    lines = (json.dumps(answer.row(), ensure_ascii=False) + "\n" for answer in answers)
    file = Path(recipe.output) / f"answers-{title.replace(' ', '-')}.jsonl"
    call_on_main(partial(write_whole, file, "".join(lines)))
    if not is_main():
        return
    right = sum(answer.is_right for answer in answers)
    table = Table("picture", "question", "truth", "answer", title=f"Held-out answers {title}")
    for answer in answers[: evaluation.show]:
        # Text, not str: brackets in an answer are no markup.
        reply = Text(repr(answer.prediction[:80]), style="green" if answer.is_right else "red")
        table.add_row(Text(pictures[answer.origin]), Text(answer.question), Text(answer.truth), reply)
    console = Console()
    console.print(table)
    console.print(f"right {title}: {right} of {len(answers)} ({right / len(answers):.1%})", highlight=False)
