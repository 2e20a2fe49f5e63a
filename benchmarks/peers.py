"""What other tools do with the same rows: their own code where it runs here, else their algorithm written again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from triptych.core.types import Batch


def padded_inputs(batch: Batch) -> dict[str, Tensor]:
    """The rows of a batch as processors hand them over: padded, with a mask, one picture a row."""
    assert batch.pixels is not None
    order = [index for row in batch.row_images for index in row]
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": batch.pixels["pixel_values"][order],
    }


def hugging_face_trainer(model: PreTrainedModel, batch: Batch, bf16: bool) -> tuple[Callable[[], Tensor], Trainer]:
    """Forward and backward through `transformers.Trainer.training_step`: `labels=`, so logits of every position."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=model.device.type == "cpu",
        bf16=bf16,
        report_to=[],
        learning_rate=0.0,
        max_steps=1,
    )
    trainer = Trainer(model=model, args=arguments)
    trainer.current_gradient_accumulation_steps = 1  # which its `train` sets
    inputs = {**padded_inputs(batch), "labels": batch.labels}
    return lambda: trainer.training_step(model, dict(inputs)), trainer


def supervised_only(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean loss of the learned tokens, logits of their positions only: what TRL's fused head does on GPUs."""
    return -_label_logprobs(model, batch).mean()


def preference(model: PreTrainedModel, batch: Batch, beta: float, full_logits: bool) -> Tensor:
    """DPO as TRL computes it for pictures: winners and losers in one padded batch, one more pass for the reference.

    Args:
        full_logits: logits of every position, as LLaMA-Factory's does.
    """
    score = _row_logprobs_of_full_logits if full_logits else _row_logprobs
    with torch.no_grad():
        reference = score(model, batch)
    margins = score(model, batch) - reference
    winners, losers = batch.pairs.T
    return -F.logsigmoid(beta * (margins[winners] - margins[losers])).mean()


def policy_gradient(model: PreTrainedModel, batch: Batch, advantages: Tensor) -> Tensor:
    """Sum over rows of advantage x log p, one row a sample, logits of learned positions only."""
    return -(_row_logprobs(model, batch) * advantages).sum()


def _label_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    hidden = model.base_model(**padded_inputs(batch), use_cache=False).last_hidden_state
    learned = hidden[:, :-1][batch.supervised[:, 1:]]
    logits = model.get_output_embeddings()(learned).float()
    return -F.cross_entropy(logits, batch.labels[batch.supervised], reduction="none")


def _row_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    logprobs = _label_logprobs(model, batch)
    return logprobs.new_zeros(batch.num_rows).index_add(0, batch.supervised_rows, logprobs)


def _row_logprobs_of_full_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = model(**padded_inputs(batch), use_cache=False).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    logprobs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (logprobs * batch.supervised[:, 1:]).sum(1)
