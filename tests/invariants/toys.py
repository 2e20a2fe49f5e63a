"""Toy models, batches and sources whose windows can be split in any way; float64 unless said."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from triptych.core.types import (
    IGNORE,
    Batch,
    ImageReference,
    Origin,
    ParameterGroup,
    Progress,
    Scores,
    TokenKind,
    Window,
    WindowValues,
)
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from triptych.objectives.language import LanguageConfig, LanguageObjective
from triptych.objectives.preference import DpoConfig, DpoObjective

VOCABULARY = 23
WIDTH = 8
OBJECTIVES: dict[str, Any] = {
    "language": LanguageObjective(LanguageConfig()),
    "clip": ContrastiveObjective(ContrastiveConfig(loss="clip")),
    "siglip": ContrastiveObjective(ContrastiveConfig(loss="siglip")),
    "dpo": DpoObjective(DpoConfig(beta=0.7, sft_coefficient=0.3)),
}
SPLITS: dict[str, tuple[int, ...]] = {"1x8": (8,), "8x1": (1,) * 8, "ragged": (3, 1, 4), "2x4": (4, 4)}


class Block(nn.Module):
    """A residual layer with a norm and optional dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(torch.tanh(self.linear(self.norm(hidden))))


class ToyScorer(nn.Module):
    """Fills every field of `Scores` that the objectives of these tests read."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.vision = nn.Linear(WIDTH, WIDTH)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.ModuleList([Block(dropout), Block(dropout)])
            self.head = nn.Linear(WIDTH, VOCABULARY)
            self.temperature = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
            self.bias = nn.Parameter(torch.tensor(-2.0))
        self.double()

    def forward(self, batch: Batch) -> Scores:
        assert batch.pixels is not None, "pixels must be attached before the forward pass"
        pictures = self.vision(batch.pixels["values"].to(self.vision.weight.dtype))
        rows = torch.stack([pictures[list(indices)].sum(dim=0) for indices in batch.row_images])
        mask = batch.attention_mask[:, :, None]
        hidden = self.embedding(batch.input_ids) * mask
        hidden = hidden.cumsum(dim=1) / mask.cumsum(dim=1) + rows[:, None, :]
        for block in self.blocks:
            hidden = block(hidden)
        logprobs = self.head(hidden).log_softmax(dim=-1)[:, :-1]
        scored = logprobs.gather(2, batch.input_ids[:, 1:, None])[:, :, 0][batch.supervised[:, 1:]]
        return Scores(
            token_logprobs=scored,
            image_embeddings=rows,
            text_embeddings=(hidden * mask).sum(dim=1),
            logit_scale=self.temperature.exp(),
            logit_bias=self.bias,
        )


class ToySource:
    """Pixels follow from the picture's name."""

    total_windows = 1

    def __init__(self) -> None:
        self.attached: list[Batch] = []

    def windows(self) -> Iterator[Window]:
        raise NotImplementedError

    def attach(self, batch: Batch) -> Batch:
        self.attached.append(batch)
        pixels = [_pixels(image.name) for image in batch.images]
        return replace(batch, pixels={"values": torch.stack(pixels)})

    def report(self, metrics: Mapping[str, float]) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


class ToyReference:
    """A frozen model of other weights."""

    def __init__(self) -> None:
        self.scorer = ToyScorer(seed=99)

    @torch.no_grad()
    def attach(self, batch: Batch) -> Batch:
        logprobs = self.scorer(batch).token_logprobs
        assert logprobs is not None
        return replace(batch, token_values={**batch.token_values, "reference_logprobs": logprobs})


def runtime(**settings: Any) -> Runtime:
    """Full precision unless said."""
    return Runtime(RuntimeConfig(**{"precision": "fp32", **settings}))


def toy_batch(examples: Sequence[int], seed: int = 7, is_padding: bool = False) -> Batch:
    """Examples by number: two rows each (a winner and a loser) of very different lengths, one picture each."""
    rows = [_row(2 * example + branch, seed) for example in examples for branch in (0, 1)]
    length = max(len(ids) for ids, _ in rows)
    num_rows = len(rows)
    ids = torch.zeros(num_rows, length, dtype=torch.long)
    labels = torch.full((num_rows, length), IGNORE)
    weights = torch.zeros(num_rows, length)
    for index, (tokens, prompt) in enumerate(rows):
        ids[index, : len(tokens)] = tokens
        labels[index, prompt : len(tokens)] = tokens[prompt:]
        weights[index, prompt : len(tokens)] = 0.5 + torch.arange(len(tokens) - prompt) % 3
    numbers = torch.arange(len(examples))
    origins = tuple(Origin("toy.jsonl", example + 1) for example in examples for _ in (0, 1))
    return Batch(
        input_ids=ids,
        labels=labels,
        weights=weights,
        kinds=torch.full((num_rows, length), int(TokenKind.RESPONSE), dtype=torch.uint8),
        lengths=torch.tensor([len(tokens) for tokens, _ in rows]),
        example_index=numbers.repeat_interleave(2),
        tree_index=numbers.repeat_interleave(2),
        trunk_lengths=torch.ones(num_rows, dtype=torch.long),
        images=tuple(ImageReference(name=f"{example}.png") for example in examples),
        row_images=tuple((index,) for index in range(len(examples)) for _ in (0, 1)),
        origins=origins,
        tasks=tuple("even" if origin.line % 2 else "odd" for origin in origins),
        pairs=torch.stack([2 * numbers, 2 * numbers + 1], dim=1),
        pair_weights=torch.tensor([1.0 + example % 3 for example in examples]),
        # Examples 2 and 5 share their captions: rows that are positives of each other across micro-batches.
        text_keys=torch.tensor([100 + 2 * (2 if n == 5 else n) + branch for n in examples for branch in (0, 1)]),
        is_padding=is_padding,
    )


def toy_window(split: Sequence[int], first: int = 0) -> Window:
    """A window of examples `first`, `first + 1`, ... cut into micro-batches of the given sizes."""
    batches = []
    for size in split:
        batches.append(toy_batch(range(first, first + size)))
        first += size
    return Window(index=0, epoch=0.0, batches=tuple(batches))


def toy_groups(scorer: ToyScorer) -> list[ParameterGroup]:
    """Vision, language and temperature, with learning rates of their own."""
    parameters = dict(scorer.named_parameters())
    vision = {name: item for name, item in parameters.items() if name.startswith("vision.")}
    heads = {name: item for name, item in parameters.items() if name in ("temperature", "bias")}
    language = {name: item for name, item in parameters.items() if name not in {**vision, **heads}}
    return [
        ParameterGroup("vision", "vision", vision, lr=1e-2, weight_decay=0.1),
        ParameterGroup("language", "language", language, lr=2e-2, weight_decay=0.1),
        ParameterGroup("heads", "heads", heads, lr=3e-2, weight_decay=0.1),
    ]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients; a missing one is an error."""
    result = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        result[name] = parameter.grad.clone()
    return result


def relative_distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """L2 norm of the difference of two whole gradients over the norm of the first."""
    assert left.keys() == right.keys()
    difference = sum(float((item.double() - right[name].double()).square().sum()) for name, item in left.items())
    return math.sqrt(difference / sum(float(item.double().square().sum()) for item in left.values()))


def direct_gradients(scorer: ToyScorer, name: str, num_examples: int = 8) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole window as one batch, without the engine: the definition."""
    objective = OBJECTIVES[name]
    scorer = deepcopy(scorer)
    batch = ToyReference().attach(ToySource().attach(toy_batch(range(num_examples))))
    scores = scorer(batch)
    if name in ("clip", "siglip"):
        values = objective.observe(scores, batch)
        window = WindowValues(values, dict.fromkeys(values, 0), dict.fromkeys(values, batch.num_rows))
        terms = objective.window_terms(batch, window)
    else:
        terms = objective.terms(scores, batch, None)
    weights = objective.weights(batch, Progress(0, 1))
    loss = sum(factor * terms[term] / weights[term].double() for term, factor in objective.coefficients.items())
    loss.backward()
    zeros = {key: torch.zeros_like(parameter) for key, parameter in scorer.named_parameters()}
    found = {key: item.grad for key, item in scorer.named_parameters() if item.grad is not None}
    return float(loss.detach()), {**zeros, **found}


def _row(row: int, seed: int) -> tuple[Tensor, int]:
    """Ids of 3 to 15 tokens, of which the first 1 or 2 are the prompt."""
    generator = torch.Generator().manual_seed(seed * 1000 + row)
    length = int(torch.randint(3, 16, (), generator=generator))
    return torch.randint(1, VOCABULARY, (length,), generator=generator), 1 + row % 2


def _pixels(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(WIDTH, generator=generator, dtype=torch.float64)
