"""Ranks and the few collectives we need; everything works in one process without initialisation."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from triptych.core.errors import TriptychError

T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""How long ranks wait for long work that the main rank does alone."""


def is_distributed() -> bool:
    """True when a process group with more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Rank of this process, 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """True on the rank that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over ranks (a new tensor; no gradients)."""
    if not is_distributed():
        return tensor.detach().clone()
    result = tensor.detach().clone()
    dist.all_reduce(result, op=dist.ReduceOp.SUM)
    return result


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Return the element-wise maximum of `tensor` over ranks (a new tensor; no gradients)."""
    result = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result


def all_gather_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Join `tensor` [n_rank, ...] over ranks along dimension 0 in rank order; ranks may hold different n, also 0.

    Returns:
        The joined tensor [sum of n, ...] without gradients, and the first row that is this rank's.
    """
    if not is_distributed():
        return tensor.detach().clone(), 0
    tensor = tensor.detach().contiguous()
    counts = all_gather_objects(tensor.shape[0])
    longest = max(counts)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    joined = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
    return joined, sum(counts[: rank()])


def all_gather_objects(value: Any) -> list[Any]:
    """Gather a small picklable value of every rank, in rank order."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def call_on_main(work: Callable[[], T], *, is_long: bool = False) -> T:
    """Let the main rank work alone while the others wait; every rank must call this.

    Args:
        work: what the main rank does; no collective in it.
        is_long: it may take longer than collectives wait, which are minutes on GPUs. The others then wait in a gloo
            group of its own, which needs a network between all processes that gloo can use.

    Returns:
        What the work returned, on every rank; small and picklable.

    Raises:
        TriptychError, OSError: what the work raised, on every rank. Anything else is raised on the main rank only; the
            others get an error of the lost connection when it ends.
    """
    if not is_distributed():
        return work()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE) if is_long else None
    outcome: list[tuple[T | None, TriptychError | OSError | None] | None] = [None]
    if is_main():
        try:
            outcome = [(work(), None)]
        except (TriptychError, OSError) as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    assert outcome[0] is not None
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return cast(T, result)
