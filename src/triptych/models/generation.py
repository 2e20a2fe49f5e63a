"""Batched generation with any supported model, through Hugging Face's own `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, PreTrainedModel

from triptych.core.protocols import PictureProcessor
from triptych.models.components import repeat_positions, row_inputs_kind, tree_obstacle
from triptych.models.growing_cache import growing_cache
from triptych.models.modes import evaluation_mode
from triptych.models.pictures import model_inputs
from triptych.models.tree_attention import use_tree_attention

_ROWS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Inputs with a line for each prompt; the others belong to pictures."""


@dataclass(frozen=True)
class Prompt:
    """Token ids that end with the generation prompt, and the pictures they hold in order."""

    input_ids: Tensor
    """[n] int64, pictures already expanded."""
    pictures: tuple[Image.Image, ...]
    """RGB, one for each run of picture tokens."""


@torch.no_grad()
def generate(
    hf: PreTrainedModel,
    prompts: Sequence[Prompt],
    pictures: PictureProcessor,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    samples: int = 1,
) -> list[list[int]]:
    """Continue each prompt; prompts are padded on the left and hidden by the attention mask, so rows do not interact.

    With several samples of a prompt, the prompt is computed once and its keys and values are repeated.

    Args:
        hf: A model in any mode, which it keeps; answers are made in evaluation mode.
        prompts: At least one.
        pictures: The model's picture processor.
        max_new_tokens: Longest continuation in tokens.
        stop_ids: Ids that end a turn; the first one met and all after it are cut from the result.
        temperature: 0 for greedy, otherwise sampling at this temperature.
        samples: Continuations of each prompt.

    Returns:
        New token ids of each continuation, without the stop id; those of a prompt follow each other.
    """
    assert isinstance(hf, GenerationMixin)
    pad = stop_ids[0] if stop_ids else 0
    inputs: dict[str, Any] = prompt_inputs(hf, prompts, pictures, pad)
    longest = inputs["input_ids"].shape[1]
    with evaluation_mode(hf), _head_for_few_rows(hf), _attention_of_next_tokens(hf):
        if samples > 1:
            inputs = _repeat_prompts(hf, inputs, samples, pad)
        inputs.setdefault("past_key_values", growing_cache(hf))
        output = hf.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature > 0 else {}),
            eos_token_id=list(stop_ids) or None,
            pad_token_id=pad,
            use_cache=True,
            # Sharded weights are gathered by all ranks together: none may stop before the others.
            synced_gpus=any(isinstance(parameter, DTensor) for parameter in hf.parameters()),
        )
    stops = set(stop_ids)
    answers = []
    for row in output[:, longest:].tolist():
        end = next((index for index, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers


_FEW_ROWS = 32
"""A head of 49,152 x 576 on 2 cores: 14 ms against 36 for 8 rows, 34 against 51 for 32, no difference for 64."""


class _TurnedHead(nn.Module):
    """A head whose product is written the other way round, W xᵀ: up to twice as fast, as W need not be rearranged."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] to [..., vocabulary]."""
        rows = states.reshape(-1, states.shape[-1])
        if len(rows) > _FEW_ROWS:
            return F.linear(states, self.weight)
        return (self.weight @ rows.T).T.reshape(*states.shape[:-1], -1)


@contextmanager
def _head_for_few_rows(hf: PreTrainedModel) -> Iterator[None]:
    """On a CPU in float32, the head as `_TurnedHead` inside the block: a token of a few rows at a time is generated."""
    head = hf.get_output_embeddings()
    weight = head.weight if type(head) is nn.Linear and head.bias is None else None
    if weight is None or isinstance(weight, DTensor) or weight.device.type != "cpu" or weight.dtype != torch.float32:
        yield
        return
    hf.set_output_embeddings(_TurnedHead(weight))
    try:
        yield
    finally:
        hf.set_output_embeddings(head)


@contextmanager
def _attention_of_next_tokens(hf: PreTrainedModel) -> Iterator[None]:
    """Inside the block our attention in the place of transformers' plain one: faster for one token at a time on CPUs.

    Only for language models whose attention is known, as for trees.
    """
    if hf.config.get_text_config()._attn_implementation != "sdpa" or tree_obstacle(hf) is not None:
        yield
        return
    use_tree_attention(hf)
    try:
        yield
    finally:
        hf.set_attn_implementation({"text_config": "sdpa"})


def _repeat_prompts(hf: PreTrainedModel, inputs: dict[str, Tensor], samples: int, pad: int) -> dict[str, Any]:
    """Inputs of the same prompts, each `samples` times, with all but their last token computed already."""
    rows = {name: value for name, value in inputs.items() if name in _ROWS}
    if inputs["input_ids"].shape[1] > 1:
        first = hf.generate(
            **{**inputs, **{name: value[:, :-1] for name, value in rows.items()}},
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=pad,
            use_cache=True,
            past_key_values=growing_cache(hf),
            return_dict_in_generate=True,
        )
        cache = first.past_key_values
        cache.batch_repeat_interleave(samples)
        repeat_positions(hf, samples)
        return {**{name: value.repeat_interleave(samples, 0) for name, value in rows.items()}, "past_key_values": cache}
    return {name: value.repeat_interleave(samples, 0) for name, value in rows.items()}


def prompt_inputs(
    hf: PreTrainedModel, prompts: Sequence[Prompt], pictures: PictureProcessor, pad: int
) -> dict[str, Tensor]:
    """Keyword arguments of the model for prompts padded on the left, on its device and in its type."""
    weight = hf.get_input_embeddings().weight
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    is_image = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:] = prompt.input_ids
        mask[row, start:] = 1
        is_image[row, start:] = prompt.input_ids == hf.config.image_token_id
    inputs: dict[str, Tensor] = {"input_ids": input_ids, "attention_mask": mask}
    every_picture = [picture for prompt in prompts for picture in prompt.pictures]
    if every_picture:
        inputs |= model_inputs(pictures.pixels(every_picture))
    kind = row_inputs_kind(hf)
    if kind != "plain":
        inputs["mm_token_type_ids" if kind == "rotary_grid" else "token_type_ids"] = is_image
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
