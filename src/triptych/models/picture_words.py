"""How well picture tokens can be read as words: similarities of the connector's output and word embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.core.types import Batch


class PictureWords(nn.Module):
    """Compares picture tokens with the embeddings of a fixed set of words.

    A picture token v names word w with probability softmax_w(cos(v, e_w) / temperature). A picture names a word with
    the mean of that over its tokens, so one token that stands for the word is enough (learning from captions without
    regions, as with the noisy-OR of Fang et al. 2015, arXiv 1411.4952; the mean is a proper distribution over words).
    """

    word_ids: Tensor

    def __init__(self, word_ids: Sequence[int], temperature: float) -> None:
        """
        Args:
            word_ids: different token ids, in rising order; at least one.
            temperature: of the softmax, positive.
        """
        super().__init__()
        self.register_buffer("word_ids", torch.tensor(word_ids, dtype=torch.long), persistent=False)
        self.temperature = temperature

    def forward(self, batch: Batch, pictures: Sequence[Tensor], embeddings: nn.Module) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Args:
            batch: its supervised tokens are the words looked for, in the pictures of their own row.
            pictures: for each picture of the batch [tokens of the picture, D].
            embeddings: maps ids [n] to word embeddings [n, D]; called as a module, so that sharded weights work.

        Returns:
            `word_logprobs` [S], natural log of the probability that the row's pictures name the token; 0 where the
            token is not among the words. `picture_scales` [N], root mean square of each picture's tokens over that of
            the words' embeddings. Both float32, or float64 for a float64 model.
        """
        words = embeddings(self.word_ids)
        words = words.to(torch.promote_types(words.dtype, torch.float32))
        tokens = [picture.to(words.dtype) for picture in pictures]
        sizes = [len(picture) for picture in tokens]
        similarities = F.normalize(torch.cat(tokens), dim=-1) @ F.normalize(words, dim=-1).T
        named = F.log_softmax(similarities / self.temperature, dim=-1).split(sizes)
        columns, is_word = self._columns(batch.labels[batch.supervised])
        rows = batch.supervised_rows
        parts = []
        for row, pictures_of_row in enumerate(batch.row_images):
            chosen = columns[rows == row]
            logprobs = torch.cat([named[index] for index in pictures_of_row])
            parts.append(torch.logsumexp(logprobs[:, chosen], dim=0) - math.log(len(logprobs)))
        scales = torch.stack([picture.square().mean().sqrt() for picture in tokens]) / words.square().mean().sqrt()
        return torch.where(is_word, torch.cat(parts), 0.0), scales

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each id among the words, and whether it is there at all."""
        found = torch.searchsorted(self.word_ids, ids).clamp(max=len(self.word_ids) - 1)
        return found, self.word_ids[found] == ids
