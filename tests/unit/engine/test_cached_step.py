"""The two-pass step: parity with keeping every graph, dropout included; what a window objective must observe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.invariants.toys import (
    OBJECTIVES,
    ToyScorer,
    ToySource,
    gradients,
    relative_distance,
    runtime,
    toy_batch,
    toy_window,
)
from triptych.core.errors import TrainingError
from triptych.core.types import Batch, Progress, Scores, Window, WindowValues
from triptych.engine.step import run_window
from triptych.objectives.contrastive import ContrastiveConfig, ContrastiveObjective

SPLIT = (3, 1, 4)


class Recording(ToyScorer):
    """Remembers what it returned and whether gradients were on."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.calls: list[tuple[bool, Tensor]] = []

    def forward(self, batch: Batch) -> Scores:
        scores = super().forward(batch)
        assert scores.text_embeddings is not None
        self.calls.append((torch.is_grad_enabled(), scores.text_embeddings.detach()))
        return scores


def graph_of_the_whole_window(scorer: ToyScorer, name: str, split: tuple[int, ...]) -> dict[str, Tensor]:
    """Gradients with the graphs of all micro-batches alive at once: what two passes must equal."""
    objective, batches = OBJECTIVES[name], toy_window(split).batches
    observed = [objective.observe(scorer(ToySource().attach(batch)), batch) for batch in batches]
    joined = {
        key: torch.cat([item[key] for item in observed]) if value.ndim else value for key, value in observed[0].items()
    }
    total, start = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        window = WindowValues(joined, dict.fromkeys(joined, start), dict.fromkeys(joined, batch.num_rows))
        terms = objective.window_terms(batch, window)
        total = total + sum(factor * terms[term] for term, factor in objective.coefficients.items()) / 16
        start += batch.num_rows
    total.backward()
    return {key: torch.zeros_like(item) if item.grad is None else item.grad for key, item in scorer.named_parameters()}


@pytest.mark.requirement("B-3")
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_dropout_is_equal_in_both_passes_and_the_gradient_exact(name: str) -> None:
    scorer, plain = Recording(dropout=0.4), ToyScorer(dropout=0.4)
    torch.manual_seed(5)
    run_window(scorer, OBJECTIVES[name], toy_window(SPLIT), ToySource(), None, runtime(), Progress(0, 1))
    after_two_passes = torch.get_rng_state()
    torch.manual_seed(5)
    expected = graph_of_the_whole_window(plain, name, SPLIT)
    assert [grad for grad, _ in scorer.calls] == [False] * 3 + [True] * 3
    for (_, first), (_, second) in zip(scorer.calls[:3], scorer.calls[3:], strict=True):
        assert torch.equal(first, second)
    assert relative_distance(expected, {**dict.fromkeys(expected), **gradients(scorer)}) < 1e-12
    assert torch.equal(after_two_passes, torch.get_rng_state()), "randomness goes on as after one pass"


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_one_micro_batch_needs_one_forward_pass(name: str) -> None:
    direct, twice = Recording(dropout=0.0), Recording(dropout=0.0)
    run_window(direct, OBJECTIVES[name], toy_window((8,)), ToySource(), None, runtime(), Progress(0, 1))
    run_window(twice, OBJECTIVES[name], toy_window((4, 4)), ToySource(), None, runtime(), Progress(0, 1))
    assert [grad for grad, _ in direct.calls] == [True]
    assert [grad for grad, _ in twice.calls] == [False, False, True, True]
    assert relative_distance(gradients(direct), gradients(twice)) < 1e-12


@dataclass(frozen=True)
class Mixed:
    """A contrastive loss plus a term of its own that reads the detached window: sum over rows of w . mean."""

    inner: ContrastiveObjective = OBJECTIVES["clip"]
    needs: frozenset[str] = frozenset({"image_embeddings", "text_embeddings", "logit_scale"})
    differentiable: frozenset[str] = frozenset({"image_embeddings", "logit_scale"})

    @property
    def coefficients(self) -> Mapping[str, float]:
        return {"own": 2.0, "scale": 1.0}

    def weights(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"own": torch.tensor(float(batch.num_rows)), "scale": torch.tensor(1.0)}

    def observe(self, scores: Scores, batch: Batch) -> Mapping[str, Tensor]:
        return self.inner.observe(scores, batch)

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        assert window is not None and not any(value.requires_grad for value in window.values.values())
        assert scores.text_embeddings is not None
        return {"own": (scores.text_embeddings @ window.values["image_embeddings"].mean(dim=0)).sum()}

    def window_terms(self, batch: Batch, window: WindowValues) -> Mapping[str, Tensor]:
        return {"scale": 3 * window.values["logit_scale"]}

    def metrics(self, scores: Scores, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return {"own": (torch.tensor(1.0), torch.tensor(1.0))}

    def window_metrics(self, batch: Batch, window: WindowValues) -> dict[str, tuple[Tensor, Tensor]]:
        return {"shared": (torch.tensor(6.0), torch.tensor(2.0))}


@pytest.mark.parametrize("split", [(8,), (4, 4), (1,) * 8])
def test_terms_of_the_second_pass_and_shared_parameters(split: tuple[int, ...]) -> None:
    # sum over micro-batches of 3 x scale, over their number: 3 x scale; d/dtemperature is 3 x exp(1.3), once.
    scorer = ToyScorer()
    result = run_window(scorer, Mixed(), toy_window(split), ToySource(), None, runtime(), Progress(0, 1))
    assert scorer.temperature.grad is not None
    assert float(scorer.temperature.grad) == pytest.approx(3 * 2.718281828459045**1.3, rel=1e-12)
    assert result.terms["scale"] == pytest.approx(3 * 2.718281828459045**1.3, rel=1e-12)
    assert result.metrics == {"own": 1.0, "shared": 3.0}
    # The detached image side gets no gradient from `own`; the text side does.
    assert float(scorer.embedding.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    reference = ToyScorer()
    run_window(reference, Mixed(), toy_window((8,)), ToySource(), None, runtime(), Progress(0, 1))
    assert relative_distance(gradients(reference), gradients(scorer)) < 1e-12


def test_micro_batches_must_observe_the_same_names() -> None:
    class Fickle(ContrastiveObjective):
        def observe(self, scores: Scores, batch: Batch) -> dict[str, Tensor]:
            values = dict(super().observe(scores, batch))
            if batch.num_rows == 2:
                del values["text_keys"]
            return values

    with pytest.raises(TrainingError, match="observe"):
        window = toy_window((2, 1))
        run_window(ToyScorer(), Fickle(ContrastiveConfig()), window, ToySource(), None, runtime(), Progress(0, 1))


def test_rows_of_a_padding_batch_are_nobodys_negatives() -> None:
    class Careless(ContrastiveObjective):
        """Observes the rows of padding batches too."""

        def observe(self, scores: Scores, batch: Batch) -> dict[str, Tensor]:
            return dict(super().observe(scores, replace(batch, is_padding=False)))

    clean, padded = ToyScorer(), ToyScorer()
    window = toy_window((4, 4))
    longer = Window(0, 0.0, (*window.batches, toy_batch((1, 2), is_padding=True)))
    run_window(clean, OBJECTIVES["clip"], window, ToySource(), None, runtime(), Progress(0, 1))
    run_window(padded, Careless(ContrastiveConfig()), longer, ToySource(), None, runtime(), Progress(0, 1))
    assert relative_distance(gradients(clean), gradients(padded)) < 1e-12
