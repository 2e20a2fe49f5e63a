"""Load, compose and save vision-language models; what is saved needs transformers alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.utils.hub import cached_file

from triptych.core.config import Config
from triptych.core.errors import ModelError
from triptych.core.protocols import PictureProcessor
from triptych.models.chat_templates import flatten_parts
from triptych.models.components import Components, check_plain_head, component_parameters, find_components
from triptych.models.connectors import ConnectorConfig, MlpConnectorConfig, restore_linear
from triptych.models.pictures import make_pictures, model_inputs
from triptych.models.tokens import TokenRegistry, TokensConfig, grow_embeddings, register_tokens
from triptych.models.towers import (
    LanguageConfig,
    TextTower,
    VisionConfig,
    VisionTower,
    find_blocks,
    fix_parameter,
    load_checkpoint,
    load_image_processor,
    load_language_model,
    load_tokenizer,
    load_vision_tower,
    reached_parameters,
    resolve_source,
)

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"

PROCESSOR_FILES = ("processor_config.json", "video_preprocessor_config.json")
"""Files beside a checkpoint that only a family's own processor class could write; copied as they are."""


class VlmConfig(Config):
    """A vision-language model: an existing checkpoint (`from`), or one composed of parts."""

    source: str | None = Field(default=None, alias="from")
    """Hub id or folder of any AutoModelForImageTextToText checkpoint."""
    vision: VisionConfig | None = None
    """Vision tower of a composed model."""
    connector: ConnectorConfig | None = None
    """What maps vision features into the language model of a composed model; always new. Default: an MLP."""
    language: LanguageConfig | None = None
    """Language model of a composed model."""
    tokens: TokensConfig = TokensConfig()
    """Tokens to add to the vocabulary."""

    @model_validator(mode="before")
    @classmethod
    def _fill_connector(cls, values: Any) -> Any:
        """Only where there is one, so that a recipe that was written with every default can be read again."""
        if isinstance(values, dict) and values.get("from") is None and values.get("connector") is None:
            return {**values, "connector": MlpConnectorConfig()}
        return values

    @model_validator(mode="after")
    def _check_parts(self) -> VlmConfig:
        parts = self.vision is not None, self.language is not None
        if self.source is not None and (any(parts) or self.connector is not None):
            raise ValueError("`from` is a whole model; leave out `vision`, `connector` and `language`")
        if self.source is None and not all(parts):
            raise ValueError("give `from` (a whole model), or both `vision` and `language` (a composed one)")
        return self


@dataclass(frozen=True)
class LoadedVlm:
    """A vision-language model with everything that belongs to its checkpoint."""

    model: PreTrainedModel
    """In evaluation mode, on the CPU."""
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    pictures: PictureProcessor
    components: Components
    template: str | None
    """Jinja chat template that is saved along; renders text and pictures of a message in order."""
    tokens: TokenRegistry
    """Ids of the tokens that were asked for; `new_ids` must be trained even where the rest is frozen."""
    source: str | None
    """Folder or hub id that processor files are copied from; None for a composed model."""


def load_vlm(config: VlmConfig, *, dtype: torch.dtype = torch.float32, chat_template: str | None = None) -> LoadedVlm:
    """Load an existing model or compose a new one (`LlavaForConditionalGeneration`) of a tower and a language model.

    New weights are drawn from torch's global random state. Vision parameters that the features never read (the final
    norm of CLIP and SigLIP, blocks behind the feature layer) cannot be trained: blocks are dropped, the rest become
    buffers; both are saved where transformers expects them.

    Args:
        chat_template: Jinja template to use instead of the language model's own. It may expect plain text messages:
            lists of parts are flattened for it, a picture becoming the picture placeholder.

    Raises:
        ModelError: a part cannot be loaded, or the parts do not fit together.
    """
    if config.source is not None:
        return _load_whole(config, dtype, chat_template)
    assert config.vision is not None and config.language is not None
    tower = load_vision_tower(config.vision, dtype, pooled=False)
    language = load_language_model(config.language, dtype)
    tokenizer = language.tokenizer
    special = [IMAGE_TOKEN] if tokenizer.pad_token_id is not None else [IMAGE_TOKEN, PAD_TOKEN]
    tokens = register_tokens(tokenizer, config.tokens, special)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = PAD_TOKEN
    assert config.connector is not None, "filled in where there is no `from`"
    model = _compose(config.connector, tower, language, tokens.ids[IMAGE_TOKEN], config.vision.feature_layer)
    tokens = replace(tokens, new_ids=grow_embeddings(model, tokenizer, tokens.new_ids))
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    template = chat_template or own
    template = None if template is None else flatten_parts(template, IMAGE_TOKEN)
    return _finish(model, tokenizer, tower.image_processor, template, tokens, None)


def save_vlm(loaded: LoadedVlm, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a folder that `AutoModelForImageTextToText` and `AutoProcessor` load without this package.

    Weights are safetensors. The processor of families whose processor class cannot be built here (it needs
    torchvision) is copied from the source.

    Args:
        state: full weights by the model's own names, where the model itself holds only a shard of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loaded.model.save_pretrained(folder, state_dict=None if state is None else dict(state))
    if loaded.source is not None:
        for name in PROCESSOR_FILES:
            found = cached_file(loaded.source, name, _raise_exceptions_for_missing_entries=False)
            if found is not None and Path(found).resolve() != (folder / name).resolve():
                shutil.copyfile(found, folder / name)
    if isinstance(loaded.model, LlavaForConditionalGeneration):
        _llava_processor(loaded).save_pretrained(folder)
    # Readers outside transformers look for preprocessor_config.json, which processors no longer write.
    loaded.image_processor.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _load_whole(config: VlmConfig, dtype: torch.dtype, chat_template: str | None) -> LoadedVlm:
    assert config.source is not None
    source = resolve_source(config.source)
    model = load_checkpoint(AutoModelForImageTextToText, source, dtype)
    check_plain_head(model.config)
    tokenizer = load_tokenizer(source)
    tokens = register_tokens(tokenizer, config.tokens)
    tokens = replace(tokens, new_ids=grow_embeddings(model, tokenizer, tokens.new_ids))
    if isinstance(model, LlavaForConditionalGeneration):
        if model.config.projector_hidden_act == "linear":
            restore_linear(model.model.multi_modal_projector)
        layer = model.config.vision_feature_layer
        if isinstance(layer, int):
            model.config.vision_feature_layer = _drop_blocks(model.model.vision_tower, layer)
    template = chat_template or _read_template(source, tokenizer)
    if chat_template is not None and isinstance(model, LlavaForConditionalGeneration):
        template = flatten_parts(chat_template, tokenizer.convert_ids_to_tokens(model.config.image_token_id))
    return _finish(model, tokenizer, load_image_processor(source), template, tokens, source)


def _finish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    template: str | None,
    tokens: TokenRegistry,
    source: str | None,
) -> LoadedVlm:
    if template is not None:
        tokenizer.chat_template = template
    components = find_components(model)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    _fix_unread(model, components, pictures)
    return LoadedVlm(model.eval(), tokenizer, image_processor, pictures, components, template, tokens, source)


def _compose(
    connector: ConnectorConfig, tower: VisionTower, language: TextTower, image_token_id: int, feature_layer: int | None
) -> LlavaForConditionalGeneration:
    vision = tower.model
    extra, patches = _count_extra_tokens(vision)
    layer = feature_layer if feature_layer is not None else (-2 if extra else -1)
    head = language.model.get_output_embeddings()
    text_config = language.model.config
    check_plain_head(text_config)
    inner = language.model.base_model
    _check_head(language.model, inner, head)
    if "embed_tokens" not in dict(inner.named_children()):
        # LlavaForConditionalGeneration can only tie an embedding of this name (GPT-2 calls it otherwise).
        text_config.tie_word_embeddings = False
        head.weight = nn.Parameter(head.weight.detach().clone())
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=patches,
        vision_feature_layer=_drop_blocks(vision, layer),
        vision_feature_select_strategy="default" if extra else "full",
        tie_word_embeddings=text_config.tie_word_embeddings,
        **connector.llava_fields(),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(inner.dtype)
    connector.initialise(projector)
    model.model.vision_tower = vision
    model.model.language_model = inner
    model.lm_head = head
    model.config.dtype = inner.dtype
    model.generation_config = GenerationConfig.from_model_config(text_config)
    if language.model.generation_config is not None:
        model.generation_config = language.model.generation_config
    return model


def _count_extra_tokens(vision: PreTrainedModel) -> tuple[int, int]:
    """Tokens in front of the patches (0 or 1), and the number of patches."""
    size, patch = vision.config.image_size, vision.config.patch_size
    patches = (size // patch) ** 2
    pixels = torch.zeros(1, vision.config.num_channels, size, size, dtype=vision.dtype)
    with torch.no_grad():
        extra = vision(pixels).last_hidden_state.shape[1] - patches
    if extra not in (0, 1):
        raise ModelError(
            f"{type(vision).__name__} makes {patches + extra} features of {patches} patches",
            remedy="use a tower with one feature a patch, with or without a class token in front (CLIP, SigLIP)",
        )
    return extra, patches


def _drop_blocks(vision: PreTrainedModel, feature_layer: int) -> int:
    """Drop the blocks behind `feature_layer`, which nothing reads, and return the layer's new number.

    Where the tower treats its last block's output in its own way, the blocks are put back.

    Raises:
        ModelError: there is no such layer.
    """
    blocks = find_blocks(vision)
    count = len(blocks)
    if not -count <= feature_layer <= count or feature_layer == 0:
        raise ModelError(f"feature layer {feature_layer} does not exist: the tower has {count} blocks")
    kept = feature_layer if feature_layer > 0 else count + 1 + feature_layer
    if kept == count:
        return feature_layer
    dropped = list(blocks[kept:])
    before = _layer_output(vision, kept)
    del blocks[kept:]
    vision.config.num_hidden_layers = kept
    if _is_close(_layer_output(vision, kept), before):
        return -1
    blocks.extend(dropped)
    vision.config.num_hidden_layers = count
    return feature_layer


@torch.no_grad()
def _layer_output(vision: PreTrainedModel, layer: int) -> Tensor:
    config = vision.config
    pixels = torch.linspace(-1, 1, config.num_channels * config.image_size**2, dtype=vision.dtype)
    pixels = pixels.view(1, config.num_channels, config.image_size, config.image_size)
    return vision(pixels, output_hidden_states=True).hidden_states[layer]


@torch.no_grad()
def _check_head(model: PreTrainedModel, inner: PreTrainedModel, head: nn.Module) -> None:
    """`LlavaForConditionalGeneration` computes `head(inner(...))`; a language model that does more cannot be held."""
    ids = torch.arange(4).unsqueeze(0)
    is_linear = isinstance(head, nn.Linear) and head.bias is None
    if (
        inner is model
        or not is_linear
        or not _is_close(
            head(inner(input_ids=ids, use_cache=False).last_hidden_state), model(input_ids=ids, use_cache=False).logits
        )
    ):
        raise ModelError(
            f"{type(model).__name__} does more than a linear head without bias after its last layer",
            remedy="LlavaForConditionalGeneration cannot hold it; use another language model",
        )


def _is_close(left: Tensor, right: Tensor) -> bool:
    """Equal but for rounding, which depends on where in memory the numbers lie."""
    tolerance = 1e-4 if left.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


def _fix_unread(model: PreTrainedModel, components: Components, pictures: PictureProcessor) -> None:
    """Turn vision parameters that no feature depends on into buffers: training would report them as unreached."""
    vision = component_parameters(components, "vision", model)
    pixels = pictures.pixels([Image.new("RGB", (32, 32), (96, 96, 96))])
    outputs = model.base_model.get_image_features(**model_inputs(pixels), return_dict=True)
    parts = [*outputs.pooler_output, *(part for level in outputs.get("deepstack_features") or () for part in level)]
    reached = reached_parameters(torch.stack([part.float().sum() for part in parts]).sum())
    for name, parameter in vision.items():
        if id(parameter) not in reached:
            fix_parameter(model, name)


def _llava_processor(loaded: LoadedVlm) -> LlavaProcessor:
    config = loaded.model.config
    return LlavaProcessor(
        image_processor=loaded.image_processor,
        tokenizer=loaded.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        # `default` drops the class token again, so the tower's own count goes in here.
        num_additional_image_tokens=1 if config.vision_feature_select_strategy == "default" else 0,
        image_token=loaded.tokenizer.convert_ids_to_tokens(config.image_token_id),
        chat_template=loaded.template,
    )


def _read_template(source: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template of a checkpoint: a file of its own (older processors: inside JSON), or the tokenizer's."""
    found = cached_file(source, "chat_template.jinja", _raise_exceptions_for_missing_entries=False)
    if found is not None:
        return Path(found).read_text(encoding="utf-8")
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
