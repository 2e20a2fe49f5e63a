"""What the model is taught, token by token: colour says what a token is, brightness whether it is learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from triptych.core.types import IGNORE, Branch, Example, TokenKind
from triptych.data.collate import DEFAULT_KIND_WEIGHTS

_COLOURS: Mapping[TokenKind, str] = {
    TokenKind.SPECIAL: "bright_black",
    TokenKind.SYSTEM: "magenta",
    TokenKind.INSTRUCTION: "blue",
    TokenKind.IMAGE: "yellow",
    TokenKind.RESPONSE: "green",
    TokenKind.END_OF_TURN: "red",
    TokenKind.BOX: "cyan",
    TokenKind.ENTITY: "bright_cyan",
}


def show_example(
    example: Example, tokenizer: Any, kind_weights: Mapping[TokenKind, float] | None = None
) -> RenderableType:
    """Draw an example: tokens coloured by kind; learned ones reversed, and dim where they weigh less than 1.

    Args:
        example: a tokenised sample; the trunk is drawn once, then each branch.
        tokenizer: turns ids back into text.
        kind_weights: as in `collate`.
    """
    weights = DEFAULT_KIND_WEIGHTS if kind_weights is None else kind_weights
    lines: list[RenderableType] = [
        Text(f"{example.origin}  {example.task}".rstrip(), style="bold"),
        _describe(example.trunk, "trunk", tokenizer, weights),
    ]
    for index, branch in enumerate(example.branches):
        name = f"branch {index}" if len(example.branches) > 1 else "answer"
        lines.append(_describe(branch, name, tokenizer, weights))
    for pair in example.pairs:
        lines.append(Text(f"branch {pair.winner} beats branch {pair.loser} (weight {pair.weight:g})"))
    return Group(*lines, legend(example, weights))


def legend(example: Example, kind_weights: Mapping[TokenKind, float]) -> Text:
    """One line: each kind that occurs, its colour, tokens, and the sum of its weights over the rows."""
    counts = dict.fromkeys(TokenKind, 0)
    sums = dict.fromkeys(TokenKind, 0.0)
    for branch in example.branches:
        for part in (example.trunk, branch):
            for kind, weight in zip(part.kinds.tolist(), _weights(part, kind_weights).tolist(), strict=True):
                counts[TokenKind(kind)] += 1
                sums[TokenKind(kind)] += weight
    line = Text("legend: ")
    for kind, colour in _COLOURS.items():
        if counts[kind]:
            line.append(kind.name.lower().replace("_", " "), style=colour)
            line.append(f" {counts[kind]} tokens, weight {sums[kind]:g}   ")
    return line


def _describe(part: Branch, name: str, tokenizer: Any, kind_weights: Mapping[TokenKind, float]) -> Text:
    line = Text(f"{name}, {len(part.input_ids)} tokens: ")
    columns = list(
        zip(part.kinds.tolist(), (part.labels != IGNORE).tolist(), _weights(part, kind_weights).tolist(), strict=True)
    )
    runs = [(key, len(list(group))) for key, group in itertools.groupby(columns)]
    names = _picture_names(part.images, sum(key[0] == TokenKind.IMAGE for key, _ in runs))
    start = 0
    for (kind, is_learned, weight), length in runs:
        style = _COLOURS[TokenKind(kind)]
        if kind == TokenKind.IMAGE:
            line.append(f"[{next(names)}: {length} tokens]", style=style)
        else:
            if is_learned:
                style += " reverse" if weight >= 1 else " reverse dim"
            ids = part.input_ids[start : start + length].tolist()
            line.append(tokenizer.decode(ids, skip_special_tokens=False), style=style)
        start += length
    return line


def _picture_names(images: Sequence[int], num_runs: int) -> Iterator[str]:
    """Names for the runs of picture tokens; pictures that touch share a run, whose borders the tokens do not tell."""
    if num_runs == len(images):
        return (f"picture {image}" for image in images)
    if num_runs == 1:
        return iter([f"pictures {images[0]}-{images[-1]}"])
    return itertools.repeat("pictures")


def _weights(part: Branch, kind_weights: Mapping[TokenKind, float]) -> Tensor:
    table = torch.tensor([kind_weights.get(kind, 0.0) for kind in TokenKind])
    return (part.weights * table[part.kinds.long()]).masked_fill(part.labels == IGNORE, 0.0)
