"""The training loop. Knows no objective and no model family."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.core import distributed
from triptych.core.errors import DataError, TrainingError
from triptych.core.protocols import BatchSource, Evaluator, Monitor, Objective, Reference
from triptych.core.types import ParameterGroup, Progress, StepRecord, Window
from triptych.engine.checkpoint import Checkpoints, read
from triptych.engine.diagnosis import GradientReach, empty_window_error, non_finite_error
from triptych.engine.evaluate import run_evaluators
from triptych.engine.interruption import Interruption, stop_error
from triptych.engine.lock import locked
from triptych.engine.monitors.health import LOSS_SCALE
from triptych.engine.optim import bind_groups, build_optimizer, clip_gradients, set_learning_rates
from triptych.engine.parallel import Runtime
from triptych.engine.run_state import RunState
from triptych.engine.schedules import multiplier
from triptych.engine.state import memory_bytes, seed_everything
from triptych.engine.step import run_window
from triptych.engine.stopping import BestTracker
from triptych.engine.train_config import TrainConfig

__all__ = ["FitResult", "TrainConfig", "Trainer"]

MIN_LOSS_SCALE = 2.0**-8
"""Below this fp16 scale no overflow is a matter of scale."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    progress: Progress
    best_value: float | None
    """Best value of the metric followed, None without one."""
    best_step: int | None
    stopped_early: bool
    checkpoint: Path
    """Folder of the last checkpoint."""
    evaluation: Mapping[str, float]
    """Results of the evaluation of the weights that were saved: of the best ones with a metric followed, else of the
    last."""


@dataclass
class Trainer:
    """Runs windows until the source ends or the patience is used up. Every rank makes one and calls `fit`.

    A step counts when its window is used, also where the fp16 scaler skipped the update, so that the position in the
    data, the schedule and the step number never part.
    """

    scorer: nn.Module
    """As returned by `Runtime.wrap`, in the mode (train or eval, module by module) it is to train in."""
    objective: Objective
    source: BatchSource
    groups: Sequence[ParameterGroup]
    """What is trained, by the names the scorer had before it was wrapped."""
    config: TrainConfig
    runtime: Runtime
    output: Path
    """Folder of the run: checkpoints, logs, the model."""
    recipe: Mapping[str, Any]
    """The resolved recipe; a checkpoint of another one is refused."""
    monitors: Sequence[Monitor] = ()
    evaluators: Sequence[Evaluator] = ()
    reference: Reference | None = None
    save_model: Callable[[Path], None] | None = None
    """Writes the finished model into a folder; called on every rank, must write on the main rank only."""
    gradient_check: Callable[[Mapping[str, nn.Parameter]], list[str]] | None = None
    """Names of the parameters that the backward pass did not reach; asked after the first one."""
    after_step: Callable[[], None] | None = None
    """Called after every update, e.g. to clamp a temperature."""
    global_batch: int | None = None
    """Samples of a window over all ranks, for learning rates that scale with it."""

    def __post_init__(self) -> None:
        if self.config.best and not self.evaluators:
            problem = f"`{self.config.best.metric}` is followed, but nothing evaluates it"
            raise TrainingError(problem, key="train.best", remedy="give evaluation data, or take `best` out")
        self.groups = bind_groups(self.scorer, self.groups)
        self.progress = Progress(0, self.source.total_windows)
        parameters = {name: item for group in self.groups for name, item in group.parameters.items()}
        self._optimizer = build_optimizer(self.groups, self.config.optimizer, self.global_batch)
        self._state = RunState(self.scorer, parameters, self._optimizer, self.runtime, self.source, self.monitors)
        self._checkpoints = Checkpoints(self.output / "checkpoints", self.recipe, self.config.keep_last)
        self._best = BestTracker(self.config.best) if self.config.best else None
        self._evaluation: dict[str, float] = {}
        self._evaluated_step = self._saved_step = -1
        self._reach = GradientReach(self.gradient_check, self.groups) if self.gradient_check else None
        self._interruption = Interruption()
        self._is_pending = False

    def fit(self) -> FitResult:
        """Train from the newest checkpoint, or from the start, to the end.

        Raises:
            TrainingError: a loss or gradient is not finite, a window has no weight, or a parameter gets no gradient;
                the weights are those of the last good step and the newest checkpoint is intact. Or another process
                trains into the folder.
            DataError: a row cannot be used; on every rank.
            CheckpointError: the checkpoints belong to another recipe, are all damaged, or cannot be written.
            KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
        """
        with locked(self.output), self._interruption:
            return self._fit()

    def _fit(self) -> FitResult:
        resumed_from = self._resume()
        for monitor in self.monitors:
            monitor.on_start(self.progress)
            if resumed_from and not self._is_pending:
                # The process may have died between writing it and telling the monitors.
                monitor.on_checkpoint(self.progress, resumed_from)
        error: BaseException | None = None
        try:
            self._run()
            result = self._finish()
            self._stop_if_asked()
            return result
        except BaseException as caught:
            error = caught
            raise
        finally:
            for monitor in self.monitors:
                monitor.on_end(self.progress, error)

    def _run(self) -> None:
        if self._is_pending:
            self._follow_up()
        if self._should_stop:
            return
        windows = iter(self.source.windows())
        while True:
            self._stop_if_asked()
            start = time.perf_counter()
            window = next_window(windows, self.runtime)
            if window is None:
                break
            self._step(window, start, time.perf_counter() - start)
            if self.progress.step != self.progress.total:
                # Before the evaluation: whoever sent the signal may not wait for it.
                self._stop_if_asked()
            self._follow_up()
            if self._should_stop:
                break
        # A source without a known length ends where it likes.
        self._evaluate()
        self._save()

    def _follow_up(self) -> None:
        """Evaluate and save after a step where it is due."""
        is_last = self.progress.step == self.progress.total
        improved = (is_last or self._is_due(self.config.evaluate_every)) and self._evaluate()
        if is_last or improved or self._should_stop or self._is_due(self.config.save_every):
            self._save()
        self._is_pending = False

    def _stop_if_asked(self) -> None:
        """Leave after SIGINT or SIGTERM, with a checkpoint of the last step."""
        number = self._interruption.received(self.runtime.device)
        if not number:
            return
        if self.progress.step:
            self._save(is_pending=True)
        raise stop_error(number)

    def _step(self, window: Window, start: float, waited: float) -> None:
        """Gradients, checks, update, report."""
        step = self.progress.step
        if window.index != step:
            raise TrainingError(f"the source gave window {window.index}, the run is at step {step}")
        result = run_window(
            self.scorer, self.objective, window, self.source, self.reference, self.runtime, self.progress
        )
        if result.non_finite or not math.isfinite(result.loss):
            raise non_finite_error(step, window, result, self.groups, self.output)
        if result.is_empty and (result.samples or not result.skipped_rows):
            raise empty_window_error(step, window)
        self.runtime.unscale(self._optimizer)
        if self._reach:
            self._reach.look(step, window, result)
        norm, component_norms = clip_gradients(self.groups, self.config.optimizer)
        scaler = self.runtime.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < MIN_LOSS_SCALE):
            raise non_finite_error(step, window, result, self.groups, self.output)
        rates = set_learning_rates(self._optimizer, multiplier(self.config.schedule, step, self.progress.total))
        is_skipped = self.runtime.step(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        if self.after_step:
            self.after_step()
        self.progress = Progress(step + 1, self.progress.total, window.epoch)
        record = StepRecord(
            progress=self.progress,
            loss=result.loss,
            terms=result.terms,
            metrics={**result.metrics, LOSS_SCALE: scaler.get_scale()} if scaler else result.metrics,
            learning_rates=rates,
            gradient_norm=norm,
            component_gradient_norms=component_norms,
            samples=result.samples,
            supervised_tokens=result.supervised_tokens,
            tokens=result.tokens,
            seconds=time.perf_counter() - start,
            data_seconds=waited + result.data_seconds,
            memory_bytes=memory_bytes(self.runtime.device),
            skipped_rows=result.skipped_rows,
            is_skipped=is_skipped,
        )
        self.source.report({"loss": record.loss, **record.metrics})
        for monitor in self.monitors:
            monitor.on_step(record)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    @property
    def _should_stop(self) -> bool:
        return self._best is not None and self._best.should_stop

    def _evaluate(self) -> bool:
        """Evaluate once for each step; True when it is the best so far."""
        if not self.evaluators or self._evaluated_step == self.progress.step:
            return False
        try:
            results = run_evaluators(self.evaluators, self.scorer)
            improved = self._best is not None and self._best.update(self.progress.step, results)
        except Exception:
            # With several ranks the others may know nothing of it, and a checkpoint needs them all.
            if distributed.world_size() == 1:
                self._save(is_pending=True)
            raise
        self._evaluation, self._evaluated_step = results, self.progress.step
        for monitor in self.monitors:
            monitor.on_evaluation(self.progress, results)
        return improved

    @property
    def _best_step(self) -> int | None:
        return self._best.step if self._best else None

    def _save(self, is_pending: bool = False) -> None:
        """Write a checkpoint, once for each step.

        Args:
            is_pending: what follows the step (evaluation, the regular checkpoint) is still to be done, on resume.
        """
        if self._saved_step == self.progress.step:
            self._checkpoints.set_links(self._best_step)
            return
        trainer = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "best": self._best.state_dict() if self._best else None,
            "evaluation": self._evaluation,
            "evaluated_step": self._evaluated_step,
            "is_pending": is_pending,
            "unreached": self._reach.unreached if self._reach else [],
        }
        summary = {"epoch": self.progress.epoch, "total": self.progress.total, "evaluation": self._evaluation}
        snapshot = self._state.capture(self.progress.step, trainer, summary)
        path = self._checkpoints.save(snapshot, self._best_step)
        self._saved_step = self.progress.step
        for monitor in self.monitors:
            monitor.on_checkpoint(self.progress, path)

    def _resume(self) -> Path | None:
        """Continue from the newest checkpoint and return its folder; start the random numbers where there is none."""
        loaded = self._checkpoints.load_newest()
        if loaded is None:
            seed_everything(self.config.seed + distributed.rank())
            return None
        trainer = loaded.snapshot.shared["trainer"]
        self.progress = Progress(trainer["step"], self.source.total_windows, trainer["epoch"])
        self._is_pending = trainer["is_pending"]
        # Saved once more, and reported, where the step that is pending asks for it.
        self._saved_step = -1 if self._is_pending else self.progress.step
        self._evaluation, self._evaluated_step = trainer["evaluation"], trainer["evaluated_step"]
        if self._best and trainer["best"]:
            self._best.load_state_dict(trainer["best"])
        self._checkpoints.set_links(self._best_step)
        if self._reach:
            self._reach.unreached = list(trainer["unreached"])
        self._state.restore(loaded.snapshot)
        return loaded.path

    def _finish(self) -> FitResult:
        """Take the best weights where there is a metric to tell, and write the model."""
        if self._reach:
            self._reach.finish()
        last = self._checkpoints.path(self.progress.step)
        evaluation = self._evaluation
        if self._best and self._best.step != self.progress.step and self._best.step in self._checkpoints.steps():
            self._state.restore_weights(read(self._checkpoints.path(self._best.step)).weights)
            evaluation = self._best.results
        if self.save_model:
            self.save_model(self.output / "model")
        value = self._best.value if self._best else None
        return FitResult(self.progress, value, self._best_step, self._should_stop, last, evaluation)


def next_window(windows: Iterator[Window], runtime: Runtime) -> Window | None:
    """The next window, None at the end. Every rank must call it.

    Raises:
        DataError: a row of any rank's share cannot be used; raised on every rank, so that none waits for ever.
    """
    window, error = None, None
    try:
        window = next(windows, None)
    except DataError as caught:
        error = caught
    failed = torch.tensor(error is not None, dtype=torch.int64, device=runtime.device)
    if distributed.is_distributed() and int(distributed.all_reduce_max(failed)):
        found = distributed.all_gather_objects(error.problems if error else [])
        error = DataError([problem for problems in found for problem in problems])
    if error:
        raise error
    return window
