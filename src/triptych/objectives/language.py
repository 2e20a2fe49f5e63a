"""Weighted next-token prediction: instruction tuning, captioning, generative pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from triptych.core.config import Config
from triptych.core.types import Batch, Progress, ScoreField, Scores, WindowValues


class LanguageConfig(Config):
    """Next-token loss, averaged over the supervised tokens of the whole window."""

    kind: Literal["language"] = "language"
    """Selects this objective."""


def language_loss(token_logprobs: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood, a *sum*: `-sum_t w_t log p(x_t | x_<t, pictures)`.

    Divided by the sum of weights over a whole window it is the token mean (with weights 0 and 1: the cross-entropy
    over unmasked tokens), however the window is split.

    Args:
        token_logprobs: [S] natural log-probabilities of the labels.
        weights: [S] non-negative.

    Returns:
        0-d, in nats; 0 for S = 0.
    """
    return -(weights * token_logprobs).sum()


@dataclass(frozen=True)
class LanguageObjective:
    """Reads log-probabilities of supervised tokens; weights come with the batch."""

    config: LanguageConfig

    @property
    def needs(self) -> frozenset[ScoreField]:
        """Log-probabilities alone."""
        return frozenset({"token_logprobs"})

    @property
    def coefficients(self) -> Mapping[str, float]:
        """One term."""
        return {"language": 1.0}

    def weights(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """Sum of token weights; 0 for a padding batch."""
        return {"language": counted_weights(batch).sum()}

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        """Weighted negative log-likelihood, summed."""
        assert scores.token_logprobs is not None
        return {"language": language_loss(scores.token_logprobs, counted_weights(batch))}

    def metrics(self, scores: Scores, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Mean nats per counted token of each task (`exp` of it is the perplexity), and counted tokens per row.

        Names: `language/<task>` for every task tag of the batch, `supervised_tokens_per_row`. A token counts where
        its weight is positive, whatever the weight: the numbers stay comparable when the weighting changes.
        """
        assert scores.token_logprobs is not None
        counted = (counted_weights(batch) > 0).to(scores.token_logprobs.dtype)
        nll = -scores.token_logprobs.detach() * counted
        rows = torch.tensor(0.0 if batch.is_padding else float(batch.num_rows), device=counted.device)
        result = {"supervised_tokens_per_row": (counted.sum(), rows)}
        for task in sorted(set(batch.tasks) - {""}):
            chosen = torch.tensor([name == task for name in batch.tasks], device=counted.device)
            chosen_tokens = chosen[batch.supervised_rows]
            result[f"language/{task}"] = (nll[chosen_tokens].sum(), counted[chosen_tokens].sum())
        return result


def counted_weights(batch: Batch) -> Tensor:
    """[S] weight of each supervised token, all 0 in a padding batch."""
    weights = batch.supervised_weights
    return torch.zeros_like(weights) if batch.is_padding else weights
