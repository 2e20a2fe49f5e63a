"""The rows of the table: what is compared with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import ours, peers
from benchmarks.models import build_model, make_example
from benchmarks.row import AS_RUN, Build, Row, Setting
from benchmarks.timing import Way
from triptych.core.types import Batch, Example, PictureInput
from triptych.data.collate import collate
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.models.components import find_components
from triptych.models.features import FeatureCache
from triptych.models.vlm import VlmScorer


def four_questions() -> list[Example]:
    """One question a picture of 196 tokens, answers of uneven length."""
    generator = torch.Generator().manual_seed(1)
    return [make_example(n, n, 196, 24, [(32, 24, 16, 8)[n]], generator) for n in range(4)]


def sft_full_196(setting: Setting) -> Row:
    """Against `transformers.Trainer`."""
    scorer, batch, peer = prepare(setting, 196, four_questions())
    step, trainer = peers.hugging_face_trainer(peer, batch, setting.bf16)
    return Row(
        training_way("ours", scorer.hf, setting, lambda: ours.supervised(scorer, batch)),
        Way("peer", step, peer, trainer.create_optimizer()),
        "transformers.Trainer.training_step: padded, attention mask, logits of every position",
        peer_kind=AS_RUN,
    )


def sft_full_196_trl(setting: Setting) -> Row:
    """Against what TRL does on GPUs."""
    scorer, batch, peer = prepare(setting, 196, four_questions())
    return Row(
        training_way("ours", scorer.hf, setting, lambda: ours.supervised(scorer, batch)),
        training_way("peer", peer, setting, lambda: peers.supervised_only(peer, batch)),
        "TRL's GPU algorithm written down again: padded, attention mask, logits of learned positions only",
    )


def align_196(setting: Setting) -> Row:
    """Two passes over four pictures, the connector alone trained: the tower's states are kept in the first."""
    scorer, batch, other = prepare(setting, 196, four_questions())
    for model in (scorer.hf, other):
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    scorer.train()
    new = _one_by_one(batch)

    def step(batch: Batch) -> Tensor:
        with setting.autocast():
            loss = ours.supervised(scorer, batch)
        loss.backward()
        return loss.detach()

    def both() -> Tensor:
        with _kept_features(scorer, new) as kept:
            return step(new) + step(kept())

    peer, trainer = peers.hugging_face_trainer(other, batch, setting.bf16)
    return Row(
        Way("ours", both, scorer.hf, _optimizer(scorer.hf)),
        Way("peer", lambda: peer() + peer(), other, trainer.create_optimizer()),
        "transformers.Trainer.training_step: padded, attention mask, logits of every position",
        unit="seconds for two steps",
        peer_kind=AS_RUN,
    )


def sft_tree8_576(setting: Setting) -> Row:
    """Eight questions of 28 tokens with answers of 32 about one picture of 576 tokens."""
    generator = torch.Generator().manual_seed(1)
    examples = [make_example(n, 0, 576, 28, [32], generator) for n in range(8)]
    scorer, batch, peer = prepare(setting, 576, examples)
    return Row(
        training_way("ours", scorer.hf, setting, lambda: ours.supervised(scorer, batch)),
        training_way("peer", peer, setting, lambda: peers.supervised_only(peer, batch)),
        "TRL's GPU algorithm written down again, one row a question",
    )


def _dpo(image_tokens: int, full_logits: bool = False, in_one_epoch: bool = False) -> Build:
    """
    Args:
        full_logits: of the peer.
        in_one_epoch: whether our reference pass, which is made once, belongs to the step.
    """

    def build(setting: Setting) -> Row:
        generator = torch.Generator().manual_seed(1)
        examples = [make_example(n, n, image_tokens, 24, [60, 56], generator) for n in range(2)]
        scorer, batch, peer = prepare(setting, image_tokens, examples)
        new = _one_by_one(batch)

        def with_reference() -> Batch:
            with _kept_features(scorer, new) as kept:
                known = ours.with_reference(scorer, new)
                return replace(kept(), token_values=known.token_values)

        known = with_reference()

        def step() -> Tensor:
            return ours.preference(scorer, with_reference() if in_one_epoch else known, 0.1)

        return Row(
            training_way("ours", scorer.hf, setting, step),
            training_way("peer", peer, setting, lambda: peers.preference(peer, batch, 0.1, full_logits)),
            "DPO with logits of every position and a reference pass (LLaMA-Factory's way) written down again"
            if full_logits
            else "TRL's GPU algorithm written down again: learned positions only, a reference pass each step",
        )

    return build


def group8_576(setting: Setting) -> Row:
    """The update on eight samples of one prompt."""
    generator = torch.Generator().manual_seed(1)
    example = make_example(0, 0, 576, 28, [32] * 8, generator)
    scorer, batch, peer = prepare(setting, 576, [example])
    # Their sum is not 0, or the losses to compare would be.
    advantages = torch.linspace(-0.5, 1.5, 8, device=setting.device)
    return Row(
        training_way("ours", scorer.hf, setting, lambda: ours.policy_gradient(scorer, batch, advantages)),
        training_way("peer", peer, setting, lambda: peers.policy_gradient(peer, batch, advantages)),
        "one row a sample, logits of learned positions only",
    )


ROWS: Mapping[str, Build] = {
    "sft_full_196": sft_full_196,
    "sft_full_196_trl": sft_full_196_trl,
    "sft_tree8_576": sft_tree8_576,
    "align_196": align_196,
    "dpo_196": _dpo(196),
    "dpo_196_one_epoch": _dpo(196, in_one_epoch=True),
    "dpo_576": _dpo(576),
    "dpo_576_full": _dpo(576, full_logits=True),
    "group8_576": group8_576,
}


def prepare(
    setting: Setting, image_tokens: int, examples: Sequence[Example]
) -> tuple[VlmScorer, Batch, PreTrainedModel]:
    """The scorer of a model of which all but the tower trains, the examples as a batch, and the peer's equal model."""
    models = [build_model(setting.scale, image_tokens).to(setting.device) for _ in range(2)]
    for model in models:
        model.model.vision_tower.requires_grad_(False)
        model.train()
    return make_scorer(setting, models[0]), with_pixels(setting, image_tokens, collate(examples)), models[1]


def make_scorer(setting: Setting, model: PreTrainedModel) -> VlmScorer:
    """Our scorer in training mode, its blocks compiled if the setting says so."""
    components = find_components(model)
    scorer = VlmScorer(model, components).train()
    if setting.compiled:
        blocks = [f"hf.{path}" for paths in components.layers.values() for path in paths]
        Runtime(RuntimeConfig(compile=True)).wrap(scorer, blocks)
    return scorer


def with_pixels(setting: Setting, image_tokens: int, batch: Batch) -> Batch:
    """The batch with random pictures of so many tokens each."""
    side = round(image_tokens**0.5) * setting.scale.patch
    pixels = torch.randn(len(batch.images), 3, side, side, generator=torch.Generator().manual_seed(2))
    return replace(batch, pixels={"pixel_values": pixels}).to(setting.device)


def _one_by_one(batch: Batch) -> Batch:
    """The batch with its pictures as they are handed over where their features are kept."""
    assert batch.pixels is not None
    pixels = batch.pixels["pixel_values"]
    inputs = tuple(PictureInput(str(key), {"pixel_values": item[None]}) for key, item in enumerate(pixels))
    return replace(batch, pixels=None, picture_inputs=inputs)


@contextmanager
def _kept_features(scorer: VlmScorer, batch: Batch) -> Iterator[Callable[[], Batch]]:
    """Keep the features of pictures that the scorer computes; gives what returns the batch with those, from disk."""
    with TemporaryDirectory() as folder:
        scorer.vision.store = store = FeatureCache(Path(folder))

        def kept() -> Batch:
            store.flush()
            known = FeatureCache(Path(folder))
            inputs = tuple(PictureInput(item.key, features=known.get(item.key)) for item in batch.picture_inputs or ())
            return replace(batch, picture_inputs=inputs).to(batch.input_ids.device)

        yield kept
        scorer.vision.store = None


def training_way(name: str, model: nn.Module, setting: Setting, loss: Callable[[], Tensor]) -> Way:
    """Forward and backward of a loss, and a step of fused AdamW at a learning rate of 0."""

    def run() -> Tensor:
        with setting.autocast():
            value = loss()
        value.backward()
        return value.detach()

    return Way(name, run, model, _optimizer(model))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, fused=True)
