"""A window's loss and metrics without gradients: evaluation with the denominators of training."""

from __future__ import annotations

import torch
from torch import nn

from triptych.core.protocols import BatchSource, Objective, Reference, WindowObjective
from triptych.core.types import Progress, Window
from triptych.engine.cached_step import measure_joined
from triptych.engine.parallel import Runtime
from triptych.engine.window import Feed, Tally, WindowResult, micro_batch_terms, plan_window


@torch.no_grad()
def measure_window(
    scorer: nn.Module,
    objective: Objective,
    window: Window,
    source: BatchSource,
    reference: Reference | None,
    runtime: Runtime,
) -> WindowResult:
    """As `run_window`, without gradients: the same numbers for the same weights. Every rank must call it.

    Args:
        scorer: wrapped, in the mode it is to be measured in.
        objective: plain or coupling the window.
        window: this rank's light batches.
        source: attaches pixels.
        reference: adds the reference model's numbers, or None.
        runtime: device and precision.
    """
    feed = Feed(source, reference, runtime)
    plan = plan_window(objective, window, runtime, Progress(0, None))
    tally = Tally(objective, plan)
    if isinstance(objective, WindowObjective):
        measure_joined(scorer, objective, feed, tally)
    else:
        for index, light in enumerate(plan.batches):
            batch = feed.prepare(light)
            with runtime.autocast():
                scores = scorer(batch)
            if not batch.is_padding:
                micro_batch_terms(tally, index, scores, batch, None)
    return tally.finish(feed.seconds)
