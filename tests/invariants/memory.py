"""Peak memory of one contrastive step, measured in a process of its own.

Started as `python -m tests.invariants.memory <tower> <pairs> <folder>`; prints the bytes that the step added at its
peak.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.invariants.toys import runtime
from tests.tiny import noise, tiny_tokenizer
from triptych.core.types import ImageReference, Message, Origin, Progress, Sample, Text
from triptych.data.images import resolve_image
from triptych.data.loader import Loader, LoaderConfig
from triptych.data.mixture import Mixture
from triptych.data.tokenize import CaptionEncoder
from triptych.engine.memory import PeakMemory
from triptych.engine.step import run_window
from triptych.models.dual_encoder import DualEncoderConfig, DualEncoderScorer, LoadedDualEncoder, load_dual_encoder
from triptych.objectives.contrastive import ContrastiveConfig, ContrastiveObjective

MICRO_BATCH = 64
PICTURES = 64
TOWERS = {
    "recipe": {  # that of recipes/cc12m_contrastive.yaml
        "model_type": "siglip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 16,
    },
    "small": {  # so cheap that everything kept for each pair shows
        "model_type": "siglip_vision_model",
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    },
}
TEXT = {
    "model_type": "bert",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


class Pairs:
    """Captions of pictures on disk; row by row, as a data set reads them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def origin(self, index: int) -> Origin:
        return Origin("pairs.csv", index + 1)

    def fingerprint(self) -> dict[str, str]:
        return {}

    def sample(self, index: int) -> Sample:
        picture: ImageReference = resolve_image(self.folder, f"{index % PICTURES}.png")
        turns = Message("user", (picture,)), Message("assistant", (Text(f"picture {index}"),))
        return Sample(turns, self.origin(index))


def step(loaded: LoadedDualEncoder, scorer: DualEncoderScorer, folder: Path, pairs: int) -> float:
    """One window through the real loader, without the update."""
    dataset = Pairs(folder, pairs)
    encoder = CaptionEncoder(loaded.tokenizer, 24)
    config = LoaderConfig(global_batch=pairs, micro_batch=MICRO_BATCH, steps=1)
    loader = Loader([dataset], Mixture([pairs], [None], 0), encoder.encode, loaded.pictures, config)
    (window,) = loader.windows()
    objective = ContrastiveObjective(ContrastiveConfig(loss="clip"))
    result = run_window(scorer, objective, window, loader, None, runtime(), Progress(0, 1))
    assert result.samples == pairs
    scorer.zero_grad(set_to_none=True)
    return result.loss


def main(tower: str, pairs: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for number in range(PICTURES):
        noise(96, 96, seed=number).save(folder / f"{number}.png")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    towers = {"vision": {"config": TOWERS[tower]}, "text": {"config": TEXT, "tokenizer": str(folder / "tokenizer")}}
    loaded = load_dual_encoder(DualEncoderConfig.model_validate({**towers, "projection_dim": 64}))
    scorer = DualEncoderScorer(loaded.model, loaded.components).train()
    # What the libraries allocate once belongs to no step.
    step(loaded, scorer, folder, MICRO_BATCH)
    with PeakMemory(torch.device("cpu"), interval=0.01) as memory:
        step(loaded, scorer, folder, pairs)
    print(f"added {memory.added}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
