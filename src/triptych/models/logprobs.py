"""Log-probabilities of labels without a `[positions, vocabulary]` tensor for all positions at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


def _chunk_logprobs(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # a sum over 100,000 exponentials loses the label's digits in half precision
    return -F.cross_entropy(logits, labels, reduction="none")
