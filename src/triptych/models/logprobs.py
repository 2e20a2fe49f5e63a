"""Log-probabilities of labels without a `[positions, vocabulary]` tensor for all positions at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from triptych.core.errors import ConfigError, ModelError

HeadKernel = Literal["plain", "cut_cross_entropy"]

DEFAULT_CHUNK = 512
"""Positions per chunk: 512 x 150,000 logits are 300 MB in float32."""


def label_logprobs(hidden: Tensor, labels: Tensor, head: nn.Module, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
    """Natural log of p(label) at every position, gradients included: log softmax(head(hidden))[label].

    With more than one chunk each chunk's logits are computed again in the backward pass, so that at most
    `chunk_size` x vocabulary logits live at a time. The head is called as a module, so adapters, quantised weights
    and sharded parameters inside it work.

    Args:
        hidden: [S, D] hidden states that predict `labels` (already shifted).
        labels: [S] int64, every one a valid token id.
        head: maps [n, D] to [n, vocabulary].
        chunk_size: positions per chunk, at least 1.

    Returns:
        [S] float32 (float64 if the logits are). With S = 0 an empty tensor that still carries gradients of zero.
    """
    is_single = len(labels) <= chunk_size
    if is_single or not torch.is_grad_enabled():
        parts = [
            _chunk_logprobs(head, states, chunk)
            for states, chunk in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
        ]
    else:
        parts = [
            checkpoint(_chunk_logprobs, head, states, chunk, use_reentrant=False)
            for states, chunk in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
        ]
    return torch.cat(parts)


def cut_logprobs(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """The same through the kernel of the package `cut-cross-entropy`, which holds no logits at all.

    Wijmans et al. 2024, arXiv 2411.09009. Its filter of small gradients is off: they are exact up to rounding.

    Raises:
        ModelError, ConfigError: as `find_cut_kernel`.
    """
    linear_cross_entropy = find_cut_kernel(head, hidden.device)
    weight: Tensor = head.get_parameter("weight")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    logprobs: Tensor = -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None)
    return logprobs


def check_cut_kernel(head: nn.Module, device: torch.device) -> None:
    """Whether `cut_logprobs` works with a head.

    Args:
        device: where the head will be.

    Raises:
        ModelError: the head is not a plain linear layer without bias, or the device is not a CUDA device.
    """
    obstacle = _cut_obstacle(head, device)
    if obstacle is not None:
        message = f"the head kernel `cut_cross_entropy` cannot be used: {obstacle}"
        raise ModelError(message, key="head_kernel", remedy="set `head_kernel: plain`")


def find_cut_kernel(head: nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """The kernel behind `cut_logprobs`.

    Raises:
        ModelError: as `check_cut_kernel`.
        ConfigError: the package is not installed.
    """
    check_cut_kernel(head, device)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        message = f"the head kernel `cut_cross_entropy` cannot be loaded: {error}"
        remedy = "pip install cut-cross-entropy, or set `head_kernel: plain`"
        raise ConfigError(message, key="head_kernel", remedy=remedy) from error
    kernel: Callable[..., Tensor] = linear_cross_entropy
    return kernel


def _cut_obstacle(head: nn.Module, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, and the model is on `{device.type}`"
    if type(head) is not nn.Linear or head.bias is not None:
        return f"the head is {type(head).__name__}, not a plain linear layer without bias"
    if isinstance(head.weight, DTensor):
        return "the head's weight is sharded"
    return None


def _chunk_logprobs(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # a sum over 100,000 exponentials loses the label's digits in half precision
    return -F.cross_entropy(logits, labels, reduction="none")
