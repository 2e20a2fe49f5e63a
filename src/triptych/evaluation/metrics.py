"""Pure functions from predictions and truth to numbers."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
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


NUMBERS = {
    word: value
    for value, words in enumerate(
        ("zero no none", "one a an", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
"""Word -> the number it stands for."""


def number_of(text: str) -> int | None:
    """The number an answer names, in digits or as a word up to ten; None where it names none or more than one."""
    found = re.findall(r"\d+|[a-z]+", normalise_answer(text))
    values = [int(word) if word.isdecimal() else NUMBERS[word] for word in found if word.isdecimal() or word in NUMBERS]
    return values[0] if len(values) == 1 else None


def bare_number(text: str) -> int | None:
    """The number that an answer consists of, `3`, `three` or `Three.`; None for any other, "no" and "a" included."""
    word = normalise_answer(text)
    if word.isdecimal():
        return int(word)
    return NUMBERS[word] if word in NUMBERS and word not in ("no", "none", "a", "an") else None


def objects_of(text: str) -> Counter[str]:
    """The things a caption lists and how many of each: `A dog, two cats and a fox.` -> dog 1, cat 2, fox 1.

    A part that starts with no number or article counts as one thing of that name, so nothing is dropped.
    """
    things: Counter[str] = Counter()
    for part in re.split(r",| and ", unicodedata.normalize("NFKC", text).lower()):
        words = part.strip(string.punctuation + string.whitespace).split()
        if not words:
            continue
        number = int(words[0]) if words[0].isdecimal() else NUMBERS.get(words[0])
        name = " ".join(words if number is None else words[1:])
        count = 1 if number is None else number
        things[_singular(name) if count != 1 else name] += count
    return things


def _singular(name: str) -> str:
    """By the regular rules of English, so that a plural meets its own singular."""
    if name.endswith("ies"):
        return f"{name[:-3]}y"
    if re.search(r"((?<!sh)o|ss|(?<!o)us|x|ch|sh)es$", name):
        return name[:-2]
    return name.removesuffix("s")


def objects_match(prediction: str, truth: str) -> bool:
    """Whether two captions list the same things in the same numbers, in any order."""
    return objects_of(prediction) == objects_of(truth)


def number_match(prediction: str, truth: str) -> bool:
    """Whether two answers name the same number, `three` or `3`; answers without one must be equal."""
    number = number_of(truth)
    return exact_match(prediction, truth) if number is None else number_of(prediction) == number


MetricName = Literal["exact", "objects", "number"]

METRICS: Mapping[MetricName, Callable[[str, str], bool]] = {
    "exact": exact_match,
    "objects": objects_match,
    "number": number_match,
}
"""Name in a recipe -> whether a prediction is right, given the truth."""


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[str], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: One number an answer.
        clusters: What each answer belongs to, its sample say; whole clusters are drawn, as answers about one picture
            are not independent.
        draws: Resamples.
        level: Share of the resamples' means inside the interval.
        seed: The interval is a pure function of it.

    Raises:
        ValueError: there are no values, or not one cluster for each.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values, {len(clusters)} clusters")
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(member, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(member)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        chosen = generator.integers(0, len(sums), len(sums))
        means[draw] = sums[chosen].sum() / sizes[chosen].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(right: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """95 % interval of a share: `bootstrap_interval`, but where all answers are alike Wilson's score interval.

    Resamples of nothing but wrong answers are all wrong, which says nothing about how sure that is; Wilson 1927, with
    one independent answer a cluster, gives 0 to z^2 / (n + z^2).

    Args:
        right: 1 or 0 an answer.
        clusters: as for `bootstrap_interval`.
    """
    low, high = bootstrap_interval(right, clusters)
    if min(right) < max(right):
        return low, high
    z_squared = NormalDist().inv_cdf(0.975) ** 2
    bound = z_squared / (len(set(clusters)) + z_squared)
    return (1 - bound, 1.0) if right[0] else (0.0, bound)
