from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
import torch
from torch.utils import _pytree

from triptych.core import types
from triptych.core.types import (
    IGNORE,
    Batch,
    Branch,
    Example,
    ImageReference,
    Message,
    Origin,
    Pair,
    Preference,
    Progress,
    Sample,
    Scores,
    Text,
    TokenKind,
    WindowValues,
)


def make_batch(**changes):
    """Two rows of one example and one row of another; tokens 1..; the last tokens of each row are supervised."""
    batch = Batch(
        input_ids=torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [6, 7, 0, 0]]),
        labels=torch.tensor([[IGNORE, IGNORE, 3, 4], [IGNORE, IGNORE, 5, IGNORE], [IGNORE, 7, IGNORE, IGNORE]]),
        weights=torch.tensor([[0, 0, 1.0, 0.5], [0, 0, 2.0, 0], [0, 1.0, 0, 0]]),
        kinds=torch.zeros(3, 4, dtype=torch.uint8),
        lengths=torch.tensor([4, 3, 2]),
        example_index=torch.tensor([0, 0, 1]),
        tree_index=torch.tensor([0, 0, 1]),
        trunk_lengths=torch.tensor([2, 2, 1]),
        images=(),
        row_images=((), (), ()),
        origins=(Origin("a.json", 1), Origin("a.json", 1), Origin("a.json", 2)),
        tasks=("", "", ""),
        pairs=torch.tensor([[0, 1]]),
        pair_weights=torch.tensor([1.0]),
        text_keys=torch.zeros(3, dtype=torch.int64),
    )
    return replace(batch, **changes)


def test_supervised_positions_are_listed_row_by_row():
    batch = make_batch()
    assert batch.supervised_rows.tolist() == [0, 0, 1, 2]
    assert batch.supervised_weights.tolist() == [1.0, 0.5, 2.0, 1.0]
    assert batch.labels[batch.supervised].tolist() == [3, 4, 5, 7]


def test_attention_mask_comes_from_lengths_not_from_ids():
    # Id 0 is a real token of the second row; only positions past the length are hidden.
    batch = make_batch(input_ids=torch.tensor([[1, 2, 3, 4], [0, 0, 5, 0], [6, 7, 0, 0]]))
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]


def test_padding_batch_has_rows_but_no_examples():
    assert (make_batch().num_rows, make_batch().num_examples) == (3, 2)
    assert (make_batch(is_padding=True).num_rows, make_batch(is_padding=True).num_examples) == (3, 0)


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest():
    batch = make_batch(
        token_values={"reference_logprobs": torch.zeros(4)},
        facts={"rank": torch.zeros(3)},
        pixels={"x": torch.zeros(1)},
    )
    moved = batch.to("meta")
    for item in fields(Batch):
        value = getattr(moved, item.name)
        tensors = value.values() if isinstance(value, dict) else [value]
        assert all(tensor.device.type == "meta" for tensor in tensors if isinstance(tensor, torch.Tensor)), item.name
    assert (moved.origins, moved.row_images) == (batch.origins, batch.row_images)
    assert batch.input_ids.device.type == "cpu"


def test_a_tree_counts_its_trunk_once_for_each_branch():
    def branch(count):
        ids = torch.arange(count)
        return Branch(ids, ids, torch.full((count,), TokenKind.RESPONSE, dtype=torch.uint8), torch.ones(count))

    example = Example(
        trunk=branch(5), branches=(branch(2), branch(3)), images=(), image_sizes=(), origin=Origin("a", 1)
    )
    assert (example.num_tokens, example.max_row_tokens) == (5 + 2 + 5 + 3, 8)


def test_pictures_of_a_sample_come_in_order_answers_last():
    first, second, third = (ImageReference(path=f"/data/{name}.png") for name in "abc")
    prompt = Message("user", (first, Text("and"), second, Text("?")))
    answers = ((Message("assistant", (Text("yes"),)),), (Message("assistant", (third,)),))
    sample = Sample((prompt,), Origin("rows.jsonl", 3), preference=Preference(answers, (Pair(0, 1),)))
    assert sample.images == (first, second, third)
    assert (prompt.text, prompt.images) == ("and?", (first, second))


def test_origin_reads_as_a_place():
    assert str(Origin("train.json", 7)) == "train.json:7"
    assert str(Origin("train.json", 7, "000123")) == "train.json:7 (000123)"


def test_encoded_pictures_do_not_fill_messages():
    assert "data" not in repr(ImageReference(data=b"\x89PNG" * 1000, name="cat.png"))


def test_window_values_give_each_micro_batch_its_rows():
    window = WindowValues({"x": torch.arange(5.0)}, starts={"x": 2}, counts={"x": 3})
    assert window.local("x").tolist() == [2.0, 3.0, 4.0]


def test_scores_are_seen_by_pytree_consumers():
    scores = Scores(token_logprobs=torch.ones(2), logit_scale=torch.tensor(3.0))
    leaves, spec = _pytree.tree_flatten(scores)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 2
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Scores) and again.token_logprobs is scores.token_logprobs


def test_every_score_field_is_a_field_of_scores():
    named = set(types.ScoreField.__args__)
    assert named == {item.name for item in fields(Scores)} - {"auxiliary"}


@pytest.mark.parametrize(
    ("progress", "fraction"), [(Progress(5, 10), 0.5), (Progress(12, 10), 1.0), (Progress(5, None), 0.0)]
)
def test_fraction_of_a_run(progress, fraction):
    assert progress.fraction == fraction


def test_records_are_frozen_and_every_field_is_typed():
    records = [value for value in vars(types).values() if is_dataclass(value) and isinstance(value, type)]
    assert len(records) >= 15
    assert all(record.__dataclass_params__.frozen for record in records)
    with pytest.raises(FrozenInstanceError):
        Progress(1, 2).step = 3


@pytest.mark.requirement("A-37")
def test_samples_and_rows_carry_a_task():
    assert Sample((), Origin("a", 1), task="ocr").task == "ocr"
    assert make_batch(tasks=("ocr", "ocr", "vqa")).tasks == ("ocr", "ocr", "vqa")
