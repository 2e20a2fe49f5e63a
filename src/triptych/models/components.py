"""Facts of model families: where vision, connector and language live inside a Hugging Face model.

Together with `data/templates.py` the only place that tells families apart.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from triptych.core.config import did_you_mean
from triptych.core.errors import ModelError, Problem

LANGUAGE_NAMES = ("language_model", "text_model")
VISION_NAMES = ("vision_tower", "visual", "vision_model")
CONNECTOR_NAMES = ("multi_modal_projector", "connector")
INNER_CONNECTOR_NAMES = ("merger", "deepstack_merger_list")
"""Connectors that live inside the vision module (Qwen)."""


@dataclass(frozen=True)
class Components:
    """Named parts of one model, as paths that `model.get_submodule` understands."""

    modules: Mapping[str, tuple[str, ...]]
    """Component (`vision`, `connector`, `language`, for dual encoders `vision`, `text`, `projection`) -> module or
    parameter paths; together they cover every parameter of the model exactly once."""
    layers: Mapping[str, tuple[str, ...]]
    """Component -> its blocks in order, the unit of layer ranges, activation checkpointing and FSDP2."""
    embeddings: str
    """Path of the input token embedding."""
    head: str | None
    """Path of the output head (may share its weight with the embedding); None without one."""
    image_token_id: int | None
    """Id of the placeholder that takes a vision feature; None for dual encoders."""


PictureKind = Literal["fixed", "grid", "marked_tiles", "tiles", "wrapped"]
"""How a family turns a picture into tokens; `models/pictures.py` has one class for each."""

_PICTURE_KINDS: Mapping[str, PictureKind] = {
    "llava": "fixed",
    "qwen2_vl": "grid",
    "qwen2_5_vl": "grid",
    "qwen3_vl": "grid",
    "qwen3_vl_moe": "grid",
    "idefics3": "marked_tiles",
    "smolvlm": "marked_tiles",
    "internvl": "tiles",
    "gemma3": "wrapped",
}

RowInputs = Literal["plain", "rotary_grid", "image_blocks"]
"""What a family's forward needs beside ids and features: nothing, three-axis positions, or image blocks."""


def find_components(hf_model: PreTrainedModel) -> Components:
    """Locate vision, connector and language of any image-text-to-text model with the standard attribute names.

    Raises:
        ModelError: a part is missing, or a parameter belongs to no part or to two.
    """
    base = hf_model.base_model
    prefix = _path_of(hf_model, base)
    language = _child(base, LANGUAGE_NAMES, "language")
    vision = _child(base, VISION_NAMES, "vision")
    connectors = [name for name in CONNECTOR_NAMES if name in dict(base.named_children())]
    inner = [name for name in INNER_CONNECTOR_NAMES if name in dict(base.get_submodule(vision).named_children())]
    if not connectors and not inner:
        wanted = ", ".join((*CONNECTOR_NAMES, *(f"{vision}.{name}" for name in INNER_CONNECTOR_NAMES)))
        raise ModelError(
            Problem(
                f"{type(hf_model).__name__} has no connector: none of {wanted}",
                remedy="use a model with the standard attribute names, or compose one",
            )
        )
    head_module = hf_model.get_output_embeddings()
    head = _path_of(hf_model, head_module) if head_module is not None else None
    language_path = _join(prefix, language)
    language_paths = [language_path]
    if head is not None and not _is_inside(head, language_path):
        language_paths.append(head)
    modules = {
        "vision": tuple(_vision_paths(base, prefix, vision, inner)),
        "connector": tuple(
            [_join(prefix, name) for name in connectors] + [_join(prefix, f"{vision}.{name}") for name in inner]
        ),
        "language": tuple(language_paths),
    }
    components = Components(
        modules=modules,
        layers={name: find_layers(hf_model, paths) for name, paths in modules.items()},
        embeddings=_path_of(hf_model, hf_model.get_input_embeddings()),
        head=head,
        image_token_id=_image_token_id(hf_model.config),
    )
    check_coverage(components, hf_model)
    return components


def check_coverage(components: Components, hf_model: nn.Module) -> None:
    """Check that every parameter lies in exactly one component.

    Raises:
        ModelError: lists the parameters that lie in none or in several.
    """
    problems = []
    for name, _ in hf_model.named_parameters():
        owners = [component for component, paths in components.modules.items() if _inside_any(name, paths)]
        if len(owners) != 1:
            found = f"in {' and '.join(owners)}" if owners else "in no component"
            problems.append(
                Problem(f"parameter {name} is {found}", remedy="every parameter needs exactly one component")
            )
    if problems:
        raise ModelError(problems)


def find_layers(hf_model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Paths of the blocks of a component: the items of the `ModuleList` below `paths` that holds most parameters.

    Empty where there is no list, as in a connector of two linear layers. Nested lists (experts) hold fewer parameters
    than the blocks they are in.
    """
    modules = [(path, hf_model.get_submodule(path)) for path in paths if not _is_parameter(hf_model, path)]
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in modules:
        for name, child in module.named_modules(prefix=path):
            if isinstance(child, nn.ModuleList) and len(child):
                size = _size(child)
                if best is None or size > best[0]:
                    best = (size, name, child)
    if best is None:
        return ()
    return tuple(f"{best[1]}.{index}" for index in range(len(best[2])))


def component_parameters(components: Components, component: str, hf_model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a component, name -> parameter; a tied weight appears once, under its first name."""
    paths = components.modules[component]
    return {name: value for name, value in hf_model.named_parameters() if _inside_any(name, paths)}


def resolve_pattern(components: Components, pattern: str, hf_model: nn.Module) -> set[str]:
    """Names of the parameters that a pattern means.

    Patterns: a component (`vision`), its blocks (`vision.layers`, `vision.layers[3]`, `vision.layers[-4:]`), the token
    embedding or the output head of the component that holds it (`language.embeddings`, `language.head`), a dotted path
    (`model.language_model.norm`) or a glob over parameter names (`*.self_attn.*`). A head tied to the embedding means
    the embedding's parameter.

    Raises:
        ModelError: the pattern matches no parameter, or a layer number does not exist.
    """
    paths = _pattern_paths(components, pattern)
    if paths is None:
        names = _glob(hf_model, pattern)
    else:
        wanted = {
            id(value) for path in paths for value in _parameters_at(hf_model, path)
        }  # by identity, since a tied head has the embedding's name
        names = {name for name, value in hf_model.named_parameters() if id(value) in wanted}
    if not names:
        raise ModelError(
            Problem(f"pattern `{pattern}` matches no parameter", remedy=did_you_mean(pattern, _known(components)))
        )
    return names


def picture_kind(config: PreTrainedConfig) -> PictureKind:
    """How the family of this configuration turns a picture into tokens.

    Raises:
        ModelError: the family is not known.
    """
    kind = _PICTURE_KINDS.get(config.model_type)
    if kind is None:
        raise ModelError(
            Problem(
                f"do not know how a `{config.model_type}` model turns a picture into tokens",
                remedy=f"use one of: {', '.join(sorted(_PICTURE_KINDS))}",
            )
        )
    return kind


def row_inputs_kind(hf_model: PreTrainedModel) -> RowInputs:
    """What the family's forward needs beside token ids and vision features.

    Raises:
        ModelError: the forward takes `token_type_ids` whose meaning is not known for this family.
    """
    names = inspect.signature(type(hf_model.base_model).forward).parameters
    if "mm_encoder_outputs" not in names:
        raise ModelError(
            Problem(
                f"{type(hf_model.base_model).__name__}.forward takes no `mm_encoder_outputs`",
                remedy="update transformers, or use a family that accepts precomputed vision features",
            )
        )
    if hf_model.config.model_type == "gemma3":
        return "image_blocks"
    if "token_type_ids" in names:
        raise ModelError(
            Problem(
                f"`{hf_model.config.model_type}` needs token_type_ids, whose meaning differs from family to family",
                remedy="use a family whose attention is known: " + ", ".join(sorted(_PICTURE_KINDS)),
            )
        )
    return "rotary_grid" if "mm_token_type_ids" in names else "plain"


def repeat_positions(hf_model: PreTrainedModel, times: int) -> None:
    """Tell a model that continues prompts from a cache that each row of it now stands `times` in a row.

    Families with a rotary grid remember how far the positions of each prompt lag behind its tokens.
    """
    if row_inputs_kind(hf_model) == "rotary_grid":
        hf_model.model.rope_deltas = hf_model.model.rope_deltas.repeat_interleave(times, 0)


def row_inputs(
    kind: RowInputs,
    hf_model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_grid_thw: Tensor | None,
) -> dict[str, Tensor]:
    """Extra keyword arguments of the forward for right-padded rows that get no attention mask.

    Args:
        input_ids: [R, L] int64.
        attention_mask: [R, L] 1 on real tokens; used for positions only.
        image_grid_thw: [pictures of all rows in order, 3] patches in time, height and width; None without pictures or
            for families without it.

    Returns:
        `rotary_grid`: `position_ids` [4, R, L], the plain positions (from which attention masks are made) and the three
        rotary axes. `image_blocks`: `token_type_ids` [R, L]. `plain`: nothing, positions count from 0.
    """
    if kind == "plain":
        return {}
    is_image = (input_ids == hf_model.config.image_token_id).long()
    if kind == "image_blocks":
        return {"token_type_ids": is_image}
    # The family's own function walks over tokens in Python: on the CPU, or every token costs a synchronisation.
    positions, _ = hf_model.base_model.get_rope_index(
        input_ids.cpu(),
        mm_token_type_ids=is_image.cpu(),
        image_grid_thw=None if image_grid_thw is None else image_grid_thw.cpu(),
        attention_mask=attention_mask.cpu(),
    )
    plain = torch.arange(input_ids.shape[1]).expand(1, *input_ids.shape)
    return {"position_ids": torch.cat([plain, positions]).to(input_ids.device)}


_TREE_LANGUAGES = frozenset(
    {
        "gemma3_text",
        "llama",
        "mistral",
        "qwen2",
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3",
        "qwen3_vl_text",
        "smollm3",
    }
)
"""Language models whose attention is a function of position ids, the causal order and a sliding window alone, and that
hand extra keyword arguments on to it."""


def tree_obstacle(hf_model: PreTrainedModel) -> str | None:
    """Why the trees of this model's batches must be expanded to rows; None where they can be packed."""
    text = hf_model.config.get_text_config()
    if text.model_type not in _TREE_LANGUAGES:
        return f"the attention of a `{text.model_type}` language model is not known"
    if getattr(text, "output_router_logits", False):
        return "the router loss is taken row by row"
    return None


_TAKES_JOINED = frozenset({"gemma3", "internvl"})
"""Families whose forward takes the features of all pictures as one tensor; others take a list."""


@dataclass
class PictureRecord(BaseModelOutputWithPooling):
    """What the forward of every family takes as `mm_encoder_outputs["image"]`."""

    deepstack_features: list[list[Tensor]] | None = None


def picture_record(hf_model: PreTrainedModel, pooled: Tensor, deepstack: Sequence[Tensor]) -> PictureRecord:
    """Features of all pictures in the form that the family's forward takes.

    Args:
        pooled: [tokens of all pictures, D].
        deepstack: for each level, [tokens of all pictures, D]; usually none.
    """
    is_joined = hf_model.config.model_type in _TAKES_JOINED
    levels = [[level] for level in deepstack] or None
    return PictureRecord(pooler_output=pooled if is_joined else [pooled], deepstack_features=levels)


_LAST_POSITION_TEXT = frozenset({"siglip_text_model"})


def fixed_text_length(config: PreTrainedConfig) -> int | None:
    """Length that a text encoder's rows are padded to because it pools at the last position and attends to padding;
    None for encoders that take rows of any length with a mask."""
    return config.max_position_embeddings if config.model_type in _LAST_POSITION_TEXT else None


def tower_family(config: PreTrainedConfig) -> Literal["siglip", "clip"] | None:
    """The family whose image processor a vision tower usually gets; None where it is not known."""
    families: Mapping[str, Literal["siglip", "clip"]] = {"siglip_vision_model": "siglip", "clip_vision_model": "clip"}
    return families.get(config.model_type)


_LOGIT_FIELDS: Mapping[str, float | None] = {
    "final_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
}
"""Configuration field that changes logits after the head -> value at which it does nothing (None: absent)."""


def check_plain_head(config: PreTrainedConfig) -> None:
    """Refuse a language model whose logits are more than the output of its head.

    Raises:
        ModelError: names the field and its value.
    """
    fields = config.get_text_config().to_dict()
    problems = [
        Problem(
            f"the language model changes its logits after the head: {name} = {fields[name]}, which is not applied here",
            remedy="use a language model without soft-capping and logit scaling",
        )
        for name, neutral in _LOGIT_FIELDS.items()
        if fields.get(name) not in (None, neutral)
    ]
    if problems:
        raise ModelError(problems)


def _image_token_id(config: PreTrainedConfig) -> int:
    try:
        return int(config.image_token_id)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            Problem(
                f"the `{config.model_type}` configuration names no image token", remedy="set `image_token_id` in it"
            )
        ) from error


def _child(module: nn.Module, names: tuple[str, ...], component: str) -> str:
    children = dict(module.named_children())
    for name in names:
        if name in children:
            return name
    raise ModelError(
        Problem(
            f"{type(module).__name__} has no {component} part: none of {', '.join(names)} among {', '.join(children)}",
            remedy="use a model with the standard attribute names",
        )
    )


def _vision_paths(base: nn.Module, prefix: str, vision: str, inner: list[str]) -> list[str]:
    """The vision module, or, when it holds the connector, its other children and its own parameters."""
    if not inner:
        return [_join(prefix, vision)]
    module = base.get_submodule(vision)
    names = [name for name, child in module.named_children() if name not in inner and _size(child)]
    names += [name for name, _ in module.named_parameters(recurse=False)]
    return [_join(prefix, f"{vision}.{name}") for name in names]


_LAYERS = re.compile(r"^(?P<component>\w+)\.layers(\[(?P<range>[^\]]*)\])?$")
_RANGE = re.compile(r"^(?P<start>-?\d+)?(?P<colon>:)?(?P<stop>-?\d+)?$")


def _pattern_paths(components: Components, pattern: str) -> tuple[str, ...] | None:
    """Paths meant by a pattern of our own vocabulary; None for a path or glob."""
    if pattern in components.modules:
        return components.modules[pattern]
    for name, path in (("embeddings", components.embeddings), ("head", components.head)):
        if path is not None and pattern == f"{_owner(components, path)}.{name}":
            return (path,)
    match = _LAYERS.match(pattern)
    if match is None or match["component"] not in components.modules:
        return None
    layers = components.layers.get(match["component"], ())
    return layers if match["range"] is None else _slice(pattern, match["range"], layers)


def _slice(pattern: str, text: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    match = _RANGE.match(text)
    if match is None or not text:
        raise ModelError(
            Problem(f"`{pattern}`: `[{text}]` is not a layer range", remedy="write [3], [0:8], [8:] or [-4:]")
        )
    bounds = [int(match[name]) for name in ("start", "stop") if match[name] is not None]
    limit = len(layers)
    is_range = match["colon"] is not None
    if any(bound < -limit or bound > (limit if is_range else limit - 1) for bound in bounds):
        raise ModelError(
            Problem(f"`{pattern}` asks for a layer that does not exist: there are {limit}, numbered 0 to {limit - 1}")
        )
    if not is_range:
        return (layers[bounds[0]],)
    start, stop = (int(match[name]) if match[name] is not None else None for name in ("start", "stop"))
    return layers[start:stop]


def _glob(hf_model: nn.Module, pattern: str) -> set[str]:
    names = [name for name, _ in hf_model.named_parameters()]
    return {name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")}


def _known(components: Components) -> list[str]:
    known = [*components.modules, *(f"{name}.layers" for name, layers in components.layers.items() if layers)]
    known.append(f"{_owner(components, components.embeddings)}.embeddings")
    if components.head is not None:
        known.append(f"{_owner(components, components.head)}.head")
    return known


def _owner(components: Components, path: str) -> str:
    return next((name for name, paths in components.modules.items() if _inside_any(path, paths)), "")


def _parameters_at(hf_model: nn.Module, path: str) -> list[nn.Parameter]:
    if _is_parameter(hf_model, path):
        return [hf_model.get_parameter(path)]
    return list(hf_model.get_submodule(path).parameters())


def _is_parameter(hf_model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name in dict(hf_model.get_submodule(parent).named_parameters(recurse=False))


def _path_of(root: nn.Module, wanted: nn.Module) -> str:
    for name, module in root.named_modules():
        if module is wanted:
            return name
    raise ModelError(Problem(f"{type(wanted).__name__} is not part of {type(root).__name__}"))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _inside_any(name: str, paths: Iterable[str]) -> bool:
    return any(_is_inside(name, path) for path in paths)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
