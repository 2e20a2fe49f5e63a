"""What is there, what may be used of it, and peaks."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch

from triptych.engine.memory import PeakMemory, available_bytes, check_limit, gibibytes, group_rooms, limit_bytes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.7, 700),
        (1, 1000),
        ("6 GiB", 6 * 2**30),
        ("1.5GB", 1_500_000_000),
        (" 200 mib ", 200 * MIB),
        ("3 kB", 3000),
    ],
)
def test_shares_and_sizes(limit: float | str, expected: int) -> None:
    assert check_limit(limit) == limit
    assert limit_bytes(limit, 1000) == expected


def test_a_share_that_yaml_takes_for_a_text_is_a_share() -> None:
    assert check_limit("5e-1") == 0.5


@pytest.mark.parametrize(
    "limit", [0, -0.5, 1.5, 6, True, None, "6", "70 %", "six GiB", "0 GiB", "6 Gib/s", "-1 GiB", ""]
)
def test_nonsense_is_refused_with_what_would_be_right(limit: object) -> None:
    with pytest.raises(ValueError, match="neither a share of the memory, above 0 and at most 1, nor a size such as"):
        check_limit(limit)


def make_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_tightest_of_nested_groups_counts_and_file_cache_is_free(tmp_path: Path) -> None:
    groups, mount = tmp_path / "cgroup", tmp_path / "mount"
    groups.write_text("1:cpu:/x\n0::/outer/inner\n")
    unlimited = {"memory.max": "max\n", "memory.current": "9\n", "memory.stat": "inactive_file 5\n"}
    limited = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 600\ninactive_file 100\n"}
    make_group(mount / "outer" / "inner", unlimited)
    make_group(mount / "outer", limited)
    assert min(group_rooms(groups, mount)) == 400
    make_group(mount / "outer", {"memory.current": "2000\n"})
    assert min(group_rooms(groups, mount)) == 0


def test_groups_of_version_1_also_from_within_a_container(tmp_path: Path) -> None:
    groups, mount = tmp_path / "cgroup", tmp_path / "mount"
    groups.write_text("4:memory,hugetlb:/of/the/host\n2:cpu:/\n")
    files = {"memory.limit_in_bytes": "5000\n", "memory.usage_in_bytes": "1000\n"}
    make_group(mount / "memory", {**files, "memory.stat": "inactive_file 1\ntotal_inactive_file 20\n"})
    assert min(group_rooms(groups, mount)) == 4020
    assert group_rooms(tmp_path / "none", mount) == [psutil.virtual_memory().total]


def test_processes_of_one_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = available_bytes(CPU)
    assert 0 < alone <= psutil.virtual_memory().total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(CPU) == pytest.approx(alone / 4, rel=0.2)


def test_a_peak_between_two_moments_is_seen() -> None:
    with PeakMemory(CPU) as memory:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        time.sleep(0.05)
        del block
    assert 60 * MIB < memory.added < 80 * MIB


def test_memory_that_was_free_in_the_heap_counts_again() -> None:
    """Small blocks stay in the heap when they are freed; taken again, they would add nothing."""
    added = []
    for _ in range(2):
        with PeakMemory(CPU) as memory:
            blocks = [bytes(60_000) for _ in range(500)]
            blocks = [bytes([number % 256]) * 60_000 for number in range(500)]
            time.sleep(0.02)
            del blocks
        added.append(memory.added)
    assert added[1] > 20 * MIB


def test_sizes_for_people() -> None:
    assert gibibytes(1.5 * 2**30) == "1.5 GiB" and gibibytes(3 * MIB) == "3 MiB"
