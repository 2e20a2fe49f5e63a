"""Every row of the benchmark compares two ways to the same loss and the same gradients."""

from __future__ import annotations

import pytest
import torch
from benchmarks.loading import LOADING
from benchmarks.models import TINY
from benchmarks.row import Setting
from benchmarks.table import ROWS
from benchmarks.timing import Local, Turns, Way, interleave


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, False) for name in ROWS if name not in LOADING),
        # Some seconds to compile each: one for every kind of block that the timed rows compile.
        *((name, True) for name in ("sft_full_196", "sft_tree8_576", "sft_lora_196")),
    ],
)
def test_both_ways_have_the_same_loss_and_gradients(name: str, compiled: bool) -> None:
    row = ROWS[name](Setting(scale=TINY, compiled=compiled))
    found = []
    for way in (row.ours, row.peer):
        way.model.zero_grad()
        loss = way.run()
        found.append((loss, {n: p.grad.clone() for n, p in way.model.named_parameters() if p.grad is not None}))
    (loss, ours), (other, peer) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    assert ours.keys() == peer.keys() and bool(ours) == row.trains
    if not row.trains:
        return
    total = torch.stack([gradient.norm() for gradient in peer.values()]).norm()
    for key, gradient in peer.items():
        assert (ours[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * total, key


def test_ways_take_turns_and_their_memory_is_their_own() -> None:
    model = torch.nn.Linear(4, 4)
    taken: list[str] = []

    def way(name: str, megabytes: int) -> Way:
        def run() -> torch.Tensor:
            taken.append(name)
            held = torch.ones(megabytes * 2**18)  # float32
            loss = model(held[:4]).sum()
            loss.backward()
            return loss

        return Way(name, run, model)

    runners = {"small": Local(way("small", 1)), "large": Local(way("large", 200))}
    timings = interleave(runners, Turns(3, 3), patience=0.0)
    assert taken == ["small", "large"] * 3 + ["large", "small"] + ["small", "large"]
    assert len(timings["small"].seconds) == 3 and timings["small"].median > 0
    assert timings["large"].added > 150 * 2**20 > 50 * 2**20 > timings["small"].added
    timings = interleave(runners, Turns(2, 2), warm_up=0, looks_at_memory=False, patience=0.0)
    assert timings["large"].added == 0 and len(taken) == 14


def test_turns_are_taken_while_one_more_ends_in_time() -> None:
    turns = Turns(least=2, most=4, seconds=40)
    assert [turns.wants(taken, 10.0 * taken) for taken in range(5)] == [True, True, True, True, False]
    assert [turns.wants(taken, 14.0 * taken) for taken in range(4)] == [True, True, False, False]
    assert Turns(3, 3).wants(2, 1e6) and not Turns(3, 3).wants(3, 0.0)
