"""Writing the finished model of a stage: adapters in peft's format, and a merged Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

from triptych.core.distributed import call_on_main
from triptych.core.errors import TrainingError
from triptych.engine.state import gather_tensors
from triptych.models.adapters import adapter_names, merge_adapters, save_adapters
from triptych.models.dual_encoder import LoadedDualEncoder, save_dual_encoder
from triptych.models.load import LoadedVlm, save_vlm

ADAPTERS = "adapters"
"""Folder, beside the model's, that holds the adapters of a LoRA run."""

Loaded = LoadedVlm | LoadedDualEncoder


def save_finished(folder: Path, loaded: Loaded, rebuild: Callable[[], Loaded]) -> None:
    """Write `folder` (plain Hugging Face, adapters merged) and, beside it, the adapters on their own.

    The model in memory is merged in place: call this when training is over. Every rank must call it.

    Args:
        folder: Of the merged model.
        loaded: The trained model; its parameters may be shards.
        rebuild: Makes the same model as before training, whole and tuned, to put gathered weights into.

    Raises:
        TrainingError: The folder cannot be written; on every rank.
    """
    state = gather_tensors(loaded.model.state_dict()) if is_sharded(loaded.model) else None

    def write() -> None:
        whole = loaded
        if state is not None:
            whole = rebuild()
            whole.model.load_state_dict(state)
        try:
            if adapter_names(whole.model):
                save_adapters(whole.model, folder.parent / ADAPTERS)
            write_model(folder, whole)
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
            raise TrainingError(
                f"the finished model cannot be written: {error} ({free / 2**30:.1f} GiB free)",
                file=str(folder),
                remedy="make room or mend the rights; the same command goes on from the last checkpoint",
            ) from error

    call_on_main(write)


def write_model(folder: Path, loaded: Loaded) -> None:
    """Write whole weights from this process; adapters are merged in place."""
    if adapter_names(loaded.model):
        merge_adapters(loaded.model)
    if isinstance(loaded, LoadedVlm):
        save_vlm(replace(loaded, model=loaded.model.eval()), folder)
    else:
        save_dual_encoder(loaded, folder)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over ranks (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
