"""Trees to padded rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triptych.core.types import IGNORE, Branch, Example, ImageReference, Origin, Pair, TokenKind
from triptych.data.collate import blank_example, collate, make_padding

S, I, M, R, E, B = (  # noqa: E741
    TokenKind.SPECIAL,
    TokenKind.INSTRUCTION,
    TokenKind.IMAGE,
    TokenKind.RESPONSE,
    TokenKind.END_OF_TURN,
    TokenKind.BOX,
)
ORIGIN = Origin("file.json", 3)
CAT, DOG = ImageReference(path="/cat.png"), ImageReference(path="/dog.png")


def part(ids: list[int], kinds: list[TokenKind], learned: int = 0, weight: float = 1.0, **more: object) -> Branch:
    """The last `learned` tokens are supervised."""
    labels = [IGNORE] * (len(ids) - learned) + ids[len(ids) - learned :]
    return Branch(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor([int(kind) for kind in kinds], dtype=torch.uint8),
        torch.full((len(ids),), weight),
        **more,  # type: ignore[arg-type]
    )


def plain_example(weight: float = 1.0) -> Example:
    """[bos] [image image] | 5 6 2, the answer learned; eos is id 2."""
    return Example(
        trunk=part([1, 9, 9], [S, M, M], images=(0,)),
        branches=(part([5, 6, 2], [R, B, E], learned=3, weight=weight),),
        images=(CAT,),
        image_sizes=((28, 14),),
        origin=ORIGIN,
        task="vqa",
    )


def pair_example() -> Example:
    """Trunk of 2 and two answers of 3 and 1 tokens, the first with a picture of its own."""
    return Example(
        trunk=part([1, 9], [S, M], images=(0,)),
        branches=(
            part([9, 5, 2], [M, R, E], learned=2, images=(1,), facts={"rank": 1.0}),
            part([2], [E], learned=1),
        ),
        images=(DOG, DOG),
        image_sizes=((14, 14), (14, 14)),
        origin=Origin("pairs.json", 8),
        pairs=(Pair(0, 1, 0.5),),
        text_key=77,
    )


@pytest.mark.requirement("A-32", "C-3", "C-9", "H-5")
def test_rows_are_right_padded_and_numbered() -> None:
    batch = collate([plain_example(), pair_example()])
    assert batch.input_ids.tolist() == [[1, 9, 9, 5, 6, 2], [1, 9, 9, 5, 2, 0], [1, 9, 2, 0, 0, 0]]
    n = IGNORE
    assert batch.labels.tolist() == [[n, n, n, 5, 6, 2], [n, n, n, 5, 2, n], [n, n, 2, n, n, n]]
    assert batch.weights.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]
    assert batch.kinds.tolist() == [[1, 4, 4, 5, 7, 6], [1, 4, 4, 5, 6, 0], [1, 4, 6, 0, 0, 0]]
    assert batch.lengths.tolist() == [6, 5, 3]
    assert batch.trunk_lengths.tolist() == [3, 2, 2]
    assert batch.example_index.tolist() == [0, 1, 1]
    assert batch.pairs.tolist() == [[1, 2]]
    assert batch.pair_weights.tolist() == [0.5]
    assert batch.text_keys.tolist() == [0, 77, 77]
    assert batch.tasks == ("vqa", "", "")
    assert [origin.line for origin in batch.origins] == [3, 8, 8]


@pytest.mark.requirement("A-32")
def test_a_picture_that_repeats_is_listed_once() -> None:
    batch = collate([plain_example(), pair_example(), plain_example()])
    assert batch.images == (CAT, DOG)
    assert batch.row_images == ((0,), (1, 1), (1,), (0,))


@pytest.mark.requirement("A-28", "A-32", "A-31")
def test_mask_comes_from_lengths_so_a_real_eos_that_is_also_the_padding_id_stays() -> None:
    ends_with_zero = Example(
        trunk=part([1], [S]),
        branches=(part([5, 0], [R, E], learned=2),),
        images=(),
        image_sizes=(),
        origin=ORIGIN,
    )
    batch = collate([ends_with_zero, plain_example()])
    assert batch.input_ids[0].tolist() == [1, 5, 0, 0, 0, 0]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert batch.labels[0].tolist() == [IGNORE, 5, 0, IGNORE, IGNORE, IGNORE]


def test_weights_multiply_message_and_kind() -> None:
    batch = collate([plain_example(weight=0.5)], {TokenKind.RESPONSE: 1.0, TokenKind.BOX: 2.0})
    assert batch.weights.tolist() == [[0, 0, 0, 0.5, 1.0, 0]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, IGNORE, 5, 6, 2]]


def test_column_zero_is_never_supervised() -> None:
    example = Example(
        trunk=part([5], [R], learned=1), branches=(part([6], [R], learned=1),), images=(), image_sizes=(), origin=ORIGIN
    )
    batch = collate([example])
    assert batch.labels.tolist() == [[IGNORE, 6]]
    assert batch.weights.tolist() == [[0, 1]]


def test_token_values_follow_the_supervised_tokens_of_the_rows() -> None:
    first, second = plain_example(), pair_example()
    first = replace(first, branches=(replace(first.branches[0], token_values={"old": torch.tensor([0.1, 0.2, 0.3])}),))
    values = [torch.tensor([0.4, 0.5]), torch.tensor([0.6])]
    branches = tuple(
        replace(branch, token_values={"old": value}) for branch, value in zip(second.branches, values, strict=True)
    )
    batch = collate([first, replace(second, branches=branches)])
    assert torch.allclose(batch.token_values["old"], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert len(batch.token_values["old"]) == int(batch.supervised.sum())


@pytest.mark.parametrize("values", [{}, {"old": torch.tensor([0.1])}])
def test_token_values_that_do_not_fit_are_refused(values: dict[str, torch.Tensor]) -> None:
    good, bad = plain_example(), plain_example()
    good = replace(good, branches=(replace(good.branches[0], token_values={"old": torch.zeros(3)}),))
    bad = replace(bad, branches=(replace(bad.branches[0], token_values=values),))
    with pytest.raises(ValueError, match=r"file.json:3: `old` has (none|1) values for 3 supervised tokens"):
        collate([good, bad])


def test_facts_that_a_row_lacks_are_nan() -> None:
    rank = collate([pair_example()]).facts["rank"]
    assert rank[0] == 1.0
    assert torch.isnan(rank[1])


def test_a_padding_batch_keeps_its_rows_and_counts_nothing() -> None:
    batch = make_padding(collate([pair_example()]))
    assert batch.is_padding
    assert batch.num_examples == 0
    assert batch.num_rows == 2
    assert batch.weights.sum() == 0
    assert batch.pair_weights.tolist() == [0]


def test_the_blank_example_has_one_label() -> None:
    batch = collate([blank_example()])
    assert batch.input_ids.tolist() == [[0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 0]]


def test_an_example_without_labels_or_branch_tokens_is_a_row() -> None:
    prompt = Example(trunk=part([1, 4], [S, I]), branches=(part([], []),), images=(), image_sizes=(), origin=ORIGIN)
    batch = collate([prompt])
    assert batch.input_ids.tolist() == [[1, 4]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE]]
