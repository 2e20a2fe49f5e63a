"""New tokens: ids given out by the tokenizer, rows of the embedding and of the output head that start at the mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from pydantic import Field
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from triptych.core.config import Config
from triptych.core.errors import ModelError, Problem

NOISE = 0.01
"""Noise on new rows, in standard deviations of the existing entries: a thousand equal rows would get equal gradients
wherever only one of them is the target, and their logits would tie."""


class TokensConfig(Config):
    """Tokens to add to the vocabulary. Those it already has keep their ids and rows."""

    names: tuple[str, ...] = ()
    """Single tokens, e.g. `<box>`, `</box>`; they stay visible in decoded answers."""
    series: dict[str, int] = Field(default_factory=dict)
    """Pattern with one `{}` -> how many, from 0: `"<x{}>": 1000` gives `<x0>` ... `<x999>` with ids in a row."""


@dataclass(frozen=True)
class TokenRegistry:
    """Which id each registered token has."""

    ids: Mapping[str, int] = field(default_factory=dict)
    """Token -> id."""
    series: Mapping[str, range] = field(default_factory=dict)
    """Pattern -> its ids, in order."""
    new_ids: tuple[int, ...] = ()
    """Ids that the vocabulary did not have before: rows that need training whatever happens to the rest."""


def register_tokens(
    tokenizer: PreTrainedTokenizerBase, config: TokensConfig, special: Iterable[str] = ()
) -> TokenRegistry:
    """Add what is missing to `tokenizer`, in order, and check every id.

    Args:
        special: tokens that decoding leaves out, such as the picture placeholder.

    Raises:
        ModelError: a token is named twice, stays unknown, is still split into pieces, shares its id with another,
            or a series would not have ids in a row.
    """
    special = tuple(special)
    patterns = {pattern: _expand(pattern, count) for pattern, count in config.series.items()}
    names = (*special, *config.names, *(name for members in patterns.values() for name in members))
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ModelError(f"tokens named more than once: {', '.join(twice[:5])}", remedy="name each token once")
    known = tokenizer.get_vocab()
    missing = [name for name in names if name not in known]
    tokenizer.add_tokens([AddedToken(name, special=name in special, normalized=False) for name in missing])
    ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}
    _check_ids(tokenizer, ids)
    series = {pattern: _as_range(pattern, [ids[name] for name in members]) for pattern, members in patterns.items()}
    return TokenRegistry(ids, series, tuple(ids[name] for name in missing))


@torch.no_grad()
def grow_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_ids: tuple[int, ...]
) -> tuple[int, ...]:
    """Give the embedding, and the output head if it has weights of its own, rows for every id of the tokenizer.

    New rows become the mean of the rows of all other ids plus a little noise (always the same): those of `new_ids`,
    also where the checkpoint had spare rows for them, and those of other ids the model had no row for. Rows are added,
    never taken away.

    Returns:
        The ids whose rows are new, in order; empty when there was nothing to do.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    fresh = tuple(sorted({*new_ids, *range(rows, len(tokenizer))}))
    if not fresh:
        return ()
    if rows < len(tokenizer):
        # mean_resizing would fit a full covariance to all rows (minutes for large vocabularies) and leave spare rows.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding = model.get_input_embeddings().weight
    _initialise_rows(embedding, fresh, len(tokenizer))
    head = model.get_output_embeddings()
    if head is not None and head.weight is not embedding:
        _initialise_rows(head.weight, fresh, len(tokenizer))
    return fresh


def _initialise_rows(weight: Tensor, new_ids: tuple[int, ...], size: int) -> None:
    old = torch.ones(size, dtype=torch.bool, device=weight.device)
    old[list(new_ids)] = False
    rows = weight[:size][old].float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(new_ids), weight.shape[1], generator=generator).to(weight.device)
    weight[list(new_ids)] = (rows.mean(0) + NOISE * rows.std() * noise).to(weight.dtype)


def _expand(pattern: str, count: int) -> list[str]:
    if pattern.count("{}") != 1 or count < 1:
        raise ModelError(
            f"token series `{pattern}`: {count} is not usable", remedy='write e.g. `"<x{}>": 1000`, with one {}'
        )
    return [pattern.replace("{}", str(index)) for index in range(count)]


def _check_ids(tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, int]) -> None:
    problems: list[Problem] = []
    owners: dict[int, str] = {}
    for name, index in ids.items():
        pieces = tokenizer.encode(name, add_special_tokens=False)
        if index == tokenizer.unk_token_id and name != tokenizer.unk_token:
            problems.append(Problem(f"token `{name}` has the id of the unknown token, {index}"))
        elif pieces != [index]:
            problems.append(Problem(f"token `{name}` has id {index} but its text becomes {pieces}"))
        if index in owners:
            problems.append(Problem(f"tokens `{owners[index]}` and `{name}` share id {index}"))
        owners[index] = name
    if problems:
        raise ModelError(problems)


def _as_range(pattern: str, ids: list[int]) -> range:
    expected = range(ids[0], ids[0] + len(ids))
    if ids != list(expected):
        raise ModelError(
            f"token series `{pattern}` does not have ids in a row: it starts at {ids[0]}, ends at {ids[-1]}",
            remedy="part of it is already in the vocabulary; use another pattern",
        )
    return expected
