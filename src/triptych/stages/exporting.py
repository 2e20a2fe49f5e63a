"""`triptych export`: a checkpoint of a run as a plain Hugging Face folder, proved to be the same model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from triptych.core.config import did_you_mean, load_tree, validate
from triptych.core.errors import ConfigError, ModelError, Problem
from triptych.core.types import Message, Text
from triptych.engine.checkpoint import read
from triptych.engine.state import restore_tensors, seed_everything
from triptych.export.parity import MERGED_TOLERANCE, TOLERANCE, Expected, Parity, expect, verify
from triptych.models.adapters import adapter_names
from triptych.models.dual_encoder import LoadedDualEncoder
from triptych.models.generation import Prompt, prompt_inputs
from triptych.models.load import LoadedVlm
from triptych.stages.contrastive import load_contrastive
from triptych.stages.pipeline import find_stage
from triptych.stages.recipe import ContrastiveRecipe, StageRecipe, VlmRecipe
from triptych.stages.saving import ADAPTERS, Loaded, write_model
from triptych.stages.table import STAGES
from triptych.stages.using import MAX_CONTEXT, drawn
from triptych.stages.vlm import build_vlm, make_encoder, template_name

QUESTION = "What is in the picture?"
NEW_TOKENS = 12
"""Length of the greedy answer that is compared."""


@dataclass(frozen=True)
class Probe:
    """What the model in memory and the one on disk are asked."""

    inputs: dict[str, Tensor]
    picture: Tensor | None
    """[H, W, 3] uint8 for the saved processor; None where transformers cannot build one here."""
    new_tokens: int
    """0 for a dual encoder, which writes nothing."""


def export_run(run: Path, output: Path | None, checkpoint: str) -> Parity:
    """Write a checkpoint of a run as a plain Hugging Face folder and verify it in a fresh process.

    What is on disk is compared with the trained model as it is in training, its adapters in place: a wrong merge is
    found like a wrong file.

    Raises:
        ConfigError: the folder is not a run, or the output belongs to the run.
        CheckpointError: the checkpoint does not fit.
        ModelError: what plain transformers loads is not the same model; the folder is kept for inspection.
    """
    tree = load_tree(run / "recipe.yaml")
    schema, _ = STAGES[find_stage(tree)]
    recipe = validate(schema, tree)
    target = output or run / "export"
    own = {run / name for name in ("", "model", "checkpoints", ADAPTERS)}
    if target.resolve() in {folder.resolve() for folder in own}:
        message = "this folder belongs to the run; exporting into it would replace the run's files"
        raise ConfigError(Problem(message, file=str(target), key="--output", remedy=f"use e.g. {run / 'export'}"))
    # A checkpoint holds what was trained; parts that started at random and stayed frozen come from the seed again.
    seed_everything(recipe.train.seed)
    loaded = load_as_trained(recipe)
    restore(loaded.model, find_checkpoint(run / "checkpoints", checkpoint))
    probe = make_probe(loaded)
    tolerance = _tolerance(loaded.model)
    with in_float32(loaded.model):
        expected = expect(loaded.model, probe.inputs, probe.new_tokens)
    write_model(target, loaded)
    parity = check_parity(expected, target, probe, tolerance)
    if isinstance(loaded, LoadedVlm):
        _check_processor(parity, probe, target)
    compared = "the same greedy answer" if probe.new_tokens else "the same similarities"
    Console().print(
        f"{target}: plain transformers gives {compared} as the model in training; largest difference of a logit "
        f"{parity.logit_difference:.1e} of the largest",
        soft_wrap=True,
    )
    return parity


def load_as_trained(recipe: StageRecipe) -> Loaded:
    """The model of a recipe as it starts, tuned; call with the run's seed set."""
    if isinstance(recipe, VlmRecipe):
        return build_vlm(recipe).loaded
    assert isinstance(recipe, ContrastiveRecipe)
    return load_contrastive(recipe)[0]


def restore(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint into a model.

    Raises:
        CheckpointError: they are not those that the recipe trains.
    """
    snapshot = read(folder)
    # Not the state_dict: it leaves out buffers that a checkpoint holds. A scorer calls the model `hf`.
    targets = {f"hf.{name}": item for name, item in (*model.named_parameters(), *model.named_buffers())}
    trained = {f"hf.{name}" for name, item in model.named_parameters() if item.requires_grad}
    saved = {name: item for name, item in targets.items() if name in snapshot.weights or name in trained}
    restore_tensors(saved, snapshot.weights, "weights")


def find_checkpoint(checkpoints: Path, name: str) -> Path:
    """The folder of a checkpoint; `best` falls back to `last` where a run followed no metric."""
    folder = checkpoints / name
    if not folder.exists() and name == "best":
        folder = checkpoints / "last"
    if not folder.exists():
        names = sorted(item.name for item in checkpoints.iterdir()) if checkpoints.is_dir() else []
        remedy = did_you_mean(name, names) if names else "train first: triptych train RECIPE"
        raise ConfigError(Problem(f"no checkpoint `{name}`", file=str(checkpoints), remedy=remedy))
    return folder


def make_probe(loaded: Loaded) -> Probe:
    """A noise picture and a question, or two pictures and a caption for a dual encoder."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if isinstance(loaded, LoadedDualEncoder):
        pair = [picture, picture.transpose(Image.Transpose.ROTATE_90)]
        text = loaded.tokenizer(QUESTION, return_tensors="pt")
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: text[name] for name in names if name in text}
        inputs["pixel_values"] = loaded.image_processor(pair, return_tensors="pt")["pixel_values"]
        return Probe(inputs, None, 0)
    encoder = make_encoder(loaded, template_name(loaded), MAX_CONTEXT)
    example = encoder.encode_prompt([Message("user", (drawn(picture, "probe"), Text(QUESTION)))])
    inputs = prompt_inputs(loaded.model, [Prompt(example.trunk.input_ids, (picture,))], loaded.pictures, pad=0)
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    has_processor = loaded.source is None
    return Probe(inputs, torch.from_numpy(pixels) if has_processor else None, NEW_TOKENS)


def check_parity(expected: Expected, folder: Path, probe: Probe, tolerance: float) -> Parity:
    """Compare what the model said in memory with what plain transformers loads."""
    picture = probe.picture if (folder / "processor_config.json").is_file() else None
    return verify(
        expected,
        folder,
        probe.inputs,
        tolerance=tolerance,
        picture=picture,
        prompt=QUESTION,
        max_new_tokens=probe.new_tokens,
    )


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32; each parameter and buffer then has its own type again, its value unchanged."""
    tensors = [item for item in (*model.parameters(), *model.buffers()) if item.is_floating_point()]
    kept = [item.data for item in tensors]
    model.float()
    try:
        yield
    finally:
        for item, data in zip(tensors, kept, strict=True):
            item.data = data


def _tolerance(model: nn.Module) -> float:
    if not adapter_names(model):
        return TOLERANCE
    is_wide = all(item.dtype in (torch.float32, torch.float64) for item in model.parameters())
    return MERGED_TOLERANCE if is_wide else MERGED_TOLERANCE * 500  # a merged weight is rounded to 8 bits


def _check_processor(parity: Parity, probe: Probe, folder: Path) -> None:
    theirs, ours = parity.processor.get("input_ids"), probe.inputs["input_ids"][0]
    if theirs is not None and theirs[0].tolist() != ours.tolist():
        message = f"the saved processor makes {theirs.shape[1]} prompt tokens, training {len(ours)}, or others"
        raise ModelError(Problem(message, file=str(folder), remedy="report the recipe that made this model"))
