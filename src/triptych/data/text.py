"""Text to token ids with the characters each token stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from tokenizers import Tokenizer

from triptych.core.errors import DataError, ModelError

_ANCHORS = ("\n", ".", "a", "0")
"""Characters written before a continuation, tried in turn until one does not merge with it."""


class TextEncoder:
    """A private copy of a fast tokenizer's engine.

    A copy, because a tokenizer that another thread is padding with refuses to encode at the same time.
    """

    def __init__(self, tokenizer: Any, content_tokens: Collection[str] = ()) -> None:
        """Args:
            tokenizer: a Hugging Face fast tokenizer.
            content_tokens: special tokens that are not control tokens.

        Raises:
            ModelError: the tokenizer is not a fast one (it could not say which characters a token stands for).
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer `{type(tokenizer).__name__}` cannot say which characters a token stands for",
                remedy="save it as a fast tokenizer (tokenizer.json) and load that",
            )
        self._engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._engine.no_truncation()
        self._engine.no_padding()
        added = tokenizer.added_tokens_decoder
        self._added_ids = frozenset(added)
        self.control_ids = frozenset(
            number for number, token in added.items() if token.special and token.content not in content_tokens
        )
        """Ids that structure a conversation; words of a message never become one of them."""
        alone = [token for token, _, _ in self._spans("x")]
        self._has_dummy_prefix = alone != [token for token, _, stop in self._spans("\nx") if stop > 1]

    def encode(self, text: str, continues: bool) -> list[tuple[int, int, int]]:
        """Encode a text; control tokens in it count.

        Args:
            text: what to encode.
            continues: the text follows other text, so that no beginning-of-text space is put before it.

        Returns:
            (id, start, stop) of each token, in characters. The spans leave no gap: characters that a tokenizer drops
            belong to the token behind them.
        """
        if not continues or not self._has_dummy_prefix:
            return self._spans(text)
        for anchor in _ANCHORS:
            tokens = [token for token in self._spans(anchor + text) if token[2] > 1 or token[1] > 0]
            if not tokens or tokens[0][1] > 0:
                return [(token, start - 1, stop - 1) for token, start, stop in tokens]
        raise DataError(f"the answer `{text[:40]}` cannot be encoded apart from what stands before it")

    def spell(self, text: str) -> list[int]:
        """Encode the name of a control token as letters."""
        for pieces in ((text[:1], text[1:]), tuple(text)):
            ids = [token for piece in pieces for token, _, _ in self.encode(piece, continues=True)]
            if self.control_ids.isdisjoint(ids):
                return ids
        raise DataError(f"`{text}` cannot be written without becoming a control token", remedy="change the text")

    def require_tokens(self, placeholder: str) -> None:
        """Check that a placeholder is made of registered tokens.

        Raises:
            ModelError: it would be spelled in letters and merge with the text around it.
        """
        ids = [token for token, _, _ in self._spans(placeholder)]
        if not ids or not self._added_ids.issuperset(ids):
            raise ModelError(
                f"the placeholder `{placeholder}` of a picture is not a token of the tokenizer: it becomes {ids}",
                remedy=f"add `{placeholder}` to the tokenizer as a special token and resize the embeddings",
            )

    def _spans(self, text: str) -> list[tuple[int, int, int]]:
        try:
            encoding = self._engine.encode(text, add_special_tokens=False)
        except TypeError as error:  # what the engine says of half a surrogate pair
            raise DataError(f"the text {text[:40]!r} is not valid Unicode", remedy="mend or drop it") from error
        return list(_without_gaps(encoding.ids, encoding.offsets))


def _without_gaps(ids: list[int], offsets: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    reached = 0
    for token, (start, stop) in zip(ids, offsets, strict=True):
        start = min(start, reached)
        reached = max(reached, stop)
        yield token, start, max(start, stop)
