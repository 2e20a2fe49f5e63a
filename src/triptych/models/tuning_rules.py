"""The lines of a recipe's `tuning:` list: one class for each method.

A new method is a new class here, a member of `TuningRule`, and its branch in `models/tuning.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from triptych.core.config import Config


class FrozenRule(Config):
    """Leave the matched parameters as they are."""

    match: str
    """Component pattern such as `vision`, `vision.layers[-4:]`, `language.embeddings`, or a dotted glob."""
    method: Literal["frozen"]
    """No gradient, no optimizer state."""


class FullRule(Config):
    """Train the matched parameters themselves."""

    match: str
    """Component pattern such as `connector`, `language.layers[0:8]`, or a dotted glob."""
    method: Literal["full"]
    """Every matched parameter is trained."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; the run's default when left out."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay; the run's default when left out. Biases, norms and scalars are never decayed."""


class LoraRule(Config):
    """Train low-rank updates W x + s B A dropout(x) of linear layers; all matched parameters stay frozen.

    There is no weight decay: decaying A and B would pull the model back to its base.
    """

    match: str
    """Component pattern; only linear layers below it are adapted, never another component's of the same name."""
    method: Literal["lora"]
    """LoRA, arXiv 2106.09685 section 4.1."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; the run's default when left out."""
    rank: int = Field(default=16, gt=0)
    """r, the inner size of B A."""
    alpha: int | None = Field(default=None, gt=0)
    """Numerator of the scale s = alpha / rank; 2 x rank when left out, so that s = 2 at every rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of A while training."""
    targets: Literal["qv", "attention", "all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers: a preset, or endings of module names such as `q_proj` or `attn.c_proj`. The output head is
    left out of `all-linear` unless the rule matches nothing else."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    train_tokens: tuple[int, ...] = ()
    """Token ids whose embedding rows, and output rows where the head is not tied, are trained as well."""
    precision: Literal["float32", "model"] = "float32"
    """Type of the adapter's own weights: float32 under half-precision base weights, or the model's."""

    @property
    def effective_alpha(self) -> int:
        """Alpha as used."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """s, the factor of B A x."""
        return self.effective_alpha / (self.rank**0.5 if self.use_rslora else self.rank)


TuningRule = Annotated[FrozenRule | FullRule | LoraRule, Field(discriminator="method")]
"""One line of a recipe's `tuning:` list, told apart by `method`."""
