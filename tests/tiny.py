"""Tiny random models of every supported family, built from configuration classes: no download, no real weights.

Names of families are Hugging Face's own `model_type`s. Pictures are 32 pixels wide for the fixed-size families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from triptych.core.protocols import PictureProcessor
from triptych.core.types import IGNORE, Batch, ImageReference, Origin, TokenKind

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "internvl", "gemma3")

IMAGE_TOKENS = {
    "llava": "<image>",
    "llava_clip": "<image>",
    "qwen2_5_vl": "<|image_pad|>",
    "qwen3_vl": "<|image_pad|>",
    "smolvlm": "<image>",
    "idefics3": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3": "<image_soft_token>",
}

_EXTRA_TOKENS = {
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}

_SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_turn>",
    "<end_of_turn>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)

HIDDEN = 32
VOCABULARY = 384
"""Default vocabulary of every tiny model: 256 bytes, the special tokens, and spare rows."""


def tiny_tokenizer(family: str = "llava", merges: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte) with the special tokens of all families; fewer than 384 ids.

    Args:
        family: decides `tokenizer.image_token` and the family's other named tokens.
        merges: 0, or 1 to merge `\\n\\n` into one token as most real tokenizers do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    pairs = [("Ċ", "Ċ")][:merges]
    for left, right in pairs:
        vocabulary[left + right] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(_SPECIAL_TOKENS))
    named = {"image_token": IMAGE_TOKENS.get(family, "<image>"), **_EXTRA_TOKENS.get(family, {})}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )


@cache
def token_id(token: str) -> int:
    """Id of a special token, equal in the tokenizers of all families (without merges)."""
    index = tiny_tokenizer().convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def tiny_family(
    name: str, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY, seed: int = 0, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Any]:
    """A tiny random model of a family, its tokenizer and its image processor; the model is in evaluation mode.

    Args:
        name: one of `FAMILIES`, or `llava_clip` (a class token, `default` selection, second to last layer).
        vocabulary: rows of the embedding; at least `len(tokenizer)`.
        changes: fields of the language configuration to override, e.g. `num_hidden_layers=4`.
    """
    build, processor = _BUILDERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomise(build(vocabulary, changes)).to(dtype).eval()
    return model, tiny_tokenizer(name), processor()


def randomise(model: PreTrainedModel, std: float = 0.15) -> PreTrainedModel:
    """Redraw every parameter so that attention and norms matter; the usual 0.02 makes a tiny model almost linear."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class DoubleThroughout(TorchFunctionMode):
    """Inside, float64 stays float64 where a model's norms would go down to float32 and back, whatever its dtype."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        narrows = function is torch.Tensor.float or (
            function is torch.Tensor.to and torch.float32 in (*arguments[1:], *options.values())
        )
        if narrows and arguments[0].dtype == torch.float64:
            return arguments[0]
        return function(*arguments, **options)


def _text(vocabulary: int, changes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": token_id("<s>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<pad>"),
    }
    return {**base, **fields, **changes}


def _vision(**fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return {**base, **fields}


def _llava(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=LlamaConfig(**_text(vocabulary, changes)),
        image_token_index=token_id("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def _llava_clip(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text(vocabulary, changes)),
        image_token_index=token_id("<image>"),
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config)


def _qwen2_5_vl(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "window_size": 32,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=_text(vocabulary, changes, rope_parameters=rope), **_qwen_tokens()
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config=_text(vocabulary, changes, head_dim=16, rope_parameters=rope),
        **_qwen_tokens(),
    )
    return Qwen3VLForConditionalGeneration(config)


def _qwen_tokens() -> dict[str, int]:
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }


def _smolvlm(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    config = SmolVLMConfig(
        vision_config=_vision(),
        text_config=LlamaConfig(**_text(vocabulary, changes)),
        image_token_id=token_id("<image>"),
        scale_factor=2,
    )
    return SmolVLMForConditionalGeneration(config)


def _idefics3(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    config = Idefics3Config(
        vision_config=_vision(),
        text_config=LlamaConfig(**_text(vocabulary, changes)),
        image_token_id=token_id("<image>"),
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration(config)


def _internvl(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**_vision()),
        text_config=Qwen2Config(**_text(vocabulary, changes)),
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return InternVLForConditionalGeneration(config)


def _gemma3(vocabulary: int, changes: dict[str, Any]) -> PreTrainedModel:
    text = _text(
        vocabulary,
        changes,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (changes.get("num_hidden_layers", 2) // 2),
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=Gemma3TextConfig(**text),
        mm_tokens_per_image=4,
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        image_token_index=token_id("<image_soft_token>"),
    )
    return Gemma3ForConditionalGeneration(config)


def tiny_siglip_processor(size: int = 32) -> SiglipImageProcessorPil:
    """Resizes every picture to a square of `size` pixels."""
    return SiglipImageProcessorPil(size={"height": size, "width": size})


def tiny_clip_processor(size: int = 32) -> CLIPImageProcessorPil:
    """Resizes the short edge to `size` pixels and crops the centre."""
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _qwen_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )


def _smolvlm_processor() -> SmolVLMImageProcessorPil:
    return SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})


def _idefics3_processor() -> Idefics3ImageProcessorPil:
    return Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})


def _internvl_processor() -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )


def _gemma3_processor() -> Gemma3ImageProcessorPil:
    return Gemma3ImageProcessorPil(size={"height": 32, "width": 32})


_BUILDERS: dict[str, tuple[Any, Any]] = {
    "llava": (_llava, tiny_siglip_processor),
    "llava_clip": (_llava_clip, tiny_clip_processor),
    "qwen2_5_vl": (_qwen2_5_vl, _qwen_processor),
    "qwen3_vl": (_qwen3_vl, _qwen_processor),
    "smolvlm": (_smolvlm, _smolvlm_processor),
    "idefics3": (_idefics3, _idefics3_processor),
    "internvl": (_internvl, _internvl_processor),
    "gemma3": (_gemma3, _gemma3_processor),
}


def tiny_llama(vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """A tiny text-only causal language model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomise(LlamaForCausalLM(LlamaConfig(**_text(vocabulary, {})))).to(dtype).eval()
    assert isinstance(model, LlamaForCausalLM)
    return model


def tiny_clip(
    dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY, seed: int = 0
) -> tuple[CLIPModel, PreTrainedTokenizerFast, CLIPImageProcessorPil]:
    """A tiny CLIP dual encoder (the text side pools at the end-of-sequence token), tokenizer and image processor."""
    text = _text(vocabulary, {})
    del text["num_key_value_heads"]
    config = CLIPConfig(
        text_config=CLIPTextConfig(**{**text, "max_position_embeddings": 64}).to_dict(),
        vision_config=CLIPVisionConfig(**_vision()).to_dict(),
        projection_dim=16,
    )
    return _dual(CLIPModel, config, dtype, seed), tiny_tokenizer(), tiny_clip_processor()


def tiny_siglip(
    dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY, seed: int = 0
) -> tuple[SiglipModel, PreTrainedTokenizerFast, SiglipImageProcessorPil]:
    """A tiny SigLIP dual encoder (the text side pools at the last position), tokenizer and image processor."""
    text = _text(vocabulary, {})
    del text["num_key_value_heads"]
    config = SiglipConfig(
        text_config=SiglipTextConfig(**{**text, "max_position_embeddings": 64}).to_dict(),
        vision_config=SiglipVisionConfig(**_vision()).to_dict(),
    )
    return _dual(SiglipModel, config, dtype, seed), tiny_tokenizer(), tiny_siglip_processor()


def _dual(kind: type[nn.Module], config: Any, dtype: torch.dtype, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        scalars = {name: value.clone() for name, value in model.named_parameters() if value.numel() == 1}
        randomise(model)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, value in scalars.items():
                model.get_parameter(name).copy_(value)
    return model.to(dtype).eval()


def noise(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@dataclass(frozen=True)
class Answer:
    """Supervised text."""

    text: str


Row = Sequence[str | Answer | Image.Image]
"""Prompt text, supervised text and pictures in order."""


def batch_of(rows: Sequence[Row], tokenizer: Any, pictures: PictureProcessor) -> Batch:
    """A batch with pixels attached; a picture object used twice is one picture of the batch."""
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    row_images: list[tuple[int, ...]] = []
    unique: list[Image.Image] = []
    for row in rows:
        ids.append([])
        labels.append([])
        images = []
        for part in row:
            if isinstance(part, Image.Image):
                new = pictures.token_ids(*part.size)
                known = next((index for index, item in enumerate(unique) if item is part), None)
                if known is None:
                    known = len(unique)
                    unique.append(part)
                images.append(known)
            else:
                new = tokenizer.encode(part.text if isinstance(part, Answer) else part, add_special_tokens=False)
            ids[-1] += new
            labels[-1] += new if isinstance(part, Answer) else [IGNORE] * len(new)
        row_images.append(tuple(images))
    count, longest = len(rows), max(len(row) for row in ids)
    label_tensor = torch.tensor([row + [IGNORE] * (longest - len(row)) for row in labels])
    return Batch(
        input_ids=torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
        labels=label_tensor,
        weights=(label_tensor != IGNORE).float(),
        kinds=torch.where(label_tensor != IGNORE, int(TokenKind.RESPONSE), int(TokenKind.INSTRUCTION)).to(torch.uint8),
        lengths=torch.tensor([len(row) for row in ids]),
        example_index=torch.arange(count),
        tree_index=torch.arange(count),
        trunk_lengths=torch.ones(count, dtype=torch.int64),
        images=tuple(ImageReference(path=f"/{index}.png", name=f"{index}.png") for index in range(len(unique))),
        row_images=tuple(row_images),
        origins=tuple(Origin("tiny.json", line) for line in range(1, count + 1)),
        tasks=("",) * count,
        pairs=torch.zeros(0, 2, dtype=torch.int64),
        pair_weights=torch.zeros(0),
        text_keys=torch.arange(count),
        pixels=pictures.pixels(unique) if unique else None,
    )


Tree = tuple[Row, Sequence[Row]]
"""What all branches share, and what each adds."""


def tree_batch(trees: Sequence[Tree], tokenizer: Any, pictures: PictureProcessor) -> Batch:
    """A batch of trees, expanded to rows as `collate` does, pixels attached."""
    rows = [(*trunk, *branch) for trunk, branches in trees for branch in branches]
    numbers = [number for number, (_, branches) in enumerate(trees) for _ in branches]
    trunks = [int(batch_of([trunk], tokenizer, pictures).lengths[0]) for trunk, _ in trees]
    return replace(
        batch_of(rows, tokenizer, pictures),
        example_index=torch.tensor(numbers),
        tree_index=torch.tensor(numbers),
        trunk_lengths=torch.tensor([trunks[number] for number in numbers]),
        origins=tuple(Origin("trees.json", number + 1) for number in numbers),
    )


def as_trees(batch: Batch) -> Batch:
    """The rows of each example as one tree whose trunk is what stands before the first label."""
    first = batch.supervised.int().argmax(1)
    trunks = [int(first[batch.example_index == number].min()) for number in batch.example_index.tolist()]
    return replace(batch, tree_index=batch.example_index, trunk_lengths=torch.tensor(trunks))
