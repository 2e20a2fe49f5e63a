"""The schema of a recipe, one class for each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from triptych.core.config import Config
from triptych.data.formats import AnyDatasetConfig, DatasetConfig, PreferenceConfig
from triptych.data.loader import LoaderConfig
from triptych.engine.trainer import TrainConfig
from triptych.evaluation.metrics import MetricName
from triptych.models.dual_encoder import DualEncoderConfig
from triptych.models.load import VlmConfig
from triptych.models.logprobs import HeadKernel
from triptych.models.tuning import TuningRule
from triptych.objectives.bag_of_words import BagOfWordsConfig
from triptych.objectives.contrastive import ContrastiveConfig
from triptych.objectives.language import LanguageConfig
from triptych.objectives.preference import DpoConfig


def _refuse_pairs(config: AnyDatasetConfig) -> AnyDatasetConfig:
    if isinstance(config, PreferenceConfig):
        raise ValueError(
            "rows of format `preference` hold answers to compare: use them in a recipe of stage preference"
        )
    return config


def _require_pairs(config: AnyDatasetConfig) -> AnyDatasetConfig:
    if not isinstance(config, PreferenceConfig):
        raise ValueError(
            f"rows of format `{config.format}` hold no answers to compare: use format `preference`, or stage tune"
        )
    return config


def _refuse_auto(config: LoaderConfig) -> LoaderConfig:
    if config.micro_batch == "auto":
        raise ValueError(
            "`micro_batch: auto` counts tokens, and two towers have no rows of tokens: set `micro_batch` to a number "
            "of samples"
        )
    return config


PlainDataset = Annotated[DatasetConfig, AfterValidator(_refuse_pairs)]
"""A data set whose rows are conversations or captions."""

PairDataset = Annotated[DatasetConfig, AfterValidator(_require_pairs)]
"""A data set whose rows are preferences."""


ReferenceKind = Literal["precomputed", "frozen", "adapter_off"]
"""Where the numbers of a reference model come from."""


class EvaluationConfig(Config):
    """What is measured on rows that are not trained on."""

    data: tuple[PlainDataset, ...] = Field(min_length=1)
    """Held-out data sets; each row once."""
    batch: int = Field(default=16, ge=1)
    """Examples in a forward pass."""


class TuneEvaluationConfig(EvaluationConfig):
    """What is measured, answers included."""

    answers: bool = False
    """Also generate the answers and score them."""
    metrics: dict[str, MetricName] = Field(default={})
    """Task -> what makes an answer right: `exact` (default), `objects` (a caption lists the same things in the same
    numbers) or `number`."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest generated answer in tokens."""
    show: int = Field(default=0, ge=0)
    """Print this many generated answers before and after training."""


class PreferenceEvaluationConfig(EvaluationConfig):
    """What is measured on preferences."""

    data: tuple[PairDataset, ...] = Field(min_length=1)
    """Held-out data sets; each row once."""


class StageRecipe(Config):
    """Keys of every stage."""

    output: str
    """Folder of the run: checkpoints, logs and the finished model. Relative to the working directory, as all paths."""
    tuning: tuple[TuningRule, ...] = Field(min_length=1)
    """Ordered rules; the first that matches a parameter decides, and together they cover the model."""
    lr: float = Field(gt=0)
    """Peak learning rate of rules that name none."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of rules that name none; biases, norms, scalars and LoRA are never decayed."""
    data: tuple[PlainDataset, ...] = Field(min_length=1)
    """Data sets to train on."""
    loader: LoaderConfig
    """How rows become batches."""
    train: TrainConfig = TrainConfig()
    """How the model is optimised, saved and watched."""
    evaluation: EvaluationConfig | None = None
    """Held-out measurements during training and at the end."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights in memory; float32 is the safe choice for training them."""


class FeaturesConfig(Config):
    """Whether what a frozen vision tower makes of pictures is kept on disk, so that each goes through it once."""

    keep: Literal["auto", "always", "never"] = "auto"
    """`auto`: where pictures come twice, or were kept by an earlier run, and reading is faster than computing."""
    folder: Path | None = None
    """Where; several runs with the same tower may share a folder. Default: `features` in the folder of the run."""
    limit_gib: float = Field(default=20.0, gt=0)
    """Nothing is added once the folder of a tower holds this much."""


class VlmRecipe(StageRecipe):
    """Keys of the stages that train a vision-language model."""

    model: VlmConfig
    """A model to load, or the parts to compose one of."""
    template: str = "model"
    """Conversation template: a name of the table in `data/templates.py`, or `model` for the model's own. It is saved
    with the model as a Jinja chat template. `plain` makes a captioning model: its prompt is the picture alone, and the
    words of a user are left out when it is used, too."""
    max_length: int = Field(default=2048, ge=8)
    """Longest row in tokens, picture tokens included; longer rows are reported, never cut."""
    trees: bool = True
    """Compute what rows about one picture have in common once, and no padding. The result is the same up to rounding;
    `false` expands them to padded rows, as families do whose attention is not known."""
    head_kernel: HeadKernel = "plain"
    """What makes log-probabilities of hidden states: `plain`, chunks of logits, or on a GPU the kernel of the package
    `cut_cross_entropy`, which holds none."""
    features: FeaturesConfig = FeaturesConfig()
    """What is kept of pictures where the vision tower is frozen."""


class TuneRecipe(VlmRecipe):
    """Next-token training: align a connector, caption, instruct."""

    stage: Literal["tune"]
    """Selects this stage."""
    objective: LanguageConfig | BagOfWordsConfig = Field(default=LanguageConfig(), discriminator="kind")
    """What is minimised: next-token loss, or, to align a connector with a frozen language model, `bag_of_words`."""
    evaluation: TuneEvaluationConfig | None = None
    """Held-out measurements during training and at the end."""


class PreferenceRecipe(VlmRecipe):
    """Preference optimisation on pairs of answers."""

    stage: Literal["preference"]
    """Selects this stage."""
    data: tuple[PairDataset, ...] = Field(min_length=1)
    """Data sets to train on."""
    objective: DpoConfig = DpoConfig()
    """What is minimised."""
    evaluation: PreferenceEvaluationConfig | None = None
    """Held-out measurements during training and at the end."""
    reference: Literal["auto", "precomputed", "frozen", "adapter_off"] = "auto"
    """Where the log-probabilities of the model to stay near come from: `precomputed` once for every row before training
    and kept on disk, so that steps pay for one model only; from a `frozen` copy; or from the policy with its adapters
    switched off (`adapter_off`). `auto`: precomputed where every row is used, else adapter_off where adapters are all
    that trains, else frozen."""


class ContrastiveRecipe(StageRecipe):
    """Contrastive pre-training of two towers."""

    stage: Literal["contrastive"]
    """Selects this stage."""
    model: DualEncoderConfig
    """The two towers."""
    loader: Annotated[LoaderConfig, AfterValidator(_refuse_auto)]
    """How rows become batches; `micro_batch` is a number."""
    objective: ContrastiveConfig = ContrastiveConfig()
    """What is minimised."""
    max_length: int = Field(default=64, ge=2)
    """Longest caption in tokens."""
    truncate_captions: bool = False
    """Cut longer captions instead of reporting them."""
