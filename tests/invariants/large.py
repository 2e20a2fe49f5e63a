"""Real sizes in float32: SmolLM2-135M's architecture behind a small tower, and a text encoder of MiniLM's size.

Started as `python -m tests.invariants.large <case> <strategy> <folder>` with the environment that torchrun sets, it
runs a case in one of two gloo processes and writes how far its gradient is from the one in the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.invariants.exact import RANKS, Case, Split, block_paths, gradients_of, numbered, words
from tests.invariants.launch import end
from tests.invariants.toys import relative_distance, runtime
from tests.tiny import Answer, Row, batch_of, noise
from triptych.core import distributed
from triptych.core.types import Batch, Progress
from triptych.engine.parallel import Runtime, unwrap
from triptych.engine.step import run_window
from triptych.models.dual_encoder import DualEncoderConfig, DualEncoderScorer, load_dual_encoder
from triptych.models.load import VlmConfig, load_vlm
from triptych.models.reference import FrozenReference
from triptych.models.vlm import VlmScorer
from triptych.objectives.contrastive import ContrastiveConfig, ContrastiveObjective
from triptych.objectives.language import LanguageConfig, LanguageObjective
from triptych.objectives.preference import DpoConfig, DpoObjective

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "initializer_range": 0.041666666666666664,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000},
    "tie_word_embeddings": True,
}
MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def language_case(tokenizer: Path, objective: Any) -> Case:
    """SmolLM2's architecture behind a small tower; everything is trained."""
    torch.manual_seed(0)
    config = {"vision": {"config": VISION}, "language": {"config": SMOLLM2_135M, "tokenizer": str(tokenizer)}}
    loaded = load_vlm(VlmConfig.model_validate(config))
    assert sum(item.numel() for item in loaded.model.model.language_model.parameters()) == 134_515_008
    scorer = VlmScorer(loaded.model, loaded.components, pictures=loaded.pictures)
    reference = None
    if isinstance(objective, DpoObjective):
        reference = FrozenReference(scorer)
        with torch.no_grad():  # a policy that has left its reference
            for parameter in loaded.model.parameters():
                parameter.mul_(1 + 0.01 * torch.randn_like(parameter))

    def make(examples: Sequence[int]) -> Batch:
        rows: list[Row] = []
        for number in examples:
            prompt = (words(number, 1),) if number % 3 == 2 else (noise(seed=number), words(number, 1))
            rows += [(*prompt, Answer(words(number + 3, 1 + number % 3))), (*prompt, Answer(words(number + 7, 2)))]
        return numbered(batch_of(rows, loaded.tokenizer, loaded.pictures), examples)

    return Case(scorer.train(), objective, block_paths(loaded.components), make, reference)


def contrastive_case(tokenizer: Path, objective: Any) -> Case:
    """A small tower against a text encoder of MiniLM's size."""
    torch.manual_seed(0)
    config = {"vision": {"config": VISION}, "text": {"config": MINILM, "tokenizer": str(tokenizer)}}
    loaded = load_dual_encoder(DualEncoderConfig.model_validate({**config, "projection_dim": 128}))

    def make(examples: Sequence[int]) -> Batch:
        rows = [(noise(seed=n), Answer(words(n, 2 + n % 5))) for n in examples for n in (n, n + 20)]
        return numbered(batch_of(rows, loaded.tokenizer, loaded.pictures), examples)

    return Case(
        DualEncoderScorer(loaded.model, loaded.components).train(), objective, block_paths(loaded.components), make
    )


@dataclass(frozen=True)
class Subject:
    """How a case is made."""

    build: Callable[[Path, Any], Case]
    objective: Any


SUBJECTS = {
    "language": Subject(language_case, LanguageObjective(LanguageConfig())),
    "dpo": Subject(language_case, DpoObjective(DpoConfig(beta=0.1))),
    "contrastive": Subject(contrastive_case, ContrastiveObjective(ContrastiveConfig(loss="clip"))),
}


def build(name: str, tokenizer: Path) -> Case:
    """A case of `SUBJECTS`; its weights are the same on every call."""
    return SUBJECTS[name].build(tokenizer, SUBJECTS[name].objective)


def run(case: Case, split: Split, engine: Runtime) -> tuple[float, dict[str, Tensor], list[str]]:
    """Loss, whole gradient and the names of sharded parameters, of this rank's split."""
    window, source = case.window(split)
    case.scorer.zero_grad(set_to_none=True)
    module = engine.wrap(case.scorer, case.blocks)
    result = run_window(module, case.objective, window, source, case.reference, engine, Progress(0, 1))
    sharded = [key for key, item in unwrap(module).named_parameters() if isinstance(item, DTensor)]
    return result.loss, gradients_of(module), sharded


def main(name: str, strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    engine = runtime(strategy=strategy)  # ranks have their numbers from here on
    loss, found, sharded = run(build(name, folder), RANKS[distributed.rank()], engine)
    distance = relative_distance(torch.load(folder / "gradient.pt", mmap=True), found)
    report = {"loss": loss, "distance": distance, "sharded": sharded, "world_size": distributed.world_size()}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    end()
