"""The row of rollouts: several samples of one prompt with a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from benchmarks.models import IMAGE_TOKEN, VOCABULARY, build_model
from benchmarks.row import AS_RUN, Build, Row, Setting
from benchmarks.timing import Way
from triptych.models.generation import Prompt, generate

SAMPLES, NEW_TOKENS = 8, 32


def rollout_k8(setting: Setting) -> Row:
    """Both ways draw with the same seed, so their tokens are the same."""
    model = build_model(setting.scale, 196).to(setting.device).eval()
    generator = torch.Generator().manual_seed(1)
    question = torch.randint(5, VOCABULARY - 100, (24,), generator=generator)
    prompt = torch.cat([torch.tensor([1]), torch.full((196,), IMAGE_TOKEN), question])
    side = 14 * setting.scale.patch
    pixels = torch.randn(1, 3, side, side, generator=generator)
    pictures = _OnePicture(pixels)
    blank = Image.new("RGB", (side, side))

    def ours() -> Tensor:
        torch.manual_seed(0)
        with setting.autocast():
            answers = generate(
                model,
                [Prompt(prompt, (blank,))],
                pictures,
                max_new_tokens=NEW_TOKENS,
                stop_ids=(),
                temperature=1.0,
                samples=SAMPLES,
            )
        return torch.tensor(answers)

    def peer() -> Tensor:
        torch.manual_seed(0)
        ids = prompt.repeat(SAMPLES, 1).to(setting.device)
        with torch.no_grad(), setting.autocast():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels.repeat(SAMPLES, 1, 1, 1).to(setting.device),
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                pad_token_id=0,
            )
        return output[:, len(prompt) :].cpu()

    return Row(
        Way("ours", ours, model),
        Way("peer", peer, model),
        "transformers' generate, the prompt repeated for each sample",
        unit=f"seconds for {SAMPLES} samples of {NEW_TOKENS} tokens",
        peer_kind=AS_RUN,
        trains=False,
    )


ROWS: Mapping[str, Build] = {"rollout_k8": rollout_k8}


@dataclass(frozen=True)
class _OnePicture:
    """A picture processor with its result at hand: both ways get pixels without work."""

    prepared: Tensor
    placeholder: str = "<image>"

    def token_ids(self, width: int, height: int) -> list[int]:
        return [IMAGE_TOKEN] * 196

    def wanted_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def pixels(
        self, pictures: Sequence[Image.Image], sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, Tensor]:
        return {"pixel_values": self.prepared}
