"""The whole-file report: every row read, every picture decoded, every row tokenised, before any training."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from triptych.core.errors import DataError, Problem
from triptych.core.protocols import PictureProcessor
from triptych.core.types import IGNORE, Example, ImageReference, Origin, Sample
from triptych.data.formats import AnyDatasetConfig, Dataset, located, open_dataset
from triptych.data.images import decode, describe, read_encoded

Level = Literal["error", "warning"]
Encode = Callable[[Sample], Example]


@dataclass(frozen=True)
class Finding:
    """One thing the check found."""

    level: Level
    """An error makes training on the row impossible or wrong; a warning does not."""
    problem: Problem
    dataset: str
    """Path of the data set in the recipe."""


@dataclass(frozen=True)
class LengthSummary:
    """Token counts over rows (branches, expanded). Percentiles are nearest-rank: a length that does occur."""

    rows: int
    p50: int
    p95: int
    p99: int
    longest: int
    total: int
    histogram: tuple[tuple[int, int], ...]
    """(upper bound, rows at most that long and longer than the bound before); bounds are powers of two."""


@dataclass(frozen=True)
class DatasetSummary:
    """Counts of one data set."""

    name: str
    samples: int
    """Samples in the file, broken ones included."""
    broken: int
    """Samples that cannot be used."""
    text_only: int
    """Usable samples without a picture."""
    pictures: int
    """Pictures of all usable samples, repetitions included."""
    different_pictures: int
    tasks: tuple[tuple[str, int], ...]
    """(task, usable samples), most frequent first."""
    lengths: LengthSummary | None
    """None when nothing was tokenised."""
    supervised_tokens: int

    @property
    def supervised_share(self) -> float:
        """Share of tokens that are supervised, 0 when nothing was tokenised."""
        return self.supervised_tokens / self.lengths.total if self.lengths and self.lengths.total else 0.0


@dataclass(frozen=True)
class CheckReport:
    """What `check_datasets` found."""

    findings: tuple[Finding, ...]
    summary: tuple[DatasetSummary, ...]
    """One for each data set."""

    @property
    def has_errors(self) -> bool:
        """True when some row or file cannot be used."""
        return any(finding.level == "error" for finding in self.findings)

    def render(self, most: int = 50) -> RenderableType:
        """Rich tables: data sets, tasks, token lengths, and the first `most` findings, errors first.

        Print it with `soft_wrap=True`: lines then keep `file:line` whole however narrow the console.
        """
        parts: list[RenderableType] = [_places(self.summary), _datasets_table(self.summary)]
        if any(item.lengths for item in self.summary):
            parts.append(_tokens_table(self.summary))
        if any(task for item in self.summary for task, _ in item.tasks):
            parts.append(_tasks_table(self.summary))
        parts += [_histogram(item) for item in self.summary if item.lengths]
        ordered = sorted(self.findings, key=lambda finding: finding.level)
        parts += [_finding_line(finding) for finding in ordered[:most]]
        if len(ordered) > most:
            parts.append(RichText(f"... and {len(ordered) - most} more"))
        counts = Counter(finding.level for finding in self.findings)
        style = "bold red" if counts["error"] else "bold green"
        parts.append(RichText(f"{counts['error']} errors, {counts['warning']} warnings", style=style))
        return Group(*parts)


def open_datasets(configs: Sequence[AnyDatasetConfig], base: Path) -> tuple[list[Dataset], list[Finding]]:
    """Open every data set that can be opened; the others become findings, so that one report holds all."""
    datasets: list[Dataset] = []
    findings: list[Finding] = []
    for config in configs:
        try:
            datasets.append(open_dataset(config, base))
        except DataError as error:
            findings += [Finding("error", problem, config.path) for problem in error.problems]
    return datasets, findings


def check_datasets(
    datasets: Sequence[Dataset],
    encode: Encode | None = None,
    pictures: PictureProcessor | None = None,
    *,
    findings: Iterable[Finding] = (),
    advance: Callable[[], None] | None = None,
) -> CheckReport:
    """Walk every sample of every data set and go on after errors.

    Args:
        datasets: what was opened.
        encode: tokenises a sample as training will; its DataErrors (too long, ...) become findings. None leaves
            tokens out of the report.
        pictures: also run each different picture through the model's processor.
        findings: what opening the data sets already found.
        advance: called after every sample (a progress bar).
    """
    collected = list(findings)
    decoder = _PictureCheck(pictures)
    contents: dict[bytes, tuple[Dataset, Origin]] = {}
    summaries = []
    for dataset in datasets:
        walk = _Walk(dataset, encode, decoder, contents)
        for index in range(len(dataset)):
            walk.visit(index)
            if advance:
                advance()
        collected += walk.finish()
        summaries.append(walk.summary())
    return CheckReport(tuple(collected), tuple(summaries))


class _PictureCheck:
    """Decodes each different picture once and remembers those that fail."""

    def __init__(self, pictures: PictureProcessor | None) -> None:
        self._pictures = pictures
        self._outcomes: dict[str | bytes, Problem | None] = {}
        self._contents: dict[tuple[object, ...], bytes] = {}

    def key(self, reference: ImageReference) -> str | bytes:
        """Identity of a picture: its file, or a digest of its bytes."""
        return reference.path if reference.path and reference.offset is None else self.content(reference)

    def content(self, reference: ImageReference) -> bytes:
        """Digest of the encoded picture; of one that is on disk it is made once."""
        if reference.data is not None:
            return _digest(reference.data)
        if reference.identity not in self._contents:
            self._contents[reference.identity] = _digest(read_encoded(reference))
        return self._contents[reference.identity]

    def problem(self, reference: ImageReference) -> Problem | None:
        """What is wrong with a picture."""
        key = self.key(reference)
        if key not in self._outcomes:
            self._outcomes[key] = self._examine(reference)
        return self._outcomes[key]

    def _examine(self, reference: ImageReference) -> Problem | None:
        try:
            picture = decode(reference)
        except DataError as error:
            return error.problems[0]
        if self._pictures is None:
            return None
        try:
            self._pictures.pixels([picture])
        except (ValueError, ArithmeticError, DataError) as error:
            size = f"{picture.width} x {picture.height}"
            message = f"the model's processor refuses picture {describe(reference)} ({size}): {error}"
            return Problem(message, remedy="change the picture or drop the row")
        return None


@dataclass
class _Walk:
    """The state of the walk over one data set."""

    dataset: Dataset
    encode: Encode | None
    decoder: _PictureCheck
    contents: dict[bytes, tuple[Dataset, Origin]]
    """Digest of a row's content -> its first place, over all data sets."""
    findings: list[Finding] = field(default_factory=list)
    errors: int = 0
    broken: int = 0
    text_only: int = 0
    pictures: int = 0
    different: set[str | bytes] = field(default_factory=set)
    tasks: Counter[str] = field(default_factory=Counter)
    ids: dict[str, Origin] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    unsupervised: list[Origin] = field(default_factory=list)

    def visit(self, index: int) -> None:
        """Read, decode and tokenise one sample."""
        errors = self.errors
        try:
            sample = self.dataset.sample(index)
        except DataError as error:
            self._report(error, self.dataset.origin(index))
            self.broken += 1
            return
        self._check_id(sample.origin)
        if self._check_pictures(sample) and self.encode is not None:
            self._check_tokens(sample, self.encode)
        if self.errors > errors:
            self.broken += 1
            return
        self._check_repetition(sample)
        self.tasks[sample.task] += 1
        self.pictures += len(sample.images)
        self.text_only += not sample.images
        self.different.update(self.decoder.key(image) for image in sample.images)

    def finish(self) -> list[Finding]:
        """Everything found, those that only the whole data set shows included."""
        # Where no row is supervised the objective reads no labels (contrastive); one row among others is a fault.
        if self.supervised:
            for origin in self.unsupervised:
                problem = Problem("no token of the row is supervised", remedy="give an answer weight, or drop the row")
                self._report(DataError(problem), origin)
                self.broken += 1
        return self.findings

    def summary(self) -> DatasetSummary:
        """The counts."""
        return DatasetSummary(
            name=self.dataset.name,
            samples=len(self.dataset),
            broken=self.broken,
            text_only=self.text_only,
            pictures=self.pictures,
            different_pictures=len(self.different),
            tasks=tuple(self.tasks.most_common()),
            lengths=summarise_lengths(self.lengths) if self.lengths else None,
            supervised_tokens=self.supervised,
        )

    def _report(self, error: DataError, origin: Origin, level: Level = "error") -> None:
        problems = located(error, origin).problems
        self.findings += [Finding(level, problem, self.dataset.name) for problem in problems]
        self.errors += len(problems) if level == "error" else 0

    def _check_repetition(self, sample: Sample) -> None:
        """The same conversation about the same pictures twice: allowed, but rarely meant.

        Pictures are compared by content: the held-out copy of a training picture is another file.
        """
        answers = sample.preference.answers if sample.preference else ()
        pictures = [self.decoder.content(image) for image in sample.images]
        turns = [[(turn.role, turn.text) for turn in messages] for messages in (sample.messages, *answers)]
        digest = _digest(repr((pictures, turns)).encode())
        dataset, first = self.contents.setdefault(digest, (self.dataset, sample.origin))
        if first is not sample.origin:
            message = f"the row repeats {first.file}:{first.line}"
            remedy = "drop one of them, unless it is meant to count twice"
            if dataset is not self.dataset:
                message += " of another data set"
                remedy = "drop one of them: a held-out row that is trained on measures nothing"
            self._report(DataError(Problem(message, remedy=remedy)), sample.origin, "warning")

    def _check_id(self, origin: Origin) -> None:
        first = self.ids.setdefault(origin.id, origin)
        if first is not origin:
            message = f"id `{origin.id}` was already used in {first.file}:{first.line}"
            self._report(DataError(Problem(message, key="id", remedy="give every row its own id, or none")), origin)

    def _check_pictures(self, sample: Sample) -> bool:
        problems = dict.fromkeys(self.decoder.problem(image) for image in sample.images)
        found = [problem for problem in problems if problem is not None]
        if found:
            self._report(DataError(found), sample.origin)
        return not found

    def _check_tokens(self, sample: Sample, encode: Encode) -> None:
        try:
            example = encode(sample)
        except DataError as error:
            self._report(error, sample.origin)
            return
        trunk_supervised = int((example.trunk.labels != IGNORE).sum())
        supervised = 0
        for branch in example.branches:
            self.lengths.append(len(example.trunk.input_ids) + len(branch.input_ids))
            supervised += trunk_supervised + int((branch.labels != IGNORE).sum())
        self.supervised += supervised
        if not supervised:
            self.unsupervised.append(sample.origin)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def summarise_lengths(lengths: Sequence[int]) -> LengthSummary:
    """Summarise at least one token count."""
    ordered = sorted(lengths)

    def percentile(share: float) -> int:
        return ordered[math.ceil(share * len(ordered)) - 1]

    bins = Counter(max(1, length - 1).bit_length() for length in ordered)
    bounds = range(min(bins), max(bins) + 1)
    histogram = tuple((2**bits, bins[bits]) for bits in bounds)
    return LengthSummary(
        rows=len(ordered),
        p50=percentile(0.50),
        p95=percentile(0.95),
        p99=percentile(0.99),
        longest=ordered[-1],
        total=sum(ordered),
        histogram=histogram,
    )


def _places(summary: Sequence[DatasetSummary]) -> RichText:
    """Number and full path of each data set; left whole on narrow terminals, so that it can be copied."""
    lines = [f"{number}  {item.name}" for number, item in enumerate(summary, 1)]
    return RichText("\n".join(lines), no_wrap=True, overflow="ignore")


def _short(number: int, item: DatasetSummary) -> str:
    return f"{number}  {Path(item.name).name}"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _datasets_table(summary: Sequence[DatasetSummary]) -> Table:
    table = _table("Data sets", "data set", "samples", "broken", "text only", "pictures", "different")
    for number, item in enumerate(summary, 1):
        counts = (item.samples, item.broken, item.text_only, item.pictures, item.different_pictures)
        table.add_row(_short(number, item), *map(str, counts))
    return table


def _tokens_table(summary: Sequence[DatasetSummary]) -> Table:
    table = _table("Tokens of a row", "data set", "rows", "p50", "p95", "p99", "max", "supervised")
    for number, item in enumerate(summary, 1):
        if item.lengths:
            lengths = item.lengths
            counts = (lengths.rows, lengths.p50, lengths.p95, lengths.p99, lengths.longest)
            table.add_row(_short(number, item), *map(str, counts), f"{item.supervised_share:.1%}")
    return table


def _tasks_table(summary: Sequence[DatasetSummary]) -> Table:
    table = _table("Tasks", "task", "samples")
    totals: Counter[str] = Counter()
    for item in summary:
        totals.update(dict(item.tasks))
    for task, count in totals.most_common():
        table.add_row(task or "(none)", str(count))
    return table


def _histogram(item: DatasetSummary) -> Table:
    assert item.lengths is not None
    title = f"Token lengths of {Path(item.name).name}"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    largest = max(count for _, count in item.lengths.histogram)
    for bound, count in item.lengths.histogram:
        table.add_row(
            f"{bound // 2 + 1 if bound > 2 else 0}-{bound}", str(count), "█" * math.ceil(40 * count / largest)
        )
    return table


def _finding_line(finding: Finding) -> RichText:
    style = "red" if finding.level == "error" else "yellow"
    return RichText.assemble((f"{finding.level}: ", style), str(finding.problem))
