"""The plain step: padding, empty terms, faults, errors. That splits do not matter is in tests/invariants."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from tests.invariants.toys import (
    OBJECTIVES,
    ToyReference,
    ToyScorer,
    ToySource,
    gradients,
    relative_distance,
    runtime,
    toy_batch,
    toy_window,
)
from triptych.core.errors import TrainingError
from triptych.core.types import Batch, Progress, Scores, Window
from triptych.engine.step import WindowResult, run_window


def run(scorer: nn.Module, objective: object, window: Window, source: ToySource | None = None) -> WindowResult:
    return run_window(scorer, objective, window, source or ToySource(), ToyReference(), runtime(), Progress(0, 1))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Means:
    """Mean of the batch's rows; the terms are named by the test."""

    sums: dict[str, float] = field(default_factory=lambda: {"rows": 1.0})
    weight: dict[str, float] = field(default_factory=lambda: {"rows": 1.0})
    coefficients: dict[str, float] = field(default_factory=lambda: {"rows": 1.0})
    needs: frozenset[str] = frozenset({"token_logprobs"})

    def weights(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {name: torch.tensor(factor * batch.num_rows) for name, factor in self.weight.items()}

    def terms(self, scores: Scores, batch: Batch, window: None) -> dict[str, Tensor]:
        assert scores.token_logprobs is not None
        return {name: factor * scores.token_logprobs.sum() for name, factor in self.sums.items()}

    def metrics(self, scores: Scores, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return {"rows": (torch.tensor(float(batch.num_rows)), torch.tensor(1.0))}


class Rows(nn.Module):
    """Every row scores the one parameter."""

    def __init__(self, value: float = 2.0, auxiliary: bool = False) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.auxiliary = auxiliary

    def forward(self, batch: Batch) -> Scores:
        extra = 5 * self.value.sum() * batch.num_rows if self.auxiliary else None
        return Scores(token_logprobs=self.value.expand(batch.num_rows), auxiliary=extra)


def test_numbers_by_hand() -> None:
    # 2 + 6 rows of value 2: the sum is 16, the weight 8; the gradient of the mean is 1.
    scorer = Rows()
    result = run(scorer, Means(), toy_window((1, 3)))
    assert (result.loss, result.terms, result.weights["rows"]) == (2.0, {"rows": 2.0}, 8.0)
    assert scorer.value.grad == torch.tensor([1.0])
    assert result.metrics == {"rows": 4.0}  # (2 + 6) / 2
    assert (result.samples, result.empty_terms, result.non_finite) == (4, (), ())


def test_coefficients_and_the_models_own_loss_are_added() -> None:
    # 0.5 x mean(2) + mean over rows of the auxiliary loss (5 x 2): 1 + 10; gradient 0.5 + 5.
    scorer = Rows(auxiliary=True)
    result = run(scorer, Means(coefficients={"rows": 0.5}), toy_window((1, 3)))
    assert result.loss == 11.0
    assert result.terms == {"rows": 2.0, "auxiliary": 10.0}
    assert scorer.value.grad == torch.tensor([5.5])


@pytest.mark.requirement("C-13")
def test_a_term_without_weight_contributes_nothing_and_is_reported() -> None:
    scorer = Rows()
    names = {"rows": 1.0, "none": 1.0}
    objective = Means(sums={"rows": 1.0, "none": float("nan")}, weight={"rows": 1.0, "none": 0.0}, coefficients=names)
    result = run(scorer, objective, toy_window((2, 2)))
    assert result.empty_terms == ("none",)
    assert result.terms == {"rows": 2.0}
    assert scorer.value.grad == torch.tensor([1.0])
    assert result.loss == 2.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_batches_count_nothing(name: str) -> None:
    plain, padded = ToyScorer(), ToyScorer()
    window = toy_window((3, 5))
    padding = toy_batch((0, 3, 6), is_padding=True)
    expected = run(plain, OBJECTIVES[name], window)
    result = run(padded, OBJECTIVES[name], replace(window, batches=(padding, *window.batches, padding)))
    assert relative_distance(gradients(plain), gradients(padded)) < 1e-12
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)
    assert (result.samples, result.tokens, result.supervised_tokens) == (
        expected.samples,
        expected.tokens,
        expected.supervised_tokens,
    )
    assert result.metrics == pytest.approx(dict(expected.metrics))


def test_a_window_of_padding_alone_gives_zero_gradients() -> None:
    scorer = ToyScorer()
    result = run(scorer, OBJECTIVES["language"], Window(0, 0.0, (toy_batch((0,), is_padding=True),)))
    assert result.loss == 0.0 and result.samples == 0
    assert "language" in result.empty_terms
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients(scorer).values())


class Poisoned(nn.Module):
    """NaN for the picture of one example."""

    def __init__(self, example: int) -> None:
        super().__init__()
        self.inner = ToyScorer()
        self.name = f"{example}.png"

    def forward(self, batch: Batch) -> Scores:
        scores = self.inner(batch)
        if any(image.name == self.name for image in batch.images):
            assert scores.token_logprobs is not None and scores.image_embeddings is not None
            factor = float("nan")
            return replace(
                scores,
                token_logprobs=scores.token_logprobs * factor,
                image_embeddings=scores.image_embeddings * factor,
            )
        return scores


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_that_is_not_finite_names_its_micro_batch_and_samples(name: str) -> None:
    # In a contrastive loss every row meets the bad one; only the micro-batch that holds it is to blame.
    source = ToySource()
    result = run(Poisoned(3), OBJECTIVES[name], toy_window((2, 3, 3)), source)
    (fault,) = result.non_finite
    assert (fault.rank, fault.micro_batch) == (0, 1)
    assert [origin.line for origin in fault.origins] == [3, 3, 4, 4, 5, 5]
    assert result.loss != result.loss
    assert source.attached[-1].images[0].name == "5.png", "the window ran to its end"


def test_pixels_are_gone_before_the_next_micro_batch() -> None:
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    class Watching(ToySource):
        def attach(self, batch: Batch) -> Batch:
            held.append(sum(reference() is not None for reference in alive))
            batch = super().attach(batch)
            self.attached.clear()
            assert batch.pixels is not None
            alive.append(weakref.ref(batch.pixels["values"]))
            return batch

    for name in ("language", "clip"):
        alive.clear()
        run(ToyScorer(), OBJECTIVES[name], toy_window((2,) * 4), Watching())
    assert held == [0] * 12  # 4 for the plain step, 2 x 4 for two passes


def test_waiting_for_data_is_measured() -> None:
    class Slow(ToySource):
        def attach(self, batch: Batch) -> Batch:
            time.sleep(0.02)
            return super().attach(batch)

    assert run(ToyScorer(), OBJECTIVES["language"], toy_window((4, 4)), Slow()).data_seconds >= 0.04


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Means(weight={"other": 1.0}), "weights name"),
        (Means(sums={"rows": 1.0, "extra": 1.0}), "extra"),
        (Means(sums={}), "never returned"),
        (Means(weight={"rows": float("inf")}), "not finite"),
    ],
)
def test_an_objective_that_contradicts_itself_is_refused(objective: Means, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run(Rows(), objective, toy_window((2,)))


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no score depends on a trainable parameter"):
        run(ToyScorer().requires_grad_(False), OBJECTIVES["language"], toy_window((2,)))
