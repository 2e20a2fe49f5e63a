"""The row of contrastive training: a step over thousands of pairs at the memory of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from benchmarks.row import Build, Row, Setting
from benchmarks.rows import training_way
from benchmarks.timing import Way
from triptych.core.types import IGNORE, Batch, ImageReference, Origin, Progress, TokenKind, Window
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.engine.step import run_window
from triptych.models.dual_encoder import DualEncoderScorer, find_dual_components
from triptych.objectives.contrastive import ContrastiveConfig, ContrastiveObjective

IMAGE_SIZE, PATCH = 64, 16
CAPTION_TOKENS = (4, 16)
"""Shortest and longest caption."""
WORDS = 8192
"""Vocabulary; the last id ends a caption."""
TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 3}
"""Of either side: small, so that the naive step of all pairs fits into 8 GiB and takes seconds."""


def contrastive_4096(setting: Setting) -> Row:
    """One step of the window objective, against a graph of all pairs at once."""
    model = _build_model().to(setting.device)
    batches, pixels = _draw_pairs(setting.scale.pairs, setting.scale.pairs_together)
    batches, pixels = tuple(batch.to(setting.device) for batch in batches), pixels.to(setting.device)
    scorer = DualEncoderScorer(model, find_dual_components(model)).train()
    objective = ContrastiveObjective(ContrastiveConfig())
    runtime = Runtime(RuntimeConfig(precision="bf16" if setting.bf16 else "fp32"))
    window, source = Window(0, 0.0, batches), _Pixels(pixels)

    def cached() -> Tensor:
        return torch.tensor(run_window(scorer, objective, window, source, None, runtime, Progress(0, 1)).loss)

    ids = torch.cat([batch.input_ids for batch in batches])
    mask = torch.cat([batch.attention_mask for batch in batches])
    return Row(
        Way("ours", cached, model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)),
        training_way("peer", model, setting, lambda: _naive(model, ids, mask, pixels)),
        f"the naive step: all {len(ids):,} pairs in one graph",
    )


ROWS: Mapping[str, Build] = {"contrastive_4096": contrastive_4096}


@dataclass(frozen=True)
class _Pixels:
    """A source that holds all pictures of the window already; a picture's path is its number."""

    pixels: Tensor

    @property
    def total_windows(self) -> int | None:
        return 1

    def windows(self) -> Iterator[Window]:
        raise NotImplementedError("the window is handed to the step")

    def attach(self, batch: Batch) -> Batch:
        start = int(batch.images[0].name)
        return replace(batch, pixels={"pixel_values": self.pixels[start : start + len(batch.images)]})

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nothing adapts."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def _naive(model: CLIPModel, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
    """The symmetric loss as CLIP's paper writes it (arXiv 2103.00020, figure 3)."""
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
    texts = F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output.float(), dim=-1)
    with torch.autocast(ids.device.type, enabled=False):
        logits = model.logit_scale.exp() * images @ texts.T
    targets = torch.arange(len(ids), device=ids.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _build_model() -> CLIPModel:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        **TOWER,
        vocab_size=WORDS,
        max_position_embeddings=CAPTION_TOKENS[1],
        bos_token_id=1,
        eos_token_id=WORDS - 1,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(**TOWER, image_size=IMAGE_SIZE, patch_size=PATCH)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def _draw_pairs(count: int, together: int) -> tuple[tuple[Batch, ...], Tensor]:
    """Micro-batches without pixels, all padded to one length so that they can be joined, and the pixels of all."""
    generator = torch.Generator().manual_seed(1)
    shortest, longest = CAPTION_TOKENS
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    ids = torch.randint(2, WORDS - 1, (count, longest), generator=generator)
    columns = torch.arange(longest)
    ids = torch.where(columns < lengths[:, None] - 1, ids, 0).scatter(1, lengths[:, None] - 1, WORDS - 1)
    numbers = torch.arange(count)
    batches = tuple(_batch(part, ids[part], lengths[part]) for part in numbers.split(together))
    return batches, torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def _batch(numbers: Tensor, ids: Tensor, lengths: Tensor) -> Batch:
    rows, columns = ids.shape
    kinds = torch.where(torch.arange(columns) < lengths[:, None], int(TokenKind.RESPONSE), int(TokenKind.PADDING))
    names = [str(number) for number in numbers.tolist()]
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        weights=torch.zeros(rows, columns),
        kinds=kinds.to(torch.uint8),
        lengths=lengths,
        example_index=torch.arange(rows),
        tree_index=torch.arange(rows),
        trunk_lengths=torch.zeros_like(lengths),
        images=tuple(ImageReference(path=f"/{name}", name=name) for name in names),
        row_images=tuple((row,) for row in range(rows)),
        origins=tuple(Origin("random", int(name) + 1) for name in names),
        tasks=("",) * rows,
        pairs=torch.zeros(0, 2, dtype=torch.int64),
        pair_weights=torch.zeros(0),
        text_keys=numbers + 1,
    )
