"""Attention of packed trees, behind the name under which transformers calls it.

Three kernels compute the same: on CPUs the causal kernel on short stretches and the plain one on what lies before
them, their results merged, so that no mask is read and little that is hidden computed; on CUDA devices flex attention;
and, for what these two do not know (dropout, blocks of picture tokens or a short sliding window on a CPU), attention
with a mask in groups. What is no tree goes to transformers' own, but for one token a row, as generation has it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from triptych.models.trees import TreeLayout

TREE_ATTENTION = "triptych_trees"
"""Name under which transformers knows the attention function; without trees its result is the plain one's (`sdpa`)."""

_UNKNOWN = ("softcap", "position_bias", "cache")
"""Options with which a next token's attention is left to transformers."""

FLEX_BLOCK = 128
"""Tokens a side of a block of flex attention."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def use_tree_attention(hf: PreTrainedModel) -> None:
    """Let the language model of `hf` attend by trees where it is handed a layout; all else stays as it was.

    Recomputation in the backward pass reads the same setting, so it cannot be switched on for a forward pass alone.
    """
    hf.set_attn_implementation({"text_config": TREE_ATTENTION})


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    trees: TreeLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of packed trees, in the form that transformers calls; without `trees` what its own does (`sdpa`).

    Args:
        query: [1, H, N, D], without `trees` [B, H, N, D]; `key` and `value` may have fewer heads, each for several of
            the query's.

    Returns:
        [1, N, H, D], or [B, N, H, D], and no attention weights.

    Raises:
        ValueError: scores are to be capped.
    """
    if trees is None:
        if query.shape[2] == 1 and attention_mask is None and all(options.get(name) is None for name in _UNKNOWN):
            return _next_token(query, key, value, dropout, scaling), None
        options = {"dropout": dropout, "scaling": scaling, **options}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    if options.get("softcap") is not None:
        raise ValueError("packed trees know no soft-capping of attention scores")
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):  # what autocast makes of them, but before they are copied
        dtype = torch.get_autocast_dtype(query.device.type)
    states = [item.to(dtype) for item in (query, key, value)]
    window: int | None = options.get("sliding_window")
    if window is not None and window >= trees.longest:
        window = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0 and query.device.type == "cuda":
        return flexible(states, trees, window, scale), None
    packed = [item[0].transpose(0, 1) for item in states]
    if dropout == 0 and query.device.type == "cpu" and window is None and trees.blocks is None:
        return merged(packed, trees, scale)[None], None
    return grouped(packed, trees, window, dropout, scale)[None], None


def _next_token(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Attention of one token a row over all keys. [B, 1, H, D] from query [B, H, 1, D].

    The query's heads that share a key head become rows of it: 8 rows of 9 heads over 240 tokens took 0.15 ms in
    bfloat16 on two cores, and 0.88 through the kernel that repeats keys, which transformers calls without a mask.
    """
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    output = F.scaled_dot_product_attention(rows, key, value, dropout_p=dropout, scale=scale)
    return output.reshape(len(query), 1, query.shape[1], -1)


# Compiled, loops over the parts of a layout would be compiled again for each layout; blocks are compiled around them.
@torch.compiler.disable
def merged(states: list[Tensor], trees: TreeLayout, scale: float) -> Tensor:
    """Attention without masks, for CPUs. [N, H, D] from query, key and value of that shape."""
    assert trees.parts, "layouts on other devices have no parts"
    output: Tensor = _Merged.apply(*states, trees, scale)
    return output


class _Merged(torch.autograd.Function):
    """Every token over its own stretch, in causal order; then over what it sees before that, part by part.

    Softmax over two sets of keys is the mean of the softmax over each, weighted by the sums of their exponentials. The
    gradients of each part follow from the joined output and the joined sum, as in the backward pass of flash attention
    (Dao et al. 2022, arXiv 2205.14135, section 3.1).

    Computed in float32 at least: on CPUs the kernels are as fast in it as in half precision over hundreds of tokens,
    and over short stretches up to four times as fast.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        context: Any, query: Tensor, key: Tensor, value: Tensor, trees: TreeLayout, scale: float
    ) -> Tensor:
        query, key, value = (item.contiguous() for item in (query, key, value))
        dtype = torch.promote_types(query.dtype, torch.float32)
        states = [item.to(dtype) for item in (query, key, value)]
        joined, total = torch.empty_like(states[0]), states[0].new_empty(query.shape[:2])
        for part in trees.parts:
            keys = part.keys or part.queries
            taken = [_heads(runs.take(item)) for item, runs in zip(states, (part.queries, keys, keys), strict=True)]
            output, logsum = (_heads(item) for item in _flash(*taken, 0.0, part.keys is None, scale=scale))
            if part.keys is not None:
                near = part.queries.take(total)
                both = torch.logaddexp(near, logsum)
                output, logsum = torch.lerp(output, part.queries.take(joined), (near - both).exp()[..., None]), both
            part.queries.put(joined, output)
            part.queries.put(total, logsum)
        result = joined.to(query.dtype)
        context.save_for_backward(query, key, value, result, total)
        context.trees, context.scale = trees, scale
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, total = context.saved_tensors
        query, key, value, output, gradient = (item.to(total.dtype) for item in (*saved, gradient))
        gradients = [torch.zeros_like(item) for item in (query, key, value)]
        for part in context.trees.parts:
            queries, keys = part.queries, part.keys or part.queries
            ahead, logsum = queries.take(gradient), queries.take(total)
            if queries.is_real is not None:  # what stands behind the end of a run is no token of it: it sees nothing
                logsum = logsum.masked_fill(~queries.is_real[..., None], math.inf)
            found = _flash_backward(
                _heads(ahead),
                _heads(queries.take(query)),
                _heads(keys.take(key)),
                _heads(keys.take(value)),
                _heads(queries.take(output)),
                _heads(logsum),
                0.0,
                part.keys is None,
                scale=context.scale,
            )
            for whole, runs, own in zip(gradients, (queries, keys, keys), found, strict=True):
                runs.add(whole, _heads(own))
        return (*(item.to(saved[0].dtype) for item in gradients), None, None)


def _heads(states: Tensor) -> Tensor:
    """[G, L, H, ...] -> [G, H, L, ...], or back."""
    return states.transpose(1, 2)


@torch.compiler.disable
def grouped(states: list[Tensor], trees: TreeLayout, window: int | None, dropout: float, scale: float) -> Tensor:
    """Attention with masks, group by group. [N, H, D] from query, key and value of that shape."""
    outputs = []
    for number, group in enumerate(trees.groups):
        parts = [states[0][group.queries], states[1][group.keys], states[2][group.keys]]
        mask = trees.mask(number, window, states[0].dtype)
        outputs.append(_attend([_heads(part) for part in parts], mask, dropout, scale))
    return torch.cat(outputs)[trees.order]


def _attend(states: list[Tensor], mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """[G * Q, H, D]."""
    query, key, value = states
    repeats = query.shape[1] // key.shape[1]
    # With a mask, only the CPU has a kernel for fewer key heads.
    has_kernel = mask is None or query.device.type == "cpu"
    if repeats > 1 and not has_kernel:
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    joined = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=repeats > 1 and has_kernel,
    )
    return joined.transpose(1, 2).flatten(0, 1)


def flexible(states: list[Tensor], trees: TreeLayout, window: int | None, scale: float) -> Tensor:
    """Attention over blocks of the packed row that hold anything to see. [1, N, H, D] from [1, H, N, D]."""
    query, key, value = states
    output: Tensor = _flex(query.device.type)(
        query,
        key,
        value,
        block_mask=block_mask(trees, window),
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    ).transpose(1, 2)
    return output


def block_mask(trees: TreeLayout, window: int | None) -> BlockMask:
    """What of the packed row each token sees, for flex attention; made once for all layers of a kind.

    Which blocks hold anything to see follows from the layout, so that no table of all pairs of tokens is made: of a
    micro-batch of 65,536 tokens it would have 4 billion entries.
    """
    key = "flex", window
    if key not in trees.masks:

        def sees(batch: Tensor, head: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
            return trees.sees(queries, keys, window)

        size = len(trees.tokens)
        some, whole = trees.visible_blocks(window, FLEX_BLOCK)
        trees.masks[key] = BlockMask.from_kv_blocks(
            *_listed(some & ~whole),
            *_listed(whole),
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=sees,
            seq_lengths=(size, size),
        )
    mask: BlockMask = trees.masks[key]
    return mask


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many there are in each row of [Q, K] bool, and their numbers, first; int32 [1, 1, Q] and [1, 1, Q, K]."""
    counts = blocks.sum(1, dtype=torch.int32)
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], numbers[None, None].contiguous()


@cache
def _flex(device_type: str) -> Any:
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
