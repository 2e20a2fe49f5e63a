"""The same steps through Triptych's scorer."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.core.types import Batch
from triptych.models.reference import REFERENCE_LOGPROBS
from triptych.models.vlm import VlmScorer


def supervised(scorer: VlmScorer, batch: Batch) -> Tensor:
    """Mean loss of the learned tokens."""
    return -_logprobs(scorer, batch).mean()


def preference(scorer: VlmScorer, batch: Batch, beta: float) -> Tensor:
    """DPO with the reference's numbers already in the batch."""
    margins = _logprobs(scorer, batch) - batch.token_values[REFERENCE_LOGPROBS]
    rows = margins.new_zeros(batch.num_rows).index_add(0, batch.supervised_rows, margins)
    winners, losers = batch.pairs.T
    return -F.logsigmoid(beta * (rows[winners] - rows[losers])).mean()


def policy_gradient(scorer: VlmScorer, batch: Batch, advantages: Tensor) -> Tensor:
    """Sum over rows of advantage x log p."""
    return -(_logprobs(scorer, batch) * advantages[batch.supervised_rows]).sum()


def with_reference(scorer: VlmScorer, batch: Batch) -> Batch:
    """The batch with the log-probabilities of the model as it is, computed once before training."""
    with torch.no_grad():
        return replace(batch, token_values={REFERENCE_LOGPROBS: _logprobs(scorer, batch)})


def _logprobs(scorer: VlmScorer, batch: Batch) -> Tensor:
    logprobs = scorer(batch).token_logprobs
    assert logprobs is not None
    return logprobs
