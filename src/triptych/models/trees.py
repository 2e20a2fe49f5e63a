"""Trees inside the language model: every trunk is computed once, and its branches see it and themselves only.

The tokens of a micro-batch are laid out as one row without padding, so that linear layers compute each token once; how
they see each other is in `tree_attention`. Everything after the language model, labels and log-probabilities, is again
by rows. Loss and gradients equal those of the expanded rows up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from triptych.core.types import Batch

LIKE_LENGTH = 0.8
"""Runs of tokens at least this share of the longest are padded to it."""

STRETCH = 128
"""Tokens that the causal kernel gets at once: it computes what it hides, too."""
SHORT = 0.25
"""Share of that which does not become a stretch of its own."""


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
class Runs:
    """G runs of neighbouring packed tokens, of like length and padded to the longest, L. No token is in two.

    Rows are taken by `index_select` and its like, never by `states[index]`: 7 runs of 128 tokens of 9 heads took 0.03
    instead of 0.17 ms on two cores, and 0.07 instead of 0.53 to be added back.
    """

    index: Tensor
    """[G, L] int64 numbers of packed tokens; 0 behind the end."""
    is_real: Tensor | None
    """[G, L] bool; None where all are of one length."""
    start: int
    """First token of the first run."""
    step: int | None
    """Tokens from the start of one run to that of the next; None where that differs or is negative, or where runs are
    padded; 0 of a single run."""
    tokens: Tensor
    """[T] int64 numbers of the packed tokens of all runs."""
    kept: Tensor | None
    """[T] int64: where those stand in the flattened [G * L]; None where all are of one length."""

    def take(self, states: Tensor) -> Tensor:
        """[G, L, ...] of [N, ...]; not copied where runs follow each other evenly."""
        if self.step is None:
            return states.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        stride = states.stride()
        return states[self.start :].as_strided((*self.index.shape, *states.shape[1:]), (self.step * stride[0], *stride))

    def put(self, states: Tensor, values: Tensor) -> None:
        """Write [G, L, ...] into [N, ...]; padding is left out."""
        if self.step is None:
            states.index_copy_(0, self.tokens, self._chosen(values))
        else:
            self.take(states).copy_(values)

    def add(self, states: Tensor, values: Tensor) -> None:
        """Add [G, L, ...] to [N, ...]; padding is left out."""
        if self.step is None:
            states.index_add_(0, self.tokens, self._chosen(values))
        else:
            self.take(states).add_(values)

    def _chosen(self, values: Tensor) -> Tensor:
        values = values.flatten(0, 1)
        return values if self.kept is None else values.index_select(0, self.kept)


@dataclass(frozen=True)
class Part:
    """Queries and keys of one call of a kernel without mask."""

    queries: Runs
    keys: Runs | None
    """Every query of a run sees all of the run of keys; None: the queries see each other in causal order."""


@dataclass(frozen=True)
class TreeLayout:
    """Where the N tokens of the trees of a batch lie, and which of them see each other."""

    tokens: Tensor
    """[N] int64: place of each token in the flattened rows [R * L]; a trunk is taken from its first row."""
    places: Tensor
    """[R, L] int64: the number among the N of every token of every row; 0 on padding."""
    columns: Tensor
    """[N] int32 position of each token in its row."""
    rows: Tensor
    """[N] int32 row of each token."""
    trees: Tensor
    """[N] int32 tree of each token."""
    is_trunk: Tensor
    """[N] bool: token of a trunk, which all rows of its tree see."""
    parts: tuple[Part, ...]
    """For the CPU's kernels without a mask. First stretches in causal order, which hold every token once; then what
    tokens see before their stretch: of the same row, and branches of their trunk."""
    groups: tuple[Group, ...]
    """The same for kernels that take a mask: trunks, and branches where there are any."""
    order: Tensor
    """[N] int64: place of each token among the queries of all groups, flattened and joined."""
    blocks: Tensor | None
    """[N] int32: tokens of one number see each other in both directions (the pictures of Gemma 3), -1: none."""
    longest: int
    """Tokens of the longest row."""
    masks: dict[Hashable, Any] = field(default_factory=dict)
    """What attention kernels made of the layout so far; every layer of a kind shares one."""

    def mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [G, 1, Q, K] of a group; None where the causal kernel will do."""
        group = self.groups[number]
        if group.is_causal and self.blocks is None and (window is None or window >= group.queries.shape[1]):
            return None
        key = number, window, dtype
        if key not in self.masks:
            hidden = ~self._visible(group, window)[:, None]
            self.masks[key] = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        mask: Tensor = self.masks[key]
        return mask

    def sees(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """Bool, of the common shape: whether tokens of these numbers see those.

        Args:
            window: how far back a token sees; itself and `window - 1` before it.
        """
        visible = self.columns[keys] <= self.columns[queries]
        if self.blocks is not None:
            visible = visible | ((self.blocks[queries] == self.blocks[keys]) & (self.blocks[queries] >= 0))
        if window is not None:
            visible = visible & (self.columns[queries] - self.columns[keys] < window)
        own = self.rows[queries] == self.rows[keys]
        shared = (self.trees[queries] == self.trees[keys]) & self.is_trunk[keys]
        return visible & (own | shared)

    def visible_blocks(self, window: int | None, size: int) -> tuple[Tensor, Tensor]:
        """Of the square of all pairs of tokens, cut into blocks: those with anything to see, those with all to see.

        Args:
            window: as for `sees`.
            size: tokens a side of a block.

        Returns:
            Two bool tensors [N / size, N / size], rounded up: queries, keys. Where pictures are seen in both directions
            the first may hold more than need be and the second less.
        """
        numbers = torch.arange(len(self.tokens), device=self.tokens.device)
        tree, _ = _spans(self.trees)
        run, run_stop = _spans(torch.stack([self.trees, self.rows, self.is_trunk.int()], 1))
        in_trunk = torch.zeros_like(numbers).index_add(0, self.trees.long(), self.is_trunk.long())
        trunk_stop = tree + in_trunk[self.trees]
        near, far = run, tree
        if window is not None:
            near = torch.maximum(near, numbers - window + 1)
            far = torch.maximum(far, tree + self.columns - window + 1)
        far_end = torch.where(self.is_trunk, tree, trunk_stop)  # a trunk's own part is `near`
        near_end = numbers + 1
        ranges = [(near, near_end), (far, far_end)]
        whole = _count_blocks(ranges, size, covered=True) == size
        if self.blocks is not None:
            ranges[0] = near, run_stop
        return _count_blocks(ranges, size, covered=False) > 0, whole

    def _visible(self, group: Group, window: int | None) -> Tensor:
        """[G, Q, K] bool."""
        visible = self.sees(group.queries[:, :, None], group.keys[:, None, :], window)
        end = _before(group.num_queries, group.queries.shape[1])
        visible &= torch.cat([_before(group.shared, group.num_shared), end], dim=1)[:, None, :]
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
    trees = _list_trees(is_first.tolist(), batch.lengths.tolist(), batch.trunk_lengths.tolist())
    groups = _make_groups(places, trees)
    kept = torch.cat([_before(group.num_queries, group.queries.shape[1]).flatten() for group in groups])
    where = kept.nonzero()[:, 0]
    order = torch.empty_like(tokens)
    order[torch.cat([group.queries.flatten() for group in groups])[where]] = where
    rows = tokens // length
    return TreeLayout(
        tokens=tokens,
        places=places,
        columns=(tokens % length).int(),
        rows=rows.int(),
        trees=batch.tree_index[rows].int(),
        is_trunk=tokens % length < batch.trunk_lengths[rows],
        parts=_make_parts(trees, device) if device.type == "cpu" else (),
        groups=groups,
        order=order,
        blocks=None if image_token_id is None else _blocks(batch.input_ids == image_token_id)[tokens].int(),
        longest=int(batch.lengths.max()),
    )


@dataclass(frozen=True)
class _Run:
    """Neighbouring packed tokens, and the first of those they see."""

    start: int
    size: int
    keys: int


@dataclass(frozen=True)
class _PackedTree:
    """Where a tree lies among the packed tokens: its trunk, then what follows it in each row."""

    row: int
    """First row."""
    start: int
    trunk: int
    """Tokens of the trunk; of a tree with one row, all."""
    branches: tuple[int, ...]
    """Tokens that follow it in each row; none for a tree with one row."""

    @property
    def stop(self) -> int:
        return self.start + self.trunk + sum(self.branches)


def _spans(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal neighbours that holds each place begins and ends (behind its last), both [N] int64."""
    is_new = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    changes = keys[1:] != keys[:-1]
    is_new[1:] = changes.any(1) if keys.dim() > 1 else changes
    starts = is_new.nonzero()[:, 0]
    run = is_new.cumsum(0) - 1
    stops = torch.cat([starts[1:], starts.new_tensor([len(keys)])])
    return starts[run], stops[run]


def _count_blocks(ranges: list[tuple[Tensor, Tensor]], size: int, covered: bool) -> Tensor:
    """[Q, K] int64: how many ranges of the queries of a block touch, or cover, each block of keys.

    Args:
        ranges: for every query the first key and the one behind the last; empty where they do not ascend.
        covered: count blocks that a range covers whole.
    """
    queries = torch.arange(len(ranges[0][0]), device=ranges[0][0].device) // size
    count = int(queries[-1]) + 1
    edges = queries.new_zeros(count, count + 1)
    for start, stop in ranges:
        first = (start + size - 1) // size if covered else start // size
        end = stop // size if covered else (stop + size - 1) // size
        kept = (first < end) & (start < stop)
        for column, sign in ((first, 1), (end, -1)):
            edges.index_put_((queries[kept], column[kept]), torch.full_like(queries[kept], sign), accumulate=True)
    return edges.cumsum(1)[:, :-1]


def _list_trees(is_first: list[bool], lengths: list[int], trunk_lengths: list[int]) -> list[_PackedTree]:
    firsts = [row for row, flag in enumerate(is_first) if flag]
    trees: list[_PackedTree] = []
    for row, end in zip(firsts, [*firsts[1:], len(is_first)], strict=True):
        is_single = end - row == 1
        trunk = lengths[row] if is_single else trunk_lengths[row]
        branches = () if is_single else tuple(length - trunk for length in lengths[row:end])
        trees.append(_PackedTree(row, trees[-1].stop if trees else 0, trunk, branches))
    return trees


def _make_parts(trees: list[_PackedTree], device: torch.device) -> tuple[Part, ...]:
    """Runs of like length share one call of the kernel, so that it can use all processors."""
    stretches: list[_Run] = []
    ahead: dict[int, list[_Run]] = defaultdict(list)
    forks: dict[int, list[_Run]] = defaultdict(list)
    for tree in trees:
        start = tree.start
        for size in (tree.trunk, *tree.branches):
            if size:
                _cut(start, size, stretches, ahead)
            start += size
        middle = tree.start + tree.trunk
        if tree.trunk and middle < tree.stop:
            forks[tree.trunk].append(_Run(middle, tree.stop - middle, tree.start))
    parts = _of_like_length(stretches, None, device)
    for spans in (ahead, forks):
        for keys, runs in spans.items():
            parts += _of_like_length(runs, keys, device)
    return tuple(parts)


def _cut(start: int, size: int, stretches: list[_Run], ahead: dict[int, list[_Run]]) -> None:
    """Cut a row's tokens into stretches; what a stretch sees of the row before it goes to `ahead`, by number of keys.

    Halves and halves of halves, always at `STRETCH` times a power of two, so that rows of all lengths can share calls;
    no token is a query twice for one number of keys.
    """
    if size < (1 + SHORT) * STRETCH:
        stretches.append(_Run(start, size, start))
        return
    keys = STRETCH
    while size >= (2 * keys + SHORT * STRETCH):
        keys *= 2
    ahead[keys].append(_Run(start + keys, size - keys, start))
    _cut(start, keys, stretches, ahead)
    _cut(start + keys, size - keys, stretches, ahead)


def _of_like_length(runs: list[_Run], keys: int | None, device: torch.device) -> list[Part]:
    """
    Args:
        keys: how many each run sees; None for stretches.
    """
    groups: list[list[_Run]] = []
    for run in sorted(runs, key=lambda run: (-run.size, run.start)):
        if not groups or run.size < LIKE_LENGTH * groups[-1][0].size:
            groups.append([])
        groups[-1].append(run)
    return [
        Part(
            _runs([(run.start, run.size) for run in group], device),
            None if keys is None else _runs([(run.keys, keys) for run in group], device),
        )
        for group in groups
    ]


def _runs(spans: list[tuple[int, int]], device: torch.device) -> Runs:
    """
    Args:
        spans: first token and size of each.
    """
    tokens = [torch.arange(start, start + size, device=device) for start, size in spans]
    index, sizes = _pad(tokens)
    starts = [start for start, _ in spans]
    is_even = len({size for _, size in spans}) == 1
    steps = {after - before for before, after in pairwise(starts)} or {0}
    step = steps.pop() if is_even and len(steps) == 1 and min(steps) >= 0 else None
    is_real = None if is_even else _before(sizes, index.shape[1])
    kept = None if is_real is None else is_real.flatten().nonzero()[:, 0]
    return Runs(index, is_real, starts[0], step, torch.cat(tokens), kept)


def _make_groups(places: Tensor, trees: list[_PackedTree]) -> tuple[Group, ...]:
    """Trunks and whole rows [trees, ...]; branches, several of a tree in one group as long as they are no more tokens
    than its trunk, since the keys and the mask of a group grow with both."""
    trunks = [places[tree.row, : tree.trunk] for tree in trees]
    leaves: list[tuple[Tensor, Tensor]] = []
    for tree, trunk in zip(trees, trunks, strict=True):
        branches = [
            places[tree.row + number, tree.trunk : tree.trunk + size]
            for number, size in enumerate(tree.branches)
            if size
        ]
        leaves += [(trunk, part) for part in _join_branches(branches, tree.trunk)]
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
