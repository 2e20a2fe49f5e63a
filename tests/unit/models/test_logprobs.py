"""Chunked log-probabilities equal the full computation."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from triptych.core.errors import ConfigError, ModelError
from triptych.models import logprobs
from triptych.models.logprobs import cut_logprobs, label_logprobs


def _full(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    return head(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]


@pytest.mark.requirement("H-18", "C-2")
def test_value_by_hand() -> None:
    head = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    hidden = torch.tensor([[math.log(2.0), math.log(5.0)]])  # logits ln 2, ln 5, 0: probabilities 2/8, 5/8, 1/8
    for label, probability in ((0, 2 / 8), (1, 5 / 8), (2, 1 / 8)):
        result = label_logprobs(hidden, torch.tensor([label]), head)
        assert result.dtype == torch.float32
        assert result.item() == pytest.approx(math.log(probability), abs=1e-6)


@pytest.mark.requirement("H-18", "C-2")
@pytest.mark.parametrize("chunk_size", [1, 3, 10, 11, 100])
def test_chunks_equal_full_with_gradients(chunk_size: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, 17, bias=True).double()
    labels = torch.randint(0, 17, (11,))
    weights = torch.randn(11, dtype=torch.float64)
    results = []
    for chunked in (False, True):
        hidden = torch.linspace(-2, 2, 55, dtype=torch.float64).reshape(11, 5).requires_grad_()
        head.zero_grad()
        logprobs = label_logprobs(hidden, labels, head, chunk_size) if chunked else _full(hidden, labels, head)
        (logprobs * weights).sum().backward()
        results.append([logprobs.detach(), hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    for full, chunk in zip(*results, strict=True):
        torch.testing.assert_close(chunk, full, rtol=1e-12, atol=1e-12)


class _Recorder(nn.Module):
    """A head that counts its calls and remembers the most rows it saw at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 9)
        self.rows: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(hidden))
        return self.inner(hidden)


@pytest.mark.requirement("H-18")
def test_no_more_than_a_chunk_of_logits_is_saved() -> None:
    head = _Recorder()
    hidden = torch.randn(10, 4, requires_grad=True)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs = label_logprobs(hidden, torch.zeros(10, dtype=torch.int64), head, chunk_size=4)
    assert all(shape[-1:] != (9,) for shape in saved)  # no logits wait for the backward pass
    assert head.rows == [4, 4, 2]
    logprobs.sum().backward()
    assert head.rows == [4, 4, 2, 2, 4, 4]  # each chunk once more, last first


def test_no_recomputation_for_a_single_chunk_or_without_gradients() -> None:
    head = _Recorder()
    hidden = torch.randn(3, 4, requires_grad=True)
    label_logprobs(hidden, torch.zeros(3, dtype=torch.int64), head, chunk_size=3).sum().backward()
    assert head.rows == [3]
    with torch.no_grad():
        result = label_logprobs(hidden, torch.zeros(3, dtype=torch.int64), head, chunk_size=2)
    assert head.rows == [3, 2, 1]
    assert not result.requires_grad


@pytest.mark.requirement("C-2")
def test_no_supervised_position_gives_zero_gradients_not_nan() -> None:
    head = nn.Linear(4, 9)
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    result = label_logprobs(hidden[none], torch.zeros(2, 3, dtype=torch.int64)[none], head)
    assert result.shape == (0,)
    result.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() == 0
    assert head.weight.grad is not None and head.weight.grad.abs().sum() == 0


@pytest.mark.requirement("C-2")
def test_half_precision_logits_are_summed_in_float32() -> None:
    head = nn.Linear(4, 5000, bias=False).bfloat16()
    hidden = torch.randn(3, 4).bfloat16()
    labels = torch.tensor([0, 1, 2])
    result = label_logprobs(hidden, labels, head)
    assert result.dtype == torch.float32
    expected = head(hidden).double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cut_kernel_equals_full_with_gradients() -> None:
    pytest.importorskip("cut_cross_entropy")
    torch.manual_seed(0)
    head = nn.Linear(64, 1000, bias=False, device="cuda")
    labels = torch.randint(0, 1000, (77,), device="cuda")
    found = []
    for score in (label_logprobs, cut_logprobs):
        hidden = torch.linspace(-2, 2, 77 * 64, device="cuda").reshape(77, 64).requires_grad_()
        head.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            scores = score(hidden, labels, head)
        (scores * torch.linspace(-1, 1, 77, device="cuda")).sum().backward()
        found.append([scores, hidden.grad, head.weight.grad])
    for cut, full in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(cut, full, rtol=2e-2, atol=2e-2)


def test_the_cut_kernel_is_refused_where_it_would_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ModelError, match="needs a CUDA device, and the model is on `cpu`"):
        cut_logprobs(hidden, labels, nn.Linear(4, 5, bias=False))
    assert logprobs._cut_obstacle(nn.Linear(4, 5, bias=False), torch.device("cuda")) is None
    assert "without bias" in str(logprobs._cut_obstacle(nn.Linear(4, 5), torch.device("cuda")))
    monkeypatch.setattr(logprobs, "_cut_obstacle", lambda head, device: None)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        cut_logprobs(hidden, labels, nn.Linear(4, 5, bias=False))
    assert "pip install cut-cross-entropy" in str(caught.value)


def test_the_cut_kernel_is_asked_for_exact_gradients_of_each_position(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
        asked.update(options, types={hidden.dtype, weight.dtype})
        return nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    monkeypatch.setattr(logprobs, "_cut_obstacle", lambda head, device: None)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=linear_cross_entropy))
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(4, 5, bias=False), torch.randn(3, 4), torch.tensor([0, 4, 2])
    torch.testing.assert_close(cut_logprobs(hidden, labels, head), _full(hidden, labels, head))
    assert asked == {"reduction": "none", "filter_eps": None, "types": {torch.float32}}
    with torch.autocast("cpu", torch.bfloat16):
        cut_logprobs(hidden, labels, head)
    assert asked["types"] == {torch.bfloat16}
