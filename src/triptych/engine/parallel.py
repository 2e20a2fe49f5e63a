"""Where and how a run computes: device, precision, processes, and how the scorer is wrapped for them.

The order is: device, activation checkpointing, then DDP or FSDP2; the optimizer comes last, from the parameters the
wrapped module has (`optim.bind_groups`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from triptych.core import distributed
from triptych.core.config import Config
from triptych.core.errors import ConfigError, ModelError, Problem, TrainingError

Precision = Literal["bf16", "fp16", "fp32"]
Strategy = Literal["single", "ddp", "fsdp"]


class RuntimeConfig(Config):
    """Precision and parallelism."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the forward pass. `auto`: bf16 where the hardware computes in it, else fp16 on a GPU, else fp32.
    Weights, gradients and losses stay in the type the model was loaded in."""
    strategy: Literal["auto", "single", "ddp", "fsdp"] = "auto"
    """How several processes share the work. `ddp`: each holds the whole model. `fsdp`: each holds a shard of every
    block. `auto`: `ddp`, or `single` in one process."""
    activation_checkpointing: bool | tuple[int, ...] = False
    """Recompute blocks in the backward pass instead of keeping their activations: all, none, or the blocks at these
    0-based places in the model's list of blocks."""
    compile: bool = False
    """Compile each block with torch.compile, for shapes that change. The first step then takes a minute or more; needs
    a C++ compiler on a CPU, triton on a GPU."""
    keep_memory: bool = True
    """On a CPU, keep freed memory in the process instead of giving it back to the system and asking for it again in
    every step. Needs glibc; without it nothing changes."""


class Runtime:
    """Device, precision and parallelism of this process.

    Joins the process group, as `join` does.

    Raises:
        TrainingError: this is one of several processes and in no group.
        ConfigError: the strategy does not fit the number of processes or what `accelerate launch` asked for.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.device = join()
        self.world_size = distributed.world_size()
        self.precision: Precision = resolve_precision(config.precision, self.device)
        self.strategy: Strategy = resolve_strategy(config.strategy, self.world_size, os.environ)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None
        self._replicated: list[nn.Parameter] = []

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of every forward pass; a fresh one each time, since casts cached without gradients carry none."""
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(device_type=self.device.type, dtype=dtype)

    def wrap(self, scorer: nn.Module, blocks: Sequence[str] = ()) -> nn.Module:
        """Move the scorer to the device, checkpoint activations, then wrap it for the strategy.

        Under FSDP2 its parameters become new objects (DTensors): call `optim.bind_groups` on the result. The scorer
        itself stays usable; under FSDP2 it is the returned module.

        Args:
            scorer: the module with all weights loaded and the tuning plan applied.
            blocks: module paths of its transformer blocks, in order; the units of checkpointing and sharding.

        Raises:
            ConfigError: `activation_checkpointing` names a block that does not exist.
            ModelError: fp16 is asked for and trainable parameters are not fp32.
            TrainingError: the model was not wrapped as asked.
        """
        self._check_trainable_types(scorer)
        scorer.to(self.device)
        units = [scorer.get_submodule(path) for path in blocks]
        for index in checkpointed_blocks(self.config.activation_checkpointing, len(units)):
            checkpoint(units[index])
        if self.config.compile:
            if self.device.type == "cpu":
                # There attention over trees is not compiled: so a block is two graphs, not one more for each caller.
                torch._dynamo.config.nested_graph_breaks = True
            for unit in units:
                unit.compile(dynamic=True)
        if self.strategy == "ddp":
            return self._wrap_ddp(scorer)
        if self.strategy == "fsdp":
            return self._wrap_fsdp(scorer, units)
        return scorer

    def synchronise(self, module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch. DDP exchanges gradients only in the last one of a window.

        FSDP2 reduces in each: keeping gradients unreduced would keep them whole, which is what sharding avoids.
        """
        if isinstance(module, DistributedDataParallel) and not is_last:
            return module.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward of this rank's share of a *sum* over ranks.

        DDP and FSDP2 average over processes, so the share is multiplied by their number; and by the fp16 scale.

        Raises:
            TrainingError: nothing that is trained took part in the forward pass.
        """
        if not loss.requires_grad:
            raise TrainingError(
                Problem(
                    "no score depends on a trainable parameter",
                    key="tuning",
                    remedy="train at least one component that the objective's scores come from",
                )
            )
        loss = loss * self.world_size
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def finish_gradients(self, module: nn.Module) -> None:
        """Complete the gradients of a window, once after its last backward.

        Averages those of parameters that FSDP2 does not shard.

        Raises:
            TrainingError: under DDP a trainable parameter took no part; DDP then leaves others unaveraged, silently.
        """
        if isinstance(module, DistributedDataParallel):
            _check_all_reached(module.module)
        if not self._replicated:
            return
        local = [torch.zeros_like(item) if item.grad is None else item.grad for item in self._replicated]
        sums = distributed.all_reduce_sum(torch.stack([gradient.double().reshape(()) for gradient in local]))
        for parameter, total in zip(self._replicated, sums / self.world_size, strict=True):
            parameter.grad = total.to(parameter.dtype).reshape(parameter.shape)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the fp16 scale out of the gradients; before they are measured or clipped. Nothing in bf16 and fp32."""
        if self.scaler is None:
            return
        # The scaler cannot take whole and sharded gradients in one call.
        scalars = [(parameter, parameter.grad) for parameter in self._replicated]
        for parameter, _ in scalars:
            parameter.grad = None
        self.scaler.unscale_(optimizer)
        for parameter, gradient in scalars:
            parameter.grad = None if gradient is None else gradient / self.scaler.get_scale()

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step the optimizer; True when the fp16 scaler left the step out because of an overflow, on every rank."""
        if self.scaler is None:
            optimizer.step()
            return False
        before = self.scaler.get_scale()
        if all(item.grad is None or bool(item.grad.isfinite()) for item in self._replicated):
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.scaler.update(before * self.scaler.get_backoff_factor())
        return self.scaler.get_scale() < before

    def state_dict(self) -> dict[str, Any]:
        """State of the fp16 scaler; empty otherwise."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state))

    def _wrap_ddp(self, scorer: nn.Module) -> nn.Module:
        options = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[options],
            step_scheduler_with_optimizer=False,
        )
        wrapped = accelerator.prepare_model(scorer)
        if not isinstance(wrapped, DistributedDataParallel):
            raise _not_wrapped("ddp", f"accelerate returned {type(wrapped).__name__} ({accelerator.distributed_type})")
        # Equal since wrapping and never trained; sending them again would put a collective into every forward pass.
        wrapped.broadcast_buffers = False
        return wrapped

    def _wrap_fsdp(self, scorer: nn.Module, units: Sequence[nn.Module]) -> nn.Module:
        _broadcast_weights(scorer)
        # One number, such as a temperature, cannot be sharded (0-d) or is not worth it: each process keeps it whole.
        scalars = {parameter for parameter in scorer.parameters() if parameter.numel() == 1}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for unit in (*units, scorer):
            fully_shard(unit, mesh=mesh, ignored_params=scalars)
        whole = [
            name for name, item in scorer.named_parameters() if item not in scalars and not isinstance(item, DTensor)
        ]
        if whole:
            raise _not_wrapped("fsdp", f"{len(whole)} parameters are not sharded, the first is {whole[0]}")
        self._replicated = [item for item in scorer.parameters() if item in scalars and item.requires_grad]
        return scorer

    def _check_trainable_types(self, scorer: nn.Module) -> None:
        if self.scaler is None:
            return
        narrow = [name for name, item in scorer.named_parameters() if item.requires_grad and item.itemsize < 4]
        if narrow:
            raise ModelError(
                Problem(
                    f"precision fp16 needs trainable weights in fp32, {len(narrow)} are not; the first is {narrow[0]}",
                    key="train.runtime.precision",
                    remedy="load the model in float32, or train in bf16",
                )
            )


def join() -> torch.device:
    """Join the process group when launched by torchrun or `accelerate launch` (gloo on CPU, nccl on GPU).

    A process joins once, whatever it trains one after the other; further calls only return its device.

    Raises:
        TrainingError: it is one of several processes and in no group: it has left it, or its launcher named no ranks.
    """
    device: torch.device = PartialState(cpu=not torch.cuda.is_available()).device
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not dist.is_initialized():
        raise TrainingError(
            Problem(
                f"this is one of {launched} processes (WORLD_SIZE) and in no group: it would train alone",
                remedy="launch with torchrun or `accelerate launch`; who calls `leave` trains everything before",
            )
        )
    return device


def leave() -> None:
    """Leave the process group, all ranks together, when everything is trained; `end_process` comes after it.

    Not for a process that failed: the others may be elsewhere.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End a process that is one of several, whether it has left its group or failed; call it last, as `triptych` does.

    Threads of gloo let go of a collective's tensors in their own time, and need Python for it. Where Python is ending
    already that aborts the process, with a status of its own (pytorch/pytorch#190489). Leaving the group does not end
    these threads as long as anything holds it, such as a wrapped scorer or torch's caches for sharded ones. So Python's
    own end is left out, with its exit handlers and its wait for threads.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def unwrap(module: nn.Module) -> nn.Module:
    """The scorer inside what `Runtime.wrap` returned."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def resolve_precision(precision: Literal["auto", "bf16", "fp16", "fp32"], device: torch.device) -> Precision:
    """What `auto` means on this device: bf16 if the hardware has it, else fp16 on a GPU, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def resolve_strategy(
    strategy: Literal["auto", "single", "ddp", "fsdp"], world_size: int, environment: Mapping[str, str]
) -> Strategy:
    """What `auto` means for this launch.

    Raises:
        ConfigError: `single` with several processes, `ddp` or `fsdp` with one, or a strategy other than the one
            `accelerate launch` was configured for.
    """
    wants_fsdp = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            Problem(
                "accelerate was configured for DeepSpeed",
                key="train.runtime.strategy",
                remedy="launch with ddp or fsdp",
            )
        )
    if strategy == "auto":
        if world_size == 1:
            return "single"
        return "fsdp" if wants_fsdp else "ddp"
    if (strategy == "single") != (world_size == 1):
        raise ConfigError(
            Problem(
                f"strategy `{strategy}` does not fit {world_size} process{'es' if world_size > 1 else ''}",
                key="train.runtime.strategy",
                remedy="use `auto`, or launch several processes: torchrun --nproc-per-node 2 -m triptych.cli train ...",
            )
        )
    if strategy == "ddp" and wants_fsdp:
        raise ConfigError(
            Problem(
                "strategy is `ddp` but accelerate was configured for FSDP",
                key="train.runtime.strategy",
                remedy="use `auto` or `fsdp`, or change the accelerate configuration",
            )
        )
    return strategy


def checkpointed_blocks(choice: bool | tuple[int, ...], num_blocks: int) -> list[int]:
    """Places of the blocks whose activations are recomputed.

    Raises:
        ConfigError: a place outside the list of blocks.
    """
    if isinstance(choice, bool):
        return list(range(num_blocks)) if choice else []
    outside = [index for index in choice if not 0 <= index < num_blocks]
    if outside:
        raise ConfigError(
            Problem(
                f"blocks {outside} do not exist, the model has {num_blocks}",
                key="train.runtime.activation_checkpointing",
                remedy=f"name places from 0 to {num_blocks - 1}" if num_blocks else "set it to false",
            )
        )
    return sorted(set(choice))


def _broadcast_weights(module: nn.Module) -> None:
    """Weights drawn at random (a new connector, LoRA) differ between processes until now; DDP does this itself."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=0)


def _check_all_reached(module: nn.Module) -> None:
    missing = [name for name, item in module.named_parameters() if item.requires_grad and item.grad is None]
    if missing:
        raise TrainingError(
            [
                Problem(
                    f"{name} is trainable, but no gradient reaches it", key="tuning", remedy="freeze it with a rule"
                )
                for name in missing
            ]
        )


def _not_wrapped(strategy: str, what: str) -> TrainingError:
    return TrainingError(
        Problem(
            f"the model was not wrapped for `{strategy}`: {what}",
            key="train.runtime.strategy",
            remedy="check the accelerate configuration, or use another strategy",
        )
    )
