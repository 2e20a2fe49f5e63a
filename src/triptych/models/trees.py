"""Trees inside the language model: every trunk is computed once, and its branches see it and themselves only.

The tokens of a micro-batch are laid out as one row without padding, so that linear layers compute each token once.
Inside attention they are regrouped: trunks (and whole rows of trees with one branch) among themselves, under the causal
kernel; the branches of a tree over the trunk's keys and their own. Everything after the language model, labels and
log-probabilities, is again by rows. Loss and gradients equal those of the expanded rows up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from triptych.core.types import Batch

TREE_ATTENTION = "triptych_trees"
"""Name under which transformers knows the attention function; without trees it is the plain one (`sdpa`)."""


@dataclass(frozen=True)
class Group:
    """Queries that one attention call holds, and the keys they may see. G groups of Q queries and K keys, padded."""

    queries: Tensor
    """[G, Q] int64 numbers of packed tokens; 0 behind the end."""
    keys: Tensor
    """[G, K] int64 numbers of packed tokens; 0 behind the end."""
    num_queries: Tensor
    """[G] int64."""
    shared: Tensor
    """[G] int64: the first keys, which every query sees: the trunk of branches; 0 for trunks themselves."""
    num_shared: int
    """Keys before a branch's own, padding included."""
    is_causal: bool
    """Queries are the keys, each sees those up to itself: the causal kernel will do."""


@dataclass(frozen=True)
class TreeLayout:
    """Where the N tokens of the trees of a batch lie, and which of them see each other."""

    tokens: Tensor
    """[N] int64: place of each token in the flattened rows [R * L]; a trunk is taken from its first row."""
    places: Tensor
    """[R, L] int64: the number among the N of every token of every row; 0 on padding."""
    columns: Tensor
    """[N] int64 position of each token in its row."""
    rows: Tensor
    """[N] int64 row of each token."""
    groups: tuple[Group, ...]
    """Trunks, and branches where there are any."""
    order: Tensor
    """[N] int64: place of each token among the queries of all groups, flattened and joined."""
    blocks: Tensor | None
    """[N] int64: tokens of one number see each other in both directions (the pictures of Gemma 3), -1: none."""
    masks: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """Additive masks made so far, by group, sliding window and dtype; every layer of a kind shares one."""

    def mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [G, 1, Q, K] of a group; None where the causal kernel will do."""
        group = self.groups[number]
        if group.is_causal and self.blocks is None and (window is None or window >= group.queries.shape[1]):
            return None
        key = number, window, dtype
        if key not in self.masks:
            hidden = ~self._visible(group, window)[:, None]
            self.masks[key] = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        return self.masks[key]

    def _visible(self, group: Group, window: int | None) -> Tensor:
        """[G, Q, K] bool."""
        queries, keys = group.queries[:, :, None], group.keys[:, None, :]
        columns = self.columns.int()
        visible = columns[keys] <= columns[queries]
        if self.blocks is not None:
            blocks = self.blocks.int()
            visible |= (blocks[queries] == blocks[keys]) & (blocks[queries] >= 0)
        if window is not None:
            visible &= columns[queries] - columns[keys] < window
        rows = self.rows.int()
        own = rows[queries] == rows[keys]
        trunk = _before(group.shared, group.num_shared)
        end = _before(group.num_queries, group.queries.shape[1])
        own[:, :, : group.num_shared] = trunk[:, None, :]
        own[:, :, group.num_shared :] &= end[:, None, :]
        visible &= own
        # What stands behind the end of a group is read by nobody, but must not be the softmax of nothing.
        visible[:, :, 0] |= ~end
        return visible


def make_layout(batch: Batch, image_token_id: int | None) -> TreeLayout:
    """Lay out the trees of a batch.

    Args:
        image_token_id: given where the tokens of a picture see each other in both directions.
    """
    device = batch.input_ids.device
    length = batch.input_ids.shape[1]
    columns = torch.arange(length, device=device)
    is_first = torch.ones_like(batch.tree_index, dtype=torch.bool)
    is_first[1:] = batch.tree_index[1:] != batch.tree_index[:-1]
    firsts = is_first.nonzero()[:, 0]
    first = firsts[is_first.cumsum(0) - 1]
    real = columns < batch.lengths[:, None]
    own = real & (is_first[:, None] | (columns >= batch.trunk_lengths[:, None]))
    tokens = own.flatten().nonzero()[:, 0]
    numbers = own.flatten().cumsum(0).view_as(own) - 1
    places = torch.where(own, numbers, numbers[first]).masked_fill(~real, 0)
    groups = _make_groups(places, is_first.tolist(), batch.lengths.tolist(), batch.trunk_lengths.tolist())
    kept = torch.cat([_before(group.num_queries, group.queries.shape[1]).flatten() for group in groups])
    where = kept.nonzero()[:, 0]
    order = torch.empty_like(tokens)
    order[torch.cat([group.queries.flatten() for group in groups])[where]] = where
    return TreeLayout(
        tokens=tokens,
        places=places,
        columns=tokens % length,
        rows=tokens // length,
        groups=groups,
        order=order,
        blocks=None if image_token_id is None else _blocks(batch.input_ids == image_token_id)[tokens],
    )


def _make_groups(
    places: Tensor, is_first: list[bool], lengths: list[int], trunk_lengths: list[int]
) -> tuple[Group, ...]:
    """Trunks and whole rows [trees, ...]; branches, several of a tree in one group as long as they are no more tokens
    than its trunk, since the keys and the mask of a group grow with both."""
    starts = [row for row, flag in enumerate(is_first) if flag]
    trunks: list[Tensor] = []
    leaves: list[tuple[Tensor, Tensor]] = []
    for start, stop in zip(starts, [*starts[1:], len(is_first)], strict=True):
        if stop - start == 1:
            trunks.append(places[start, : lengths[start]])
            continue
        size = trunk_lengths[start]
        trunks.append(places[start, :size])
        branches = [places[row, size : lengths[row]] for row in range(start, stop) if lengths[row] > size]
        leaves += [(trunks[-1], part) for part in _join_branches(branches, size)]
    none = torch.zeros(len(trunks), dtype=torch.int64, device=places.device)
    queries, sizes = _pad(trunks)
    groups = [Group(queries, queries, sizes, none, 0, is_causal=True)]
    if leaves:
        queries, sizes = _pad([own for _, own in leaves])
        shared, num_shared = _pad([trunk for trunk, _ in leaves])
        keys = torch.cat([shared, queries], dim=1)
        groups.append(Group(queries, keys, sizes, num_shared, shared.shape[1], is_causal=False))
    return tuple(groups)


def _join_branches(branches: list[Tensor], most: int) -> list[Tensor]:
    joined: list[list[Tensor]] = []
    size = 0
    for branch in branches:
        if not joined or size + len(branch) > most:
            joined.append([])
            size = 0
        joined[-1].append(branch)
        size += len(branch)
    return [torch.cat(part) for part in joined]


def pack(rows: Tensor, layout: TreeLayout) -> Tensor:
    """[..., R, L] -> [..., 1, N]: the tokens of rows as the one row the language model gets."""
    return rows.flatten(-2)[..., layout.tokens].unsqueeze(-2)


def tree_inputs(layout: TreeLayout) -> dict[str, Any]:
    """Keyword arguments for the forward of a model that attends by trees, beside the packed tokens."""
    # A mask of four dimensions is handed on as it is, so that none is made; the attention function does not read it.
    return {"trees": layout, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.tokens.device)}


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    trees: TreeLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of packed trees, in the form that transformers calls; without `trees` its own (`sdpa`).

    Args:
        query: [1, H, N, D]; `key` and `value` may have fewer heads, each for several of the query's.

    Returns:
        [1, N, H, D], and no attention weights.
    """
    if trees is None:
        options = {"dropout": dropout, "scaling": scaling, **options}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    if options.get("softcap") is not None:
        raise ValueError("packed trees know no soft-capping of attention scores")
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):  # what autocast makes of them, but before they are copied
        dtype = torch.get_autocast_dtype(query.device.type)
    states = [item[0].transpose(0, 1).to(dtype) for item in (query, key, value)]
    outputs = []
    for number, group in enumerate(trees.groups):
        parts = [states[0][group.queries], states[1][group.keys], states[2][group.keys]]
        mask = trees.mask(number, options.get("sliding_window"), dtype)
        outputs.append(_attend([part.transpose(1, 2) for part in parts], mask, dropout, scaling))
    return torch.cat(outputs)[trees.order].unsqueeze(0), None


def _attend(states: list[Tensor], mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    """[G * Q, H, D]."""
    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    # With a mask, only the CPU has a kernel for fewer key heads.
    has_kernel = mask is None or query.device.type == "cpu"
    if repeats > 1 and not has_kernel:
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    joined = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=repeats > 1 and has_kernel,
    )
    return joined.transpose(1, 2).flatten(0, 1)


def use_tree_attention(hf: PreTrainedModel) -> None:
    """Let the language model of `hf` attend by trees where it is handed a layout; all else stays as it was.

    Recomputation in the backward pass reads the same setting, so it cannot be switched on for a forward pass alone.
    """
    hf.set_attn_implementation({"text_config": TREE_ATTENTION})


def _pad(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[n, longest] with 0 behind the end, and the lengths [n]."""
    sizes = torch.tensor([len(part) for part in parts], device=parts[0].device)
    return nn.utils.rnn.pad_sequence(parts, batch_first=True), sizes


def _before(lengths: Tensor, width: int) -> Tensor:
    """[n, width] bool: the first `lengths[i]` of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _blocks(is_image: Tensor) -> Tensor:
    """[R * L] int64: a number for each run of True within a row, -1 elsewhere."""
    starts = is_image.clone()
    starts[:, 1:] &= ~is_image[:, :-1]
    return torch.where(is_image, starts.flatten().cumsum(0).view_as(is_image), -1).flatten()


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
