"""In float32 at the size of real models the gradient is the same to 1e-5 for any split: SmolLM2-135M, MiniLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.invariants.exact import SPLITS, Case, Split, gradients_of, numbered, words
from tests.invariants.toys import relative_distance, runtime
from tests.tiny import Answer, Row, batch_of, noise, tiny_tokenizer
from triptych.core.types import Batch, Progress
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
BOUND = 1e-5


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

    return Case(scorer.train(), objective, [], make, reference)


def contrastive_case(tokenizer: Path, objective: Any) -> Case:
    """A small tower against a text encoder of MiniLM's size."""
    torch.manual_seed(0)
    config = {"vision": {"config": VISION}, "text": {"config": MINILM, "tokenizer": str(tokenizer)}}
    loaded = load_dual_encoder(DualEncoderConfig.model_validate({**config, "projection_dim": 128}))

    def make(examples: Sequence[int]) -> Batch:
        rows = [(noise(seed=n), Answer(words(n, 2 + n % 5))) for n in examples for n in (n, n + 20)]
        batch = batch_of(rows, loaded.tokenizer, loaded.pictures)
        return numbered(replace(batch, labels=batch.labels), examples)

    return Case(DualEncoderScorer(loaded.model, loaded.components).train(), objective, [], make)


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


def run(case: Case, split: Split) -> tuple[float, dict[str, Tensor]]:
    """Loss and a copy of the whole gradient, which is then dropped."""
    window, source = case.window(split)
    result = run_window(
        case.scorer, case.objective, window, source, case.reference, runtime(precision="fp32"), Progress(0, 1)
    )
    found = gradients_of(case.scorer)
    nn.Module.zero_grad(case.scorer, set_to_none=True)
    return result.loss, found


@pytest.mark.slow
@pytest.mark.requirement("C-13", "F-28")
@pytest.mark.parametrize("name", SUBJECTS)
def test_splits_agree_at_real_size(name: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    case = SUBJECTS[name].build(tmp_path, SUBJECTS[name].objective)
    loss, expected = run(case, SPLITS["1x8"])
    for split in ("8x1", "ragged"):
        found_loss, found = run(case, SPLITS[split])
        distance = relative_distance(expected, found)
        print(f"{name} {split}: relative distance {distance:.1e}")
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert distance < BOUND
