"""Micro-batches hold whole trees within their budget, and every example once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from triptych.core.types import IGNORE, Branch, Example, ImageReference, Origin, TokenKind
from triptych.data.collate import collate
from triptych.data.packing import Budget, split_examples
from triptych.data.sharing import find_trees

PICTURE = 20


def example(line: int, picture: int | None, own: int, branches: int = 1) -> Example:
    """A trunk of a first token, a picture of 20 tokens and a question token; branches of `own` tokens."""

    def branch(ids: list[int], kind: TokenKind, images: tuple[int, ...] = ()) -> Branch:
        tensor = torch.tensor(ids)
        kinds = torch.full((len(ids),), int(kind), dtype=torch.uint8)
        if images:
            kinds[1 : 1 + PICTURE] = int(TokenKind.IMAGE)
        labels = tensor.clone() if kind == TokenKind.RESPONSE else torch.full_like(tensor, IGNORE)
        return Branch(tensor, labels, kinds, torch.ones(len(ids)), images)

    shown = () if picture is None else (ImageReference(path=f"/{picture}", name=str(picture)),)
    ids = [1] + ([7] * PICTURE if shown else []) + [100 + line]
    return Example(
        trunk=branch(ids, TokenKind.INSTRUCTION, (0,) if shown else ()),
        branches=tuple(branch([50 + line + number] * own, TokenKind.RESPONSE) for number in range(branches)),
        images=shown,
        image_sizes=((4, 4),) * len(shown),
        origin=Origin("rows.json", line),
    )


_ROWS = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 2)), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=12
)


@given(_ROWS, st.one_of(st.none(), st.integers(1, 5)), st.one_of(st.none(), st.integers(5, 90)), st.booleans())
def test_every_example_once_within_the_budget(
    rows: list[tuple[int | None, int, int]], most: int | None, tokens: int | None, by_length: bool
) -> None:
    examples = [example(line, *row) for line, row in enumerate(rows, start=1)]
    batches = list(split_examples(examples, Budget(most, tokens), by_length))
    lines = [item.origin.line for batch in batches for item in batch]
    assert sorted(lines) == list(range(1, len(rows) + 1))
    if not by_length:
        assert lines == sorted(lines)
    for batch in batches:
        assert most is None or len(batch) <= most
        joined = collate(batch)
        computed = _computed(joined.tree_index, joined.trunk_lengths, joined.lengths)
        assert tokens is None or computed <= tokens or len(batch) == 1


def _computed(trees: torch.Tensor, trunks: torch.Tensor, lengths: torch.Tensor) -> int:
    """Tokens a packed batch holds."""
    total = 0
    for tree in trees.unique():
        rows = trees == tree
        if int(rows.sum()) == 1:
            total += int(lengths[rows][0])
        else:
            total += int(trunks[rows][0]) + int((lengths - trunks)[rows].sum())
    return total


def test_a_tree_is_counted_as_it_is_computed() -> None:
    examples = [example(line, 0, own=3) for line in (1, 2, 3)]
    joined = collate(examples)
    assert joined.tree_index.tolist() == [0, 0, 0] and joined.trunk_lengths.tolist() == [21] * 3
    (tree,) = find_trees(examples)
    assert tree.tokens == 21 + 3 * (1 + 3) == _computed(joined.tree_index, joined.trunk_lengths, joined.lengths)
    assert find_trees(examples[:1])[0].tokens == 25
    assert find_trees([example(1, 0, own=3, branches=2)])[0].tokens == 22 + 2 * 3


def test_rows_that_are_not_packed_count_with_their_padding() -> None:
    examples = [example(line, 0, own=own) for line, own in ((1, 3), (2, 8), (3, 3))]
    batches = split_examples(examples, Budget(tokens=60, packed=False), by_length=False)
    assert [len(batch) for batch in batches] == [2, 1]  # 2 rows of 30; a third would make 90
    assert [len(batch) for batch in split_examples(examples, Budget(tokens=60), by_length=False)] == [3]


def test_trees_stay_whole_where_they_fit() -> None:
    pictures = [0, 0, 0, 1, 1, 2]
    examples = [example(line, picture, own=2) for line, picture in enumerate(pictures, start=1)]
    batches = split_examples(examples, Budget(examples=4), by_length=False)
    assert [[item.origin.line for item in batch] for batch in batches] == [[1, 2, 3], [4, 5, 6]]
    cut = split_examples(examples, Budget(examples=2), by_length=False)
    assert [[item.origin.line for item in batch] for batch in cut] == [[1, 2], [3], [4, 5], [6]]


def test_rows_of_different_pictures_or_none_are_no_tree() -> None:
    examples = [example(1, 0, own=2), example(2, 1, own=2), example(3, None, own=2), example(4, None, own=2)]
    assert collate(examples).tree_index.tolist() == [0, 1, 2, 3]
    assert [len(batch) for batch in split_examples(examples, Budget(tokens=40), by_length=False)] == [1, 3]


def test_micro_batches_come_while_examples_are_read() -> None:
    """So the examples of one micro-batch are held at a time, not those of a window of thousands of rows."""
    read: list[int] = []

    def examples() -> Iterator[Example]:
        for line in range(1, 10):
            read.append(line)
            yield example(line, line, own=2)

    for number, batch in enumerate(split_examples(examples(), Budget(examples=3), by_length=False), start=1):
        assert [item.origin.line for item in batch] == [3 * number - 2, 3 * number - 1, 3 * number]
        # The next example does not fit; that the tree it begins has ended, the one after it shows.
        assert len(read) == min(9, 3 * number + 2)
    assert number == 3
