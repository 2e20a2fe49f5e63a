"""Pure functions from predictions and truth to numbers."""

from __future__ import annotations

import string
import unicodedata

import torch
from torch import Tensor


def recall_at_k(queries: Tensor, candidates: Tensor, query_keys: Tensor, candidate_keys: Tensor, k: int) -> float:
    """Share of queries whose k nearest candidates by cosine hold a right one.

    Args:
        queries: [Q, D] embeddings, any scale.
        candidates: [C, D] embeddings, any scale.
        query_keys: [Q] int64; a candidate with an equal key is right, so duplicate captions are not counted as errors.
        candidate_keys: [C] int64.
        k: How many of the nearest candidates count.

    Raises:
        ValueError: there are no queries or k is not in 1..C.
    """
    if not len(queries) or not 1 <= k <= len(candidates):
        raise ValueError(
            f"recall@{k} needs at least one query and {k} candidates, got {len(queries)}, {len(candidates)}"
        )
    queries = torch.nn.functional.normalize(queries.float(), dim=-1)
    candidates = torch.nn.functional.normalize(candidates.float(), dim=-1)
    hits = 0
    for start in range(0, len(queries), 1024):
        nearest = (queries[start : start + 1024] @ candidates.T).topk(k, dim=-1).indices
        hits += int((candidate_keys[nearest] == query_keys[start : start + 1024, None]).any(dim=-1).sum())
    return hits / len(queries)


def normalise_answer(text: str) -> str:
    """Lower-case, without punctuation at the ends, articles in front, and repeated white space (Unicode NFKC)."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    text = text.strip(string.punctuation + string.whitespace + "。！？，")
    for article in ("a ", "an ", "the "):
        if text.startswith(article):
            return text[len(article) :]
    return text


def exact_match(prediction: str, truth: str) -> bool:
    """Equality after `normalise_answer`."""
    return normalise_answer(prediction) == normalise_answer(truth)
