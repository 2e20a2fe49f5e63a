"""The loop: exact resume at every step and after SIGKILL, evaluation, the best model, what stops a run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.engine.toy_run import (
    LENGTH,
    NUM_WINDOWS,
    ToyEvaluator,
    ToyObjective,
    ToyScorer,
    ToySource,
    Watcher,
    assert_identical,
    outcome,
    toy_batch,
    toy_trainer,
)
from triptych.core.errors import CheckpointError, DataError, TrainingError
from triptych.core.protocols import Objective
from triptych.core.types import Batch, ImageReference, Progress, StepRecord, Window
from triptych.engine.checkpoint import read
from triptych.engine.trainer import FitResult


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("whole")
    toy_trainer(output).fit()
    return outcome(output)


def test_the_toy_is_a_plain_objective() -> None:
    assert isinstance(ToyObjective(), Objective)


@pytest.mark.requirement("F-26", "F-27")
def test_a_run_takes_every_window_the_last_partial_one_included(tmp_path: Path) -> None:
    watcher, source = Watcher(), ToySource()
    result = toy_trainer(tmp_path, source=source, monitors=[watcher]).fit()

    assert result.progress == Progress(NUM_WINDOWS, NUM_WINDOWS, 3.0)
    assert [record.samples for record in watcher.records] == [4, 4, 2] * 3
    assert [record.supervised_tokens for record in watcher.records] == [16, 16, 8] * 3
    assert [event for event in watcher.events if event[0] == "evaluation"] == [("evaluation", s) for s in (3, 6, 9)]
    saved = [event[1] for event in watcher.events if event[0] == "checkpoint"]
    assert saved == [2, 4, 6, 8, 9]
    assert source.reported[0] == {"loss": watcher.records[0].loss, **watcher.records[0].metrics}
    assert watcher.records[0].progress.step == 1 and watcher.records[0].loss == pytest.approx(2.536, abs=1e-3)


@pytest.mark.requirement("F-26")
def test_gradients_of_one_window_never_leak_into_the_next(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path)
    seen: list[bool] = []
    trainer.after_step = lambda: seen.append(all(item.grad is None for item in trainer.scorer.parameters()))
    trainer.fit()

    assert seen == [True] * NUM_WINDOWS


@pytest.mark.requirement("G-3", "G-7")
@pytest.mark.parametrize("step", range(1, NUM_WINDOWS + 1))
def test_a_run_broken_off_after_any_step_ends_bit_identical(
    tmp_path: Path, step: int, uninterrupted: dict[str, Any]
) -> None:
    """Weights, optimizer, random numbers, data position, early stopping and log; checkpoints are two steps apart."""
    broken = toy_trainer(tmp_path)
    watcher = Watcher(fail_at=step)
    broken.monitors = [*broken.monitors, watcher]
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert isinstance(watcher.error, KeyboardInterrupt)

    torch.rand(step)  # whatever happened to the generators in between
    resumed = toy_trainer(tmp_path)
    watcher = Watcher()
    resumed.monitors = [*resumed.monitors, watcher]
    resumed.fit()

    start = (step - 1) // 2 * 2
    assert watcher.events[0] == ("start", start)
    assert watcher.events[1] == (("checkpoint", start) if start else ("step", 1))
    assert_identical(outcome(tmp_path), uninterrupted)


def test_a_finished_run_started_again_only_reports(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    first = toy_trainer(tmp_path).fit()
    watcher, saved = Watcher(), list[Path]()
    again = toy_trainer(tmp_path, save_model=saved.append)
    again.monitors = [*again.monitors, watcher]

    assert again.fit() == first
    assert [event[0] for event in watcher.events] == ["start", "checkpoint", "end"]
    assert saved == [tmp_path / "model"]
    assert_identical(outcome(tmp_path), uninterrupted)


DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.unit.engine.toy_run import Watcher, toy_trainer

class Telling(Watcher):
    def on_step(self, record):
        if not self.records:
            os.write(write, b"!")
        super().on_step(record)

def start(output):
    '''A process that has finished the first step of its life.'''
    pid = os.fork()
    if pid == 0:
        trainer = toy_trainer(Path(output), {"save_every": 1, "keep_last": 2})
        trainer.monitors = [*trainer.monitors, Telling()]
        trainer.fit()
        os.write(write, b"!")  # a life without any step
        os._exit(0)
    os.read(read, 1)
    return pid

read, write = os.pipe()
pid, begin = start(sys.argv[1]), time.perf_counter()
assert os.waitpid(pid, 0)[1] == 0
length = time.perf_counter() - begin
rng = random.Random(7)
status, steps = None, []
while status != 0:
    pid = start(sys.argv[2])
    time.sleep(rng.uniform(0, 0.3) * length)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    last = Path(sys.argv[2], "checkpoints", "last")
    steps.append(int(os.readlink(last)[5:]) if last.is_symlink() else 0)
    os.set_blocking(read, False)
    try:
        os.read(read, 9)
    except BlockingIOError:
        pass
    os.set_blocking(read, True)
print(*steps)
"""


@pytest.mark.requirement("G-7")
def test_killed_at_random_instants_a_run_ends_bit_identical(tmp_path: Path) -> None:
    """SIGKILL at a random instant of the training, again and again until a life reaches the end."""
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "whole"), str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    steps = [int(step) for step in done.stdout.split()]
    assert len(set(steps)) >= 3, "killed at the same step each time"
    assert steps[-1] == NUM_WINDOWS
    assert_identical(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_evaluation_changes_nothing_of_the_training(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    toy_trainer(tmp_path, {"evaluate_every": None}, evaluators=[]).fit()

    assert_identical(outcome(tmp_path)["weights"], uninterrupted["weights"])


@pytest.mark.requirement("F-27", "G-4", "G-6")
def test_the_best_checkpoint_is_kept_and_is_the_model_saved(tmp_path: Path) -> None:
    scorer = ToyScorer().train()
    saved: dict[str, torch.Tensor] = {}
    trainer = toy_trainer(
        tmp_path,
        {"evaluate_every": 1, "keep_last": 1, "best": {"metric": "loss"}},
        scorer=scorer,
        evaluators=[ToyEvaluator(scorer, [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])],
        save_model=lambda folder: saved.update({name: item.clone() for name, item in scorer.state_dict().items()}),
    )
    result = trainer.fit()

    assert (result.best_value, result.best_step, result.stopped_early) == (1.0, 2, False)
    assert result.evaluation == {"loss": 1.0}  # of the weights that were saved, not the last one
    folders = sorted(item.name for item in (tmp_path / "checkpoints").iterdir())
    assert folders == ["best", "last", "step-00000002", "step-00000009"]
    best = read(tmp_path / "checkpoints" / "best").weights
    assert best.keys() < saved.keys()
    for name, tensor in best.items():
        assert torch.equal(saved[name], tensor), name


@pytest.mark.requirement("G-1", "G-2")
def test_early_stopping_counts_on_after_a_resume(tmp_path: Path) -> None:
    values = [math.nan, 2.0, 2.5, 2.5, 2.5, 0.0]
    train = {"evaluate_every": 1, "best": {"metric": "loss", "patience": 3}, "save_every": 1}

    def trainer(skip: int, fail_at: int | None = None) -> tuple[Any, Watcher]:
        scorer, watcher = ToyScorer().train(), Watcher(fail_at)
        evaluators = [ToyEvaluator(scorer, values[skip:])]
        return toy_trainer(tmp_path, train, scorer=scorer, evaluators=evaluators, monitors=[watcher]), watcher

    broken, _ = trainer(0, fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    resumed, watcher = trainer(3)
    result: FitResult = resumed.fit()

    assert watcher.events[0] == ("start", 3)
    assert (result.progress.step, result.stopped_early) == (5, True)
    assert (result.best_value, result.best_step) == (2.0, 2)
    again, _ = trainer(5)
    assert again.fit().progress.step == 5


def test_a_metric_that_nothing_evaluates_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.best: `loss` is followed, but nothing evaluates it"):
        toy_trainer(tmp_path, {"best": {"metric": "loss"}}, evaluators=[])


def test_a_source_of_unknown_length_is_evaluated_and_saved_at_its_end(tmp_path: Path) -> None:
    watcher = Watcher()
    schedule = {"schedule": {"kind": "constant"}}
    result = toy_trainer(tmp_path, schedule, source=ToySource(endless=True), monitors=[watcher]).fit()

    assert result.progress == Progress(9, None, 3.0)
    assert watcher.events[-3:] == [("evaluation", 9), ("checkpoint", 9), ("end", 9)]


def test_a_changed_recipe_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    toy_trainer(tmp_path).fit()
    before = (tmp_path / "log.jsonl").read_text()
    toy_trainer(tmp_path, {"log_every": 3, "save_every": 5, "keep_last": 9}).fit()

    with pytest.raises(CheckpointError, match=r"train\.optimizer\.betas\[1\]: 0.95 -> 0.9"):
        toy_trainer(tmp_path, {"optimizer": {"betas": (0.9, 0.9)}}).fit()
    assert len((tmp_path / "log.jsonl").read_text()) == len(before)


@pytest.mark.requirement("F-10")
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_samples(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, source=ToySource(broken=7))
    with pytest.raises(TrainingError) as caught:
        trainer.fit()

    step = trainer.progress.step
    places = [(problem.file, problem.line) for problem in caught.value.problems[1:]]
    assert ("toy.jsonl", 7) in places and len(places) == 2  # the micro-batch of two, not the window of four
    assert f"step {step + 1}: loss is nan; the weights are untouched" in str(caught.value)
    for parameter in trainer.scorer.parameters():
        assert parameter.isfinite().all()
    note = json.loads((tmp_path / "non-finite.json").read_text())
    assert (note["step"], note["loss"]) == (step, "nan")
    assert 7 in [sample["line"] for sample in note["samples"]]
    assert set(note["gradients"]) == {"embedding.weight", "head.weight", "head.bias"}
    error = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (error["event"], error["kind"]) == ("error", "TrainingError")


class InfiniteGradient(torch.autograd.Function):
    """Identity with a finite value and an infinite gradient."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.inf


@pytest.mark.requirement("F-10")
def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_the_parameters(tmp_path: Path) -> None:
    scorer = ToyScorer().train()
    scorer.embedding.register_forward_hook(lambda module, inputs, output: InfiniteGradient.apply(output))
    before = scorer.embedding.weight.detach().clone()

    with pytest.raises(TrainingError) as caught:
        toy_trainer(tmp_path, scorer=scorer).fit()

    assert "gradients are not finite" in str(caught.value)
    assert "Non-finite gradients: toy (1 of 3), first embedding.weight" in str(caught.value)
    assert len(caught.value.problems) == 1 + 4
    assert torch.equal(scorer.embedding.weight, before)


def test_an_fp16_overflow_is_a_skipped_step_not_the_end(tmp_path: Path) -> None:
    scorer, watcher = ToyScorer().train(), Watcher()
    trainer = toy_trainer(tmp_path, scorer=scorer, monitors=[watcher])
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflow_at = {2, 3}
    hook: list[torch.Tensor] = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if trainer.progress.step in overflow_at else gradient

    scorer.head.bias.register_hook(overflow)
    trainer.after_step = lambda: hook.append(scorer.head.weight.detach().clone())
    result = trainer.fit()

    assert result.progress.step == NUM_WINDOWS
    assert [record.is_skipped for record in watcher.records] == [False, False, True, True] + [False] * 5
    assert [record.metrics["loss_scale"] for record in watcher.records[1:5]] == [1024.0, 512.0, 256.0, 256.0]
    assert torch.equal(hook[1], hook[2]) and torch.equal(hook[2], hook[3])
    assert not torch.equal(hook[3], hook[4])


def test_fp16_overflows_that_no_scale_cures_stop(tmp_path: Path) -> None:
    scorer = ToyScorer().train()
    trainer = toy_trainer(tmp_path, scorer=scorer)
    trainer.runtime.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-6)
    scorer.head.bias.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(TrainingError, match="gradients are not finite"):
        trainer.fit()
    assert trainer.progress.step == 3  # 2^-6, 2^-7 and 2^-8 were tried


def unreached(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    return [name for name, item in parameters.items() if item.grad is None or not item.grad.any()]


def test_a_trainable_parameter_without_gradient_stops_the_run(tmp_path: Path) -> None:
    scorer = ToyScorer().train()
    scorer.unused = nn.Linear(2, 2)
    scorer.embedding.weight.register_hook(torch.zeros_like)
    source = ToySource()
    windows = source.windows

    # Windows of text alone would be allowed to wait for pictures.
    def with_pictures() -> Iterator[Window]:
        for window in windows():
            batches = tuple(replace(batch, images=(ImageReference("a.png"),)) for batch in window.batches)
            yield replace(window, batches=batches)

    source.windows = with_pictures  # type: ignore[method-assign]
    trainer = toy_trainer(tmp_path, source=source, scorer=scorer, gradient_check=unreached)
    with pytest.raises(TrainingError) as caught:
        trainer.fit()

    assert [problem.message for problem in caught.value.problems] == [
        "no gradient reaches 3 trainable parameters",
        "group toy: 3 of 5: embedding.weight, unused.weight, unused.bias",
    ]
    assert trainer.progress.step == 0


def test_a_run_shorter_than_the_patience_is_refused_at_its_end_and_at_every_start_after_it(tmp_path: Path) -> None:
    saved: list[Path] = []
    for _ in range(2):
        scorer = ToyScorer().train()
        scorer.unused = nn.Linear(2, 2)
        trainer = toy_trainer(tmp_path, scorer=scorer, gradient_check=unreached, save_model=saved.append)
        with pytest.raises(TrainingError, match="no gradient reaches 2 trainable parameters"):
            trainer.fit()
        assert trainer.progress.step == NUM_WINDOWS
    assert not saved


def test_the_check_goes_on_after_a_resume_for_those_not_reached_yet(tmp_path: Path) -> None:
    """Before the break the head was reached; afterwards nothing is, which only the others are blamed for."""

    def start(reaching: set[str], fail_at: int | None = None) -> Any:
        def check(parameters: Mapping[str, nn.Parameter]) -> list[str]:
            return [name for name in parameters if name not in reaching]

        return toy_trainer(tmp_path, gradient_check=check, monitors=[Watcher(fail_at)])

    with pytest.raises(KeyboardInterrupt):
        start({"head.weight", "head.bias"}, fail_at=5).fit()
    with pytest.raises(TrainingError, match=r"group toy: 1 of 3: embedding\.weight"):
        start(set()).fit()


def test_parameters_that_all_get_gradients_pass(tmp_path: Path) -> None:
    assert toy_trainer(tmp_path, gradient_check=unreached).fit().progress.step == NUM_WINDOWS


class Emptied(ToySource):
    """The second window has samples without weight, or none because all its rows were skipped."""

    def __init__(self, is_skipped: bool) -> None:
        super().__init__()
        self.is_skipped = is_skipped

    def windows(self) -> Iterator[Window]:
        for window in super().windows():
            if window.index == 1:
                change = {"is_padding": True} if self.is_skipped else {"weights": torch.zeros(2, LENGTH)}
                batches = tuple(replace(batch, **change) for batch in window.batches)
                skipped = tuple(origin for batch in batches for origin in batch.origins)
                window = replace(window, batches=batches, skipped=skipped if self.is_skipped else ())
            yield window


def test_a_window_without_weight_stops_the_run_unless_its_rows_were_skipped_and_reported(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "empty", source=Emptied(is_skipped=False))
    with pytest.raises(TrainingError, match="step 2: every term of the loss has weight 0") as caught:
        trainer.fit()
    assert trainer.progress.step == 1
    assert len(caught.value.problems) == 1 + 4

    assert toy_trainer(tmp_path / "skipped", source=Emptied(is_skipped=True)).fit().progress.step == NUM_WINDOWS


class Waiting(ToySource):
    """Takes its time over the second window, and over every batch of the third."""

    def windows(self) -> Iterator[Window]:
        for window in super().windows():
            time.sleep(0.1 * (window.index == 1))
            self.slow = window.index == 2
            yield window

    def attach(self, batch: Batch) -> Batch:
        time.sleep(0.1 * self.slow)
        return super().attach(batch)


def test_the_wait_for_windows_and_for_pixels_counts_as_time_for_data(tmp_path: Path) -> None:
    watcher = Watcher()
    toy_trainer(tmp_path, source=Waiting(), monitors=[watcher]).fit()
    first, second, third = watcher.records[:3]
    assert first.data_seconds < 0.1 <= second.data_seconds <= second.seconds
    assert 0.1 <= third.data_seconds <= third.seconds


class Failing(ToyEvaluator):
    """Finds a bad row at its second evaluation."""

    def run(self) -> Mapping[str, float]:
        if self.calls == 1:
            raise DataError("bad row", file="held-out.jsonl", line=3)
        return super().run()


@pytest.mark.requirement("G-3", "G-7")
@pytest.mark.parametrize("save_every", [None, 2, 3])
def test_an_evaluation_that_fails_loses_nothing_and_is_made_up_for(tmp_path: Path, save_every: int | None) -> None:
    train = {"save_every": save_every}
    whole = toy_trainer(tmp_path / "whole", train).fit()
    scorer = ToyScorer().train()
    with pytest.raises(DataError, match=r"held-out\.jsonl:3"):
        toy_trainer(tmp_path / "broken", train, scorer=scorer, evaluators=[Failing(scorer)]).fit()
    assert read(tmp_path / "broken" / "checkpoints" / "last").step == 6

    watcher = Watcher()
    resumed = toy_trainer(tmp_path / "broken", train)
    resumed.monitors = [*resumed.monitors, watcher]
    assert resumed.fit().evaluation == whole.evaluation
    assert watcher.events[:2] == [("start", 6), ("evaluation", 6)]
    assert_identical(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))


def test_a_misspelt_metric_may_be_mended_and_the_run_goes_on(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "whole", {"best": {"metric": "loss"}}).fit()
    with pytest.raises(TrainingError, match=r"train\.best\.metric: the evaluation has no metric `los`"):
        toy_trainer(tmp_path / "mended", {"best": {"metric": "los"}}).fit()
    toy_trainer(tmp_path / "mended", {"best": {"metric": "loss"}}).fit()

    assert_identical(outcome(tmp_path / "mended"), outcome(tmp_path / "whole"))


class Signalling(Watcher):
    """Sends signals to this process after a step, or during an evaluation."""

    def __init__(self, step: int, *signals: signal.Signals) -> None:
        super().__init__()
        self.step, self.signals = step, signals

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if record.progress.step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.mark.requirement("G-3", "G-7")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 2, 3, 6, 8, 9])
def test_a_signal_stops_after_the_step_with_a_checkpoint_of_it(
    tmp_path: Path, number: signal.Signals, step: int, uninterrupted: dict[str, Any]
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    broken = toy_trainer(tmp_path)
    broken.monitors = [*broken.monitors, Signalling(step, number)]
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        broken.fit()
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert read(tmp_path / "checkpoints" / "last").step == step

    torch.rand(step)
    watcher = Watcher()
    resumed = toy_trainer(tmp_path)
    resumed.monitors = [*resumed.monitors, watcher]
    resumed.fit()
    assert watcher.events[0] == ("start", step)
    assert_identical(outcome(tmp_path), uninterrupted)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    watcher = Signalling(3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path, monitors=[watcher]).fit()
    assert watcher.events[-1] == ("end", 3)
    assert read(tmp_path / "checkpoints" / "last").step == 2


def test_a_signal_while_the_model_is_written_ends_the_run_after_it(tmp_path: Path) -> None:
    saved: list[Path] = []

    def save(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        saved.append(folder)

    with pytest.raises(SystemExit):
        toy_trainer(tmp_path, save_model=save).fit()
    assert saved == [tmp_path / "model"]


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    def start_another() -> None:
        with pytest.raises(TrainingError, match=f"another process \\({os.getpid()}\\) is training into this folder"):
            toy_trainer(tmp_path).fit()

    trainer = toy_trainer(tmp_path)
    trainer.after_step = start_another
    trainer.fit()
    toy_trainer(tmp_path).fit()  # released


def test_a_source_that_lost_its_place_is_noticed(tmp_path: Path) -> None:
    source = ToySource()
    source.position = 1
    with pytest.raises(TrainingError, match="window 1, the run is at step 0"):
        toy_trainer(tmp_path, source=source).fit()


def test_toy_batches_are_what_they_say() -> None:
    assert toy_batch([0, 9]).input_ids.tolist() == [[0, 1, 2, 3, 4], [9, 10, 0, 1, 2]]
