"""Tensors, optimizers and random numbers taken apart and put back."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from triptych.core.errors import CheckpointError
from triptych.engine.state import (
    gather_tensors,
    pack_optimizer,
    plain,
    random_state,
    restore_optimizer,
    restore_random_state,
    restore_tensors,
    seed_everything,
    untouched_modes,
    untouched_random_state,
)


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))


@pytest.mark.requirement("G-3")
def test_random_numbers_continue_where_they_were() -> None:
    seed_everything(3)
    draw()
    state = plain(random_state(), "random")
    expected = [draw(), draw()]
    seed_everything(4)
    restore_random_state(state)

    assert [draw(), draw()] == expected


def test_what_runs_in_between_leaves_no_trace() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    module[1].eval()
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    with untouched_random_state(), untouched_modes(module):
        draw()
        module.train()

    assert draw() == expected
    assert (module.training, module[0].training, module[1].training) == (True, True, False)


def test_tensors_that_share_memory_are_gathered_apart() -> None:
    shared = torch.arange(4.0)
    gathered = gather_tensors({"a": shared, "b": shared, "c": shared.reshape(2, 2).T})

    assert len({item.data_ptr() for item in gathered.values()}) == 3
    assert gathered["c"].tolist() == [[0.0, 2.0], [1.0, 3.0]] and gathered["c"].is_contiguous()


def test_tensors_that_do_not_fit_are_all_named_and_nothing_changes() -> None:
    targets = {"a": torch.zeros(2), "b": torch.zeros(2), "only": torch.zeros(1)}
    saved = {"a": torch.ones(2), "b": torch.ones(3), "other": torch.ones(1)}

    with pytest.raises(CheckpointError) as caught:
        restore_tensors(targets, saved, "weights")

    assert "not in the checkpoint: only" in str(caught.value)
    assert "not in the model: other" in str(caught.value)
    assert "b: saved float32[3], in the model float32[2]" in str(caught.value)
    assert targets["a"].tolist() == [0.0, 0.0]


def test_an_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    def build() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, dict[int, str]]:
        items = {
            "x": nn.Parameter(torch.ones(2)),
            "idle": nn.Parameter(torch.ones(1)),
            "y": nn.Parameter(torch.ones(3)),
        }
        entries = [{"params": [items["x"], items["idle"]], "name": "one"}, {"params": [items["y"]], "lr": 0.5}]
        return items, torch.optim.AdamW(entries, lr=0.1, fused=True), {id(item): name for name, item in items.items()}

    def step(items: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, factor: float) -> None:
        for name in ("x", "y"):
            items[name].grad = torch.arange(1.0, items[name].numel() + 1) * factor
        optimizer.step()

    items, optimizer, names = build()
    step(items, optimizer, 1.0)
    optimizer.param_groups[1]["lr"] = 0.25
    packed = copy.deepcopy(plain(pack_optimizer(optimizer, names), "optimizer"))
    assert sorted(packed["state"]) == ["x", "y"]
    assert [group["params"] for group in packed["groups"]] == [["x", "idle"], ["y"]]
    copies = {name: item.detach().clone() for name, item in items.items()}
    step(items, optimizer, -0.3)

    fresh, other, fresh_names = build()
    restore_tensors(fresh, copies, "weights")
    restore_optimizer(other, fresh_names, packed)
    assert (other.param_groups[0]["name"], other.param_groups[1]["lr"]) == ("one", 0.25)
    step(fresh, other, -0.3)
    for name, item in items.items():
        assert torch.equal(item, fresh[name]), name


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    def build(*names: str) -> tuple[torch.optim.Optimizer, dict[int, str]]:
        items = {name: nn.Parameter(torch.ones(1)) for name in names}
        return torch.optim.SGD(items.values()), {id(item): name for name, item in items.items()}

    packed = pack_optimizer(*build("x", "y"))
    with pytest.raises(CheckpointError, match=r"optimizer group 0 .* other parameters: y, z"):
        restore_optimizer(*build("x", "z"), packed)


def test_plain_values_pass_and_others_are_named() -> None:
    view = torch.arange(1000)[:2]
    copied = plain(OrderedDict(a=[1, (2.0, None)], b=view), "state")
    assert type(copied) is dict and copied["a"] == [1, (2.0, None)]
    assert copied["b"].untyped_storage().nbytes() == 16

    with pytest.raises(CheckpointError, match=r"`state\.a\[1\]` is a numpy.float64"):
        plain({"a": [0, np.float64(1.0)]}, "state")
