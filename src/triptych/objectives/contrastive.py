"""Image-text contrastive learning over a whole window: softmax (CLIP) and sigmoid (SigLIP).

Each micro-batch computes its own rows against the columns of the whole window, so the sums over micro-batches and
ranks are the loss of the whole window, however unevenly it is split. Row i of the images belongs to row i of the
texts; captions with equal keys are positives of each other's pictures too, never negatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.core.config import Config
from triptych.core.errors import TrainingError
from triptych.core.types import Batch, Progress, ScoreField, Scores, WindowValues


class ContrastiveConfig(Config):
    """Contrastive loss over all pairs of the window."""

    kind: Literal["contrastive"] = "contrastive"
    """Selects this objective."""
    loss: Literal["clip", "siglip"] = "clip"
    """`clip`: symmetric softmax cross-entropy. `siglip`: pairwise sigmoid; the model must have a logit bias."""


def positive_pairs(keys: Tensor, all_keys: Tensor, start: int) -> Tensor:
    """Which columns of the window are positives of the local rows.

    Args:
        keys: [n] int64 text keys of the local rows; 0 means unknown and equals nothing but itself on the diagonal.
        all_keys: [N] int64 text keys of the window.
        start: first local row within the window; local row i is column `start + i`.

    Returns:
        [n, N] bool. The full matrix is symmetric, so the same rows serve both directions.
    """
    columns = torch.arange(all_keys.shape[0], device=keys.device)
    rows = start + torch.arange(keys.shape[0], device=keys.device)
    same_caption = (keys[:, None] == all_keys[None, :]) & (keys != 0)[:, None]
    return same_caption | (rows[:, None] == columns[None, :])


def info_nce(queries: Tensor, keys: Tensor, positives: Tensor, logit_scale: Tensor) -> Tensor:
    """Softmax contrastive loss in one direction, a *sum* over the queries.

    `sum_i -1/|P_i| sum_{j in P_i} log softmax_j(s q_i . k_j)`; with one positive each it is InfoNCE (van den Oord et
    al. 2018, arXiv 1807.03748, eq. 4) at temperature 1/s; the mean over several positives stands outside the
    logarithm as in Khosla et al. 2020, arXiv 2004.11362, eq. 2.

    Args:
        queries: [n, D] L2-normalised.
        keys: [N, D] L2-normalised.
        positives: [n, N] bool, at least one in each row.
        logit_scale: 0-d, s.
    """
    logits = _logits(queries, keys, logit_scale)
    rows, columns = positives.nonzero(as_tuple=True)
    # Few of the n x N entries are positives: picking them out keeps one [n, N] tensor for the backward pass, not four.
    shares = positives.sum(dim=-1).to(logits.dtype).reciprocal()[rows]
    return torch.logsumexp(logits, dim=-1).sum() - (logits[rows, columns] * shares).sum()


def siglip_loss(
    images: Tensor, all_texts: Tensor, positives: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Pairwise sigmoid loss, a *sum* over the images (Zhai et al. 2023, arXiv 2303.15343, eq. 1).

    `sum_ij -log sigmoid(z_ij (s x_i . y_j + b))`, z = 1 for positives and -1 for the rest.

    Args:
        images: [n, D] L2-normalised.
        all_texts: [N, D] L2-normalised.
        positives: [n, N] bool.
        logit_scale: 0-d, s.
        logit_bias: 0-d, b.
    """
    logits = _logits(images, all_texts, logit_scale) + logit_bias
    signs = positives.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum()


@dataclass(frozen=True)
class ContrastiveObjective:
    """Couples the pairs of a window; all of its terms come from the window's values."""

    config: ContrastiveConfig

    @property
    def needs(self) -> frozenset[ScoreField]:
        """Both embeddings and the temperature; SigLIP also the bias."""
        common: frozenset[ScoreField] = frozenset({"image_embeddings", "text_embeddings", "logit_scale"})
        return common | {"logit_bias"} if self.config.loss == "siglip" else common

    @property
    def coefficients(self) -> Mapping[str, float]:
        """CLIP is the mean of two directions (Radford et al. 2021, arXiv 2103.00020, figure 3); SigLIP is one sum."""
        return {"siglip": 1.0} if self.config.loss == "siglip" else {"loss_i2t": 0.5, "loss_t2i": 0.5}

    @property
    def differentiable(self) -> frozenset[str]:
        """Everything observed but the keys."""
        return frozenset(self.needs)

    def weights(self, batch: Batch, progress: Progress) -> Mapping[str, Tensor]:
        """Pairs of this batch; 0 for a padding batch."""
        rows = 0 if batch.is_padding else batch.num_rows
        return {name: torch.tensor(float(rows), device=batch.text_keys.device) for name in self.coefficients}

    def terms(self, scores: Scores, batch: Batch, window: WindowValues | None) -> Mapping[str, Tensor]:
        """Nothing: one micro-batch alone knows no negatives."""
        return {}

    def metrics(self, scores: Scores, batch: Batch) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Nothing; see `window_metrics`."""
        return {}

    def observe(self, scores: Scores, batch: Batch) -> Mapping[str, Tensor]:
        """L2-normalised embeddings [rows, D], the keys [rows], and the 0-d temperature (and bias).

        A padding batch gives no rows, so its copies are nobody's negatives. Normalising here, once a row, keeps the
        window's gradients those of unit vectors; the second pass carries them through the norm.

        Raises:
            TrainingError: the model has no logit bias and the loss is `siglip`.
        """
        assert scores.image_embeddings is not None and scores.text_embeddings is not None
        assert scores.logit_scale is not None
        rows = 0 if batch.is_padding else batch.num_rows
        observed = {
            "image_embeddings": F.normalize(_at_least_fp32(scores.image_embeddings[:rows]), dim=-1),
            "text_embeddings": F.normalize(_at_least_fp32(scores.text_embeddings[:rows]), dim=-1),
            "text_keys": batch.text_keys[:rows],
            "logit_scale": _at_least_fp32(scores.logit_scale),
        }
        if self.config.loss == "siglip":
            if scores.logit_bias is None:
                raise TrainingError(
                    "objective.loss is `siglip` but the model has no logit bias",
                    key="objective.loss",
                    remedy="use a SigLIP model, or set objective.loss to `clip`",
                )
            observed["logit_bias"] = _at_least_fp32(scores.logit_bias)
        return observed

    def window_terms(self, batch: Batch, window: WindowValues) -> Mapping[str, Tensor]:
        """This batch's rows against the whole window. Summed over all batches: the loss of the window."""
        positives = _local_positives(window)
        images, texts = window.local("image_embeddings"), window.local("text_embeddings")
        scale = window.values["logit_scale"]
        if self.config.loss == "siglip":
            bias = window.values["logit_bias"]
            return {"siglip": siglip_loss(images, window.values["text_embeddings"], positives, scale, bias)}
        return {
            "loss_i2t": info_nce(images, window.values["text_embeddings"], positives, scale),
            "loss_t2i": info_nce(texts, window.values["image_embeddings"], positives, scale),
        }

    def window_metrics(self, batch: Batch, window: WindowValues) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Recall at 1 within the window in both directions (any caption with an equal key counts), and the temperature.

        Names: `acc_i2t`, `acc_t2i`, `logit_scale`; exact over micro-batches and ranks.
        """
        positives = _local_positives(window)
        images, texts = window.local("image_embeddings").detach(), window.local("text_embeddings").detach()
        scale = window.values["logit_scale"].detach()
        count = torch.tensor(float(images.shape[0]), device=images.device)
        return {
            "acc_i2t": (_num_hits(images, window.values["text_embeddings"].detach(), positives), count),
            "acc_t2i": (_num_hits(texts, window.values["image_embeddings"].detach(), positives), count),
            "logit_scale": (scale * count, count),
        }


def _local_positives(window: WindowValues) -> Tensor:
    return positive_pairs(window.local("text_keys"), window.values["text_keys"], window.starts["text_keys"])


def _num_hits(queries: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
    nearest = _logits(queries, keys, torch.ones((), dtype=keys.dtype, device=keys.device)).argmax(dim=-1)
    return positives.gather(1, nearest[:, None]).sum().to(keys.dtype)


def _logits(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    # Autocast would run this product in half precision, whose steps are coarser than the differences it must rank.
    # The scale goes into the [n, D] factor, so that the unscaled [n, N] product need not be kept for its gradient.
    with torch.autocast(queries.device.type, enabled=False):
        return (logit_scale * queries) @ keys.T


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
