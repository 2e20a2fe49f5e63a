"""What the stages share: from a recipe's sections to the objects of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from triptych.core.config import Config
from triptych.core.distributed import rank, world_size
from triptych.core.errors import ConfigError, DataError, ModelError, Problem
from triptych.core.protocols import Evaluator, FeatureStore, Objective, PictureProcessor, Reference
from triptych.core.types import Example, ParameterGroup, Sample
from triptych.data.formats import AnyDatasetConfig, Dataset, open_dataset
from triptych.data.grouping import picture_groups
from triptych.data.loader import Loader, LoaderConfig
from triptych.data.mixture import Mixture
from triptych.engine.optim import build_optimizer
from triptych.engine.parallel import Runtime, checkpointed_blocks
from triptych.engine.schedules import multiplier
from triptych.models.components import Components
from triptych.models.logprobs import check_cut_kernel, find_cut_kernel
from triptych.models.tuning import TuningPlan
from triptych.models.vision import VisionSide
from triptych.stages.recipe import StageRecipe, VlmRecipe

ROW_REPORT = "rows.jsonl"
"""File in the output folder that lists the rows a run left out."""
HELD_OUT_DECODE: Literal["full"] = "full"
"""`loader.decode` for held-out rows: what is measured does not depend on how training saves time."""


@dataclass(frozen=True)
class Built:
    """Everything that a stage hands to the engine, and that `check` looks at."""

    scorer: nn.Module
    """Unwrapped, tuned; the Hugging Face model is its `hf`."""
    components: Components
    plan: TuningPlan
    tokenizer: Any
    pictures: PictureProcessor
    encode: Callable[[Sample], Example]
    """A training row as the loader encodes it."""
    datasets: list[Dataset]
    objective: Objective
    save: Callable[[Path], None]
    """Write the finished model as a Hugging Face folder; called on the main rank with full weights in place."""
    by_picture: bool = True
    """Whether rows about one picture may stand together; not where the others of a batch are what a row is told
    from."""
    packed: bool = False
    """Whether the scorer computes trees packed."""
    vision: VisionSide | None = None
    """The vision side of the scorer, where the states of a frozen tower can be kept."""
    picture_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of image processor and feature selection, beside the weights all that those states depend on."""
    reference: Reference | None = None
    evaluators: Callable[[nn.Module, Runtime], list[Evaluator]] = field(default=lambda scorer, runtime: [])
    """Wrapped scorer -> what measures it during training."""
    after_step: Callable[[], None] | None = None
    show_answers: Callable[[str], None] = field(default=lambda title: None)
    """Print some held-out answers, on the main rank; called before and after training on every rank."""
    prepare: Callable[[Runtime, Console], None] = field(default=lambda runtime, console: None)
    """What is computed once before training, on every rank; the scorer is not wrapped yet."""
    passes_before: int = 0
    """Passes over all pictures that this takes."""
    lint: Callable[[], list[Problem]] = field(default=list)
    """Look for faults of the conversation template itself."""
    notes: Sequence[str] = ()
    """What was decided where the recipe left it open, a line each."""

    def show(self, console: Console) -> None:
        """Print the tuning plan and the notes."""
        console.print(self.plan.table())
        for note in self.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)

    @property
    def groups(self) -> list[ParameterGroup]:
        """The plan's groups by the names that the scorer gives their parameters."""
        return [
            replace(group, parameters={f"hf.{name}": item for name, item in group.parameters.items()})
            for group in self.plan.groups
        ]

    @property
    def blocks(self) -> list[str]:
        """Module paths, within the scorer, of all transformer blocks: the units of checkpointing and sharding."""
        return [f"hf.{path}" for paths in self.components.layers.values() for path in paths]


def open_datasets(configs: Iterable[AnyDatasetConfig]) -> list[Dataset]:
    """Open every data set of a recipe, relative to the working directory.

    Raises:
        DataError: all that cannot be opened, at once.
    """
    datasets: list[Dataset] = []
    problems: list[Problem] = []
    for config in configs:
        try:
            dataset = open_dataset(config, Path.cwd())
            if not len(dataset):
                problems.append(Problem("no rows", file=config.path, remedy="point `path` at a file with rows"))
            datasets.append(dataset)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return datasets


def make_loader(
    datasets: Sequence[Dataset],
    encode: Callable[[Sample], Example],
    pictures: PictureProcessor,
    config: LoaderConfig,
    output: Path | None,
    *,
    by_picture: bool,
    packed: bool,
    store: FeatureStore | None = None,
) -> Loader:
    """The training source of this rank; rows that are left out are listed in the output folder.

    Args:
        by_picture: keep rows about one picture together, as `config` says.
        packed: the model computes trees packed.
        store: knows what a frozen tower makes of pictures.
    """
    mixture = make_mixture(datasets, config, by_picture=by_picture)
    if config.report is None and output is not None:
        config = config.model_copy(update={"report": output / ROW_REPORT})
    return Loader(datasets, mixture, encode, pictures, config, (rank(), world_size()), packed, store)


def make_mixture(datasets: Sequence[Dataset], config: LoaderConfig, *, by_picture: bool) -> Mixture:
    """Which row comes when in training; arguments as for `make_loader`."""
    return Mixture(
        [len(item) for item in datasets],
        [item.config.weight for item in datasets],
        config.seed,
        groups=(lambda: picture_groups(datasets)) if by_picture else None,
        piece_size=config.most_per_picture,
    )


def training_loader(
    built: Built, config: LoaderConfig, output: Path | None = None, store: FeatureStore | None = None
) -> Loader:
    """`make_loader` for the rows that a stage trains on; arguments as there."""
    return make_loader(
        built.datasets,
        built.encode,
        built.pictures,
        config,
        output,
        by_picture=built.by_picture,
        packed=built.packed,
        store=store,
    )


def settled(config: LoaderConfig, tokens: int | None = None) -> LoaderConfig:
    """The settings with a number in the place of `micro_batch: auto`.

    Args:
        tokens: what was found; None for a loader that yields no windows.
    """
    if config.micro_batch != "auto":
        return config
    return config.model_copy(update={"micro_batch": 1 if tokens is None else None, "micro_batch_tokens": tokens})


def make_held_out_loader(
    datasets: Sequence[Dataset],
    encode: Callable[[Sample], Example],
    pictures: PictureProcessor,
    batch: int,
    store: FeatureStore | None = None,
) -> Loader:
    """A source that yields every held-out row once, in a single window of light batches."""
    total = sum(len(item) for item in datasets)
    config = LoaderConfig(
        global_batch=total, micro_batch=batch, epochs=1, prefetch=0, rows_per_picture=1, decode=HELD_OUT_DECODE
    )
    unweighted = Mixture([len(item) for item in datasets], [None] * len(datasets), 0)
    return Loader(datasets, unweighted, encode, pictures, config, (rank(), world_size()), store=store)


def plain_rows(encode: Callable[[Sample], Example]) -> Callable[[Sample], Example]:
    """`encode`, refusing rows with answers to compare: the worse ones would be learned like the better ones."""

    def checked(sample: Sample) -> Example:
        if sample.preference is not None:
            raise DataError(_misplaced(sample, "the row holds answers to compare", "use it in stage preference"))
        return encode(sample)

    return checked


def pair_rows(encode: Callable[[Sample], Example]) -> Callable[[Sample], Example]:
    """`encode`, refusing rows without answers to compare: nothing would be learned from them."""

    def checked(sample: Sample) -> Example:
        if sample.preference is None:
            raise DataError(_misplaced(sample, "the row holds no answers to compare", "use it in stage tune"))
        return encode(sample)

    return checked


def preflight(recipe: StageRecipe, built: Built, device: torch.device | None = None) -> None:
    """Make what only training needs, so that what it refuses is known before.

    Args:
        device: where the training runs; None where that may be another machine.

    Raises:
        TriptychError: mixture, optimizer, schedule or kernel do not fit the recipe, the model or the device.
    """
    if recipe.train.best and recipe.evaluation is None:
        message = f"`{recipe.train.best.metric}` is followed, but nothing evaluates it"
        raise ConfigError(Problem(message, key="train.best", remedy="give `evaluation:`, or take `best` out"))
    loader = training_loader(built, settled(recipe.loader))
    build_optimizer(built.groups, recipe.train.optimizer, recipe.loader.global_batch)
    multiplier(recipe.train.schedule, 0, loader.total_windows)
    checkpointed_blocks(recipe.train.runtime.activation_checkpointing, len(built.blocks))
    scorer: Any = built.scorer
    if isinstance(recipe, VlmRecipe) and recipe.head_kernel != "plain" and "token_logprobs" in scorer.needs:
        head = scorer.hf.get_output_embeddings()
        if device is None:
            check_cut_kernel(head, torch.device("cuda"))
        else:
            find_cut_kernel(head, device)


def check_length(max_length: int, limit: int | None, part: str) -> None:
    """Refuse rows longer than a model was made for.

    Args:
        limit: Longest row in tokens; None where the model names none.
        part: What has the limit, for the message.

    Raises:
        ModelError: `max_length` is above the limit.
    """
    if limit is not None and max_length > limit:
        message = f"max_length {max_length} is more than the {limit} tokens (max_position_embeddings) of the {part}"
        raise ModelError(Problem(message, key="max_length", remedy=f"set `max_length` to {limit} at most"))


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a recipe's `dtype`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


def resolved(config: Config) -> dict[str, Any]:
    """The recipe with every default filled in, as plain values; what checkpoints are compared by."""
    return config.model_dump(mode="json", by_alias=True)


def _misplaced(sample: Sample, message: str, remedy: str) -> Problem:
    return Problem(message, file=sample.origin.file, line=sample.origin.line, remedy=f"{remedy}, or drop it")
