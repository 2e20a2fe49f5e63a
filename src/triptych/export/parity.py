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
"""Largest difference of a logit, relative to the largest logit."""


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


def verify(
    model: PreTrainedModel,
    folder: Path,
    inputs: Mapping[str, Tensor],
    *,
    picture: Tensor | None = None,
    prompt: str = "",
    max_new_tokens: int = 16,
) -> Parity:
    """Compare `model` with what plain transformers loads from `folder`.

    Args:
        model: The model that was saved, in fp32 on the CPU.
        folder: A Hugging Face folder.
        inputs: One row of the model's own keyword arguments (ids, pixels, ...), no padding.
        picture: [H, W, 3] uint8, for the folder's processor; None where transformers cannot build one here.
        prompt: User text that goes with it.
        max_new_tokens: Length of the greedy continuation.

    Raises:
        ModelError: the folder does not load, or logits or answers differ.
    """
    assert isinstance(model, GenerationMixin)
    with evaluation_mode(model), torch.no_grad():
        logits = model(**inputs).logits.float()
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = generated[0, inputs["input_ids"].shape[1] :]
    saved = {name: value.contiguous() for name, value in inputs.items()}
    if picture is not None:
        saved["probe_picture"] = picture.contiguous()
        saved["probe_prompt"] = torch.tensor(list(prompt.encode("utf-8")), dtype=torch.uint8)
    loaded = _probe(folder, saved, max_new_tokens)
    difference = float((loaded["logits"] - logits).abs().max() / logits.abs().max())
    same = loaded["generated"].tolist() == answer.tolist()
    if difference > TOLERANCE or not same:
        raise ModelError(
            Problem(
                f"plain transformers loads another model: logits differ by {difference:.1e} of the largest "
                f"(at most {TOLERANCE:.0e}), greedy answers are {'equal' if same else 'different'}",
                file=str(folder),
                remedy="do not use this folder; report the recipe that made it",
            )
        )
    view = {name.removeprefix("processor/"): value for name, value in loaded.items() if name.startswith("processor/")}
    return Parity(difference, same, answer.tolist(), view)


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
