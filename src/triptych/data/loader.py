"""Windows of light batches: the rows of each optimizer step, the same however the work is split.

    positions of an epoch   |--------- G ---------|--------- G ---------|--- rest ---|     windows
    one window              |-- rank 0 --|-- rank 1 --|                                    contiguous shares
    one share               |- M -|- M -|-|                                                batches

Rows about one picture stand together, so that batches hold trees. Which rows a window holds follows from its number
alone, so the state is that number. What runs ahead in the background
(reading, tokenising, decoding) changes when work is done, never what comes out.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from triptych.core.config import Config
from triptych.core.errors import CheckpointError, DataError, Problem
from triptych.core.protocols import FeatureStore, PictureProcessor, join_pixels
from triptych.core.types import Batch, Example, ImageReference, Origin, PictureInput, Sample, Window
from triptych.data.collate import blank_example, collate, make_padding
from triptych.data.decoders import Decoders
from triptych.data.images import decode, decode_reduced, picture_key
from triptych.data.mixture import Mixture
from triptych.data.packing import Budget, split_examples
from triptych.data.row_report import RowReport
from triptych.data.tokenize import at_row


class Rows(Protocol):
    """A data set: rows by number."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def sample(self, index: int) -> Sample:
        """Read one row; raises DataError."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """Data file -> digest that changes with its content."""
        ...

    def origin(self, index: int) -> Origin:
        """Where a row stands, even if it cannot be read."""
        ...


def _number_or_auto(things: str) -> BeforeValidator:
    """Before the union, which would report one problem for each of its members. None is left to it."""

    def check(value: object) -> object:
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is None or value == "auto" or is_number:
            return value
        raise ValueError(f"`{value}` is neither a number of {things}, 1 or more, nor `auto`")

    return BeforeValidator(check)


class LoaderConfig(Config):
    """How rows become windows."""

    global_batch: int = Field(ge=1)
    """Samples of one optimizer step, all ranks together."""
    micro_batch: Annotated[int | Literal["auto"] | None, _number_or_auto("samples")] = None
    """Most samples of one forward pass on one rank; give this, `micro_batch_tokens`, or both. `auto`: the largest
    `micro_batch_tokens` whose measured memory stays under `train.memory_limit`, found when a run begins."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one forward pass on one rank, those that several rows share counted once; a longer row gets one
    of its own."""
    rows_per_picture: int | None = Field(default=None, ge=1)
    """Most rows about one picture that follow each other, so that it is computed once for all of them; 1 draws every
    row by itself, as contrastive stages always do. Default: an eighth of `global_batch`, at most 8, so that a step
    still sees eight pictures. Pictures inside table rows or archives are told apart by their row, not by their bytes:
    only what one row asks about its picture is grouped there, and with weights only rows of one data set."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; give this or `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the run."""
    seed: int = 0
    """Decides the order of the rows."""
    group_by_length: bool = False
    """Put rows of like length into one micro-batch; the rows of an optimizer step stay the same, less is padded, which
    matters where trees are not packed."""
    prefetch: int = Field(default=2, ge=0)
    """Windows prepared ahead in the background; 0 does all work when it is asked for."""
    decode: Literal["full", "draft"] = "full"
    """`draft` decodes pictures at a half, a third, ... of their size where that is more than the model takes: faster,
    and on photographs one or two of 255 levels off the whole pictures on average. It changes no number of tokens."""
    decode_threads: Annotated[int | Literal["auto"], _number_or_auto("threads")] = "auto"
    """Threads that decode the pictures of a batch and make pixels of them; `auto` tries several on the first batches
    and takes the fastest. It changes no pixel."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """`skip` leaves out rows that cannot be used and reports them; it decodes pictures twice in the first epoch."""
    report: Path | None = None
    """JSON Lines file to which the problems of skipped rows are added."""

    @property
    def most_per_picture(self) -> int:
        """`rows_per_picture` with its default worked out."""
        return self.rows_per_picture or max(1, min(8, self.global_batch // 8))

    def passes(self, rows: int) -> float:
        """How often a run goes over so many rows."""
        if self.epochs is not None:
            return self.epochs
        assert self.steps is not None
        return self.steps * self.global_batch / rows

    @model_validator(mode="after")
    def _agrees(self) -> LoaderConfig:
        wrong = []
        if (self.epochs is None) == (self.steps is None):
            wrong.append("give exactly one of `epochs` and `steps`")
        if self.micro_batch is None and self.micro_batch_tokens is None:
            wrong.append("give `micro_batch` (samples), `micro_batch_tokens`, or both")
        if self.micro_batch == "auto" and self.micro_batch_tokens is not None:
            wrong.append("`micro_batch: auto` finds `micro_batch_tokens`: give one of them")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


@dataclass(frozen=True)
class _Prepared:
    """A window and what was wrong with its rows."""

    window: Window
    problems: tuple[Problem, ...]


class Loader:
    """The `BatchSource` over data sets on disk."""

    def __init__(
        self,
        datasets: Sequence[Rows],
        mixture: Mixture,
        encode: Callable[[Sample], Example],
        pictures: PictureProcessor | None,
        config: LoaderConfig,
        share: tuple[int, int] = (0, 1),
        packed: bool = True,
        store: FeatureStore | None = None,
    ) -> None:
        """Args:
        datasets: in the order of the mixture.
        mixture: position -> (data set, row).
        encode: sample -> example; raises DataError for a row that cannot be used.
        pictures: turns decoded pictures into pixels; None for a model of text alone.
        config: see `LoaderConfig`.
        share: number of this process and of all processes; each gets a contiguous share of every window.
        packed: whether the model computes trees packed, which `micro_batch_tokens` counts by.
        store: knows what a frozen tower makes of pictures; those it knows are not decoded.
        """
        self._datasets = datasets
        self._mixture = mixture
        self._encode = encode
        self._pictures = pictures
        self._config = config
        self._rank, self._world_size = share
        self._store = store
        assert not isinstance(config.micro_batch, str), "`auto` is measured before the loader is made"
        self._budget = Budget(config.micro_batch, config.micro_batch_tokens, packed)
        self._windows_per_epoch = math.ceil(mixture.epoch_length / config.global_batch)
        self._report = RowReport(config.report) if config.report is not None else None
        self._files = [dict(dataset.fingerprint()) for dataset in datasets]
        self._yielded = 0
        self._decoded: set[tuple[object, ...]] = set()
        self._decoders = Decoders(config.decode_threads)
        self._pixels = _PixelPrefetch(self._make_pixels, config.prefetch > 0)

    @property
    def total_windows(self) -> int:
        """Windows of the whole run."""
        if self._config.steps is not None:
            return self._config.steps
        assert self._config.epochs is not None
        return max(1, math.ceil(self._config.epochs * self._windows_per_epoch - 1e-9))

    def windows(self) -> Iterator[Window]:
        """Yield the windows that remain.

        Raises:
            DataError: a row cannot be used and `on_bad_row` is `stop`.
        """
        self._pixels.forget()
        if self._report is not None:
            self._report.keep_before(self._yielded)
        for prepared, following in self._run_ahead(self._yielded):
            if self._report is not None:
                self._report.add(prepared.window.index, prepared.problems)
            self._pixels.expect(prepared.window.batches, following)
            self._yielded = prepared.window.index + 1
            yield prepared.window

    def attach(self, batch: Batch) -> Batch:
        """Return the batch with `pixels`, or with `picture_inputs` where there is a store; one without pictures is
        returned as it is.

        Raises:
            DataError: a picture cannot be decoded; names the row.
        """
        if not batch.images:
            return batch
        return replace(batch, **self._pixels.take(batch))

    def report(self, metrics: Mapping[str, float]) -> None:
        """Metrics change nothing here: the order of the rows is fixed."""

    def state_dict(self) -> dict[str, Any]:
        """The number of windows yielded, and what decides which rows they hold."""
        return {"windows": self._yielded, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's last window; the number of ranks and the micro-batch may differ.

        Raises:
            CheckpointError: seed, global batch or data differ, so that the order would be another one.
        """
        state = {"rows_per_picture": 1, **state}  # which earlier checkpoints do not know
        remedy = "resume with the same data and batch size, or start a new run from the checkpoint's weights"
        for name, value in self._identity().items():
            if name != "files" and state[name] != value:
                message = f"the checkpoint was made with {name} {state[name]}, this run has {value}"
                raise CheckpointError(message, remedy=remedy)
        for saved, present in zip(state["files"], self._files, strict=True):
            for file in sorted({*saved, *present}):
                if saved.get(file) != present.get(file):
                    change = "is new" if file not in saved else "is gone" if file not in present else "has changed"
                    raise CheckpointError(f"the data file {change} since the checkpoint", file=file, remedy=remedy)
        self._yielded = int(state["windows"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._config.seed,
            "global_batch": self._config.global_batch,
            "rows_per_picture": self._config.most_per_picture,
            "rows": [len(dataset) for dataset in self._datasets],
            "draws": list(self._mixture.quotas),
            "files": self._files,
        }

    def _run_ahead(self, first: int) -> Iterator[tuple[_Prepared, Future[_Prepared] | None]]:
        """Windows in order, each with the one after it, which may still be in the making in the background."""
        numbers = range(first, self.total_windows)
        if self._config.prefetch == 0:
            yield from ((self._prepare(number), None) for number in numbers)
            return
        # One thread: data sets and tokenizers need not be safe for several, and the order of errors stays.
        with ThreadPoolExecutor(1, "triptych-windows") as pool:
            waiting: deque[Future[_Prepared]] = deque()
            remaining = iter(numbers)
            try:
                while True:
                    ahead = itertools.islice(remaining, self._config.prefetch + 1 - len(waiting))
                    waiting.extend(pool.submit(self._prepare, number) for number in ahead)
                    if not waiting:
                        return
                    prepared = waiting.popleft().result()
                    yield prepared, waiting[0] if waiting else None
            finally:
                for future in waiting:
                    future.cancel()

    def _prepare(self, number: int) -> _Prepared:
        epoch, within = divmod(number, self._windows_per_epoch)
        length = self._mixture.epoch_length
        start = within * self._config.global_batch
        size = min(self._config.global_batch, length - start)
        positions = range(epoch * length + start, epoch * length + start + size)
        share = positions[self._rank * size // self._world_size : (self._rank + 1) * size // self._world_size]
        bad: list[tuple[Origin, DataError]] = []
        split = split_examples(self._load(share, bad), self._budget, self._config.group_by_length)
        # One by one: a window of thousands of rows takes less memory collated than read.
        batches = [collate(examples) for examples in split]
        window = Window(
            index=number,
            epoch=epoch + (start + size) / length,
            # A rank without rows takes part all the same; the engine makes up for other differences between ranks.
            batches=tuple(batches or [self._make_padding(positions)]),
            skipped=tuple(origin for origin, _ in bad),
        )
        return _Prepared(window, tuple(problem for _, error in bad for problem in error.problems))

    def _load(self, positions: Sequence[int], bad: list[tuple[Origin, DataError]]) -> Iterator[Example]:
        """Examples of the rows at `positions`; with `on_bad_row: skip` those that cannot be used go to `bad`."""
        for position in positions:
            dataset, row = self._mixture.draw(position)
            try:
                example = self._encode(self._datasets[dataset].sample(row))
                self._require_pictures(example)
            except DataError as error:
                if self._config.on_bad_row == "stop":
                    raise
                bad.append((self._datasets[dataset].origin(row), error))
            else:
                yield example

    def _require_pictures(self, example: Example) -> None:
        """With `on_bad_row: skip`, decode the pictures once: when a window is out, its rows are fixed.

        Raises:
            DataError: a picture opens but cannot be decoded whole.
        """
        if self._config.on_bad_row == "stop":
            return
        for reference in example.images:
            if reference.data is not None or reference.identity not in self._decoded:
                _decode_for(reference, example.origin)
                self._decoded |= {reference.identity} if reference.data is None else set()

    def _make_padding(self, positions: Sequence[int]) -> Batch:
        """A batch that counts nothing, made from the first usable row of the whole window."""
        example = next(self._load(positions, []), None) or blank_example()
        return make_padding(collate([example]))

    def _make_pixels(self, batch: Batch) -> dict[str, Any]:
        """What `attach` adds to the batch, by field."""
        if self._pictures is None:
            raise DataError(
                f"{batch.origins[0]} has pictures, but the model takes text alone", remedy="drop the rows with pictures"
            )
        rows = {image: row for row in reversed(range(batch.num_rows)) for image in batch.row_images[row]}
        jobs = [(reference, batch.origins[rows[image]]) for image, reference in enumerate(batch.images)]
        # One by one, so that whole pictures are gone as soon as their pixels are made, and all threads do both.
        if self._store is not None:
            return {"picture_inputs": tuple(self._decoders.map(self._make_input, jobs))}
        return {"pixels": _pinned(join_pixels(self._decoders.map(self._make_one, jobs)))}

    def _make_input(self, job: tuple[ImageReference, Origin]) -> PictureInput:
        """What the store knows of a picture, or its pixels."""
        assert self._store is not None
        reference, origin = job
        with at_row(origin):
            # Whole and reduced pictures have features of their own; held-out rows share the store and are whole.
            key = picture_key(reference) + ("" if self._config.decode == "full" else f" {self._config.decode}")
        features = self._store.get(key)
        if features is not None:
            return PictureInput(key, features=features)
        return PictureInput(key, pixels=_pinned(self._make_one(job)))

    def _make_one(self, job: tuple[ImageReference, Origin]) -> dict[str, Tensor]:
        """The pixels of a picture of this row."""
        assert self._pictures is not None
        reference, origin = job
        if self._config.decode == "full":
            return self._pictures.pixels([_decode_for(reference, origin)])
        with at_row(origin):
            picture, whole = decode_reduced(reference, self._pictures.wanted_size)
        return self._pictures.pixels([picture], [whole])


class _PixelPrefetch:
    """Makes the pixels of the next batch while the current one is computed, across windows too.

    Holds at most those of one batch of this window and of the first batch of the next.
    """

    def __init__(self, make: Callable[[Batch], dict[str, Any]], is_enabled: bool) -> None:
        self._make = make
        # One thread: each has a heap of its own, which keeps the memory of the largest batch it made.
        self._pool = ThreadPoolExecutor(1, "triptych-pixels") if is_enabled else None
        self._batches: list[Batch] = []
        self._following: Future[_Prepared] | None = None
        self._next: tuple[Batch, Future[dict[str, Any]]] | None = None
        self._next_window: Future[dict[str, Any]] | None = None

    def expect(self, batches: Sequence[Batch], following: Future[_Prepared] | None) -> None:
        """Announce the batches of a window in the order they will be asked for (possibly in several passes)."""
        self._batches = [batch for batch in batches if batch.images]
        self._following = following
        self._next = None
        if self._batches and self._next_window is not None:
            self._next = (self._batches[0], self._next_window)
        else:
            self._start(0)
        self._next_window = None

    def forget(self) -> None:
        """Drop what was made ahead: the windows that come are not those announced."""
        self._batches, self._following, self._next, self._next_window = [], None, None, None

    def take(self, batch: Batch) -> dict[str, Any]:
        """What was made of a batch, also of a changed copy that holds the same pictures."""
        index = next((number for number, known in enumerate(self._batches) if known.images is batch.images), None)
        if index is None:
            return self._make(batch)
        ahead, self._next = self._next, None
        is_ready = ahead is not None and ahead[0] is self._batches[index]
        pixels = ahead[1].result() if ahead is not None and is_ready else self._make(batch)
        self._start(index + 1)
        return pixels

    def _start(self, index: int) -> None:
        if self._pool is None:
            return
        if index < len(self._batches):
            batch = self._batches[index]
            self._next = (batch, self._pool.submit(self._make, batch))
        elif self._following is not None and self._following.done() and self._next_window is None:
            self._next_window = self._pool.submit(self._make_first, self._following)

    def _make_first(self, following: Future[_Prepared]) -> dict[str, Any]:
        batches = [batch for batch in following.result().window.batches if batch.images]
        return self._make(batches[0]) if batches else {}


def _pinned(pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """In page-locked memory, from which a CUDA device copies while it computes; as they are where none is in use."""
    # The model was put on its device before pixels are asked for.
    return {name: value.pin_memory() for name, value in pixels.items()} if torch.cuda.is_initialized() else pixels


def _decode_for(reference: ImageReference, origin: Origin) -> Image.Image:
    with at_row(origin):
        return decode(reference)
