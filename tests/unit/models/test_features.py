"""Features on disk survive, are found again, keep to their limit, and belong to one tower."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from triptych.core.errors import ModelError
from triptych.models import features as features_module
from triptych.models.features import FeatureCache, tower_key


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"states": torch.full((4, 8), float(number)), "grid": torch.tensor([1, number, 2])}


def test_what_was_put_is_found_again_by_another_process(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    for number in range(5):
        cache.put(f"k{number}", tensors(number))
    assert len(cache) == 5 and "k3" in cache and not list((tmp_path / "cache").iterdir())
    torch.testing.assert_close(cache.get("k3"), tensors(3), rtol=0, atol=0)
    cache.flush()
    for again in (cache, FeatureCache(tmp_path / "cache")):
        assert len(again) == 5 and again.get("k9") is None
        for number in range(5):
            torch.testing.assert_close(again.get(f"k{number}"), tensors(number), rtol=0, atol=0)


def test_a_file_is_written_when_enough_has_come_together_and_nothing_twice(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, shard_bytes=2 * (4 * 8 * 4 + 3 * 8))
    for number in (0, 1, 1, 0, 2):
        cache.put(f"k{number}", tensors(number))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and len(cache) == 3
    cache.put("k0", tensors(9))
    torch.testing.assert_close(cache.get("k0"), tensors(0), rtol=0, atol=0)


def test_types_are_kept_and_later_changes_do_not_reach_the_cache(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    value = torch.ones(3, dtype=torch.bfloat16)
    cache.put("a", {"states": value})
    value.zero_()
    cache.flush()
    found = FeatureCache(tmp_path).get("a")
    assert found is not None and found["states"].dtype == torch.bfloat16 and found["states"].tolist() == [1, 1, 1]


def test_a_file_that_was_cut_off_costs_only_what_it_held(tmp_path: Path) -> None:
    for number in range(2):
        cache = FeatureCache(tmp_path)
        cache.put(f"k{number}", tensors(number))
        cache.flush()
    first = FeatureCache(tmp_path)
    broken = next(file for file in tmp_path.glob("*.safetensors") if b"k0/" in file.read_bytes())
    broken.write_bytes(broken.read_bytes()[:-40])
    del first
    cache = FeatureCache(tmp_path)
    assert "k0" not in cache and "k1" in cache and not broken.exists()


def test_a_flipped_bit_costs_what_its_file_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        cache = FeatureCache(tmp_path)
        for key in (f"a{number}", f"b{number}"):
            cache.put(key, tensors(number))
        cache.flush()
    file = next(file for file in tmp_path.glob("*.safetensors") if b"a1/" in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.rindex(torch.full((4, 8), 1.0).numpy().tobytes())] ^= 1  # of one of its two pictures
    file.write_bytes(content)
    again = FeatureCache(tmp_path)
    found = {key: again.get(key) for key in ("a0", "a1", "b1", "a1", "b2")}
    assert found["a1"] is None and found["a0"] is not None and found["b2"] is not None
    assert "a1" not in again and "b1" not in again and not file.exists() and len(again.files) == 2
    assert caplog.text.count("checksum") == 1 and file.name in caplog.text
    again.put("a1", tensors(1))
    again.flush()
    torch.testing.assert_close(FeatureCache(tmp_path).get("a1"), tensors(1), rtol=0, atol=0)


def test_what_came_is_written_after_a_minute(tmp_path: Path) -> None:
    now = [1000.0]
    cache = FeatureCache(tmp_path, clock=lambda: now[0])
    written = []
    for key, now[0] in (("a", 2000.0), ("b", 2059.0), ("c", 2060.0), ("d", 2119.0)):
        cache.put(key, tensors(0))
        written.append(len(FeatureCache(tmp_path)))
    assert written == [0, 0, 3, 3]  # a minute since the first of them came


def test_a_file_that_cannot_be_opened_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the system refuses: here a link to itself, since root may read every file."""
    cache = FeatureCache(tmp_path)
    cache.put("k", tensors(1))
    cache.flush()
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "aside")
    file.symlink_to(file)
    assert "k" not in FeatureCache(tmp_path) and f"{file.name} cannot be read" in caplog.text
    with pytest.raises(ModelError, match=r"cannot be read: .*Too many levels"):
        cache.get("k")
    assert file.is_symlink()
    (tmp_path / "aside").replace(file)
    assert "k" in FeatureCache(tmp_path)


def test_a_damaged_file_that_may_not_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"cut off")

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    cache = FeatureCache(tmp_path)
    assert len(cache) == 0 and "is damaged" in caplog.text and "cannot be removed: " in caplog.text
    cache.put("k", tensors(1))
    cache.flush()
    assert "k" in FeatureCache(tmp_path)


def test_a_folder_that_cannot_be_used_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"file/tower cannot be used: .*Not a directory"):
        FeatureCache(tmp_path / "file" / "tower")
    cache = FeatureCache(tmp_path / "full")
    cache.put("k", tensors(1))

    def refuse(stream: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features_module.os, "fsync", refuse)
    with pytest.raises(ModelError, match=r"full cannot be written: .*No space left"):
        cache.flush()
    assert not list((tmp_path / "full").iterdir())


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("k", tensors(1))
    cache.flush()
    (file,) = tmp_path.iterdir()
    assert cache.files == [file.name]
    file.unlink()
    with pytest.raises(ModelError, match=f"{file.name} cannot be read") as caught:
        cache.get("k")
    assert "start the run again" in str(caught.value)


def test_the_limit_is_kept_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path, limit_bytes=600, shard_bytes=300)
    for number in range(50):
        cache.put(f"k{number}", tensors(number))
    cache.flush()
    assert cache.is_full and 2 <= len(cache) < 10
    assert caplog.text.count("which is its limit") == 1 and str(tmp_path) in caplog.text
    again = FeatureCache(tmp_path, limit_bytes=600)
    again.put("new", tensors(1))
    assert "new" not in again and "k0" in again


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    one, two = FeatureCache(tmp_path), FeatureCache(tmp_path)
    one.put("a", tensors(1))
    two.put("a", tensors(1))
    two.put("b", tensors(2))
    one.flush()
    two.flush()
    again = FeatureCache(tmp_path)
    assert len(again) == 2
    torch.testing.assert_close(again.get("b"), tensors(2), rtol=0, atol=0)


def test_what_others_wrote_is_seen_after_the_next_file_of_ones_own(tmp_path: Path) -> None:
    first, second = FeatureCache(tmp_path, limit_bytes=10_000), FeatureCache(tmp_path, limit_bytes=10_000)
    for number in range(5):
        second.put(f"k{number}", tensors(number))
    second.flush()
    assert "k3" not in first
    first.put("own", tensors(9))
    first.flush()
    assert "k3" in first and len(first) == 6 and not first.is_full
    held = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert FeatureCache(tmp_path, limit_bytes=held).is_full  # of both processes together
    assert not FeatureCache(tmp_path, limit_bytes=held + 1).is_full


def test_what_a_crash_left_behind_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for part in (old, new):
        part.write_bytes(b"x")
    os.utime(old, (0, 0))
    FeatureCache(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.parametrize("change", ["weight", "buffer", "type", "settings"])
def test_another_tower_has_another_key(change: str) -> None:
    def tower() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    one, other, settings = tower(), tower(), {"size": 3}
    assert tower_key(one.state_dict(), {"size": 3}) == tower_key(other.state_dict(), settings)
    if change == "weight":
        other[0].weight.data[1, 1] += 1e-6
    elif change == "buffer":
        other[1].running_mean += 1
    elif change == "type":
        other.to(torch.float64)
    else:
        settings = {"size": 4}
    assert tower_key(one.state_dict(), {"size": 3}) != tower_key(other.state_dict(), settings)
