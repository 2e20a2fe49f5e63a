"""A run small enough to check by hand, that uses every generator of random numbers a real one may use."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from triptych.core.distributed import rank, world_size
from triptych.core.types import (
    IGNORE,
    Batch,
    Origin,
    ParameterGroup,
    Progress,
    Scores,
    StepRecord,
    Window,
    WindowValues,
)
from triptych.engine.checkpoint import read
from triptych.engine.monitors import JsonlConfig, build_monitors
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.engine.trainer import TrainConfig, Trainer

VOCABULARY, WIDTH, LENGTH = 11, 8, 5
NUM_SAMPLES, GLOBAL_BATCH, EPOCHS = 10, 4, 3
NUM_WINDOWS = 9
"""3 epochs of windows of 4, 4 and 2 samples."""
TIMES = ("seconds", "data_seconds", "memory_bytes")
"""Keys of the log that no two runs share."""


class ToyScorer(nn.Module):
    """Embedding, dropout, noise from the data, linear; a buffer that changes; a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.frozen.requires_grad_(False)

    def forward(self, batch: Batch) -> Scores:
        if self.training:
            self.seen += batch.num_rows
        hidden = self.dropout(torch.tanh(self.frozen(self.embedding(batch.input_ids))))
        if batch.pixels is not None:
            hidden = hidden + batch.pixels["noise"]
        logprobs = self.head(hidden).float().log_softmax(-1)
        before = logprobs[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return Scores(token_logprobs=before[batch.supervised[:, 1:]])


class ToyObjective:
    """Mean negative log-probability of the supervised tokens."""

    needs = frozenset({"token_logprobs"})
    coefficients: Mapping[str, float] = {"nll": 1.0}

    def weights(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        return {"nll": batch.supervised_weights.sum()}

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        assert scores.token_logprobs is not None
        return {"nll": -(batch.supervised_weights * scores.token_logprobs).sum()}

    def metrics(self, scores: Scores, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        assert scores.token_logprobs is not None
        return {"p": (scores.token_logprobs.detach().exp().sum(), torch.tensor(float(len(scores.token_logprobs))))}


class ToySource:
    """Shuffles every epoch; micro-batches of 2; the last window of an epoch holds 2 samples."""

    def __init__(self, endless: bool = False, broken: int | None = None) -> None:
        self._endless = endless
        self._broken = broken
        self.position = 0
        self.reported: list[Mapping[str, float]] = []

    @property
    def total_windows(self) -> int | None:
        return None if self._endless else NUM_WINDOWS

    def windows(self) -> Iterator[Window]:
        each = -(-NUM_SAMPLES // GLOBAL_BATCH)
        while self.position < NUM_WINDOWS:
            index = self.position
            epoch, place = divmod(index, each)
            order = random.Random(epoch).sample(range(NUM_SAMPLES), NUM_SAMPLES)
            mine = order[place * GLOBAL_BATCH : (place + 1) * GLOBAL_BATCH]
            batches = tuple(toy_batch(mine[start : start + 2]) for start in range(0, len(mine), 2))
            self.position += 1
            # A rank without samples keeps step with a padding batch.
            share = batches[rank() :: world_size()] or (replace(batches[0], is_padding=True),)
            yield Window(index, epoch + (place + 1) / each, share)

    def attach(self, batch: Batch) -> Batch:
        noise = random.random() + float(np.random.rand())
        if self._broken is not None and any(origin.line == self._broken for origin in batch.origins):
            noise = float("nan")
        return replace(batch, pixels={"noise": torch.full((WIDTH,), 0.01 * noise)})

    def report(self, metrics: Mapping[str, float]) -> None:
        self.reported.append(metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class ToyEvaluator:
    """Mean loss over all samples; draws random numbers and changes modes, as a careless evaluation may."""

    def __init__(self, scorer: nn.Module, values: list[float] | None = None) -> None:
        self._scorer = scorer
        self._values = values
        self.calls = 0

    def run(self) -> Mapping[str, float]:
        random.random(), np.random.rand(), torch.rand(1)
        self.calls += 1
        self._scorer.eval()
        scores = self._scorer(toy_batch(list(range(NUM_SAMPLES))))
        loss = float(-scores.token_logprobs.mean())
        return {"loss": loss if self._values is None else self._values[self.calls - 1]}


def toy_batch(samples: list[int]) -> Batch:
    """Sample i holds the tokens i, i + 1, ... modulo the vocabulary; all but the first are supervised."""
    rows = len(samples)
    ids = torch.tensor([[(sample + place) % VOCABULARY for place in range(LENGTH)] for sample in samples])
    labels = ids.clone()
    labels[:, 0] = IGNORE
    return Batch(
        input_ids=ids,
        labels=labels,
        weights=(labels != IGNORE).float(),
        kinds=torch.full_like(ids, 5, dtype=torch.uint8),
        lengths=torch.full((rows,), LENGTH),
        example_index=torch.arange(rows),
        tree_index=torch.arange(rows),
        trunk_lengths=torch.ones(rows, dtype=torch.int64),
        images=(),
        row_images=((),) * rows,
        origins=tuple(Origin("toy.jsonl", sample + 1, f"s{sample}") for sample in samples),
        tasks=("",) * rows,
        pairs=torch.zeros((0, 2), dtype=torch.int64),
        pair_weights=torch.zeros(0),
        text_keys=torch.arange(rows),
    )


def toy_trainer(
    output: Path,
    train: Mapping[str, Any] | None = None,
    source: ToySource | None = None,
    strategy: Literal["single", "ddp", "fsdp"] = "single",
    **changes: Any,
) -> Trainer:
    """A trainer on the toy, logging to `log.jsonl`; `train` holds keys of TrainConfig."""
    values: dict[str, Any] = {"save_every": 2, "evaluate_every": 3, "optimizer": {"betas": (0.9, 0.95)}}
    config = TrainConfig.model_validate({**values, **(train or {})})
    runtime = Runtime(RuntimeConfig(precision="fp32", strategy=strategy))
    scorer = changes.pop("scorer", None) or ToyScorer().train()
    named = {name: item for name, item in scorer.named_parameters() if item.requires_grad}
    arguments: dict[str, Any] = {
        "scorer": runtime.wrap(scorer),
        "objective": ToyObjective(),
        "source": source or ToySource(),
        "groups": [ParameterGroup("toy", "language", named, lr=0.05, weight_decay=0.01)],
        "config": config,
        "runtime": runtime,
        "output": output,
        "recipe": {"train": config.model_dump(mode="json")},
        "monitors": build_monitors([JsonlConfig()], output, config.log_every),
        "evaluators": [ToyEvaluator(scorer)],
    }
    return Trainer(**{**arguments, **changes})


class Watcher:
    """Keeps all it is told; fails where asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.events: list[tuple[str, int]] = []
        self.records: list[StepRecord] = []
        self.error: BaseException | None = None

    def on_start(self, progress: Progress) -> None:
        self.events.append(("start", progress.step))

    def on_step(self, record: StepRecord) -> None:
        self.events.append(("step", record.progress.step))
        self.records.append(record)
        if record.progress.step == self.fail_at:
            raise KeyboardInterrupt

    def on_evaluation(self, progress: Progress, results: Mapping[str, float]) -> None:
        self.events.append(("evaluation", progress.step))

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        self.events.append(("checkpoint", progress.step))

    def on_end(self, progress: Progress, error: BaseException | None) -> None:
        self.events.append(("end", progress.step))
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def outcome(output: Path) -> dict[str, Any]:
    """Everything the last checkpoint holds, and the log without times."""
    snapshot = read(output / "checkpoints" / "last")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    shared = dict(snapshot.shared, monitors=None)  # the log's length varies with the digits of its wall times
    return {
        "step": snapshot.step,
        "weights": snapshot.weights,
        "optimizer": snapshot.optimizer,
        "shared": shared,
        "ranks": snapshot.ranks,
        "log": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
    }


def assert_identical(left: Any, right: Any, where: str = "") -> None:
    """Equal bit by bit."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_identical(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_identical(*pair, f"{where}[{number}]")
    else:
        assert left == right, where
