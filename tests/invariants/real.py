"""Windows for real architectures (tiny random weights): Llava with `language` and `dpo`, SigLIP and CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tests.invariants.toys import OBJECTIVES, ToySource
from tests.tiny import Answer, Row, as_trees, batch_of, noise, tiny_clip, tiny_family, tiny_siglip
from triptych.core.types import Batch, Origin, ParameterGroup, Window
from triptych.models.components import Components, find_components
from triptych.models.dual_encoder import DualEncoderScorer, find_dual_components
from triptych.models.pictures import make_pictures
from triptych.models.reference import FrozenReference
from triptych.models.vlm import VlmScorer

TEXT = "a small red cube stands behind two green balls and one very old blue lamp"
UNUSED = "hf.model.vision_tower.post_layernorm"
"""Llava takes its features before it."""


class Pictures:
    """A dual encoder's pictures take no place in the text."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def token_ids(self, width: int, height: int) -> list[int]:
        return []

    def pixels(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor(pictures, return_tensors="pt"))


class Attached(ToySource):
    """Gives each batch the pixels it was made with."""

    def __init__(self, pixels: Mapping[tuple[Origin, ...], Mapping[str, Tensor] | None]) -> None:
        super().__init__()
        self.pixels = pixels

    def attach(self, batch: Batch) -> Batch:
        return replace(batch, pixels=self.pixels[batch.origins])


@dataclass
class Case:
    """A scorer, its objective, and windows over eight examples in any split."""

    scorer: nn.Module
    objective: Any
    blocks: list[str]
    make: Callable[[Sequence[int]], Batch]
    reference: FrozenReference | None = None

    def window(self, split: Sequence[Sequence[int]]) -> tuple[Window, Attached]:
        """Examples of each micro-batch; without any, a padding batch. Light, with the source of their pixels."""
        batches = [self.make(examples) for examples in split]
        if not batches:
            batches = [replace(self.make((0,)), is_padding=True)]
        pixels = {batch.origins: batch.pixels for batch in batches}
        return Window(0, 0.0, tuple(replace(batch, pixels=None) for batch in batches)), Attached(pixels)

    def groups(self) -> list[ParameterGroup]:
        trainable = {name: item for name, item in self.scorer.named_parameters() if item.requires_grad}
        return [ParameterGroup("all", "all", trainable, lr=1e-3, weight_decay=0.0)]


def real_case(name: str) -> Case:
    """`llava/language`, `llava/dpo`, `siglip/siglip` or `clip/clip`; weights are the same on every call."""
    family, objective = name.split("/")
    return _vlm(family, objective) if family == "llava" else _dual(family, objective)


def _vlm(family: str, objective: str) -> Case:
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    components = find_components(model)
    scorer = VlmScorer(model, components, pictures=pictures).train()
    scorer.get_submodule(UNUSED).requires_grad_(False)

    def make(examples: Sequence[int]) -> Batch:
        # Every third example has no picture; the two answers of a pair share theirs and differ in length.
        rows: list[Row] = []
        for number in examples:
            prompt = (_words(number, 2),) if number % 3 == 2 else (noise(seed=number), _words(number, 2))
            rows += [(*prompt, Answer(_words(number + 3, 1 + number % 5))), (*prompt, Answer(_words(number + 7, 4)))]
        return as_trees(_number(batch_of(rows, tokenizer, pictures), examples))

    reference = FrozenReference(VlmScorer(tiny_family(family, seed=5)[0], components)) if objective == "dpo" else None
    return Case(scorer, OBJECTIVES[objective], _blocks(components), make, reference)


def _dual(family: str, objective: str) -> Case:
    model, tokenizer, image_processor = tiny_clip() if family == "clip" else tiny_siglip()
    components = find_dual_components(model)

    def make(examples: Sequence[int]) -> Batch:
        rows = [(noise(seed=n), Answer(_words(n, 2 + n % 5) + "<|im_end|>")) for n in examples for n in (n, n + 20)]
        return _number(batch_of(rows, tokenizer, Pictures(image_processor)), examples)  # type: ignore[arg-type]

    return Case(DualEncoderScorer(model, components).train(), OBJECTIVES[objective], _blocks(components), make)


def _number(batch: Batch, examples: Sequence[int]) -> Batch:
    """Two rows an example."""
    numbers = torch.arange(len(examples))
    return replace(
        batch,
        example_index=numbers.repeat_interleave(2),
        origins=tuple(Origin("real.jsonl", number + 1) for number in examples for _ in (0, 1)),
        pairs=torch.stack([2 * numbers, 2 * numbers + 1], dim=1),
        pair_weights=torch.tensor([1.0 + number % 2 for number in examples]),
        text_keys=torch.tensor([1 + 2 * number + branch for number in examples for branch in (0, 1)]),
    )


def _blocks(components: Components) -> list[str]:
    return [f"hf.{path}" for paths in components.layers.values() for path in paths]


def _words(start: int, count: int) -> str:
    words = TEXT.split()
    return " ".join(words[(start * 5 + step) % len(words)] for step in range(count))
