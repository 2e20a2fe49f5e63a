"""In float32 at the size of real models the gradient is the same to 1e-5 for any split and any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.invariants.exact import SPLITS
from tests.invariants.large import SUBJECTS, build, run
from tests.invariants.launch import launch
from tests.invariants.toys import relative_distance, runtime
from tests.tiny import tiny_tokenizer

BOUND = 1e-5


@pytest.mark.slow
@pytest.mark.requirement("C-13", "F-28")
@pytest.mark.parametrize("name", SUBJECTS)
def test_splits_agree_at_real_size(name: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    case = build(name, tmp_path)
    loss, expected, _ = run(case, SPLITS["1x8"], runtime())
    for split in ("8x1", "ragged"):
        found_loss, found, _ = run(case, SPLITS[split], runtime())
        distance = relative_distance(expected, found)
        print(f"{name} {split}: relative distance {distance:.1e}")
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert distance < BOUND


@pytest.mark.slow
@pytest.mark.requirement("B-3", "B-5", "C-13", "F-26", "F-28")
@pytest.mark.parametrize("name", SUBJECTS)
def test_two_processes_agree_with_one_at_real_size(name: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    case = build(name, tmp_path)
    loss, expected, _ = run(case, SPLITS["1x8"], runtime())
    torch.save(expected, tmp_path / "gradient.pt")
    split = [key for key, item in case.scorer.named_parameters() if item.numel() > 1]
    del case, expected
    for strategy in ("ddp", "fsdp"):
        launch("tests.invariants.large", [name, strategy, str(tmp_path)])
        for rank in range(2):
            report = json.loads((tmp_path / f"{rank}.json").read_text())
            print(f"{name} {strategy} rank {rank}: relative distance {report['distance']:.1e}")
            assert report["world_size"] == 2
            assert report["sharded"] == (split if strategy == "fsdp" else [])
            assert report["loss"] == pytest.approx(loss, rel=1e-5)
            assert report["distance"] < BOUND
