"""The records that flow between folders. All frozen; a tensor field states its shape.

Shapes: R rows (branches, expanded), L padded length, S supervised positions of the batch in row-major order,
P pairs, N pictures. Token positions are *not* shifted anywhere: `labels[r, t]` is the token at position t or
`IGNORE`; the model predicts it from position t - 1, which is why column 0 is never supervised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree

IGNORE = -100
"""Label of a position that is not supervised."""

CONTEXT = "context"
"""Name in `token_values`: how much a token counts as the context of the looked-for word before it (`bag_of_words`)."""


class TokenKind(IntEnum):
    """What a token is; its default loss weight follows from it (`data/tokenize.py`)."""

    PADDING = 0
    SPECIAL = 1
    """Beginning of sequence, role markers, separators: given at inference, never supervised."""
    SYSTEM = 2
    INSTRUCTION = 3
    IMAGE = 4
    RESPONSE = 5
    END_OF_TURN = 6
    """What closes an assistant turn; supervised, so that the model learns to stop."""
    BOX = 7
    ENTITY = 8


Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sample came from; every error and report row names it."""

    file: str
    """Path of the file as given in the recipe."""
    line: int
    """1-based line (JSON Lines, CSV), row (JSON list, Parquet) or member group (tar)."""
    id: str = ""
    """Identifier in the record, or generated from file and line."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" ({self.id})" if self.id else "")


class PictureRows(Protocol):
    """A table whose pictures are read when they are needed."""

    def read_picture(self, cell: tuple[int | str, ...]) -> bytes:
        """The encoded bytes in a cell; see `ImageReference.cell`."""
        ...


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A picture not yet decoded: a file inside the image root, a slice of a file, a cell of a table, or bytes."""

    path: str | None = None
    """Absolute, already resolved path; None when the picture is in `rows` or `data`."""
    data: bytes | None = field(default=None, repr=False)
    """Encoded bytes (JPEG, PNG, ...) of rows that carry their pictures as text; all others are read when needed."""
    name: str = ""
    """The spelling in the record, for messages."""
    offset: int | None = None
    """First byte of the picture inside the file, such as a tar; None when it is the whole file."""
    size: int | None = None
    """Bytes of the picture; given with `offset`."""
    rows: PictureRows | None = field(default=None, repr=False)
    """Table that holds the picture."""
    cell: tuple[int | str, ...] = ()
    """Where in `rows`: the row, the column, and the keys and positions inside the column's value."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two spellings of one picture: where it is, or its bytes."""
        return self.path, self.offset, self.rows, self.cell, self.data


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of a message."""

    text: str
    kind: TokenKind | None = None
    """Overrides the kind that follows from the role, e.g. BOX or ENTITY."""


Part = Text | ImageReference


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]
    weight: float = 1.0
    """Loss weight of this turn; 0 turns supervision off. Only assistant turns are supervised by default."""

    @property
    def images(self) -> tuple[ImageReference, ...]:
        """The pictures of this turn, in order."""
        return tuple(part for part in self.parts if isinstance(part, ImageReference))

    @property
    def text(self) -> str:
        """The text parts joined, without pictures."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Box:
    """A box in pixels of the original picture (after EXIF rotation), origin top left."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""
    image: int = 0
    """Index of the picture among the sample's pictures."""


@dataclass(frozen=True, slots=True)
class Pair:
    """`winner` is preferred to `loser`; both index the branches of one example."""

    winner: int
    loser: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Preference:
    """Several answers to one prompt and who beats whom."""

    answers: tuple[tuple[Message, ...], ...]
    """Each answer is the turns that follow the prompt (usually one assistant turn)."""
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a data set, in the form every format is read into."""

    messages: tuple[Message, ...]
    """The whole conversation; with `preference`, the prompt alone. A caption pair is one user turn holding the
    picture and one assistant turn holding the caption."""
    origin: Origin
    preference: Preference | None = None
    boxes: tuple[Box, ...] = ()
    task: str = ""
    """Task tag (caption, vqa, ocr, grounding, ...) for weights, sampling and evaluation."""
    weight: float = 1.0

    @property
    def images(self) -> tuple[ImageReference, ...]:
        """All pictures: those of the messages, then those of each answer, in order."""
        answers = self.preference.answers if self.preference else ()
        turns = (*self.messages, *(message for answer in answers for message in answer))
        return tuple(image for message in turns for image in message.images)


@dataclass(frozen=True, slots=True)
class Branch:
    """What one answer adds to the trunk. All tensors [n], n the number of the branch's own tokens."""

    input_ids: Tensor
    labels: Tensor
    """[n] the token itself where supervised, else IGNORE."""
    kinds: Tensor
    """[n] uint8 TokenKind."""
    weights: Tensor
    """[n] float32 message weight x sample weight, before the kind's weight."""
    images: tuple[int, ...] = ()
    """Indices into `Example.images` of the branch's own pictures, in order."""
    token_values: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> one number per supervised token of the *row* (trunk labels first), e.g. reference log-probs."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """name -> one number for the branch: rank, score, desirable."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised sample as a tree: a trunk that every branch sees, and branches that never see each other.

    The trunk is the longest common token prefix that holds whole pictures and at least one token. Trunk labels count
    once per branch, as rows would.
    """

    trunk: Branch
    branches: tuple[Branch, ...]
    images: tuple[ImageReference, ...]
    image_sizes: tuple[tuple[int, int], ...]
    """(width, height) of each picture as decoded (after EXIF rotation)."""
    origin: Origin
    pairs: tuple[Pair, ...] = ()
    task: str = ""
    text_key: int = 0
    """Stable 63-bit hash of the normalised caption; equal captions have equal keys (multi-positive targets)."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows this tree expands to."""
        return sum(len(self.trunk.input_ids) + len(branch.input_ids) for branch in self.branches)

    @property
    def max_row_tokens(self) -> int:
        """Tokens of the longest row."""
        return len(self.trunk.input_ids) + max(len(branch.input_ids) for branch in self.branches)


@dataclass(frozen=True)
class PictureInput:
    """One picture of a batch where the states of a frozen tower are kept; either pixels or features."""

    key: str
    """Digest of the picture's encoded bytes."""
    pixels: Mapping[str, Tensor] | None = None
    """Vision inputs of this picture alone, by the model's own argument names."""
    features: Mapping[str, Tensor] | None = None
    """What the store kept of it."""

    def to(self, device: torch.device | str) -> PictureInput:
        """Return it with every tensor on `device`."""

        def moved(tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
            return tensors and {name: value.to(device, non_blocking=True) for name, value in tensors.items()}

        return PictureInput(self.key, moved(self.pixels), moved(self.features))


@dataclass(frozen=True)
class Batch:
    """A micro-batch: trees expanded to rows, right-padded. Light until `pixels` is attached."""

    input_ids: Tensor
    """[R, L] int64; padding holds 0 and is hidden by `lengths`, never by its id."""
    labels: Tensor
    """[R, L] int64; IGNORE where not supervised and in column 0."""
    weights: Tensor
    """[R, L] float32 loss weight per token; 0 where `labels` is IGNORE."""
    kinds: Tensor
    """[R, L] uint8 TokenKind."""
    lengths: Tensor
    """[R] int64 tokens of each row."""
    example_index: Tensor
    """[R] int64 index, within this batch, of the example each row is a branch of."""
    tree_index: Tensor
    """[R] int64 index, within this batch, of the tree each row is computed in: the rows of one tree stand together and
    begin with the same tokens and pictures. A tree holds the branches of an example, or of several."""
    trunk_lengths: Tensor
    """[R] int64 tokens that the row shares with all rows of its tree; in a tree of one row, those before its branch."""
    images: tuple[ImageReference, ...]
    """N different pictures of the batch (one picture of a tree appears once)."""
    row_images: tuple[tuple[int, ...], ...]
    """For each row, the indices into `images` of its pictures in order of appearance."""
    origins: tuple[Origin, ...]
    """For each row."""
    tasks: tuple[str, ...]
    """For each row."""
    pairs: Tensor
    """[P, 2] int64 (winner row, loser row)."""
    pair_weights: Tensor
    """[P] float32."""
    text_keys: Tensor
    """[R] int64; equal for equal captions."""
    token_values: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [S] float32."""
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> [R] float32; NaN where a row lacks the fact."""
    pixels: Mapping[str, Tensor] | None = None
    """Vision inputs of `images` in order, by the model's own argument names; None while the batch is light."""
    picture_inputs: tuple[PictureInput, ...] | None = None
    """Instead of `pixels`, for each of `images`, where the states of a frozen tower are kept."""
    is_padding: bool = False
    """True for a batch that only keeps this rank in step with the others; its loss counts nothing."""

    @property
    def num_rows(self) -> int:
        """R."""
        return self.input_ids.shape[0]

    @property
    def num_examples(self) -> int:
        """Trees in this batch; a padding batch counts none."""
        if self.is_padding or self.num_rows == 0:
            return 0
        return int(self.example_index[-1]) + 1

    @cached_property
    def supervised(self) -> Tensor:
        """[R, L] bool: positions whose token is predicted and scored."""
        return self.labels != IGNORE

    @cached_property
    def supervised_rows(self) -> Tensor:
        """[S] int64: the row of each supervised position."""
        return self.supervised.nonzero()[:, 0]

    @cached_property
    def supervised_weights(self) -> Tensor:
        """[S] float32: the weight of each supervised position."""
        return self.weights[self.supervised]

    @property
    def attention_mask(self) -> Tensor:
        """[R, L] int64, 1 on real tokens; made from lengths, so a pad id that equals eos hides nothing."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (positions[None, :] < self.lengths[:, None]).long()

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        moved: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = value.to(device, non_blocking=True)
            elif isinstance(value, Mapping):
                moved[item.name] = {key: tensor.to(device, non_blocking=True) for key, tensor in value.items()}
        if self.picture_inputs is not None:
            moved["picture_inputs"] = tuple(item.to(device) for item in self.picture_inputs)
        return replace(self, **moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Window:
    """The light batches of one optimizer step on one rank."""

    index: int
    """0-based number of the window since the start of the run."""
    epoch: float
    """Passes over the data finished when this window is done; may be fractional."""
    batches: tuple[Batch, ...]
    skipped: tuple[Origin, ...] = ()
    """Rows that could not be used and were reported; nothing takes their place."""


@dataclass(frozen=True)
class WindowValues:
    """What an objective observed over the whole window, joined over micro-batches and ranks in sample order."""

    values: Mapping[str, Tensor]
    """name -> [rows of the window on all ranks, ...], or 0-d for a shared parameter such as the temperature."""
    starts: Mapping[str, int]
    """name -> first row of this micro-batch within `values[name]`."""
    counts: Mapping[str, int]
    """name -> rows of this micro-batch within `values[name]`."""

    def local(self, name: str) -> Tensor:
        """The rows that this micro-batch contributed, [count, ...]."""
        return self.values[name].narrow(0, self.starts[name], self.counts[name])


ScoreField = Literal[
    "token_logprobs",
    "word_logprobs",
    "silence_logprobs",
    "picture_distances",
    "values",
    "rewards",
    "image_embeddings",
    "text_embeddings",
    "logit_scale",
    "logit_bias",
    "boxes",
    "masks",
]


@dataclass(frozen=True)
class Scores:
    """What a model tells an objective. A scorer fills the fields in the objective's `needs`, no others."""

    token_logprobs: Tensor | None = None
    """[S] float32 natural log of p(label) at every supervised position."""
    word_logprobs: Tensor | None = None
    """[S] float32 natural log of the probability that the row's pictures name the label, see `PictureWords`."""
    silence_logprobs: Tensor | None = None
    """[R] float32 natural log of the probability that the row's pictures name no word."""
    picture_distances: Tensor | None = None
    """[R] float32 mean squared distance of picture tokens to the words they name, over the words' mean square."""
    values: Tensor | None = None
    """[S] float32 value estimates."""
    rewards: Tensor | None = None
    """[R] float32."""
    image_embeddings: Tensor | None = None
    """[R, D] float32, not normalised."""
    text_embeddings: Tensor | None = None
    """[R, D] float32, not normalised."""
    logit_scale: Tensor | None = None
    """0-d float32, the multiplier exp(parameter) already applied and clamped."""
    logit_bias: Tensor | None = None
    """0-d float32 (SigLIP)."""
    boxes: Tensor | None = None
    masks: Tensor | None = None
    auxiliary: Tensor | None = None
    """0-d sum over rows of the model's own extra loss (mixture-of-experts router), or None."""


# FSDP2 finds the tensors of a module's output by flattening pytrees; an unregistered dataclass would hide them.
_pytree.register_dataclass(Scores, field_names=[item.name for item in fields(Scores)], drop_field_names=[])


@dataclass(frozen=True)
class Progress:
    """Where the run is when a step is taken."""

    step: int
    """Optimizer steps already taken."""
    total: int | None
    """Optimizer steps of the whole run, None for an endless source."""
    epoch: float = 0.0

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 for an endless source."""
        return min(1.0, self.step / self.total) if self.total else 0.0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share component, learning rate and weight decay."""

    name: str
    """Unique name shown in logs, e.g. `language.lora`."""
    component: str
    """vision, connector, language, heads, ...: the unit of component-wise clipping."""
    parameters: Mapping[str, torch.nn.Parameter]
    """Qualified name -> parameter; the optimizer applies no decay where its shape rule says so."""
    lr: float
    """Peak learning rate."""
    weight_decay: float


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did, reduced over ranks; what monitors see."""

    progress: Progress
    """After the step."""
    loss: float
    """The number that was minimised: sum of coefficient x term / global weight."""
    terms: Mapping[str, float]
    """Each term divided by its global weight, without its coefficient."""
    metrics: Mapping[str, float]
    learning_rates: Mapping[str, float]
    """Parameter group -> learning rate used in this step."""
    gradient_norm: float
    """Global L2 norm before clipping."""
    component_gradient_norms: Mapping[str, float]
    samples: int
    """Examples in the window, all ranks."""
    supervised_tokens: int
    """Supervised tokens in the window, all ranks."""
    tokens: int
    """Tokens in the window without padding, all ranks."""
    seconds: float
    """Wall time of the step, data included."""
    data_seconds: float
    """Part of `seconds` spent waiting for data."""
    memory_bytes: int
    """Peak device memory so far; resident memory of the process on CPU."""
    skipped_rows: int = 0
    """Rows of the window left out and reported, all ranks."""
    is_skipped: bool = False
    """True when the fp16 scaler refused the step because of an overflow."""
