"""Adapters that peft put into a model: switch them off, merge them, save and load them in peft's own format.

On disk every named adapter is a folder of its own, `<folder>/<name>/adapter_config.json` and
`adapter_model.safetensors`, which `peft.PeftModel.from_pretrained(base, <folder>/<name>)` reads. Base weights that are
trained beside them (a connector, say) go into `<folder>/trainable.safetensors` under the plain model's names.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.core.errors import ModelError, Problem
from triptych.models.lora_linear import use_lora_linear

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINABLE_WEIGHTS = "trainable.safetensors"

_PEFT_PREFIX = "base_model.model."
"""What a PeftModel puts before the names of the model it wraps; files carry it."""


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters in a model, in the order they were put in."""
    return tuple(vars(model).get("peft_config", {}))


def inject_adapter(model: nn.Module, name: str, config: PeftConfig) -> None:
    """Put one more adapter into a model, in place; follow with `activate_adapters` when all are in.

    The first one freezes every other parameter, as peft does.
    """
    if isinstance(config, LoraConfig):
        use_lora_linear(config)
    with warnings.catch_warnings():
        # Several adapters on one model are what we want here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, adapter_name=name)


def activate_adapters(model: nn.Module) -> None:
    """Let every adapted layer use all adapters it holds.

    peft activates only the last one injected, which would silence the others. This also sets `requires_grad` of all
    adapters.
    """
    for layer in _tuner_layers(model):
        held = [name for name in adapter_names(model) if name in _held(layer)]
        layer.set_adapter(held)
    for wrapper in _wrappers(model):
        wrapper.set_adapter(wrapper.token_adapter.active_adapters)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the model as its base, without adapters and trained token rows, inside the `with` block.

    `requires_grad` stays as it is throughout: peft would switch it off, and a sharded model that gathers its weights
    inside the block would remember that. Do not enter or leave between a forward pass and its backward pass: a
    recomputed forward would run another model.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    switches: list[BaseTunerLayer | AuxiliaryTrainingWrapper] = [*_tuner_layers(model), *_wrappers(model)]
    was_disabled = [switch.disable_adapters for switch in switches]

    def restore_flags() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    for switch in switches:
        switch.enable_adapters(False)
    restore_flags()
    try:
        yield
    finally:
        for switch, disabled in zip(switches, was_disabled, strict=True):
            switch.enable_adapters(not disabled)
        restore_flags()


def merge_adapters(model: nn.Module) -> nn.Module:
    """Fold every adapter into the base weights, W + s B A, and take the adapter layers out.

    Args:
        model: changed in place; copy it first to keep the adapters. Tied weights stay tied.

    Returns:
        The same object, now a plain Hugging Face model that `save_pretrained` writes as ever.

    Raises:
        ModelError: a merged weight would not be finite, or the model has no adapters.
    """
    if not adapter_names(model):
        raise ModelError("the model has no adapters to merge", remedy="save it as it is")
    outer = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    inside = {path for path, module in outer if isinstance(module, AuxiliaryTrainingWrapper)}
    for path, module in outer:
        parent, _, name = path.rpartition(".")
        if parent in inside:
            continue
        try:
            if isinstance(module, AuxiliaryTrainingWrapper):
                plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                module.merge(safe_merge=True)
                plain = module.get_base_layer()
        except ValueError as error:
            raise ModelError(f"cannot merge `{path}`: {error}", remedy="look for NaN or Inf in the adapter") from error
        setattr(model.get_submodule(parent), name, plain)
    del model.peft_config
    return model


def save_adapters(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> list[Path]:
    """Write every adapter in peft's format, and the other trainable weights beside them.

    Args:
        model: the model the adapters are in.
        folder: made if missing; files of the same name are replaced.
        state: whole tensors by the model's own names, for a sharded model; `model.state_dict()` when left out.

    Returns:
        The folder of each adapter, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    folders = []
    for name in adapter_names(model):
        target = folder / name
        target.mkdir(exist_ok=True)
        save_file(
            {
                _PEFT_PREFIX + file_key: state[key].detach().cpu().contiguous()
                for file_key, key in _adapter_keys(model, name).items()
            },
            target / ADAPTER_WEIGHTS,
            metadata={"format": "pt"},
        )
        config = copy.deepcopy(_configs(model)[name])
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules)  # peft holds a set, whose order differs between runs
        config.save_pretrained(str(target))
        folders.append(target)
    adapted = {key for name in adapter_names(model) for key in _adapter_keys(model, name).values()}
    others = {
        _plain_name(name): state[name].detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in adapted
    }
    if others:
        save_file(others, folder / TRAINABLE_WEIGHTS, metadata={"format": "pt"})
    return folders


def load_adapters(model: nn.Module, folder: Path) -> tuple[str, ...]:
    """Read what `save_adapters` wrote, into a plain base model or into one that already has the same adapters.

    Args:
        model: adapters that it lacks are put in (not trainable); those it has get the stored weights, which no later
            initialisation touches.
        folder: as written by `save_adapters`, or a single adapter folder in peft's format.

    Returns:
        Names of the adapters that were read.

    Raises:
        ModelError: there is nothing to read, or settings, names or shapes disagree with the model.
    """
    folders = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))}
    if (folder / ADAPTER_CONFIG).is_file():
        # A dot would be read as a path by the modules that hold the adapter.
        folders = {folder.name.replace(".", "-"): folder}
    trainable = folder / TRAINABLE_WEIGHTS
    if not folders and not trainable.is_file():
        raise ModelError(
            f"no adapter in {folder}",
            remedy=f"expected {ADAPTER_CONFIG} there or one folder down, or {TRAINABLE_WEIGHTS}",
        )
    for name, source in folders.items():
        _load_adapter(model, name, source)
    if trainable.is_file():
        _load_trainable(model, trainable)
    return tuple(folders)


def _load_adapter(model: nn.Module, name: str, source: Path) -> None:
    config = PeftConfig.from_pretrained(str(source))
    weights = {key.removeprefix(_PEFT_PREFIX): value for key, value in load_file(source / ADAPTER_WEIGHTS).items()}
    if name in adapter_names(model):
        _check_settings(_configs(model)[name], config, source)
    else:
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        inject_adapter(model, name, config)
        activate_adapters(model)
        is_float32 = any(value.dtype == torch.float32 for value in weights.values())
        cast_adapter_dtype(model, name, autocast_adapter_dtype=is_float32)
        present = {id(parameter) for parameter, _ in flags}
        for parameter in model.parameters():
            if id(parameter) not in present:
                parameter.requires_grad_(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    parameters = dict(model.named_parameters())
    expected = {file_key: parameters[key] for file_key, key in _adapter_keys(model, name).items()}
    _copy(weights, expected, source / ADAPTER_WEIGHTS)


def _load_trainable(model: nn.Module, source: Path) -> None:
    weights = load_file(source)
    parameters = {_plain_name(name): item for name, item in model.named_parameters(remove_duplicate=False)}
    _copy(weights, {name: item for name, item in parameters.items() if name in weights}, source)


def _check_settings(present: PeftConfig, stored: PeftConfig, source: Path) -> None:
    left, right = present.to_dict(), stored.to_dict()
    problems = [
        Problem(
            f"the model's adapter has {key} {left[key]!r}, the stored one {right[key]!r}",
            file=str(source / ADAPTER_CONFIG),
            remedy="use the recipe that the adapter was trained with",
        )
        for key in ("peft_type", "r", "lora_alpha", "use_rslora", "trainable_token_indices")
        if left.get(key) != right.get(key)
    ]
    if problems:
        raise ModelError(problems)


def _copy(weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], source: Path) -> None:
    """Copy values into parameters of the same names.

    Raises:
        ModelError: names or shapes disagree; then nothing is copied.
    """
    problems = []
    for name in sorted({*parameters, *weights}):
        if name not in weights:
            problems.append(Problem(f"`{name}` is in the model, not in the file", file=str(source)))
        elif name not in parameters:
            problems.append(Problem(f"`{name}` is in the file, not in the model", file=str(source)))
        elif parameters[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)} in the file, {tuple(parameters[name].shape)} in the model"
            problems.append(Problem(f"`{name}` is {shapes}", file=str(source)))
    if problems:
        shown = problems[:8]
        remedy = f"{len(problems)} names disagree: load it onto the base model and adapters it was trained with"
        raise ModelError([*shown[:-1], Problem(shown[-1].message, file=str(source), remedy=remedy)])
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _configs(model: nn.Module) -> dict[str, PeftConfig]:
    configs: dict[str, PeftConfig] = vars(model)["peft_config"]
    return configs


def _tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _wrappers(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _held(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that a layer has weights for."""
    return {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)}


def _adapter_keys(model: nn.Module, name: str) -> dict[str, str]:
    """Name in the file (without the adapter's name, as peft has it) -> name in the model, each parameter once.

    peft's own function fails on a model in which only some of the adapters have trained token rows.
    """
    keys: dict[str, str] = {}
    prefixes = {
        f"{path}.{attribute}.{name}": f"{path}.{attribute}"
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for attribute in layer.adapter_layer_names
    }
    for key, _ in model.named_parameters():
        for prefix in (key, key.rpartition(".")[0]):
            if prefix in prefixes:
                keys[prefixes[prefix] + key.removeprefix(prefix)] = key
    return keys


def _plain_name(name: str) -> str:
    """The name a parameter has in the model without adapters."""
    return name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
