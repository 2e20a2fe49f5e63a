"""Lexical alignment: every word of a caption should be readable from a picture token, without the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from triptych.core.config import Config
from triptych.core.types import Batch, Progress, ScoreField, Scores, TokenKind, WindowValues
from triptych.objectives.language import counted_weights


class BagOfWordsConfig(Config):
    """Name the words of an answer from the picture tokens alone, in no order.

    For `stage: tune` while the language model is frozen: only its word embeddings are used, so a step costs next to
    nothing. What the connector puts out is then close to words the language model knows. Every occurrence of a word
    asks for `tokens_per_word` picture tokens, and the other tokens are asked to name nothing.
    """

    kind: Literal["bag_of_words"]
    """Selects this objective."""
    temperature: float = Field(default=0.07, gt=0)
    """Of the softmax over words; similarities are cosines."""
    silence: float = Field(default=0.35, gt=-1, lt=1)
    """Cosine that a picture token must be closer to a word with than this, to name it rather than nothing."""
    tokens_per_word: float = Field(default=1.0, gt=0)
    """Picture tokens that one occurrence of a word stands for: the tokens that a thing usually covers."""
    common_share: float = Field(default=0.2, gt=0, le=1)
    """Words of more than this share of the answers (`the`, `at`, a full stop) are not looked for in pictures."""
    other_words: int = Field(default=4000, ge=0)
    """Words of the vocabulary, evenly spread over it, that picture tokens are told apart from beside those of the
    answers; with few of them a picture token need not come close to any word."""
    context: float = Field(default=0.0, ge=0)
    """How much of the common words that follow a looked-for word, up to the next one, its picture token should carry
    beside it (`at the top left`), each by the log of how few answers have it; 0 for none."""
    commitment_coefficient: float = Field(default=10.0, ge=0)
    """Factor of the squared distance of picture tokens to the embeddings of what they name, with its context; nothing
    is 0."""
    silent_commitment: float = Field(default=0.1, ge=0)
    """Share of that for tokens that name nothing; with much of it all fall silent before they have learned a word."""


@dataclass(frozen=True)
class BagOfWordsObjective:
    """Cross-entropy between the words of the answers, silence for the rest, and what picture tokens name on average."""

    config: BagOfWordsConfig

    @property
    def needs(self) -> frozenset[ScoreField]:
        """Probabilities of words and of silence, and distances to what is named; no language model runs."""
        return frozenset({"word_logprobs", "silence_logprobs", "picture_distances"})

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Two terms."""
        return {"bag_of_words": 1.0, "commitment": self.config.commitment_coefficient}

    def weights(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """Picture tokens that words or silence are asked of, and rows; 0 for a padding batch."""
        spoken, silent = self._asked(batch)
        rows = 0.0 if batch.is_padding else float(batch.num_rows)
        return {"bag_of_words": spoken.sum() + silent.sum(), "commitment": torch.tensor(rows, device=spoken.device)}

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        """Negative log-likelihood of words and silence, summed over picture tokens; distances, summed over rows."""
        assert scores.word_logprobs is not None
        assert scores.silence_logprobs is not None and scores.picture_distances is not None
        spoken, silent = self._asked(batch)
        named = -(spoken * scores.word_logprobs).sum() - (silent * scores.silence_logprobs).sum()
        is_counted = 0.0 if batch.is_padding else 1.0
        return {"bag_of_words": named, "commitment": scores.picture_distances.sum() * is_counted}

    def metrics(self, scores: Scores, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """`silence`: share of picture tokens that name nothing, mean over rows."""
        assert scores.silence_logprobs is not None
        shares = scores.silence_logprobs.detach().exp()
        is_counted = 0.0 if batch.is_padding else 1.0
        return {"silence": (shares.sum() * is_counted, torch.tensor(len(shares) * is_counted, device=shares.device))}

    def _asked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """How many picture tokens each supervised token asks for [S], and silence asks for in each row [R]."""
        spoken = counted_weights(batch) * self.config.tokens_per_word
        tokens = (batch.kinds == TokenKind.IMAGE).sum(dim=1).to(spoken.dtype) * (0.0 if batch.is_padding else 1.0)
        words = torch.zeros_like(tokens).index_add(0, batch.supervised_rows, spoken)
        return spoken, (tokens - words).clamp(min=0)
