"""The kernels of packed trees against attention written out token by token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.unit.data.test_sharing import make_row
from triptych.core.types import ImageReference
from triptych.data.collate import collate
from triptych.models import tree_attention as modeling_attention
from triptych.models import trees as modeling_trees
from triptych.models.tree_attention import flexible, grouped, tree_attention
from triptych.models.trees import TreeLayout, make_layout

PICTURES = [ImageReference(path=f"/{number}.png") for number in range(3)]
SCALE = 0.3


def layout(blocks: bool = False) -> TreeLayout:
    """A tree of three rows, one of two equal rows, and rows by themselves of like and unlike lengths."""
    rows = [
        make_row(PICTURES[0], [20, 21, 22], [5, 6, 7]),
        make_row(PICTURES[0], [20, 21, 23], [5]),
        make_row(PICTURES[0], [20, 24, 25, 26, 27], [5, 6, 7, 8]),
        *[make_row(PICTURES[1], [20, 21], [5])] * 2,
        make_row(PICTURES[2], list(range(30, 50)), [5]),
        make_row(PICTURES[0], list(range(30, 48)), [6]),
        make_row(PICTURES[1], [31], [7]),
    ]
    batch = collate(rows)
    assert batch.tree_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 4]
    return make_layout(batch, 9 if blocks else None)


def states(trees: TreeLayout, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query of 4 heads, key and value of 2."""
    generator = torch.Generator().manual_seed(1)
    size = len(trees.tokens)
    return [torch.randn(1, heads, size, 8, dtype=dtype, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def written_out(states: list[Tensor], trees: TreeLayout, window: int | None) -> Tensor:
    """softmax(q k^T) v over what each token may see, from the rows themselves."""
    query, key, value = states
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    size = len(trees.tokens)
    sees = torch.zeros(size, size, dtype=torch.bool)
    for row in trees.places.tolist():
        row = row[: max(index for index, place in enumerate(row) if place or not index) + 1]
        for column, token in enumerate(row):
            for other, seen in enumerate(row):
                is_block = trees.blocks is not None and trees.blocks[token] == trees.blocks[seen] >= 0
                is_near = window is None or column - other < window
                sees[token, seen] |= (other <= column or bool(is_block)) and is_near
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~sees, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def as_transformers(states: list[Tensor], trees: TreeLayout, window: int | None) -> Tensor:
    module = torch.nn.Identity()
    return tree_attention(module, *states, None, trees=trees, scaling=SCALE, sliding_window=window)[0]


def in_groups(states: list[Tensor], trees: TreeLayout, window: int | None) -> Tensor:
    return grouped([item[0].transpose(0, 1) for item in states], trees, window, 0.0, SCALE)[None]


@pytest.mark.parametrize("attend", [as_transformers, in_groups])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("blocks", [False, True])
def test_output_and_gradients_equal_attention_written_out(
    attend: Callable[[list[Tensor], TreeLayout, int | None], Tensor], window: int | None, blocks: bool
) -> None:
    _check_against_attention_written_out(attend, layout(blocks), window)


@pytest.mark.parametrize("stretch", [1, 2, 4, 8])
def test_rows_cut_into_stretches_equal_attention_written_out(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layout()
    monkeypatch.setattr(modeling_trees, "STRETCH", stretch)
    trees = layout()
    assert len(trees.parts) > len(whole.parts)
    _check_against_attention_written_out(as_transformers, trees, None)


def _check_against_attention_written_out(
    attend: Callable[[list[Tensor], TreeLayout, int | None], Tensor], trees: TreeLayout, window: int | None
) -> None:
    inputs = states(trees)
    weights = torch.randn(1, len(trees.tokens), 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = written_out(inputs, trees, window)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    found = attend(inputs, trees, window)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # flex attention without compilation says so
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("blocks", [False, True])
def test_flex_attention_sees_the_same(window: int | None, blocks: bool) -> None:
    trees = layout(blocks)
    inputs = [item.detach() for item in states(trees)]
    found = flexible(inputs, trees, window, SCALE)
    torch.testing.assert_close(found, written_out(inputs, trees, window), rtol=1e-12, atol=1e-12)
    assert flexible(inputs, trees, window, SCALE) is not found and len(trees.masks) == 1


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 64])
@pytest.mark.parametrize("blocks", [False, True])
def test_blocks_for_flex_attention_are_those_with_anything_to_see(window: int | None, size: int, blocks: bool) -> None:
    trees = layout(blocks)
    count = len(trees.tokens)
    numbers = torch.arange(count)
    sees = trees.sees(numbers[:, None], numbers[None, :], window)
    side = -(-count // size)
    seen = torch.zeros(side * size, side * size, dtype=torch.int64)
    seen[:count, :count] = sees
    seen = seen.view(side, size, side, size).sum((1, 3))
    some, whole = trees.visible_blocks(window, size)
    if blocks:  # more may be looked at, none left out; what is called whole is
        assert not ((seen > 0) & ~some).any() and not (whole & (seen < size * size)).any()
    else:
        assert torch.equal(some, seen > 0) and torch.equal(whole, seen == size * size)
    assert int(some.sum()) > 0 and (size > 1 or window == 1 or int(some.sum()) < side * side)


@pytest.mark.parametrize("stretch", [2, 4, 128])
def test_parts_hold_all_that_is_seen_once_and_little_padding(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_trees, "STRETCH", stretch)
    trees = layout()
    size = len(trees.tokens)
    seen = torch.zeros(size, size, dtype=torch.int64)
    for part in trees.parts:
        keys = part.keys or part.queries
        for runs in (part.queries, keys):
            assert torch.equal(runs.take(torch.arange(size)), runs.index)
            real = runs.index if runs.is_real is None else runs.index[runs.is_real]
            assert real.unique().numel() == real.numel() >= 0.8 * runs.index.numel()
        for run, queries in enumerate(part.queries.index.tolist()):
            if part.queries.is_real is not None:
                queries = queries[: int(part.queries.is_real[run].sum())]
            for number, query in enumerate(queries):
                seen[query, queries[: number + 1] if part.keys is None else keys.index[run]] += 1
    numbers = torch.arange(size)
    assert torch.equal(seen, trees.sees(numbers[:, None], numbers[None, :], None).long())
    assert stretch < 128 or any(part.queries.is_real is not None for part in trees.parts)
    assert any(part.queries.step is None for part in trees.parts) and any(part.queries.step for part in trees.parts)


def test_a_stretch_takes_a_short_rest_and_no_long_one() -> None:
    def cut(size: int) -> tuple[list[int], dict[int, list[int]]]:
        stretches: list[modeling_trees._Run] = []
        ahead: dict[int, list[modeling_trees._Run]] = defaultdict(list)
        modeling_trees._cut(0, size, stretches, ahead)
        return [run.size for run in stretches], {keys: [run.size for run in runs] for keys, runs in ahead.items()}

    assert cut(159) == ([159], {})
    assert cut(160) == ([128, 32], {128: [32]})
    assert cut(601) == ([128, 128, 128, 128, 89], {512: [89], 256: [256], 128: [128, 128]})
    assert cut(520) == ([128, 128, 128, 136], {256: [264], 128: [128, 136]})


def test_runs_that_follow_each_other_evenly_are_views() -> None:
    states = torch.arange(24.0).reshape(12, 2)
    device = states.device
    for spans, is_view in (
        ([(1, 3), (5, 3), (9, 3)], True),
        ([(4, 5)], True),
        ([(9, 3), (1, 3)], False),  # a stride cannot be negative
        ([(0, 3), (3, 3), (7, 3)], False),
        ([(0, 3), (4, 2)], False),
    ):
        runs = modeling_trees._runs(spans, device)
        taken = runs.take(states)
        assert (taken.untyped_storage().data_ptr() == states.untyped_storage().data_ptr()) == is_view
        for run, (start, size) in enumerate(spans):
            assert torch.equal(taken[run, :size], states[start : start + size])
        written, added = torch.zeros_like(states), states.clone()
        runs.put(written, taken)
        runs.add(added, taken)
        inside = torch.zeros(12, 1)
        for start, size in spans:
            inside[start : start + size] = 1
        assert torch.equal(written, states * inside) and torch.equal(added, states * (1 + inside))


def test_bfloat16_under_autocast_is_near_float64() -> None:
    trees = layout()
    inputs = states(trees, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = as_transformers(inputs, trees, None)
    assert found.dtype == torch.bfloat16
    exact = [item.detach().double().requires_grad_() for item in inputs]
    expected = written_out(exact, trees, None)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    wanted = torch.autograd.grad(expected.sum(), exact)
    for ours, theirs in zip(torch.autograd.grad(found.float().sum(), inputs), wanted, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_a_next_token_is_left_to_transformers_where_more_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    module = torch.nn.Identity()
    module.num_key_value_groups = 2
    with pytest.raises(ValueError, match="softcap"):
        tree_attention(module, query, key, key, None, softcap=1.0)
    monkeypatch.setattr(modeling_attention, "sdpa_attention_forward", lambda *_, **__: ("theirs", None))
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert tree_attention(module, query, key, key, mask)[0] == "theirs"
    assert tree_attention(module, key, key, key, None)[0] == "theirs"
    assert isinstance(tree_attention(module, query, key, key, None)[0], Tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_next_token_sees_all_keys_as_with_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((3, 6, 1, 8), (3, 2, 11, 8), (3, 2, 11, 8))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    module = torch.nn.Identity()
    module.num_key_value_groups = 3
    inputs = [item.to(dtype) for item in (query, key, value)]
    found = tree_attention(module, *inputs, None, scaling=SCALE)[0]
    expected = sdpa_attention_forward(module, query, key, value, None, scaling=SCALE)[0]
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_dropout_is_applied() -> None:
    trees = layout()
    inputs = states(trees)
    torch.manual_seed(0)
    module = torch.nn.Identity()
    dropped = tree_attention(module, *inputs, None, trees=trees, scaling=SCALE, dropout=0.5)[0]
    assert not torch.allclose(dropped, as_transformers(inputs, trees, None))


def test_capped_scores_are_refused() -> None:
    trees = layout()
    with pytest.raises(ValueError, match="soft-capping"):
        tree_attention(torch.nn.Identity(), *states(trees), None, trees=trees, softcap=30.0)


def test_large_scores_leave_no_trace_of_padding() -> None:
    """Padding behind a short stretch holds the states of another token, whose scores may be far above its own."""
    trees = layout()
    inputs = [(40 * item.detach()).requires_grad_() for item in states(trees)]
    found, expected = as_transformers(inputs, trees, None), written_out(inputs, trees, None)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()
