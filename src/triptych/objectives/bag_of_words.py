"""Lexical alignment: every word of a caption should be readable from a picture token, without the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from triptych.core.config import Config
from triptych.core.types import Batch, Progress, ScoreField, Scores, WindowValues
from triptych.objectives.language import counted_weights, language_loss


class BagOfWordsConfig(Config):
    """Predict the words of an answer from the picture tokens alone, in no order.

    For `stage: tune` while the language model is frozen: only its word embeddings are used, so a step costs next to
    nothing. What the connector puts out is then close to words the language model knows.
    """

    kind: Literal["bag_of_words"]
    """Selects this objective."""
    temperature: float = Field(default=0.07, gt=0)
    """Of the softmax over words; similarities are cosines."""
    other_words: int = Field(default=4000, ge=0)
    """Words of the vocabulary, evenly spread over it, that picture tokens are told apart from beside those of the
    answers; with few of them a picture token need not come close to any word."""
    scale_coefficient: float = Field(default=1.0, ge=0)
    """Factor of the term that keeps picture tokens as large as word embeddings."""


def scale_loss(picture_scales: Tensor) -> Tensor:
    """Sum over pictures of (ln s)^2, s being the picture tokens' RMS over that of the word embeddings.

    Args:
        picture_scales: [N], positive.

    Returns:
        0-d.
    """
    return picture_scales.log().square().sum()


@dataclass(frozen=True)
class BagOfWordsObjective:
    """Reads how well the pictures name the supervised tokens; rare words weigh more through the batch's weights."""

    config: BagOfWordsConfig

    @property
    def needs(self) -> frozenset[ScoreField]:
        """Probabilities of words and sizes of picture tokens; no language model runs."""
        return frozenset({"word_logprobs", "picture_scales"})

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Two terms."""
        return {"bag_of_words": 1.0, "picture_scale": self.config.scale_coefficient}

    def weights(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """Sum of word weights, and pictures of all rows; 0 for a padding batch."""
        words = counted_weights(batch).sum()
        pictures = 0.0 if batch.is_padding else float(len(_shown(batch)))
        return {"bag_of_words": words, "picture_scale": torch.tensor(pictures, device=words.device)}

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        """Weighted negative log-likelihood of the words, and the squared log scales, summed."""
        assert scores.word_logprobs is not None and scores.picture_scales is not None
        is_counted = 0.0 if batch.is_padding else 1.0
        return {
            "bag_of_words": language_loss(scores.word_logprobs, counted_weights(batch)),
            "picture_scale": scale_loss(scores.picture_scales[_shown(batch)]) * is_counted,
        }

    def metrics(self, scores: Scores, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """`picture_token_scale`: RMS of picture tokens over that of word embeddings, mean over pictures."""
        assert scores.picture_scales is not None
        scales = scores.picture_scales.detach()[_shown(batch)]
        count = torch.tensor(0.0 if batch.is_padding else float(len(scales)), device=scales.device)
        return {"picture_token_scale": (scales.sum() * (0.0 if batch.is_padding else 1.0), count)}


def _shown(batch: Batch) -> list[int]:
    """The pictures of every row; one that two rows share counts twice, as it does when they are in two batches."""
    return [index for row in batch.row_images for index in row]
