"""Dual encoders: a vision tower and a text encoder whose outputs are compared by a scaled cosine.

A composed model is a `VisionTextDualEncoderModel`; existing `CLIPModel` and `SiglipModel` checkpoints are used as they
are. All three pool the text with the encoder's own pooler: for BERT-like encoders (MiniLM) the tanh layer on the first
token, not the mean over tokens that sentence-transformers uses, because no standard checkpoint holds a mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from triptych.core.config import Config
from triptych.core.errors import ModelError, Problem
from triptych.core.protocols import PictureProcessor
from triptych.core.types import Batch, Scores
from triptych.models.components import Components, check_coverage, find_layers, fixed_text_length
from triptych.models.connectors.initialise import initialise_linear
from triptych.models.picture_values import Size, SizedPixels
from triptych.models.towers import (
    TextConfig,
    VisionConfig,
    fix_parameter,
    load_checkpoint,
    load_image_processor,
    load_text_tower,
    load_tokenizer,
    load_vision_tower,
    resolve_source,
)
from triptych.models.tuning import eval_frozen

TEXTS_TOGETHER = 32
"""Captions embedded at a time; larger groups pad more, smaller ones make slower products."""
HEADS_FILE = "heads.safetensors"
"""Holds `logit_bias` where the model class has no place for it."""


class TemperatureConfig(Config):
    """The scale of the similarities, exp(logit_scale)."""

    init: float | None = Field(default=None, gt=0)
    """Temperature at the start, 1 / scale. None: that of the checkpoint, or 0.07 for a composed model (CLIP, Radford
    et al. 2021, arXiv 2103.00020)."""
    learnable: bool = True
    """False keeps it fixed: a buffer, saved and moved with the model."""
    max_scale: float = Field(default=100.0, gt=1)
    """Upper bound of the scale; the lower is 1."""


class DualEncoderConfig(Config):
    """A dual encoder: an existing checkpoint (`from`), or one composed of two towers."""

    source: str | None = Field(default=None, alias="from")
    """Hub id or folder of a CLIPModel, SiglipModel or VisionTextDualEncoderModel checkpoint."""
    vision: VisionConfig | None = None
    """Vision tower of a composed model."""
    text: TextConfig | None = None
    """Text encoder of a composed model."""
    projection_dim: int = Field(default=512, gt=0)
    """Width of the common space of a composed model."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Scale of the similarities."""
    bias_init: float | None = None
    """Start of the bias added to every logit, for the sigmoid loss (SigLIP uses -10, Zhai et al. 2023, arXiv
    2303.15343). None: the checkpoint's own, or no bias."""

    @model_validator(mode="after")
    def _check_parts(self) -> DualEncoderConfig:
        if self.source is not None and (self.vision or self.text or "projection_dim" in self.model_fields_set):
            raise ValueError("`from` is a whole model; leave out `vision`, `text` and `projection_dim`")
        if self.source is None and (self.vision is None or self.text is None):
            raise ValueError("give `from` (a whole model), or both `vision` and `text` (a composed one)")
        if self.vision is not None and self.vision.feature_layer is not None:
            raise ValueError("`feature_layer` is for language models; a dual encoder reads the pooled output")
        return self


@dataclass(frozen=True)
class LoadedDualEncoder:
    """A dual encoder with everything that belongs to its checkpoint."""

    model: PreTrainedModel
    """In evaluation mode, on the CPU; `logit_scale` in float32, and `logit_bias` where there is one."""
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    pictures: PictureProcessor
    components: Components
    """`vision`, `text`, `projection` (composed models and CLIP) and, if it is trained, `temperature`."""
    max_scale: float
    max_text_tokens: int
    """Longest caption the text encoder takes, in tokens."""


class DualPictures:
    """The picture side of a dual encoder: pixels of one size, and no place in the text."""

    def __init__(self, image_processor: Any) -> None:
        self._sized = SizedPixels(image_processor)

    @property
    def placeholder(self) -> str:
        """Empty: captions do not mention their picture."""
        return ""

    def token_ids(self, width: int, height: int) -> list[int]:
        """No tokens."""
        return []

    def wanted_size(self, width: int, height: int) -> Size:
        """Before a centre crop, if there is one."""
        return self._sized.wanted_size(width, height)

    def pixels(self, pictures: Sequence[Image.Image], sizes: Sequence[Size] | None = None) -> dict[str, Tensor]:
        """`pixel_values` [N, channels, height, width] of N RGB pictures."""
        return self._sized.pixels(pictures, sizes)


class DualEncoderScorer(nn.Module):
    """Embeds one picture and one caption a row.

    The scale is bounded by moving the *parameter* back to [0, ln max_scale] before it is used: the clamp after each
    optimizer step of CLIP and open_clip. Within a window the parameter does not change, so every use sees one value,
    and its gradient is the loss's true derivative there, also on the bound. Clamping the value instead would make the
    gradient zero beyond the bound, and the parameter could never come back.
    """

    def __init__(self, hf: PreTrainedModel, components: Components, max_scale: float = 100.0) -> None:
        super().__init__()
        self.hf = hf
        self.components = components
        self.max_scale = max_scale
        text = hf.config.text_config
        self.text_length = fixed_text_length(text)
        self.pad_token_id = text.pad_token_id or 0

    def forward(self, batch: Batch) -> Scores:
        """Score a batch whose pixels are attached.

        Returns:
            `image_embeddings` and `text_embeddings` [R, D], not normalised, `logit_scale` 0-d and, where the model has
            one, `logit_bias` 0-d; in float32, or float64 for a float64 model.

        Raises:
            ModelError: a row does not have exactly one picture, pixels are missing, or a caption is too long.
        """
        _check_pictures(batch)
        assert batch.pixels is not None
        images = self.embed_images(batch.pixels)
        rows = torch.tensor([row[0] for row in batch.row_images], device=images.device)
        # As pictures, equal captions are embedded once; their gradients add up in the gather. `text_keys` are ids of
        # captions, so this needs no look at the tokens. With dropout each would have a mask of its own.
        firsts, caption = _first_of_each(batch.text_keys)
        if self.hf.text_model.training:
            firsts = caption = torch.arange(batch.num_rows, device=images.device)
        texts = self._embed_by_length(batch.input_ids[firsts], batch.attention_mask[firsts])
        scale, bias = self.scale_and_bias()
        return Scores(
            image_embeddings=images[rows],
            text_embeddings=texts[caption],
            logit_scale=scale,
            logit_bias=bias,
        )

    def train(self, mode: bool = True) -> DualEncoderScorer:
        """Switch modes; parts whose parameters are all frozen stay in evaluation mode. Call again after freezing."""
        super().train(mode)
        if mode:
            eval_frozen(self.hf, self.components)
        return self

    def embed_images(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Embeddings [N, D], float32 or float64, of N pictures, each computed once however many captions it has."""
        return _at_least_float32(self.hf.get_image_features(**pixels, return_dict=True).pooler_output)

    def _embed_by_length(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As `embed_texts`, captions of like length together, so that little padding is computed.

        Sharded ranks gather weights at every call and may hold different numbers of captions, so they make one call.
        """
        if any(isinstance(parameter, DTensor) for parameter in self.hf.text_model.parameters()):
            return self.embed_texts(input_ids, attention_mask)
        lengths = attention_mask.sum(dim=1)
        order = torch.argsort(lengths, stable=True)
        parts = []
        for chosen in order.split(TEXTS_TOGETHER):
            length = int(lengths[chosen[-1]])
            parts.append(self.embed_texts(input_ids[chosen, :length], attention_mask[chosen, :length]))
        return torch.cat(parts)[torch.argsort(order)]

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [R, D], float32 or float64, of right-padded captions, `input_ids` and `attention_mask` [R, L].

        Raises:
            ModelError: a caption is longer than the text encoder takes.
        """
        rows, length = input_ids.shape
        limit = self.hf.config.text_config.max_position_embeddings
        if length > limit:
            raise ModelError(
                f"a caption has {length} tokens, the text encoder takes {limit}", remedy="cut captions when tokenising"
            )
        if self.text_length is None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        else:
            padded = input_ids.new_full((rows, self.text_length), self.pad_token_id)
            padded[:, :length] = torch.where(attention_mask.bool(), input_ids, self.pad_token_id)
            inputs = {"input_ids": padded}
        return _at_least_float32(self.hf.get_text_features(**inputs, return_dict=True).pooler_output)

    def scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The bounded scale exp(logit_scale), and the bias or None; 0-d, float32 or float64."""
        bound_scale(self.hf, self.max_scale)
        bias = _bias(self.hf)
        scale = _at_least_float32(self.hf.logit_scale).reshape(()).exp()
        return scale, None if bias is None else _at_least_float32(bias).reshape(())


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is too coarse to rank similarities by; float64 models stay exact."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def bound_scale(model: PreTrainedModel, max_scale: float) -> None:
    """Move `logit_scale` back into [0, ln max_scale]; without effect where it is inside."""
    # Through `.data`, so that a graph made earlier in the window stays valid: the value is the same.
    model.logit_scale.data.clamp_(0.0, math.log(max_scale))


def load_dual_encoder(config: DualEncoderConfig, *, dtype: torch.dtype = torch.float32) -> LoadedDualEncoder:
    """Load an existing dual encoder or compose one of two towers; new weights use torch's global random state.

    Raises:
        ModelError: a part cannot be loaded, or the parts do not fit together.
    """
    if config.source is not None:
        source = resolve_source(config.source)
        model = load_checkpoint(AutoModel, source, dtype)
        _check_class(model, source)
        tokenizer, image_processor = load_tokenizer(source), load_image_processor(source)
        bias = _saved_bias(source) if config.bias_init is None else config.bias_init
    else:
        assert config.vision is not None and config.text is not None
        tower = load_vision_tower(config.vision, dtype, pooled=True)
        text = load_text_tower(config.text, dtype)
        model = _compose(tower.model, text.model, config)
        tokenizer, image_processor, bias = text.tokenizer, tower.image_processor, config.bias_init
    _set_scalars(model, config.temperature, bias)
    return LoadedDualEncoder(
        model=model.eval(),
        tokenizer=tokenizer,
        image_processor=image_processor,
        pictures=DualPictures(image_processor),
        components=find_dual_components(model),
        max_scale=config.temperature.max_scale,
        max_text_tokens=model.config.text_config.max_position_embeddings,
    )


def _first_of_each(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(first row of each different key, for every row the number of its key); both int64."""
    unique, member = torch.unique(keys, return_inverse=True)
    firsts = torch.full_like(unique, len(keys)).scatter_reduce(
        0, member, torch.arange(len(keys), device=keys.device), "amin"
    )
    return firsts, member


def save_dual_encoder(loaded: LoadedDualEncoder, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a folder that `AutoModel` and `AutoProcessor` load without this package, and `vision: {from: ...}` too.

    A bias that the model class has no place for goes into `heads.safetensors`; it changes no ranking.

    Args:
        state: full weights by the model's own names, where the model itself holds only a shard of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = loaded.model
    bound_scale(model, loaded.max_scale)
    weights = dict(model.state_dict() if state is None else state)
    if isinstance(model, VisionTextDualEncoderModel) and "logit_bias" in weights:
        save_file({"logit_bias": weights.pop("logit_bias").contiguous()}, folder / HEADS_FILE)
    model.save_pretrained(folder, state_dict=weights)
    processor_class = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model.config.model_type])
    processor_class(image_processor=loaded.image_processor, tokenizer=loaded.tokenizer).save_pretrained(folder)
    # Readers outside transformers look for preprocessor_config.json, which processors no longer write.
    loaded.image_processor.save_pretrained(folder)


def find_dual_components(model: PreTrainedModel) -> Components:
    """Locate the towers, projections and scalars of a dual encoder.

    Raises:
        ModelError: a parameter belongs to no part.
    """
    children = dict(model.named_children())
    scalars = dict(model.named_parameters(recurse=False))
    modules: dict[str, tuple[str, ...]] = {"vision": ("vision_model",), "text": ("text_model",)}
    projections = tuple(name for name in ("visual_projection", "text_projection") if name in children)
    temperature = tuple(name for name in ("logit_scale", "logit_bias") if name in scalars)
    if projections:
        modules["projection"] = projections
    if temperature:
        modules["temperature"] = temperature
    embedding = model.text_model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    layers = {name: find_layers(model, modules[name]) for name in ("vision", "text")}
    components = Components(modules, layers, embeddings=path, head=None, image_token_id=None)
    check_coverage(components, model)
    return components


def _compose(vision: PreTrainedModel, text: PreTrainedModel, config: DualEncoderConfig) -> VisionTextDualEncoderModel:
    own = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config,
        text.config,
        projection_dim=config.projection_dim,
        logit_scale_init_value=math.log(1 / (config.temperature.init or 0.07)),
    )
    model = VisionTextDualEncoderModel(config=own, vision_model=vision, text_model=text)
    for projection in (model.visual_projection, model.text_projection):
        initialise_linear(projection)
        projection.to(vision.dtype)
    model.config.dtype = vision.dtype
    _check_pooled(model)
    return model


@torch.no_grad()
def _check_pooled(model: VisionTextDualEncoderModel) -> None:
    size, channels = model.config.vision_config.image_size, model.config.vision_config.num_channels
    pixels = torch.zeros(1, channels, size, size, dtype=model.vision_model.dtype)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    problems = [
        Problem(
            f"{type(tower).__name__} has no pooled output", remedy="use a tower with a pooler, such as SigLIP or BERT"
        )
        for tower, value in ((model.vision_model, pixels), (model.text_model, ids))
        if tower(value, return_dict=True).get("pooler_output") is None
    ]
    if problems:
        raise ModelError(problems)


def _check_class(model: PreTrainedModel, source: str) -> None:
    children = dict(model.named_children())
    scalars = {*dict(model.named_parameters(recurse=False))}
    if not {"vision_model", "text_model"} <= children.keys() or "logit_scale" not in scalars:
        raise ModelError(
            f"{source} holds a {type(model).__name__}, which is no dual encoder",
            remedy="give a CLIPModel, SiglipModel or VisionTextDualEncoderModel checkpoint, or `vision` and `text`",
        )


def _set_scalars(model: PreTrainedModel, temperature: TemperatureConfig, bias: float | None) -> None:
    """Keep scale and bias in float32 at least (bfloat16 steps near 4.6 are 0.03 wide) and give them their start."""
    model.logit_scale = nn.Parameter(_at_least_float32(model.logit_scale.detach()))
    if temperature.init is not None:
        model.logit_scale.data.fill_(math.log(1 / temperature.init))
    own = _bias(model)
    if own is not None:
        model.logit_bias = nn.Parameter(_at_least_float32(own.detach()))
        if bias is not None:
            model.logit_bias.data.fill_(bias)
    elif bias is not None:
        model.register_parameter("logit_bias", nn.Parameter(torch.tensor(bias)))
    if not temperature.learnable:
        fix_parameter(model, "logit_scale")


def _bias(model: PreTrainedModel) -> nn.Parameter | None:
    return dict(model.named_parameters(recurse=False)).get("logit_bias")


def _saved_bias(source: str) -> float | None:
    path = Path(source) / HEADS_FILE
    return float(load_file(path)["logit_bias"]) if path.is_file() else None


def _check_pictures(batch: Batch) -> None:
    problems = [
        Problem(
            f"sample {batch.origins[row]} has {len(images)} pictures; a dual encoder needs exactly one a row",
            remedy="use captions with one picture each",
        )
        for row, images in enumerate(batch.row_images)
        if len(images) != 1
    ]
    if not problems and batch.pixels is None:
        problems.append(Problem("the batch has no pixels", remedy="call the source's attach first"))
    if problems:
        raise ModelError(problems)
