"""Models and batches of the benchmarks: random weights, real shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from triptych.core.types import IGNORE, Branch, Example, ImageReference, Origin, Pair, TokenKind

VOCABULARY = 49152
IMAGE_TOKEN = 49151


@dataclass(frozen=True)
class Scale:
    """How large a benchmark is; tests use `TINY`."""

    language: dict[str, int]
    vision: dict[str, int]
    patch: int = 16
    pairs: int = 4096
    """Pictures and captions of a contrastive step."""
    pairs_together: int = 64
    """Those of a micro-batch."""


FULL = Scale(
    language={
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": VOCABULARY,
    },
    vision={"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
)
"""SmolLM2-135M behind a tower of 22 million parameters."""

SMOLLM2_360M = Scale(
    language={
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": VOCABULARY,
    },
    vision=FULL.vision,
)
LLAVA_7B = Scale(
    language={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
    },
    vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
)
SCALES: Mapping[str, Scale] = {"135m": FULL, "360m": SMOLLM2_360M, "7b": LLAVA_7B}
"""By name; the larger ones are for GPUs, and the largest only for rows that train few of its weights."""

TINY = Scale(
    language={
        "hidden_size": 36,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    },
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    pairs=40,
    pairs_together=16,
)


def build_model(scale: Scale, image_tokens: int) -> LlavaForConditionalGeneration:
    """A Llava whose pictures are `image_tokens` (a square number) tokens; everything trains."""
    side = round(image_tokens**0.5)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            **scale.vision, image_size=side * scale.patch, patch_size=scale.patch, vision_use_head=False
        ),
        text_config=LlamaConfig(**scale.language, tie_word_embeddings=True, max_position_embeddings=8192),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=image_tokens,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def make_example(
    number: int, picture: int, image_tokens: int, question: int, answers: Sequence[int], generator: torch.Generator
) -> Example:
    """A picture, a question of `question` tokens and answers of these many tokens; two answers are a pair.

    Args:
        picture: pictures of equal numbers are the same.
    """

    def draw(count: int) -> torch.Tensor:
        return torch.randint(5, VOCABULARY - 100, (count,), generator=generator)

    def branch(ids: torch.Tensor, kinds: torch.Tensor, is_learned: bool, images: tuple[int, ...] = ()) -> Branch:
        labels = ids.clone() if is_learned else torch.full_like(ids, IGNORE)
        return Branch(ids, labels, kinds.to(torch.uint8), torch.ones(len(ids)), images)

    image = torch.full((image_tokens,), IMAGE_TOKEN)
    ids = torch.cat([torch.tensor([1]), image, draw(question)])
    kinds = torch.full_like(ids, int(TokenKind.INSTRUCTION))
    kinds[1 : 1 + image_tokens] = int(TokenKind.IMAGE)
    return Example(
        trunk=branch(ids, kinds, False, (0,)),
        branches=tuple(branch(draw(count), torch.full((count,), int(TokenKind.RESPONSE)), True) for count in answers),
        images=(ImageReference(path=f"/{picture}", name=str(picture)),),
        image_sizes=((224, 224),),
        origin=Origin("random", number + 1),
        pairs=(Pair(0, 1),) if len(answers) == 2 else (),
    )
