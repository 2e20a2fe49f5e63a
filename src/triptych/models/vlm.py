"""The scorer of image-text-to-text models: what the engine calls and wraps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from triptych.core.errors import ModelError, Problem
from triptych.core.protocols import FeatureStore, PictureProcessor
from triptych.core.types import Batch, ScoreField, Scores
from triptych.models.components import (
    Components,
    check_plain_head,
    picture_record,
    row_inputs,
    row_inputs_kind,
    tree_obstacle,
)
from triptych.models.generation import Prompt, generate
from triptych.models.logprobs import DEFAULT_CHUNK, HeadKernel, cut_logprobs, label_logprobs
from triptych.models.picture_words import PictureWords
from triptych.models.tree_attention import use_tree_attention
from triptych.models.trees import make_layout, pack, tree_inputs
from triptych.models.vision import Features, VisionSide

logger = logging.getLogger(__name__)

WORD_NEEDS: frozenset[ScoreField] = frozenset({"word_logprobs", "silence_logprobs", "picture_distances"})
"""What is computed from pictures and word embeddings, without the language model."""
SUPPORTED_NEEDS: frozenset[ScoreField] = WORD_NEEDS | {"token_logprobs"}


class VlmScorer(nn.Module):
    """Scores batches with any supported image-text-to-text model; the model inside stays untouched.

    Rows are right-padded and get no attention mask: under causal attention the result is the same and the fast
    kernels apply. Components without trainable parameters stay in evaluation mode whatever `train()` says.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        components: Components,
        needs: frozenset[ScoreField] = frozenset({"token_logprobs"}),
        chunk_size: int = DEFAULT_CHUNK,
        pictures: PictureProcessor | None = None,
        words: PictureWords | None = None,
        trees: bool = True,
        store: FeatureStore | None = None,
    ) -> None:
        """
        Args:
            needs: fields of `Scores` to compute.
            chunk_size: positions whose logits live at the same time.
            pictures: makes the dummy picture of a micro-batch without pictures; needed when vision or connector train.
            words: what pictures are compared with; needed for `word_logprobs` and what comes with it.
            store: keeps the states of a frozen tower, where batches come with `picture_inputs`.
            trees: compute every trunk once and no padding, where `components.tree_obstacle` knows of no obstacle.

        Raises:
            ModelError: a field cannot be computed, or the model's logits are more than its head's output.
        """
        super().__init__()
        unknown = sorted(needs - SUPPORTED_NEEDS)
        if unknown:
            raise ModelError(
                Problem(
                    f"a vision-language scorer cannot compute {', '.join(unknown)}",
                    remedy=f"use an objective that needs {', '.join(sorted(SUPPORTED_NEEDS))}",
                )
            )
        if needs & WORD_NEEDS and (words is None or "token_logprobs" in needs):
            raise ValueError(f"{', '.join(sorted(WORD_NEEDS))} need `words`, and are computed without other fields")
        check_plain_head(hf.config)
        if components.image_token_id is None:
            raise ModelError(Problem(f"{type(hf).__name__} has no image token", remedy="use a dual-encoder scorer"))
        self.hf = hf
        self.components = components
        self.needs = needs
        self.chunk_size = chunk_size
        self.head_kernel: HeadKernel = "plain"
        """What makes log-probabilities of hidden states: `label_logprobs`, or `cut_logprobs` if it is set to that."""
        self.pictures = pictures
        self.vision = VisionSide(hf, components, pictures, store)
        self.words = words
        self._image_token_id = components.image_token_id
        self._row_inputs = row_inputs_kind(hf)
        obstacle = tree_obstacle(hf) if trees else None
        self.packs_trees = trees and obstacle is None
        if self.packs_trees:
            use_tree_attention(hf)
        if obstacle is not None:
            _say_once(f"trees are expanded to padded rows: {obstacle}")

    def forward(self, batch: Batch) -> Scores:
        """Score a batch on the model's device.

        Returns:
            `token_logprobs` [S], or the fields of `PictureWords`, where needed, and `auxiliary`, the
            router loss of a mixture-of-experts model that is configured to report it (`output_router_logits`), else
            None.

        Raises:
            ModelError: pixels are not attached, or the placeholders of a row do not match its pictures' features.
        """
        features = self.vision.features(batch)
        dummy = self.vision.dummy(batch)
        self._check_counts(batch, features)
        if self.needs & WORD_NEEDS:
            assert self.words is not None
            if features is None:  # a padding batch of a window without one usable row
                zero = torch.zeros((), device=batch.input_ids.device) if dummy is None else dummy
                words, rows = zero.expand(len(batch.supervised_rows)), zero.expand(batch.num_rows)
                return Scores(
                    word_logprobs=words,
                    silence_logprobs=rows,
                    picture_distances=rows,
                )
            return self.words(batch, features.pooled, self.hf.get_input_embeddings())
        order = [index for row in batch.row_images for index in row]
        grids = None if features is None or features.grids is None else features.grids[order]
        extra = row_inputs(self._row_inputs, self.hf, batch.input_ids, batch.attention_mask, grids)
        with self._added_to_embeddings(dummy):
            if self.packs_trees:
                hidden, auxiliary = self._packed_states(batch, features, extra), None
            else:
                outputs = self._language(batch.input_ids, features, order, extra)
                hidden, auxiliary = outputs.last_hidden_state, self._auxiliary(outputs, batch)
                hidden = hidden[:, :-1][batch.supervised[:, 1:]]
        if "token_logprobs" not in self.needs:
            return Scores(auxiliary=auxiliary)
        labels = batch.labels[batch.supervised]
        head = self.hf.get_output_embeddings()
        if self.head_kernel == "cut_cross_entropy":
            logprobs = cut_logprobs(hidden, labels, head)
        else:
            logprobs = label_logprobs(hidden, labels, head, self.chunk_size)
        return Scores(token_logprobs=logprobs, auxiliary=auxiliary)

    def _language(
        self, input_ids: Tensor, features: Features | None, order: list[int], extra: Mapping[str, Any]
    ) -> Any:
        return self.hf.base_model(
            input_ids=input_ids,
            mm_encoder_outputs=None if features is None else {"image": _gather(self.hf, features, order)},
            use_cache=False,
            **extra,
        )

    def _packed_states(self, batch: Batch, features: Features | None, extra: Mapping[str, Tensor]) -> Tensor:
        """[S, D] hidden states that predict the supervised labels; trunks computed once."""
        layout = make_layout(batch, self._image_token_id if self._row_inputs == "image_blocks" else None)
        packed = {name: pack(value, layout) for name, value in extra.items()}
        packed.setdefault("position_ids", layout.columns[None].long())
        order = [] if features is None else self._packed_pictures(batch, features)
        outputs = self._language(pack(batch.input_ids, layout), features, order, {**packed, **tree_inputs(layout)})
        # The label at column t is predicted from column t - 1; several branches are predicted from one trunk token.
        return outputs.last_hidden_state[0][layout.places[:, :-1][batch.supervised[:, 1:]]]

    def _packed_pictures(self, batch: Batch, features: Features) -> list[int]:
        """Pictures in the order of the packed tokens: those of a trunk only for its first row.

        Raises:
            ModelError: a trunk ends inside a picture.
        """
        columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        in_trunk = (columns < batch.trunk_lengths[:, None]) & (batch.input_ids == self._image_token_id)
        order: list[int] = []
        before = -1
        rows = zip(batch.tree_index.tolist(), in_trunk.sum(1).tolist(), batch.row_images, strict=True)
        for row, (tree, tokens, images) in enumerate(rows):
            if tree != before:
                order += images
                before = tree
                continue
            shared, seen = 0, 0
            while seen < tokens:
                seen += len(features.pooled[images[shared]])
                shared += 1
            if seen > tokens:
                raise ModelError(
                    f"the trunk of sample {batch.origins[row]} ends inside a picture: {tokens} of {seen} tokens",
                    remedy="build examples whose trunk holds whole pictures",
                )
            order += images[shared:]
        return order

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[list[int]]:
        """Continue prompts, see `generation.generate`; a method here so that sharding can wrap it like `forward`."""
        assert self.pictures is not None
        return generate(self.hf, prompts, self.pictures, **options)

    def train(self, mode: bool = True) -> VlmScorer:
        """Switch modes; call it again after `requires_grad` changed.

        Modules whose parameters are all frozen stay in evaluation mode, dropout and running statistics included.
        """
        super().train(mode)
        if mode:
            _freeze_modes(self.hf)
        return self

    def _check_counts(self, batch: Batch, features: Features | None) -> None:
        """Compare placeholders and features row by row; a mismatch would pair words with the wrong pixels."""
        pooled = features.pooled if features is not None else ()
        found = batch.input_ids.eq(self._image_token_id).sum(dim=1).tolist()
        problems = []
        for row, (placeholders, images) in enumerate(zip(found, batch.row_images, strict=True)):
            expected = sum(len(pooled[index]) for index in images)
            if placeholders != expected:
                problems.append(
                    Problem(
                        f"sample {batch.origins[row]} has {placeholders} image placeholders, "
                        f"but its {len(images)} pictures have {expected} features",
                        remedy="tokenise with this model's picture processor; never cut a row inside a picture",
                    )
                )
        if problems:
            raise ModelError(problems)

    @contextmanager
    def _added_to_embeddings(self, dummy: Tensor | None) -> Iterator[None]:
        """Send the dummy the way of real features: sharded ranks must gather and reduce in the same order.

        That holds for the backward pass too, where FSDP2 reduces a block once the gradient of its input is there.
        """
        if dummy is None:
            yield
            return
        embeddings = self.hf.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda module, inputs, output: output + dummy.to(output.dtype))
        try:
            yield
        finally:
            hook.remove()

    def _auxiliary(self, outputs: Any, batch: Batch) -> Tensor | None:
        router_logits = outputs.get("router_logits")
        if not router_logits:
            return None
        config = self.hf.config.get_text_config()
        losses = row_balance(router_logits, batch.attention_mask, config.num_experts_per_tok)
        return config.router_aux_loss_coef * losses.sum()


def row_balance(router_logits: tuple[Tensor, ...], mask: Tensor, top_k: int) -> Tensor:
    """Load-balancing loss of each row of a mixture-of-experts model: experts x sum_e f_e P_e.

    f_e is the share of the row's tokens (over all layers) routed to expert e, P_e the mean probability of e (Fedus et
    al. 2021, arXiv 2101.03961, equations 4 to 6). Taken row by row, so that it adds up over micro-batches; padding
    counts nothing.

    Args:
        router_logits: for each layer [R * L, experts].
        mask: [R, L] 1 on real tokens.

    Returns:
        [R] float32.
    """
    rows, length = mask.shape
    logits = torch.stack([layer.view(rows, length, -1) for layer in router_logits], dim=1).float()
    probabilities = logits.softmax(dim=-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    weights = mask[:, None, :, None].float()
    tokens = weights.sum(dim=(1, 2)) * len(router_logits)
    shares = (chosen * weights).sum(dim=(1, 2)) / tokens
    means = (probabilities * weights).sum(dim=(1, 2)) / tokens
    return logits.shape[-1] * (shares * means).sum(dim=-1)


def _gather(hf: PreTrainedModel, features: Features, order: list[int]) -> Any:
    """The record a model takes instead of pixels, with the features of the rows' pictures in order of appearance."""
    pooled = torch.cat([features.pooled[index] for index in order])
    deepstack = [torch.cat([level[index] for index in order]) for level in features.deepstack]
    return picture_record(hf, pooled, deepstack)


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _freeze_modes(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _freeze_modes(child)
