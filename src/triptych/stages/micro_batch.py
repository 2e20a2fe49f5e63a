"""`loader.micro_batch: auto`: a token budget, measured on rows of the run when it begins and kept in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import nn

from triptych.core.distributed import call_on_main, world_size
from triptych.core.errors import DataError, Problem, TrainingError
from triptych.core.types import IGNORE, Batch, Example, ImageReference
from triptych.data.collate import collate
from triptych.data.images import decode, read_encoded
from triptych.data.loader import LoaderConfig
from triptych.data.packing import Budget, Load
from triptych.data.sharing import Tree, find_trees, plant
from triptych.engine.lock import locked
from triptych.engine.memory import gibibytes, limit_bytes
from triptych.engine.micro_batch import (
    Meter,
    Point,
    Room,
    TooLargeError,
    climb,
    confirm,
    find_room,
    grow,
    untouched_run,
)
from triptych.engine.parallel import Runtime
from triptych.models.reference import FrozenReference
from triptych.stages.build import Built, make_mixture, settled, training_loader
from triptych.stages.recipe import StageRecipe
from triptych.stages.state_files import read_state, write_state

MICRO_BATCH = "micro_batch.json"
"""File in the folder of a run that keeps what was found, for when the run is resumed."""
PLANNED = "micro-batch: auto, its tokens are measured when the run begins"
"""What is said where nothing is measured yet."""
SAMPLE = 256
"""Rows that are looked at for the longest ones."""
_NOISE = 16 * 2**20
"""Bytes by which two measurements may differ by chance."""


@dataclass(frozen=True)
class Found:
    """A token budget, and the measurements it stands on."""

    tokens: int
    """`loader.micro_batch_tokens` of the run."""
    added: int
    """Bytes that passes within it added at their peak."""
    reserved: int
    """Bytes of gradients and optimizer state."""
    limit: int
    """Bytes that both together may take."""
    available: int
    """Bytes there were."""
    measured: tuple[tuple[int, int], ...]
    """(tokens, bytes added) of the single passes that led to it."""

    def __str__(self) -> str:
        sizes = [gibibytes(size) for size in (self.added, self.reserved, self.limit, self.available)]
        return (
            f"micro-batch: {self.tokens:,} tokens, measured to add {sizes[0]}; with {sizes[1]} of gradients and "
            f"optimizer state within the limit of {sizes[2]} ({sizes[3]} are available)"
        )


def settle_loader(
    recipe: StageRecipe, built: Built, runtime: Runtime, scorer: nn.Module, *, is_new: bool, console: Console
) -> tuple[LoaderConfig, Found | None]:
    """The loader's settings with a number in the place of `auto`: that of the folder where a run is resumed.

    Every rank must call it.

    Args:
        scorer: as `Runtime.wrap` returned it, in the mode it trains in.
        is_new: the run has no checkpoint.

    Raises:
        TrainingError: a row alone needs more memory than `train.memory_limit` allows, or another process trains into
            the folder.
        CheckpointError: the file with the number is damaged.
    """
    if recipe.loader.micro_batch != "auto":
        return recipe.loader, None
    file = Path(recipe.output) / MICRO_BATCH
    found = None if is_new else call_on_main(partial(_read, file))
    if found is not None:
        console.print(f"micro-batch: {found.tokens:,} tokens, as measured when the run began", highlight=False)
        return settled(recipe.loader, found.tokens), found
    if not is_new:
        console.print(f"{file} is gone: measured again, so the run may go on with other roundings", soft_wrap=True)
    # A run that another process has begun keeps its number.
    with locked(file.parent):
        found = find_tokens(recipe, built, runtime, scorer)
        call_on_main(partial(write_state, file, asdict(found)))
    console.print(str(found), highlight=False, soft_wrap=True)
    if limit_bytes(recipe.train.memory_limit, found.available) > found.limit:
        words = f"train.memory_limit: {recipe.train.memory_limit} is more than is available, which is the limit instead"
        console.print(words, highlight=False, soft_wrap=True)
    return settled(recipe.loader, found.tokens), found


def find_tokens(recipe: StageRecipe, built: Built, runtime: Runtime, scorer: nn.Module) -> Found:
    """Measure the largest token budget; nothing of the run changes but the time.

    Raises:
        TrainingError: a row alone needs more memory than `train.memory_limit` allows.
        DataError: none of the rows looked at can be used.
    """
    if isinstance(built.reference, FrozenReference):
        built.reference.to(runtime.device)  # or its weights would come after the room was looked at
    keeps_master = recipe.train.optimizer.bf16_weights == "master"
    room = find_room(scorer, runtime, recipe.train.memory_limit, keeps_master)
    # The largest share of a step that any rank may have.
    share = -(-recipe.loader.global_batch // world_size())
    rows, shared = sample_rows(recipe.loader, built, share)
    longest = rows[0]
    if room.passes <= 0:
        raise _no_room(longest, built.packed, room, None)
    source = training_loader(built, settled(recipe.loader).model_copy(update={"prefetch": 0}))
    meter = Meter(scorer, built.objective, source, built.reference, runtime)
    passes = Passes(meter, rows, shared, Budget(share, packed=built.packed))
    with untouched_run(scorer):
        ascending = rows[::-1]
        try:
            lengths = [passes.cost([row]) for row in ascending]
            singles = climb(lengths, lambda place: passes.measure([ascending[place]]), room)
            first = passes.measure_budget(passes.cost([longest]))
            if first.added > room.passes:
                raise TooLargeError(first.tokens, first.added, is_measured=True)
            largest = passes.cost([longest] * share)
            tokens, points = grow([*singles[:-1], first], largest, passes.measure_budget, room)
            found = confirm(tokens, first.tokens, passes.measure_step, room)
        except TooLargeError as error:
            raise _no_room(longest, built.packed, room, error) from error
    measured = tuple((point.tokens, point.added) for point in points)
    return Found(found.tokens, found.added, room.reserved, room.limit, room.available, measured)


def sample_rows(config: LoaderConfig, built: Built, share: int) -> tuple[list[Tree], list[Tree]]:
    """Rows of an epoch, those that cost most tokens first, and what the first rows of the run have in common.

    Args:
        share: examples of a step on one rank.

    Returns:
        Single rows, at least one, and trees of several.

    Raises:
        DataError: no row can be used.
    """
    mixture = make_mixture(built.datasets, config, by_picture=built.by_picture)
    apart = range(0, mixture.epoch_length, max(1, mixture.epoch_length // SAMPLE))
    together = range(min(share, SAMPLE, mixture.epoch_length))
    examples: dict[int, Example] = {}
    error: DataError | None = None
    for position in sorted({*apart, *together}):
        dataset, row = mixture.draw(position)
        try:
            example = built.encode(built.datasets[dataset].sample(row))
            if config.on_bad_row == "skip":
                for reference in example.images:
                    decode(reference)
            examples[position] = example
        except DataError as caught:
            error = caught
    if not examples:
        assert error is not None
        raise error
    rows = sorted((plant(example) for example in examples.values()), key=lambda row: _cost(row, built.packed))
    trees = find_trees(examples[position] for position in together if position in examples)
    return rows[::-1], [tree for tree in trees if len(tree.examples) > 1]


class Passes:
    """Fills micro-batches with the rows that need most memory, and measures them.

    Which those are depends on what trains: rows may be long (attention), full of pictures, or full of supervised
    tokens, or trees may have many branches. Each kind is measured until it is clearly less than another.
    """

    def __init__(self, meter: Meter, rows: Sequence[Tree], shared: Sequence[Tree], budget: Budget) -> None:
        """Args:
        rows: single rows, those of most tokens first.
        shared: trees of several rows.
        budget: without tokens; how they are counted, and the most examples.
        """
        self._meter = meter
        self._rows = rows
        self._budget = budget
        kinds = [
            rows[0],
            max(rows, key=lambda row: row.longest),
            max(rows, key=lambda row: len(row.examples[0].images) / self.cost([row])),
            max(rows, key=lambda row: _supervised(row) / self.cost([row])),
            *([max(shared, key=lambda tree: len(tree.examples))] if shared else ()),
        ]
        self._kinds = list({id(kind): kind for kind in kinds}.values())

    def cost(self, trees: Sequence[Tree]) -> int:
        """Tokens of trees in one micro-batch."""
        return self._budget.cost(_load(trees))

    def measure(self, trees: Sequence[Tree]) -> int:
        """Bytes that a micro-batch of trees adds, none of which shares anything with another."""
        return self._meter.measure(_batch(trees))

    def measure_budget(self, tokens: int) -> Point:
        """Fill a budget in each way that may be the worst."""
        filled = self._fill(tokens)
        added = [self.measure(trees) for trees in filled]
        point = Point(max(self.cost(trees) for trees in filled), max(added))
        if len(filled[0]) > 1:
            worst = max(added)
            self._kinds = [
                kind for kind, bytes_ in zip(self._kinds, added, strict=True) if bytes_ + _NOISE > 0.9 * worst
            ]
        return point

    def measure_step(self, tokens: int) -> int:
        """Bytes that the micro-batches of a step add, full in each way that is still among the worst, and once more."""
        return self._meter.measure(*(_batch(trees) for _ in range(2) for trees in self._fill(tokens)))

    def _fill(self, tokens: int) -> list[list[Tree]]:
        return [fill(kind, self._rows, replace(self._budget, tokens=tokens)) for kind in self._kinds]


def fill(kind: Tree, rows: Sequence[Tree], budget: Budget) -> list[Tree]:
    """As many of a tree as a budget allows, and what then still fits: rows from the longest to the shortest."""
    chosen: list[Tree] = []
    load = Load()
    for tree in (kind, *rows):
        while budget.allows(more := load.with_tree(tree)):
            chosen.append(tree)
            load = more
    return chosen


def _batch(trees: Sequence[Tree]) -> Batch:
    return collate([example for number, tree in enumerate(trees) for example in _copies(tree, number)])


def _load(trees: Sequence[Tree]) -> Load:
    load = Load()
    for tree in trees:
        load = load.with_tree(tree)
    return load


def _cost(tree: Tree, packed: bool) -> int:
    return Budget(packed=packed).cost(_load([tree]))


def _supervised(tree: Tree) -> int:
    branches = [part for example in tree.examples for part in (example.trunk, *example.branches)]
    return sum(int((branch.labels != IGNORE).sum()) for branch in branches)


def _copies(tree: Tree, number: int) -> list[Example]:
    """The examples of a tree, with pictures that are other ones than those of every other number."""
    return [
        replace(example, images=tuple(_copy(image, number) for image in example.images)) for example in tree.examples
    ]


def _copy(image: ImageReference, number: int) -> ImageReference:
    if image.rows is not None:
        image = replace(image, data=read_encoded(image), rows=None)
    # Read for pictures in tables only; for others it merely tells them apart.
    return replace(image, cell=("copy", number))


def _no_room(row: Tree, packed: bool, room: Room, error: TooLargeError | None) -> TrainingError:
    tokens = error.tokens if error else _cost(row, packed)
    parts = [f"gradients {gibibytes(room.gradients)}", f"optimizer state {gibibytes(room.optimizer)}"]
    if error is not None:
        how = "measured" if error.is_measured else "estimated from shorter ones"
        parts.insert(0, f"its pass {gibibytes(error.added)} ({how})")
    total = room.reserved + (error.added if error else 0)
    may_rise = room.limit < room.available
    most = f"{gibibytes(room.limit)} of the {gibibytes(room.available)} that are available"
    return TrainingError(
        Problem(
            f"a micro-batch of one row of {tokens:,} tokens needs {gibibytes(total)}{'' if error else ' and more'}: "
            f"{', '.join(parts)}; `train.memory_limit` allows {most}",
            key="train.memory_limit",
            remedy="train with `method: lora`, set `train.runtime.activation_checkpointing: true`, make rows shorter "
            f"(`max_length`, smaller pictures), {'free memory, or raise the limit' if may_rise else 'or free memory'}",
        )
    )


def _read(file: Path) -> Found | None:
    values = read_state(file, (field.name for field in fields(Found)))
    if values is None:
        return None
    return Found(**{**values, "measured": tuple((tokens, added) for tokens, added in values["measured"])})
