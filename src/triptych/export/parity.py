"""Is the folder on disk the model in memory? Checked in a fresh process with transformers alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from triptych.core.errors import ModelError, Problem
from triptych.models.modes import evaluation_mode

TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit, of the same weights."""
MERGED_TOLERANCE = 1e-4
"""The same for adapters that were merged into float32 weights, which adds a rounding to each."""


@dataclass(frozen=True)
class Expected:
    """What the model says before it is written."""

    logits: Tensor
    """[1, L, V], or [pictures, texts] of a dual encoder."""
    answer: list[int]
    """Token ids of the greedy continuation; empty for a dual encoder."""


@dataclass(frozen=True)
class Parity:
    """What the comparison found."""

    logit_difference: float
    """Largest absolute difference of a logit over the largest absolute logit."""
    same_answer: bool
    """Greedy continuations are equal."""
    answer: list[int]
    """Token ids of the continuation."""
    processor: Mapping[str, Tensor]
    """What the folder's own processor makes of the probe picture and prompt; empty when none were given."""


def expect(model: PreTrainedModel, inputs: Mapping[str, Tensor], max_new_tokens: int) -> Expected:
    """Ask the model in memory, whatever adapters it has in place.

    Args:
        model: In float32 on the CPU.
        inputs: One row of the model's own keyword arguments (ids, pixels, ...), no padding.
        max_new_tokens: Length of the greedy continuation; 0 for a dual encoder.
    """
    with evaluation_mode(model), torch.no_grad():
        if not max_new_tokens:
            return Expected(model(**inputs).logits_per_image.float(), [])
        assert isinstance(model, GenerationMixin)
        logits = model(**inputs).logits.float()
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return Expected(logits, generated[0, inputs["input_ids"].shape[1] :].tolist())


def verify(
    expected: Expected,
    folder: Path,
    inputs: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    picture: Tensor | None = None,
    prompt: str = "",
    max_new_tokens: int = 16,
) -> Parity:
    """Compare what a model said with what plain transformers loads from `folder`.

    Args:
        expected: What the model that was saved said.
        folder: A Hugging Face folder.
        inputs: As for `expect`.
        tolerance: Largest difference of a logit, relative to the largest logit.
        picture: [H, W, 3] uint8, for the folder's processor; None where transformers cannot build one here.
        prompt: User text that goes with it.
        max_new_tokens: As for `expect`.

    Raises:
        ModelError: the folder does not load, or logits or answers differ. Answers may differ where the tolerance is
            above `MERGED_TOLERANCE`, as tokens that are nearly as likely then change places.
    """
    saved = {name: value.contiguous() for name, value in inputs.items()}
    if picture is not None:
        saved["probe_picture"] = picture.contiguous()
        saved["probe_prompt"] = torch.tensor(list(prompt.encode("utf-8")), dtype=torch.uint8)
    found = _probe(folder, saved, max_new_tokens)
    difference = float((found["logits"] - expected.logits).abs().max() / expected.logits.abs().max())
    same = found["generated"].tolist() == expected.answer
    if not difference <= tolerance or (not same and tolerance <= MERGED_TOLERANCE):
        raise ModelError(
            Problem(
                f"plain transformers loads another model: logits differ by {difference:.1e} of the largest "
                f"(at most {tolerance:.0e}), greedy answers are {'equal' if same else 'different'}",
                file=str(folder),
                remedy="do not use this folder; report the recipe that made it",
            )
        )
    view = {name.removeprefix("processor/"): value for name, value in found.items() if name.startswith("processor/")}
    return Parity(difference, same, expected.answer, view)


def _probe(folder: Path, inputs: Mapping[str, Tensor], max_new_tokens: int) -> dict[str, Tensor]:
    script = Path(__file__).with_name("plain_probe.py")
    with tempfile.TemporaryDirectory() as temporary:
        files = [str(Path(temporary) / name) for name in ("inputs.safetensors", "outputs.safetensors")]
        save_file(dict(inputs), files[0])
        command = [sys.executable, str(script), str(folder), *files, str(max_new_tokens)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise ModelError(
                Problem(
                    f"plain transformers cannot load the folder:\n{result.stderr.strip()[-2000:]}",
                    file=str(folder),
                    remedy="see the last line above",
                )
            )
        return load_file(files[1])
