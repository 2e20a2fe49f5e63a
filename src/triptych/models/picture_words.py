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

    A picture token v names word w with a probability proportional to exp(cos(v, e_w) / temperature), and nothing with
    one proportional to exp(silence / temperature). A row's pictures name a word with the mean of that over their
    tokens: a proper distribution over words and silence, learned from captions without regions (in the manner of the
    noisy-OR of Fang et al. 2015, arXiv 1411.4952).
    """

    word_ids: Tensor

    def __init__(self, word_ids: Sequence[int], temperature: float, silence: float) -> None:
        """
        Args:
            word_ids: different token ids, in rising order; at least one.
            temperature: of the softmax, positive.
            silence: the cosine that a token must be closer to a word with than this, to name it.
        """
        super().__init__()
        self.register_buffer("word_ids", torch.tensor(word_ids, dtype=torch.long), persistent=False)
        self.temperature = temperature
        self.silence = silence

    def forward(self, batch: Batch, pictures: Sequence[Tensor], embeddings: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Score a batch.

        Args:
            batch: its supervised tokens are the words looked for, in the pictures of their own row.
            pictures: for each picture of the batch [tokens of the picture, D].
            embeddings: maps ids [n] to word embeddings [n, D]; called as a module, so that sharded weights work.

        Returns:
            `word_logprobs` [S], natural log of the probability that the row's pictures name the token; 0 where the
            token is not among the words. `silence_logprobs` [R], of the probability that they name nothing.
            `picture_distances` [N], the mean over a picture's tokens of the squared distance to what each names most
            (the word's embedding, a constant for the gradient; 0 for nothing), over the mean squared length of the
            words' embeddings: the commitment of van den Oord et al. 2017 (arXiv 1711.00937). All float32, or float64
            for a float64 model.
        """
        words = embeddings(self.word_ids)
        words = words.to(torch.promote_types(words.dtype, torch.float32))
        sizes = [len(picture) for picture in pictures]
        tokens = torch.cat([picture.to(words.dtype) for picture in pictures])
        similarities = F.normalize(tokens, dim=-1) @ F.normalize(words, dim=-1).T
        similarities = torch.cat([similarities, similarities.new_full((len(tokens), 1), self.silence)], dim=1)
        named = F.log_softmax(similarities / self.temperature, dim=-1).split(sizes)
        columns, is_word = self._columns(batch.labels[batch.supervised])
        rows = batch.supervised_rows
        spoken, silent = [], []
        for row, pictures_of_row in enumerate(batch.row_images):
            logprobs = torch.cat([named[index] for index in pictures_of_row])
            chosen = torch.cat([columns[rows == row], columns.new_full((1,), len(words))])
            means = torch.logsumexp(logprobs[:, chosen], dim=0) - math.log(len(logprobs))
            spoken.append(means[:-1])
            silent.append(means[-1])
        meant = torch.cat([words, torch.zeros_like(words[:1])])[similarities.argmax(dim=1)]
        distances = (tokens - meant.detach()).square().sum(dim=-1) / words.detach().square().sum(dim=-1).mean()
        shown = torch.stack([part.mean() for part in distances.split(sizes)])
        return torch.where(is_word, torch.cat(spoken), 0.0), torch.stack(silent), shown

    def _columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each id among the words, and whether it is there at all."""
        found = torch.searchsorted(self.word_ids, ids).clamp(max=len(self.word_ids) - 1)
        return found, self.word_ids[found] == ids
