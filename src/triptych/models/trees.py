"""Trees inside the language model: every trunk is computed once, and its branches see it and themselves only.

The tokens of a micro-batch are laid out as one row without padding, so that linear layers compute each token once.
Inside attention they are regrouped: trunks (and whole rows of examples with one branch) among themselves, under the
causal kernel; the branches of a tree over the trunk's keys and their own. Everything after the language model, labels and
log-probabilities, is again by rows. Loss and gradients equal those of the expanded rows up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from triptych.core.types import Batch

TREE_ATTENTION = "triptych_trees"
"""Name under which transformers knows the attention function; one it has no mask function for, so it builds no mask."""


@dataclass(frozen=True)
class TreeLayout:
    """Where the N tokens of the trees of a batch lie, and which of them see each other.

    A group is what one attention call holds: roots [E, T] are the trunks of examples with several branches and the
    whole rows of those with one; leaves [M, K] are all branches of a tree with several, one behind the other.
    """

    tokens: Tensor
    """[N] int64: place of each token in the flattened rows [R * L]; a trunk is taken from its first row."""
    places: Tensor
    """[R, L] int64: the number among the N of every token of every row; 0 on padding."""
    roots: Tensor
    """[E, T] int64 numbers among the N; 0 behind the end."""
    root_lengths: Tensor
    """[E] int64."""
    leaves: Tensor
    """[M, K] int64 numbers among the N; 0 behind the end."""
    leaf_lengths: Tensor
    """[M] int64."""
    leaf_roots: Tensor
    """[M] int64: the root whose trunk the leaves continue."""
    order: Tensor
    """[N] int64: place of each token in the roots and leaves, flattened and joined."""
    columns: Tensor
    """[N] int64 position of each token in its row."""
    rows: Tensor
    """[N] int64 row of each token."""
    blocks: Tensor | None
    """[N] int64: tokens of one number see each other in both directions (the pictures of Gemma 3), -1: none."""
    masks: dict[tuple[str, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """Additive masks made so far, by group, sliding window and dtype; every layer of a kind shares one."""

    def mask(self, group: str, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [groups, 1, queries, keys] of `roots` or `leaves`; None where the causal kernel will do."""
        if group == "roots" and self.blocks is None and (window is None or window >= self.roots.shape[1]):
            return None
        key = group, window, dtype
        if key not in self.masks:
            visible = self._visible(group, window)
            self.masks[key] = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
                ~visible, torch.finfo(dtype).min
            )
        return self.masks[key]

    def _visible(self, group: str, window: int | None) -> Tensor:
        queries, lengths = (
            (self.roots, self.root_lengths) if group == "roots" else (self.leaves, self.leaf_lengths)
        )
        valid = _before(lengths, queries.shape[1])
        keys, trunk = queries, 0
        if group == "leaves":
            trunk = self.roots.shape[1]
            keys = torch.cat([self.roots[self.leaf_roots], queries], dim=1)
            valid = torch.cat([_before(self.root_lengths[self.leaf_roots], trunk), valid], dim=1)
        ahead = self.columns[queries][:, :, None] - self.columns[keys][:, None, :]
        visible = ahead >= 0
        if window is not None:
            visible &= ahead < window
        if self.blocks is not None:
            left, right = self.blocks[queries][:, :, None], self.blocks[keys][:, None, :]
            visible |= (left == right) & (left >= 0)
        own = self.rows[queries][:, :, None] == self.rows[keys][:, None, :]
        own[:, :, :trunk] = True
        visible &= own & valid[:, None, :]
        # What stands behind the end of a group is read by nobody, but must not be the softmax of nothing.
        visible[:, :, 0] |= ~_before(lengths, queries.shape[1])
        return visible[:, None]


def make_layout(batch: Batch, image_token_id: int | None) -> TreeLayout:
    """Lay out the trees of a batch.

    Args:
        image_token_id: given where the tokens of a picture see each other in both directions.
    """
    device = batch.input_ids.device
    length = batch.input_ids.shape[1]
    columns = torch.arange(length, device=device)
    rows = torch.arange(batch.num_rows, device=device)
    is_first = torch.ones_like(batch.tree_index, dtype=torch.bool)
    is_first[1:] = batch.tree_index[1:] != batch.tree_index[:-1]
    first_rows = is_first.nonzero()[:, 0]
    first = first_rows[is_first.cumsum(0) - 1]
    real = columns < batch.lengths[:, None]
    own = real & (is_first[:, None] | (columns >= batch.trunk_lengths[:, None]))
    tokens = own.flatten().nonzero()[:, 0]
    numbers = own.flatten().cumsum(0).view_as(own) - 1
    places = torch.where(own, numbers, numbers[first]).masked_fill(~real, 0)
    sizes = torch.zeros_like(first_rows).index_add_(0, is_first.cumsum(0) - 1, own.sum(1))
    num_rows = torch.diff(first_rows, append=first_rows.new_tensor([batch.num_rows]))
    root_lengths = torch.where(num_rows > 1, batch.trunk_lengths[first_rows], batch.lengths[first_rows])
    roots = places[first_rows, : int(root_lengths.max())]
    roots = roots.masked_fill(~_before(root_lengths, roots.shape[1]), 0)
    leaf_roots = (sizes > root_lengths).nonzero()[:, 0]
    leaf_lengths = (sizes - root_lengths)[leaf_roots]
    leaves = torch.zeros(0, 0, dtype=torch.int64, device=device)
    if len(leaf_roots):
        starts = (numbers[first_rows, 0] + root_lengths)[leaf_roots]
        offsets = torch.arange(int(leaf_lengths.max()), device=device)
        leaves = (starts[:, None] + offsets).masked_fill(~_before(leaf_lengths, len(offsets)), 0)
    order = torch.empty_like(tokens)
    kept = torch.cat([_before(root_lengths, roots.shape[1]).flatten(), _before(leaf_lengths, leaves.shape[1]).flatten()])
    where = kept.nonzero()[:, 0]
    order[torch.cat([roots.flatten(), leaves.flatten()])[where]] = where
    return TreeLayout(
        tokens=tokens,
        places=places,
        roots=roots,
        root_lengths=root_lengths,
        leaves=leaves,
        leaf_lengths=leaf_lengths,
        leaf_roots=leaf_roots,
        order=order,
        columns=columns.expand(batch.num_rows, length).flatten()[tokens],
        rows=rows[:, None].expand(batch.num_rows, length).flatten()[tokens],
        blocks=None if image_token_id is None else _blocks(batch.input_ids == image_token_id)[tokens],
    )


def pack(rows: Tensor, layout: TreeLayout) -> Tensor:
    """[..., R, L] -> [..., 1, N]: the tokens of rows as the one row the language model gets."""
    return rows.flatten(-2)[..., layout.tokens].unsqueeze(-2)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    trees: TreeLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed trees, in the form that transformers calls.

    Args:
        query: [1, H, N, D]; `key` and `value` may have fewer heads, each for several of the query's.

    Returns:
        [1, N, H, D], and no attention weights.
    """
    if trees is None or attention_mask is not None or softcap is not None:
        raise ValueError(
            "packed trees need a layout, no attention mask and no soft-capping; to use the model inside a scorer as it "
            "is, do so within `plain_attention`"
        )
    heads = [states[0].transpose(0, 1) for states in (query, key, value)]

    def attend(states: list[Tensor], group: str) -> Tensor:
        mask = trees.mask(group, sliding_window, query.dtype)
        joined = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in states),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return joined.transpose(1, 2).flatten(0, 1)

    outputs = attend([part[trees.roots] for part in heads], "roots")
    if len(trees.leaves):
        trunks, leaves = trees.roots[trees.leaf_roots], trees.leaves
        keys = torch.cat([trunks, leaves], dim=1)
        outputs = torch.cat([outputs, attend([heads[0][leaves], heads[1][keys], heads[2][keys]], "leaves")])
    return outputs[trees.order].unsqueeze(0), None


def use_tree_attention(hf: PreTrainedModel) -> None:
    """Let the language model of `hf` attend by trees, until the end of its life but for `plain_attention`.

    Recomputation in the backward pass reads the same setting, so it cannot be switched on for a forward pass alone.
    """
    hf.set_attn_implementation({"text_config": TREE_ATTENTION})


@contextmanager
def plain_attention(hf: PreTrainedModel) -> Iterator[None]:
    """The language model of `hf` as transformers has it, for generating; nothing where it attends by trees no more."""
    config = hf.config.get_text_config()
    if config._attn_implementation != TREE_ATTENTION:
        yield
        return
    hf.set_attn_implementation({"text_config": "sdpa"})
    try:
        yield
    finally:
        use_tree_attention(hf)


def _before(lengths: Tensor, width: int) -> Tensor:
    """[n, width] bool: the first `lengths[i]` of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _blocks(is_image: Tensor) -> Tensor:
    """[R * L] int64: a number for each run of True within a row, -1 elsewhere."""
    starts = is_image.clone()
    starts[:, 1:] &= ~is_image[:, :-1]
    return torch.where(is_image, starts.flatten().cumsum(0).view_as(is_image), -1).flatten()


AttentionInterface.register(TREE_ATTENTION, tree_attention)
