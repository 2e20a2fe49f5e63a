"""Recipes of tiny models on a few drawn pictures: real files, trained by the real command in a second or two."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from tests.tiny import tiny_tokenizer
from triptych.data.scenes import NAMES, glyph

QUESTION = "What is in the picture?"

VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "attention_dropout": 0.1,
}
LANGUAGE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}
TEXT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
}


@dataclass(frozen=True)
class Files:
    """A tokenizer and data on disk."""

    tokenizer: Path
    data: Path


def write_names(folder: Path, split: str, count: int) -> None:
    """`count` small pictures of each name, questions about them (`.json`) and captions (`.csv`)."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    generator = random.Random(split)
    rows, captions = [], ["filepath\ttitle"]
    for number, name in itertools.product(range(count), NAMES):
        file, item = f"{split}-{number:03d}-{name}.png", glyph(name, generator.randint(14, 28))
        scene = Image.new("RGB", (32, 32), (generator.randint(200, 255), 240, 240))
        scene.paste(item, (generator.randint(0, 4), generator.randint(0, 4)), item)
        scene.save(pictures / file)
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": name}]
        rows.append({"id": file.removesuffix(".png"), "image": file, "conversations": turns})
        captions.append(f"{file}\ta picture of a {name}")
    (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))
    (folder / f"{split}.csv").write_text("\n".join(captions) + "\n")


def write_files(folder: Path, rows_per_name: int = 1) -> Files:
    """A tokenizer, 24 pictures for each of `rows_per_name`, questions, captions and preference pairs about them."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    names = list(NAMES)
    for split, count in (("train", rows_per_name), ("test", 1)):
        write_names(folder / "data", split, count)
    rows = json.loads((folder / "data" / "train.json").read_text())
    pairs = [
        {
            "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}],
            "chosen": {"from": "gpt", "value": row["conversations"][1]["value"]},
            "rejected": {"from": "gpt", "value": f"it is a {names[number % len(names)]}, I think"},
            "images": [row["image"]],
        }
        for number, row in enumerate(rows, 7)
    ]
    (folder / "data" / "pairs.json").write_text(json.dumps(pairs, indent=1))
    return Files(folder / "tokenizer", folder / "data")


def vlm(files: Files) -> dict[str, Any]:
    """The `model` section of a composed VLM."""
    return {
        "vision": {"config": VISION},
        "connector": {"kind": "mlp"},
        "language": {"config": LANGUAGE, "tokenizer": str(files.tokenizer)},
    }


def dual_encoder(files: Files) -> dict[str, Any]:
    """The `model` section of a dual encoder."""
    return {
        "vision": {"config": VISION},
        "text": {"config": TEXT, "tokenizer": str(files.tokenizer)},
        "projection_dim": 16,
    }


def tune(files: Files) -> dict[str, Any]:
    """Everything trains; evaluation, the best metric, two epochs whose last window is ragged."""
    pictures = str(files.data / "pictures")
    return {
        "stage": "tune",
        "model": vlm(files),
        "template": "chatml",
        "max_length": 128,
        "lr": 3.0e-3,
        "tuning": [{"match": part, "method": "full"} for part in ("vision", "connector", "language")],
        "data": [{"format": "llava", "path": str(files.data / "train.json"), "images": pictures}],
        "loader": {"global_batch": 5, "micro_batch": 2, "epochs": 2},
        "evaluation": {
            "data": [{"format": "llava", "path": str(files.data / "test.json"), "images": pictures}],
            "batch": 12,
        },
        "train": {
            "save_every": 2,
            "keep_last": 2,
            "evaluate_every": 3,
            "best": {"metric": "loss", "patience": 50},
            "log_every": 1,
        },
    }


def contrastive(files: Files) -> dict[str, Any]:
    """Two passes over every window, a temperature, dropout in the text tower, a weighted mixture of two files."""
    captions = {"format": "captions", "images": str(files.data / "pictures")}
    return {
        "stage": "contrastive",
        "model": dual_encoder(files),
        "max_length": 48,
        "lr": 3.0e-3,
        "tuning": [{"match": part, "method": "full"} for part in ("vision", "text", "projection", "temperature")],
        "data": [
            {**captions, "path": str(files.data / "train.csv"), "weight": 0.7},
            {**captions, "path": str(files.data / "test.csv"), "weight": 0.3},
        ],
        "loader": {"global_batch": 9, "micro_batch": 4, "epochs": 2},
        "objective": {"kind": "contrastive", "loss": "clip"},
        "train": {"save_every": 1, "keep_last": 2, "log_every": 1},
    }


def preference(files: Files) -> dict[str, Any]:
    """LoRA with dropout; the reference is the model with its adapters switched off."""
    pictures = str(files.data / "pictures")
    return {
        "stage": "preference",
        "model": vlm(files),
        "template": "chatml",
        "max_length": 160,
        "lr": 3.0e-3,
        "tuning": [
            {"match": "vision", "method": "frozen"},
            {"match": "connector", "method": "frozen"},
            {"match": "language.layers[0:1]", "method": "lora", "rank": 4, "dropout": 0.2},
            {"match": "language.layers[1:2]", "method": "lora", "rank": 2, "dropout": 0.1},
            {"match": "language", "method": "frozen"},
        ],
        "data": [{"format": "preference", "path": str(files.data / "pairs.json"), "images": pictures}],
        "loader": {"global_batch": 5, "micro_batch": 2, "epochs": 2},
        "objective": {"kind": "dpo", "beta": 0.3},
        "train": {"save_every": 1, "keep_last": 3, "log_every": 1},
    }


RECIPES: dict[str, Callable[[Files], dict[str, Any]]] = {
    "language": tune,
    "contrastive": contrastive,
    "dpo": preference,
}
"""Objective -> the recipe that trains with it, without its `output`."""


def write_recipe(file: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file
