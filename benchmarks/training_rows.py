"""Rows of supervised training beside full tuning: adapters, and the trainer of another tool as it runs here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from benchmarks import ours, peers
from benchmarks.models import build_model
from benchmarks.row import AS_RUN, Build, Row, Setting
from benchmarks.rows import four_questions, make_scorer, prepare, training_way, with_pixels
from benchmarks.timing import Way
from triptych.core.types import Batch
from triptych.data.collate import collate
from triptych.models.components import find_components
from triptych.models.tuning import apply_tuning
from triptych.models.tuning_rules import FrozenRule, LoraRule

LORA = LoraRule(match="language", method="lora")
"""The recipes' default: rank 16, scale 2, every linear layer but the head."""


def sft_lora_196(setting: Setting) -> Row:
    """LoRA on the language model, everything else rests, against peft in `transformers.Trainer`."""
    model = build_model(setting.scale, 196).to(setting.device)
    components = find_components(model)
    frozen = [FrozenRule(match=part, method="frozen") for part in ("vision", "connector")]
    (adapter,) = apply_tuning(model, components, [*frozen, LORA], default_lr=1e-4).adapters
    _draw_factors(model)
    scorer = make_scorer(setting, model)
    batch = with_pixels(setting, 196, collate(four_questions()))
    peer = _with_peft(build_model(setting.scale, 196).to(setting.device), adapter)
    inner = peer.get_base_model()
    inner.load_state_dict(model.state_dict())
    step, trainer = peers.hugging_face_trainer(peer, batch, setting.bf16)
    return Row(
        training_way("ours", model, setting, lambda: ours.supervised(scorer, batch)),
        Way("peer", step, inner, trainer.create_optimizer()),
        "transformers.Trainer.training_step of a PeftModel: padded, attention mask, logits of every position",
        peer_kind=AS_RUN,
    )


def sft_full_196_trl_as_run(setting: Setting) -> Row:
    """Against TRL's own trainer, which on CPUs scores every position."""
    scorer, batch, peer = prepare(setting, 196, four_questions())
    step, trainer = _trl_trainer(peer, batch, setting.bf16)
    return Row(
        training_way("ours", scorer.hf, setting, lambda: ours.supervised(scorer, batch)),
        Way("peer", step, peer, trainer.create_optimizer()),
        "trl.SFTTrainer.training_step without activation checkpointing; on CPUs its head scores every position",
        peer_kind=AS_RUN,
    )


ROWS: Mapping[str, Build] = {"sft_lora_196": sft_lora_196, "sft_full_196_trl_as_run": sft_full_196_trl_as_run}


def _draw_factors(model: nn.Module) -> None:
    """Small random numbers for both factors: with B at 0, A would have no gradient to compare."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _with_peft(model: PreTrainedModel, adapter: str) -> PeftModel:
    """The same adapter the way of peft's own manual; its name keeps the parameters' names equal."""
    config = LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.effective_alpha,
        target_modules=r".*language_model\.layers.*_proj",
    )
    return get_peft_model(model, config, adapter_name=adapter)


def _trl_trainer(model: PreTrainedModel, batch: Batch, bf16: bool) -> tuple[Callable[[], Tensor], Trainer]:
    """Forward and backward through TRL's trainer, which gives `model` a second forward under another argument."""
    from trl import SFTConfig, SFTTrainer  # only here: the other rows are measured without it

    vocabulary = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=model.device.type == "cpu",
            bf16=bf16,
            report_to=[],
            learning_rate=0.0,
            max_steps=1,
            activation_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        # Neither is read: the step below is handed a batch that is ready.
        train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<pad>"),
        data_collator=lambda rows: rows,
    )
    trainer.current_gradient_accumulation_steps = 1  # which its `train` sets
    inputs = {**peers.padded_inputs(batch), "labels": batch.labels}
    return lambda: trainer.training_step(model, dict(inputs)), trainer
