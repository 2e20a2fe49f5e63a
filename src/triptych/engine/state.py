"""Taking the state of a run apart into plain values and full tensors, and putting it back.

Sharded parameters (FSDP2's DTensors) are gathered whole, one tensor at a time, on the main rank. A checkpoint is
therefore the same file whatever the sharding was, and holds what is trained only; the price is that the main rank needs
host memory for one full copy of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from triptych.core import distributed
from triptych.core.errors import CheckpointError

_SCALARS = (type(None), bool, int, float, str, bytes)


def gather_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the main rank, an empty mapping elsewhere. Every rank must call it.

    No two results share memory, which safetensors would refuse.
    """
    gathered: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        full = _gather(tensor)
        if not distributed.is_main():
            continue
        full = full.contiguous()
        if full.data_ptr() in seen:
            full = full.clone()
        seen.add(full.data_ptr())
        gathered[name] = full
    return gathered


def restore_tensors(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy `saved` into `targets` in place.

    Args:
        targets: Name -> parameter or buffer, sharded or not.
        saved: Name -> full tensor.
        what: What the tensors are, for messages.

    Raises:
        CheckpointError: names, shapes or dtypes disagree; nothing has been changed then.
    """
    missing, unknown = sorted(targets.keys() - saved.keys()), sorted(saved.keys() - targets.keys())
    wrong = [
        f"{name}: saved {_kind(saved[name])}, in the model {_kind(target)}"
        for name, target in targets.items()
        if name in saved and _kind(saved[name]) != _kind(target)
    ]
    if missing or unknown or wrong:
        found = [f"not in the checkpoint: {_first(missing)}"] if missing else []
        found += [f"not in the model: {_first(unknown)}"] if unknown else []
        found += [_first(wrong)] if wrong else []
        raise CheckpointError(
            f"{what} of the checkpoint do not fit the model: {'; '.join(found)}",
            remedy="resume with the model and tuning rules the run was started with",
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_distribute(saved[name], target))


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """State by parameter name and the hyperparameters of each group. Every rank must call it.

    Args:
        optimizer: Any torch optimizer.
        names: `id(parameter)` -> qualified name, for every parameter of the optimizer.
    """
    state: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        tensors = gather_tensors({key: value for key, value in values.items() if isinstance(value, Tensor)})
        others = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        state[names[id(parameter)]] = {**others, **tensors}
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str], packed: Mapping[str, Any]) -> None:
    """The opposite of `pack_optimizer`.

    Raises:
        CheckpointError: the groups hold other parameters than when the checkpoint was written.
    """
    index: dict[str, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        present = [names[id(parameter)] for parameter in group["params"]]
        saved = packed["groups"][number]["params"] if number < len(packed["groups"]) else []
        if present != saved:
            differing = sorted(set(present) ^ set(saved)) or present
            raise CheckpointError(
                f"optimizer group {number} of the checkpoint holds other parameters: {_first(differing)}",
                remedy="resume with the tuning rules the run was started with",
            )
        index.update({name: len(index) + offset for offset, name in enumerate(present)})
    parameters = {names[id(item)]: item for group in optimizer.param_groups for item in group["params"]}
    state = {index[name]: _distribute_state(values, parameters[name]) for name, values in packed["state"].items()}
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in packed["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def plain(value: Any, where: str) -> Any:
    """A state made of mappings, lists, tuples, tensors and scalars; nothing else can be loaded without pickle.

    Tensors that are on the CPU already are not copied: write the result before the next step changes them.

    Raises:
        CheckpointError: another type is in it. Found when saving, because at resume it would be too late.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        # torch.save writes whole storages: a view of a large one must not drag it along.
        is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        return tensor.clone() if is_view else tensor
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{where}[{number}]") for number, item in enumerate(value))
    raise CheckpointError(
        f"the state `{where}` is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved safely",
        remedy="keep state in numbers, strings, lists, mappings and tensors",
    )


def random_state() -> dict[str, Any]:
    """State of every random number generator this process uses, as plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """The opposite of `random_state`."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Whatever runs inside, training draws the random numbers it would have drawn without it."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


@contextmanager
def untouched_modes(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside, each sub-module is in train or eval mode afterwards as it was before."""
    modes = [(item, item.training) for item in module.modules()]
    try:
        yield
    finally:
        for item, training in modes:
            item.training = training


def memory_bytes(device: torch.device) -> int:
    """Peak memory of a GPU so far; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _gather(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _distribute(full: Tensor, target: Tensor) -> Tensor:
    """Every rank has read the same file, so each takes its own shard and nothing is sent."""
    if not isinstance(target, DTensor):
        return full
    local = full.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)


def _distribute_state(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    return {
        key: _distribute(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in values.items()
    }


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _first(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
