"""`make bench`: Triptych's step against the plain way, in turns, in one process; medians and ratios.

Writes `benchmarks/results/latest.json`: {"machine", "rows": [{"name", "ours", "peer", "unit", "peer_name", "ratio",
"n"}]}; a ratio above 1 means that we are faster.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from triptych.core.types import IGNORE, Batch, ImageReference, Origin
from triptych.models.components import find_components
from triptych.models.vlm import VlmScorer

REPEATS = 5
ROWS, IMAGE_TOKENS, ANSWER = 4, 196, 32


def main() -> None:
    """Run the comparison and write the file."""
    torch.manual_seed(0)
    model = build_model()
    batch = build_batch()
    scorer = VlmScorer(model, find_components(model))
    scorer.train()

    def ours() -> Tensor:
        logprobs = scorer(batch).token_logprobs
        assert logprobs is not None
        return -logprobs.mean()

    def peer() -> Tensor:
        assert batch.pixels is not None
        loss = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            pixel_values=batch.pixels["pixel_values"],
            use_cache=False,
        ).loss
        assert isinstance(loss, Tensor)
        return loss

    difference = abs(ours().item() - peer().item())
    assert difference < 0.02, f"the two losses differ by {difference} in bf16"
    seconds = interleave(model, {"ours": ours, "peer": peer})
    row = {
        "name": "sft_full_196_plain",
        "ours": seconds["ours"],
        "peer": seconds["peer"],
        "unit": "seconds per forward and backward",
        "peer_name": "the same model with `labels=`: full logits, attention mask, bf16 autocast",
        "ratio": seconds["peer"] / seconds["ours"],
        "n": REPEATS,
    }
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "rows": [row],
    }
    path = Path(__file__).parent / "results" / "latest.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def build_model() -> LlavaForConditionalGeneration:
    """A 22M tower, an MLP and the SmolLM2-135M architecture with random weights; the tower is frozen."""
    vision = SiglipVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=224,
        patch_size=16,
    )
    language = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=49151,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model


def build_batch() -> Batch:
    """Rows of one picture, a question and answers of uneven length."""
    lengths = [IMAGE_TOKENS + 24 + ANSWER - 8 * row for row in range(ROWS)]
    input_ids = torch.zeros(ROWS, max(lengths), dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(5, 49000, (length,))
        input_ids[row, 2 : 2 + IMAGE_TOKENS] = 49151
        answer = ANSWER - 8 * row
        labels[row, length - answer : length] = input_ids[row, length - answer : length]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        weights=(labels != IGNORE).float(),
        kinds=torch.zeros_like(input_ids, dtype=torch.uint8),
        lengths=torch.tensor(lengths),
        example_index=torch.arange(ROWS),
        tree_index=torch.arange(ROWS),
        trunk_lengths=torch.tensor(lengths),
        images=tuple(ImageReference(name=str(row)) for row in range(ROWS)),
        row_images=tuple((row,) for row in range(ROWS)),
        origins=tuple(Origin("random", row + 1) for row in range(ROWS)),
        tasks=("",) * ROWS,
        pairs=torch.zeros(0, 2, dtype=torch.int64),
        pair_weights=torch.zeros(0),
        text_keys=torch.zeros(ROWS, dtype=torch.int64),
        pixels={"pixel_values": torch.randn(ROWS, 3, 224, 224)},
    )


def interleave(model: nn.Module, ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median seconds of forward and backward of each way, taken in turns after one warm-up turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(REPEATS + 1):
        for name, loss in ways.items():
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss()
            value.backward()
            if turn:
                times[name].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
