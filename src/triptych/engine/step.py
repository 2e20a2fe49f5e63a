"""One optimizer step's gradients: exact however the window is split over micro-batches and ranks."""

from __future__ import annotations

from torch import nn

from triptych.core.protocols import BatchSource, Objective, Reference, WindowObjective
from triptych.core.types import Batch, Progress, Window
from triptych.engine.cached_step import run_cached_window
from triptych.engine.parallel import Runtime
from triptych.engine.window import Feed, NonFinite, Tally, WindowResult, anchor, micro_batch_terms, plan_window

__all__ = ["NonFinite", "WindowResult", "run_window"]


def run_window(
    scorer: nn.Module,
    objective: Objective,
    window: Window,
    source: BatchSource,
    reference: Reference | None,
    runtime: Runtime,
    progress: Progress,
) -> WindowResult:
    """Run forward and backward over a window and leave the gradients in `.grad`.

    They are those of `sum_t coefficient_t * term_t / W_t`, term_t and W_t added over all micro-batches and ranks
    (a mean of micro-batch means would weigh short micro-batches too much). Every rank must call this; no rank stops
    early, so that collectives match: a loss that is not finite is reported in the result.

    Args:
        scorer: the module that `Runtime.wrap` returned.
        objective: a plain objective, or a `WindowObjective` (run in two passes).
        window: this rank's light batches, at least one.
        source: attaches pixels just before each forward pass.
        reference: adds the reference model's numbers, or None.
        runtime: device, precision and wrapping.
        progress: before the step.

    Raises:
        TrainingError: the objective's names disagree, a weight is not finite, nothing that trains took part, or (DDP)
            a trainable parameter did not.
    """
    feed = Feed(source, reference, runtime)
    plan = plan_window(objective, window, runtime, progress)
    tally = Tally(objective, plan)
    if isinstance(objective, WindowObjective):
        run_cached_window(scorer, objective, feed, tally)
    else:
        for index, batch in enumerate(plan.batches):
            with runtime.synchronise(scorer, is_last=index == len(plan.batches) - 1):
                run_micro_batch(scorer, feed, tally, index, batch)
    runtime.finish_gradients(scorer)
    return tally.finish(feed.seconds)


def run_micro_batch(scorer: nn.Module, feed: Feed, tally: Tally, index: int, batch: Batch) -> None:
    """Forward and backward; everything it allocates but the gradients, pixels included, is gone when it returns."""
    batch = feed.prepare(batch)
    with feed.runtime.autocast():
        scores = scorer(batch)
    share = micro_batch_terms(tally, index, scores, batch, None)
    loss = anchor(scores)
    feed.runtime.backward(loss if share is None else loss + share)
