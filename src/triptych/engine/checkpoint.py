"""Checkpoints that survive a crash at any instant.

    checkpoints/
      step-00000500/
        manifest.json        format, step, progress, number of ranks, size and checksum of every other file
        recipe.json          the resolved recipe
        weights.safetensors  what is trained, and all buffers; frozen weights are read from their source again
        optimizer.pt         state by parameter name
        state.pt             schedule position, gradient scaler, early stopping, monitors
        ranks.pt             for each rank: random generators and data source
      best -> step-00000500
      last -> step-00001000

A folder is written under another name, flushed to disk, and renamed: `step-*` is complete or absent. Tensors are
loaded by safetensors or with `weights_only=True`; nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.core import distributed
from triptych.core.config import differing_keys
from triptych.core.errors import CheckpointError, Problem
from triptych.engine.state import plain

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 2
"""Version of the layout above."""

MAY_CHANGE = (
    "output",
    "train.save_every",
    "train.keep_last",
    "train.log_every",
    "train.evaluate_every",
    "train.monitors",
    "train.memory_limit",
    "loader.on_bad_row",
    "loader.prefetch",
    "features.folder",
    "features.limit_gib",
    "loader.decode_threads",
    "loader.report",
)
"""Keys that may differ on resume: none of them can change a weight. All others make it another run."""

EVALUATION = ("evaluation.batch", "evaluation.show", "evaluation.max_new_tokens", "evaluation.answers")
"""Keys that may differ as well where no evaluation chooses the best checkpoint, or none was made yet."""

_STEP = re.compile(r"step-(\d{8,})")
_WRITING, _DELETING = ".writing-", ".deleting-"


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to continue as if it had not stopped."""

    step: int
    """Optimizer steps taken."""
    weights: Mapping[str, Tensor]
    """Trainable parameters and buffers by qualified name, whole; on the main rank only when saving."""
    optimizer: Mapping[str, Any]
    """As made by `pack_optimizer`; on the main rank only when saving."""
    shared: Mapping[str, Any]
    """State that is the same on every rank."""
    ranks: Sequence[Mapping[str, Any]]
    """State of each rank, in rank order."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """A few numbers for people, written into the manifest."""


@dataclass(frozen=True)
class LoadedSnapshot:
    """A snapshot and the folder it was read from."""

    snapshot: Snapshot
    path: Path


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method; the main rank writes.

    Resuming with another number of ranks is refused: random numbers and data order are kept for each rank, so it could
    not be exact.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], keep_last: int) -> None:
        self.folder = folder
        self._recipe = json.loads(json.dumps(recipe, default=str))
        self._keep_last = keep_last

    def path(self, step: int) -> Path:
        """Folder of the checkpoint taken after `step` steps."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint folder, oldest first."""
        names = [item.name for item in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def save(self, snapshot: Snapshot, best_step: int | None) -> Path:
        """Write a checkpoint, point `last` and `best` at the right folders and delete the oldest others.

        Args:
            snapshot: What to write. A step that is already on disk is not written again.
            best_step: Step of the best checkpoint, which is never deleted; None while there is none.

        Raises:
            CheckpointError: it cannot be written (the previous checkpoint is untouched), or holds a state that could
                not be loaded again.
        """
        return self._on_main(lambda: self._save(snapshot, best_step))

    def load_newest(self) -> LoadedSnapshot | None:
        """Read the newest complete checkpoint, or None where there is none; clean up what a crash left behind.

        A damaged checkpoint is set aside as `*.damaged` with a warning and the one before it is taken.

        Raises:
            CheckpointError: the recipe, the number of ranks or the format differs, or all checkpoints are damaged.
        """
        path = self._on_main(self._choose)
        return LoadedSnapshot(read(path), path) if path else None

    def resumable(self) -> int | None:
        """The step a run would resume at; None where there is no checkpoint. Reads no weights, changes nothing.

        Raises:
            CheckpointError: the newest checkpoint is of another recipe or world size.
        """
        steps = self.steps()
        if not steps:
            return None
        self._check_same_run(self.path(steps[-1]))
        return steps[-1]

    def set_links(self, best_step: int | None) -> None:
        """Point `last` at the newest checkpoint and `best` at that of `best_step`, if it is there."""
        self._on_main(lambda: self._set_links(best_step))

    def _on_main(self, work: Callable[[], T]) -> T:
        """`call_on_main`, with errors of the file system as errors of a checkpoint."""

        def explained() -> T:
            try:
                return work()
            except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
                free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
                raise CheckpointError(
                    f"cannot be written: {error} ({free / 2**30:.1f} GiB free)",
                    file=str(self.folder),
                    remedy="make room or mend the rights; the next start resumes from the checkpoint before it",
                ) from error

        return distributed.call_on_main(explained)

    def _save(self, snapshot: Snapshot, best_step: int | None) -> Path:
        path = self.path(snapshot.step)
        if not path.exists():
            temporary = self.folder / f"{_WRITING}{path.name}"
            _remove(temporary)
            temporary.mkdir(parents=True)
            try:
                _write(temporary, snapshot, self._recipe)
            except BaseException:
                _remove(temporary)
                raise
            os.rename(temporary, path)
            _flush(self.folder)
        self._set_links(best_step)
        self._rotate(best_step)
        return path

    def _choose(self) -> Path | None:
        for item in [*self.folder.glob(f"{_WRITING}*"), *self.folder.glob(f"{_DELETING}*")]:
            _remove(item)
        damaged: list[Problem] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            problem = find_damage(path)
            if problem is None:
                self._set_aside(damaged)
                self._check_same_run(path)
                return path
            damaged.append(problem)
        if damaged:
            raise CheckpointError(damaged)
        return None

    def _set_aside(self, damaged: list[Problem]) -> None:
        for problem in damaged:
            path = Path(problem.file or "").parent
            aside = path.with_name(f"{path.name}.damaged")
            _remove(aside)
            os.rename(path, aside)
            logger.warning("damaged checkpoint set aside as %s, resuming from the one before it: %s", aside, problem)

    def _check_same_run(self, path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["world_size"] != distributed.world_size():
            raise CheckpointError(
                f"written by {manifest['world_size']} ranks, resumed with {distributed.world_size()}",
                file=str(path),
                remedy=f"start {manifest['world_size']} ranks, or another output folder for a new run",
            )
        saved = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
        may_change: tuple[str, ...] = MAY_CHANGE
        if not manifest["summary"].get("evaluation"):
            may_change += (*EVALUATION, "train.best")
        elif not self._recipe.get("train", {}).get("best"):
            may_change += EVALUATION
        changed = [
            text for text in differing_keys(saved, self._recipe) if not _is_in(text.partition(": ")[0], may_change)
        ]
        if changed:
            raise CheckpointError(
                [
                    Problem(
                        f"the recipe changed: {text}",
                        file=str(path),
                        remedy="put the value back to resume this run, or choose another output folder for a new one",
                    )
                    for text in changed
                ]
            )

    def _set_links(self, best_step: int | None) -> None:
        steps = self.steps()
        targets = {"last": steps[-1] if steps else None, "best": best_step if best_step in steps else None}
        if best_step is not None and best_step not in steps:
            logger.warning("the best checkpoint, step %d, is gone from %s", best_step, self.folder)
        for name, step in targets.items():
            link = self.folder / name
            if step is None:
                link.unlink(missing_ok=True)
                continue
            temporary = self.folder / f"{_WRITING}{name}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(self.path(step).name)
            os.replace(temporary, link)

    def _rotate(self, best_step: int | None) -> None:
        for step in self.steps()[: -self._keep_last]:
            if step == best_step:
                continue
            doomed = self.folder / f"{_DELETING}{self.path(step).name}"
            os.rename(self.path(step), doomed)
            _remove(doomed)


def read(path: Path) -> Snapshot:
    """Read a checkpoint folder; tensors on the CPU.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    problem = find_damage(path, checksums=False)
    if problem:
        raise CheckpointError(problem)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    return Snapshot(
        step=manifest["step"],
        weights=load_file(path / "weights.safetensors"),
        optimizer=_load(path / "optimizer.pt"),
        shared=_load(path / "state.pt"),
        ranks=_load(path / "ranks.pt"),
        summary=manifest["summary"],
    )


def find_damage(path: Path, checksums: bool = True) -> Problem | None:
    """What is wrong with the files of a checkpoint, None when they are as written.

    Raises:
        CheckpointError: the folder is of another format, which is no damage.
    """
    file = path / "manifest.json"
    remedy = f"delete {path.name}; with no checkpoint left the run starts afresh"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        sizes = {name: (item["bytes"], item["crc32"]) for name, item in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Problem(f"the manifest cannot be read: {error!r}", file=str(file), remedy=remedy)
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint format {version}, this version reads {FORMAT}",
            file=str(path),
            remedy="resume with the version of triptych that wrote it",
        )
    for name, (size, checksum) in sizes.items():
        file = path / name
        if not file.is_file():
            return Problem("the file is missing", file=str(file), remedy=remedy)
        if file.stat().st_size != size:
            return Problem(f"{file.stat().st_size} bytes, {size} were written", file=str(file), remedy=remedy)
        if checksums and _checksum(file) != checksum:
            return Problem("the content is not what was written (checksum)", file=str(file), remedy=remedy)
    return None


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith((f"{section}.", f"{section}[")) for section in sections)


def _write(folder: Path, snapshot: Snapshot, recipe: Any) -> None:
    save_file(dict(snapshot.weights), folder / "weights.safetensors")
    torch.save(plain(snapshot.optimizer, "optimizer"), folder / "optimizer.pt")
    torch.save(plain(snapshot.shared, "state"), folder / "state.pt")
    torch.save(plain(list(snapshot.ranks), "ranks"), folder / "ranks.pt")
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    files = {file.name: {"bytes": file.stat().st_size, "crc32": _checksum(file)} for file in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "world_size": len(snapshot.ranks),
        "summary": plain(snapshot.summary, "summary"),
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for file in folder.iterdir():
        _flush(file)
    _flush(folder)


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
