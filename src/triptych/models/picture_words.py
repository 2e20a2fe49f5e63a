"""How well picture tokens can be read as words: similarities of the connector's output and word embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.core.types import CONTEXT, Batch, Scores

SHORT = 0.5
"""A picture token is short below this share of the root mean square of the words' lengths."""


@dataclass(frozen=True)
class ReadingRules:
    """How a picture token is read."""

    temperature: float
    """Of the softmax over words, positive."""
    silence: float
    """Cosine that a token must be closer to a word with than this, to name it."""
    context: float = 0.0
    """How much of the words that follow the one it names a token should carry; 0 for none."""
    silent_commitment: float = 0.1
    """Factor of the distance of tokens that name nothing."""


class PictureWords(nn.Module):
    """Compares picture tokens with the embeddings of a fixed set of words.

    A picture token v names word w with a probability proportional to exp(cos(v, e_w) / temperature), and nothing with
    one proportional to exp(silence / temperature). With a short token (`SHORT`) cosines go to 0 and silence to 1 as its
    length does, so that to be small is to name nothing, and gradients stay finite. A row's pictures name a word with
    the mean over their tokens: a proper distribution over words and silence, learned from captions without regions (in
    the manner of the noisy-OR of Fang et al. 2015, arXiv 1411.4952).

    Supervised tokens of weight 0 are not looked for. They are the context of the word they follow, up to the next one
    that is (`a dog at the top left`), and its picture token should carry them beside it.
    """

    word_ids: Tensor

    def __init__(self, word_ids: Sequence[int], rules: ReadingRules) -> None:
        """
        Args:
            word_ids: different token ids, in rising order; at least one.
            rules: how tokens are read.
        """
        super().__init__()
        self.register_buffer("word_ids", torch.tensor(word_ids, dtype=torch.long), persistent=False)
        self.rules = rules

    def forward(self, batch: Batch, pictures: Sequence[Tensor], embeddings: nn.Module) -> Scores:
        """Score a batch.

        Args:
            batch: its supervised tokens are the words looked for, in the pictures of their own row; `token_values` say
                how much each of the others counts as context.
            pictures: for each picture of the batch [tokens of the picture, D]; every row has one.
            embeddings: maps ids [n] to word embeddings [n, D]; called as a module, so that sharded weights work.

        Returns:
            Scores in float32, or float64 for a float64 model.

            - `word_logprobs` [S]: natural log of the probability that the row's pictures name the token; 0 where it is
              not looked for or not among the words.
            - `silence_logprobs` [R]: of the probability that they name nothing.
            - `picture_distances` [R]: see `_distances`, the mean over the tokens of a row's pictures, over the mean
              squared length of the words' embeddings.
        """
        words = _embed(embeddings, self.word_ids)
        length = words.detach().square().sum(dim=-1).mean()
        tokens = torch.cat([pictures[index] for row in batch.row_images for index in row]).to(words.dtype)
        sizes = torch.tensor([sum(len(pictures[index]) for index in row) for row in batch.row_images]).to(words.device)
        owners = torch.arange(len(sizes), device=words.device).repeat_interleave(sizes)
        counts = sizes.to(words.dtype)
        named = self._named(tokens, words, shortest=SHORT * length.sqrt())
        columns, is_word = _find(self.word_ids, batch.labels[batch.supervised])
        is_word = is_word & (batch.supervised_weights > 0)
        rows, columns = batch.supervised_rows[is_word], columns[is_word]
        said = named[:, columns].masked_fill(owners[:, None] != rows, -torch.inf)
        every_row = torch.arange(len(sizes), device=words.device)
        silent = named[:, -1:].masked_fill(owners[:, None] != every_row, -torch.inf)
        targets = words[columns].detach()
        if self.rules.context:
            targets = targets + self._contexts(batch, is_word, embeddings).detach()
        distances = self._distances(tokens, said, named[:, -1], targets) / (length * counts[owners])
        spoken = said.logsumexp(dim=0) - counts[rows].log()
        return Scores(
            word_logprobs=spoken.new_zeros(len(is_word)).masked_scatter(is_word, spoken),
            silence_logprobs=silent.logsumexp(dim=0) - counts.log(),
            picture_distances=distances.new_zeros(len(sizes)).index_add(0, owners, distances),
        )

    def _named(self, tokens: Tensor, words: Tensor, shortest: Tensor) -> Tensor:
        """[T, words + 1] log-probability that each picture token names each word and, last, nothing."""
        lengths = tokens.norm(dim=-1, keepdim=True)
        similarities = tokens / lengths.clamp(min=shortest) @ F.normalize(words, dim=-1).T
        silence = 1 - (1 - self.rules.silence) * (lengths / shortest).clamp(max=1)
        similarities = torch.cat([similarities, silence], dim=1)
        return F.log_softmax(similarities / self.rules.temperature, dim=-1)

    def _contexts(self, batch: Batch, is_word: Tensor, embeddings: nn.Module) -> Tensor:
        """[O, D] the embeddings of what follows each looked-for word, up to the next one of its row, times `context`.

        Args:
            is_word: [S] which supervised tokens are looked for, O of them.
        """
        rows = batch.supervised_rows
        last = is_word.long().cumsum(0) - 1  # the number of the last one before each token
        follows = ~is_word & (last >= 0)
        if follows.any():
            follows = follows & (rows[is_word][last.clamp(min=0)] == rows)
        found = _embed(embeddings, batch.labels[batch.supervised][follows])
        shares = self.rules.context * batch.token_values[CONTEXT][follows].to(found.dtype)
        contexts = found.new_zeros(int(is_word.sum()), found.shape[-1])
        return contexts.index_add(0, last[follows], shares[:, None] * found)

    def _distances(self, tokens: Tensor, said: Tensor, silent: Tensor, targets: Tensor) -> Tensor:
        """How far each picture token is from what it names most of its own row's words, or from 0 if that is nothing.

        The commitment of van den Oord et al. 2017 (arXiv 1711.00937). Targets are constants for the gradient, and so is
        a factor: the probability of what is named, so that tokens are pulled as far as they have made up their minds,
        and `silent_commitment` for nothing, so that they do not all fall silent before they have learned a word.

        Args:
            tokens: [T, D].
            said: [T, O] log-probability that each names each occurrence of a word; -inf for those of other rows.
            silent: [T] log-probability that it names nothing.
            targets: [O, D]; of several occurrences of one word the nearest counts.

        Returns:
            [T] squared distances times their factors.
        """
        with torch.no_grad():
            options = torch.cat([said, silent[:, None]], dim=1)
            targets = torch.cat([targets, targets.new_zeros(1, tokens.shape[1])])
            best = options.max(dim=1, keepdim=True).values
            chosen = torch.cdist(tokens, targets).masked_fill(options < best, torch.inf).argmin(dim=1)
            is_silent = chosen == len(targets) - 1
            factor = best[:, 0].exp() * torch.where(is_silent, self.rules.silent_commitment, 1.0)
        return factor * (tokens - targets[chosen]).square().sum(dim=-1)


def _embed(embeddings: nn.Module, ids: Tensor) -> Tensor:
    found = embeddings(ids)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _find(known: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each id among the known ones, which rise, and whether it is there at all."""
    found = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
    return found, known[found] == ids
