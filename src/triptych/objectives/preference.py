"""Direct preference optimisation on pairs of answers to one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from triptych.core.config import Config
from triptych.core.errors import TrainingError
from triptych.core.types import Batch, Progress, ScoreField, Scores, WindowValues
from triptych.objectives.language import counted_weights, language_loss


class DpoConfig(Config):
    """Sigmoid DPO; the reference log-probabilities come with the batch."""

    kind: Literal["dpo"] = "dpo"
    """Selects this objective."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference model."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose order is wrong (conservative DPO)."""
    length_normalised: bool = False
    """Compare log-ratios per token instead of per answer; wants a larger beta."""
    sft_coefficient: float = Field(default=0.0, ge=0)
    """Factor of an added next-token loss on the preferred answers; 0 leaves it out."""


def dpo_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair: `-(1 - e) log sigmoid(m) - e log sigmoid(-m)`.

    With e = 0 it is Rafailov et al. 2023, arXiv 2305.18290, eq. 7; e > 0 is the conservative form for noisy labels.

    Args:
        margins: [P] reward of the winner minus reward of the loser, a reward being
            `beta (log pi(answer) - log pi_reference(answer))`.
        label_smoothing: e in [0, 0.5).

    Returns:
        [P].
    """
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def row_logprobs(token_logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's answer and how many tokens it counts.

    Only supervised tokens of positive weight count; the weight itself is a mask here, for scaling a log-ratio would
    change beta from sample to sample (a sample's weight belongs in `Batch.pair_weights`).

    Args:
        token_logprobs: [S].
        batch: R rows.

    Returns:
        [R] sums in nats and [R] counts.
    """
    counted = (batch.supervised_weights > 0).to(token_logprobs.dtype)
    zeros = token_logprobs.new_zeros(batch.num_rows)
    sums = zeros.index_add(0, batch.supervised_rows, token_logprobs * counted)
    return sums, zeros.index_add(0, batch.supervised_rows, counted)


@dataclass(frozen=True)
class DpoObjective:
    """Reads log-probabilities; pairs and reference come with the batch. Rows of no pair are left alone."""

    config: DpoConfig

    @property
    def needs(self) -> frozenset[ScoreField]:
        """Log-probabilities alone."""
        return frozenset({"token_logprobs"})

    @property
    def coefficients(self) -> Mapping[str, float]:
        """`dpo`, and `sft` where it is asked for."""
        return {"dpo": 1.0, "sft": self.config.sft_coefficient} if self.config.sft_coefficient else {"dpo": 1.0}

    def weights(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """Sum of pair weights; for `sft` the sum of token weights of the preferred answers."""
        result = {"dpo": _counted_pair_weights(batch).sum()}
        if self.config.sft_coefficient:
            result["sft"] = _winner_weights(batch).sum()
        return result

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        """Pair losses weighted by `pair_weights`, summed; for `sft` as in `language_loss`.

        Raises:
            TrainingError: the batch carries no reference log-probabilities.
        """
        assert scores.token_logprobs is not None
        rewards = self._rewards(scores.token_logprobs, batch)
        margins = rewards[batch.pairs[:, 0]] - rewards[batch.pairs[:, 1]]
        losses = dpo_loss(margins, self.config.label_smoothing)
        result = {"dpo": (_counted_pair_weights(batch) * losses).sum()}
        if self.config.sft_coefficient:
            result["sft"] = language_loss(scores.token_logprobs, _winner_weights(batch))
        return result

    def metrics(self, scores: Scores, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Means over pairs, by pair weight.

        Names: `reward_margin`, `accuracy` (share of margins above 0), `chosen_reward`, `rejected_reward`, and
        `chosen_logprob` in nats per answer: rewards can grow while the preferred answer gets less likely.
        """
        assert scores.token_logprobs is not None
        logprobs = scores.token_logprobs.detach()
        rewards = self._rewards(logprobs, batch)
        winners, losers = batch.pairs[:, 0], batch.pairs[:, 1]
        chosen, rejected = rewards[winners], rewards[losers]
        answers, _ = row_logprobs(logprobs, batch)
        values = {
            "reward_margin": chosen - rejected,
            "accuracy": (chosen > rejected).to(chosen.dtype),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": answers[winners],
        }
        weights = _counted_pair_weights(batch)
        return {name: ((weights * value).sum(), weights.sum()) for name, value in values.items()}

    def _rewards(self, token_logprobs: Tensor, batch: Batch) -> Tensor:
        """[R] beta times the log-ratio of each row's answer."""
        reference = batch.token_values.get("reference_logprobs")
        if reference is None:
            raise TrainingError(
                "objective `dpo` found no reference log-probabilities in the batch",
                key="objective",
                remedy="give the run a reference model (frozen copy or adapters switched off)",
            )
        ratios, counts = row_logprobs(token_logprobs - reference.to(token_logprobs.dtype), batch)
        if self.config.length_normalised:
            ratios = ratios / counts.clamp(min=1)
        return self.config.beta * ratios


def _counted_pair_weights(batch: Batch) -> Tensor:
    """[P], all 0 in a padding batch."""
    return torch.zeros_like(batch.pair_weights) if batch.is_padding else batch.pair_weights


def _winner_weights(batch: Batch) -> Tensor:
    """[S] token weights of rows that win a pair, each row once; 0 elsewhere."""
    wins = torch.zeros(batch.num_rows, dtype=torch.bool, device=batch.pairs.device)
    wins[batch.pairs[:, 0]] = True
    weights = counted_weights(batch)
    return weights * wins[batch.supervised_rows].to(weights.dtype)
