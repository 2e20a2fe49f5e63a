"""Real architectures in float64 with real tuning plans: what one process must share with any split and any rank.

Started as `python -m tests.invariants.exact <folder>` with the environment that torchrun sets, it runs every case in
two gloo processes with DDP and FSDP2 and writes what it saw.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.invariants.launch import end
from tests.invariants.real import UNUSED, Attached, Pictures
from tests.invariants.toys import runtime
from tests.tiny import Answer, Row, as_trees, batch_of, noise, tiny_clip, tiny_family, tiny_siglip
from triptych.core import distributed
from triptych.core.protocols import Reference
from triptych.core.types import CONTEXT, Batch, Origin, Progress, Window
from triptych.engine.parallel import unwrap
from triptych.engine.step import run_window
from triptych.models.components import Components, find_components
from triptych.models.dual_encoder import DualEncoderScorer, find_dual_components
from triptych.models.picture_words import PictureWords, ReadingRules
from triptych.models.pictures import make_pictures
from triptych.models.reference import AdapterOffReference, FrozenReference
from triptych.models.tuning import TuningPlan, TuningRule, apply_tuning
from triptych.models.vlm import VlmScorer
from triptych.objectives.bag_of_words import BagOfWordsConfig, BagOfWordsObjective
from triptych.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from triptych.objectives.language import LanguageConfig, LanguageObjective
from triptych.objectives.preference import DpoConfig, DpoObjective

Split = Sequence[Sequence[int]]
Make = Callable[[Sequence[int]], Batch]

TEXT = "a small red cube stands behind two green balls and one very old blue lamp"
SPLITS: dict[str, Split] = {
    "1x8": [range(8)],
    "8x1": [(n,) for n in range(8)],
    "ragged": [(0, 1, 2), (3,), (4, 5, 6, 7)],
}
RANKS: tuple[Split, ...] = (((0, 1, 3), (4,), (6, 7)), ((2, 5),))
"""Rank -> micro-batch -> examples. Examples 2 and 5 have no picture, so the second rank has none at all."""

LORA = [
    {"match": "language.layers[0:1]", "method": "lora", "rank": 4, "precision": "model"},
    {"match": "language.layers[1:2]", "method": "lora", "rank": 2, "precision": "model", "targets": "attention"},
    {"match": "language", "method": "frozen"},
]
PLANS: dict[str, list[dict[str, Any]]] = {
    "full": [{"match": part, "method": "full"} for part in ("vision", "connector", "language")],
    "lora_and_connector": [{"match": "vision", "method": "frozen"}, {"match": "connector", "method": "full"}, *LORA],
    "vision_and_connector": [
        {"match": "vision", "method": "full"},
        {"match": "connector", "method": "full"},
        {"match": "language", "method": "frozen"},
    ],
    "lora": [{"match": "vision", "method": "frozen"}, {"match": "connector", "method": "frozen"}, *LORA],
}
CASES = (
    "language/full",
    "language/lora_and_connector",
    "language/lora",
    "bag_of_words/vision_and_connector",
    "dpo/full",
    "dpo/lora",
    "clip/full",
    "clip/frozen_vision",
    "siglip/full",
)


@dataclass
class Case:
    """A scorer in training mode, its objective and its rows."""

    scorer: nn.Module
    objective: Any
    blocks: list[str]
    make: Make
    reference: Reference | None = None

    def window(self, split: Split) -> tuple[Window, Attached]:
        """A light window, and the source of its pixels."""
        batches = [self.make(examples) for examples in split]
        pixels = {batch.origins: batch.pixels for batch in batches}
        return Window(0, 0.0, tuple(replace(batch, pixels=None) for batch in batches)), Attached(pixels)


def exact_case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """One of `CASES`; its weights are the same on every call."""
    objective, plan = name.split("/")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return _dual(objective, plan, dtype) if objective in ("clip", "siglip") else _vlm(objective, plan, dtype)


def _vlm(objective: str, plan: str, dtype: torch.dtype) -> Case:
    model, tokenizer, image_processor = tiny_family("llava", dtype)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    components = find_components(model)
    tuning = _tune(model, components, PLANS[plan])
    goals: dict[str, Any] = {
        "language": LanguageObjective(LanguageConfig()),
        "dpo": DpoObjective(DpoConfig(beta=0.7, sft_coefficient=0.3)),
        "bag_of_words": BagOfWordsObjective(BagOfWordsConfig(kind="bag_of_words")),
    }
    goal = goals[objective]
    vocabulary = model.get_input_embeddings().num_embeddings
    is_bag = objective == "bag_of_words"
    found = PictureWords(range(vocabulary), ReadingRules(0.1, 0.3, context=0.5)) if is_bag else None
    scorer = VlmScorer(model, components, needs=goal.needs, pictures=pictures, chunk_size=7, words=found)
    scorer.get_submodule(UNUSED).requires_grad_(False)
    reference: Reference | None = None
    if objective == "dpo":
        reference = AdapterOffReference(scorer, tuning) if tuning.adapters else FrozenReference(scorer)
    _move(model)

    def make(examples: Sequence[int]) -> Batch:
        rows: list[Row] = []
        for number in examples:
            is_text = number % 3 == 2 and not is_bag
            prompt = (words(number, 2),) if is_text else (noise(seed=number), words(number, 2))
            rows += [(*prompt, Answer(words(number + 3, 1 + number % 5))), (*prompt, Answer(words(number + 7, 4)))]
        batch = as_trees(numbered(batch_of(rows, tokenizer, pictures), examples))
        return _with_context(batch) if is_bag else batch

    return Case(scorer.train(), goal, block_paths(components), make, reference)


def _with_context(batch: Batch) -> Batch:
    """Every second token of the vocabulary is not looked for, but context."""
    is_context = batch.supervised & (batch.labels % 2 == 0)
    values = {CONTEXT: 1.5 * is_context[batch.supervised].float()}
    return replace(batch, weights=batch.weights.masked_fill(is_context, 0.0), token_values=values)


def _dual(loss: str, plan: str, dtype: torch.dtype) -> Case:
    model, tokenizer, image_processor = tiny_clip(dtype) if loss == "clip" else tiny_siglip(dtype)
    components = find_dual_components(model)
    rules = [{"match": part, "method": "full"} for part in components.modules]
    if plan == "frozen_vision":
        rules[0]["method"] = "frozen"
    _tune(model, components, rules)

    def make(examples: Sequence[int]) -> Batch:
        rows = [(noise(seed=n), Answer(words(n, 2 + n % 5) + "<|im_end|>")) for n in examples for n in (n, n + 20)]
        return numbered(batch_of(rows, tokenizer, Pictures(image_processor)), examples)  # type: ignore[arg-type]

    objective = ContrastiveObjective(ContrastiveConfig(loss=loss))  # type: ignore[arg-type]
    return Case(DualEncoderScorer(model, components).train(), objective, block_paths(components), make)


def _tune(model: nn.Module, components: Components, rules: list[dict[str, Any]]) -> TuningPlan:
    adapter: TypeAdapter[list[TuningRule]] = TypeAdapter(list[TuningRule])
    return apply_tuning(model, components, adapter.validate_python(rules), 1e-3)


@torch.no_grad()
def _move(model: nn.Module) -> None:
    """Away from the start: B = 0 would leave A without a gradient, and DPO on its reference without a margin."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))


def numbered(batch: Batch, examples: Sequence[int]) -> Batch:
    """Two rows an example, a winner and a loser; examples 1 and 6 have equal captions."""
    numbers = torch.arange(len(examples))
    keys = [1 if number == 6 else number for number in examples]
    return replace(
        batch,
        example_index=numbers.repeat_interleave(2),
        origins=tuple(Origin("exact.jsonl", number + 1) for number in examples for _ in (0, 1)),
        weights=batch.weights * (0.5 + torch.arange(batch.weights.shape[1]) % 3),
        pairs=torch.stack([2 * numbers, 2 * numbers + 1], dim=1),
        pair_weights=torch.tensor([1.0 + number % 2 for number in examples]),
        text_keys=torch.tensor([1 + 2 * key + branch for key in keys for branch in (0, 1)]),
    )


def words(start: int, count: int) -> str:
    """Some words, a pure function of the arguments."""
    known = TEXT.split()
    return " ".join(known[(start * 5 + step) % len(known)] for step in range(count))


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """Whole copies of all gradients that are there; every rank must call it."""
    found = {}
    for name, parameter in unwrap(module).named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.detach()
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
    return found


def run_alone(name: str, split: Split, dtype: torch.dtype = torch.float64) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in this process."""
    case = exact_case(name, dtype)
    window, source = case.window(split)
    result = run_window(case.scorer, case.objective, window, source, case.reference, runtime(), Progress(0, 1))
    return result.loss, gradients_of(case.scorer)


def run_rank(name: str, strategy: str) -> dict[str, Any]:
    """This rank's part of the window."""
    engine, case = runtime(strategy=strategy), exact_case(name)
    window, source = case.window(RANKS[distributed.rank()])
    module = engine.wrap(case.scorer, case.blocks)
    result = run_window(module, case.objective, window, source, case.reference, engine, Progress(0, 1))
    sharded = [key for key, item in unwrap(module).named_parameters() if isinstance(item, DTensor)]
    return {"loss": result.loss, "gradients": gradients_of(module), "sharded": sharded}


def block_paths(components: Components) -> list[str]:
    """Module paths of all transformer blocks, the units of sharding."""
    return [f"hf.{path}" for paths in components.layers.values() for path in paths]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report: Mapping[str, Any] = {
        f"{strategy}/{name}": run_rank(name, strategy) for strategy in ("ddp", "fsdp") for name in CASES
    }
    torch.save({**report, "world_size": distributed.world_size()}, folder / f"{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end()
