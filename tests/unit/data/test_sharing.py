"""Examples about one picture are one tree, up to where they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.data.test_collate import CAT, DOG, part
from triptych.core.types import Example, ImageReference, Origin, Pair, TokenKind
from triptych.data.collate import collate
from triptych.data.sharing import find_trees, plant

S, I, M, R, E = (  # noqa: E741
    TokenKind.SPECIAL,
    TokenKind.INSTRUCTION,
    TokenKind.IMAGE,
    TokenKind.RESPONSE,
    TokenKind.END_OF_TURN,
)


def make_row(picture: ImageReference, question: list[int], answer: list[int], line: int = 1) -> Example:
    """[bos] [picture of 2 tokens] [text] | answer."""
    kinds = [S, M, M, *([I] * len(question))]
    return Example(
        trunk=part([1, 9, 9, *question], kinds, images=(0,)),
        branches=(part(answer, [R] * len(answer), learned=len(answer)),),
        images=(picture,),
        image_sizes=((28, 14),),
        origin=Origin("rows.json", line),
        task=f"task {line}",
    )


@pytest.mark.requirement("H-5")
def test_examples_about_one_picture_share_what_they_begin_with() -> None:
    rows = [make_row(CAT, [20, 21], [5, 2], 1), make_row(CAT, [20, 22], [6], 2), make_row(CAT, [20, 21, 23], [7], 3)]
    batch = collate(rows)
    assert batch.tree_index.tolist() == [0, 0, 0]
    assert batch.trunk_lengths.tolist() == [4, 4, 4]  # [bos] [picture] 20
    assert batch.example_index.tolist() == [0, 1, 2] and batch.num_examples == 3
    assert batch.tasks == ("task 1", "task 2", "task 3")
    assert [origin.line for origin in batch.origins] == [1, 2, 3]


def test_a_shared_beginning_holds_whole_equal_pictures() -> None:
    # Equal tokens, but another picture: nothing is shared, as the first token alone is not worth it.
    batch = collate([make_row(CAT, [20], [5]), make_row(DOG, [20], [5])])
    assert batch.tree_index.tolist() == [0, 1]
    # A picture of another size is another number of tokens; this one would end within the first.
    longer = replace(make_row(CAT, [20], [5]), trunk=part([1, 9, 9, 9], [S, M, M, M], images=(0,)))
    assert collate([longer, make_row(CAT, [20], [5])]).tree_index.tolist() == [0, 1]
    # Pictures that touch have no known border.
    touching = replace(
        make_row(CAT, [], [5]), trunk=part([1, 9, 9, 9, 9], [S, M, M, M, M], images=(0, 1)), images=(CAT, DOG)
    )
    assert collate([touching, touching]).tree_index.tolist() == [0, 1]

    # The second picture differs: the trunk ends before it.
    def two(second: ImageReference) -> Example:
        trunk = part([1, 9, 9, 20, 9, 9, 21], [S, M, M, I, M, M, I], images=(0, 1))
        return replace(make_row(CAT, [], [5]), trunk=trunk, images=(CAT, second))

    batch = collate([two(DOG), two(CAT)])
    assert batch.tree_index.tolist() == [0, 0] and batch.trunk_lengths.tolist() == [4, 4]


def test_examples_join_where_that_saves_tokens() -> None:
    def pair(question: list[int]) -> Example:
        branches = (part([5, 2], [R, E], learned=2), part([6, 2], [R, E], learned=2))
        return replace(make_row(CAT, question, []), branches=branches, pairs=(Pair(0, 1),))

    # [bos] [picture] once for four answers saves 4 tokens and repeats 2 of each question.
    batch = collate([pair([20, 21]), pair([20, 22])])
    assert batch.tree_index.tolist() == [0, 0, 0, 0] and batch.trunk_lengths.tolist() == [4] * 4
    assert batch.example_index.tolist() == [0, 0, 1, 1] and batch.pairs.tolist() == [[0, 1], [2, 3]]
    # With longer questions of their own, two trunks of the picture and a question are cheaper.
    batch = collate([pair([20, 21, 22, 23]), pair([30, 31, 32, 33])])
    assert batch.tree_index.tolist() == [0, 0, 1, 1] and batch.trunk_lengths.tolist() == [7] * 4


def test_equal_examples_share_their_trunks() -> None:
    batch = collate([make_row(CAT, [20], [5, 2])] * 2)
    assert batch.trunk_lengths.tolist() == [4, 4] and batch.lengths.tolist() == [6, 6]


def test_a_tree_counts_its_trunk_once() -> None:
    (tree,) = find_trees([make_row(CAT, [20, 21], [5, 2]), make_row(CAT, [22], [6])])
    assert (tree.trunk, tree.rows, tree.row_tokens, tree.longest) == (3, 2, 7 + 5, 7)
    assert tree.tokens == 3 + 4 + 2
    alone = plant(make_row(CAT, [20, 21], [5, 2]))
    assert (alone.trunk, alone.rows, alone.tokens) == (5, 1, 7)
    assert alone.with_example(make_row(DOG, [20, 21], [5, 2])) is None
