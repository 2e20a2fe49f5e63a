"""Reference models as values: they add the log-probabilities of the model before training to a batch.

Preference objectives compare the policy with where it started (DPO, Rafailov et al. 2023, arXiv 2305.18290 equation 7).
The pass runs in evaluation mode and without gradients, in whatever autocast the caller has switched on, so that at
step 0 policy and reference agree to the last bit when the policy has no dropout.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from triptych.core.errors import ModelError
from triptych.core.types import Batch, Scores
from triptych.models.adapters import adapters_disabled
from triptych.models.modes import evaluation_mode
from triptych.models.tuning import TuningPlan

REFERENCE_LOGPROBS = "reference_logprobs"


class FrozenReference:
    """A copy of the scorer as it is now; later training of the original does not reach it."""

    def __init__(self, scorer: nn.Module) -> None:
        """Copy `scorer`, which must be unsharded. Build this before training and before a checkpoint is restored."""
        self._scorer = copy.deepcopy(scorer).requires_grad_(False).eval()
        self._device: torch.device | None = None

    def attach(self, batch: Batch) -> Batch:
        """Return the batch with `token_values["reference_logprobs"]`, [S], natural log, in the type of the scores.

        Raises:
            ModelError: the scorer gives no token log-probabilities.
        """
        self.to(batch.input_ids.device)  # the policy moves to its device only after this copy was made
        return _attach(self._scorer, batch)

    def to(self, device: torch.device) -> None:
        """Move the copy to a device, where it is not there yet."""
        if self._device != device:
            self._device = device
            self._scorer.to(device)


class AdapterOffReference:
    """The policy itself with its adapters switched off: no second copy of the weights."""

    def __init__(self, scorer: nn.Module, plan: TuningPlan) -> None:
        """Check that switching adapters off gives back the policy as it is now.

        Args:
            scorer: the policy; the same object that is trained.
            plan: how it is tuned.

        Raises:
            ModelError: base weights are trained too, there are no adapters, or an adapter has been trained already.
        """
        remedy = "set `reference: frozen`"
        if not plan.adapters:
            message = "adapter_off needs adapters to switch off, and `tuning` gives none"
            raise ModelError(message, key="reference", remedy=f"{remedy}, or let `tuning` add LoRA")
        if plan.full_matches:
            matches = ", ".join(f"`{match}`" for match in plan.full_matches)
            raise ModelError(
                f"{matches} train base weights, which switching adapters off does not undo",
                key="reference",
                remedy=f"{remedy}, or freeze or LoRA-tune them",
            )
        moved = _first_trained_adapter(scorer)
        if moved:
            raise ModelError(
                f"the adapter on `{moved}` is already trained: without it the reference would be an older model",
                key="reference",
                remedy=f"{remedy}, or merge the adapter before this stage",
            )
        self._scorer = scorer

    def attach(self, batch: Batch) -> Batch:
        """Return the batch with `token_values["reference_logprobs"]`, [S], natural log, in the type of the scores.

        Training mode, `requires_grad` and the random state of the policy are as before afterwards. Call it before the
        policy's forward pass, never between that and its backward pass.

        Raises:
            ModelError: the scorer gives no token log-probabilities.
        """
        with adapters_disabled(self._scorer):
            return _attach(self._scorer, batch)


def reference_logprobs(scorer: nn.Module, batch: Batch) -> Tensor:
    """[S] log-probabilities of a scorer as it is now, without dropout, gradients or a trace in the random state.

    Raises:
        ModelError: the scorer gives no token log-probabilities.
    """
    device = batch.input_ids.device
    devices = [device] if device.type == "cuda" else []
    with evaluation_mode(scorer), torch.random.fork_rng(devices=devices), torch.no_grad():
        scores: Scores = scorer(batch)
    if scores.token_logprobs is None:
        raise ModelError(
            "the reference gives no token log-probabilities",
            remedy="build its scorer with needs that include `token_logprobs`",
        )
    return scores.token_logprobs


def _attach(scorer: nn.Module, batch: Batch) -> Batch:
    values = {**batch.token_values, REFERENCE_LOGPROBS: reference_logprobs(scorer, batch)}
    return replace(batch, token_values=values)


def _first_trained_adapter(model: nn.Module) -> str | None:
    """Path of a layer whose adapter changes the output, or None."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(bool(item.weight.any()) for item in module.lora_B.values()):
            return path
        if isinstance(module, TrainableTokensLayer) and any(
            not torch.equal(delta.to(module.trainable_tokens_original[name]), module.trainable_tokens_original[name])
            for name, delta in module.trainable_tokens_delta.items()
        ):
            return path
    return None
