"""Using a trained model: `chat` and `export`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from triptych.core.config import did_you_mean, load_tree, validate
from triptych.core.errors import ConfigError, DataError, ModelError, Problem, TriptychError
from triptych.core.types import ImageReference, Message, Part, Text
from triptych.data.images import decode, resolve_image
from triptych.data.scene_questions import describe
from triptych.data.scenes import draw, sample_scene
from triptych.engine.checkpoint import read
from triptych.engine.state import restore_tensors, seed_everything
from triptych.evaluation.answers import Answering
from triptych.export.parity import Parity, verify
from triptych.models.generation import Prompt, prompt_inputs
from triptych.models.load import LoadedVlm, VlmConfig, load_vlm
from triptych.stages.pipeline import find_stage
from triptych.stages.recipe import VlmRecipe
from triptych.stages.saving import ADAPTERS, write_model
from triptych.stages.table import STAGES
from triptych.stages.vlm import build_vlm, context_length, make_answering, make_encoder, template_name

MAX_CONTEXT = 8192
"""Longest conversation in tokens where the model names no limit."""

DUAL_ENCODERS = {"VisionTextDualEncoderModel", "CLIPModel", "SiglipModel"}
"""Classes of models that compare pictures and texts."""


def load_for_use(folder: Path) -> LoadedVlm:
    """Load a finished model.

    Raises:
        ModelError: there is none in the folder.
    """
    if not (folder / "config.json").is_file():
        inner = folder / "model"
        remedy = f"use {inner}" if (inner / "config.json").is_file() else "train one first: triptych train RECIPE"
        raise ModelError(Problem("no model in this folder (config.json is missing)", file=str(folder), remedy=remedy))
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["?"]
    if set(architectures) & DUAL_ENCODERS:
        message = f"this is a dual encoder ({architectures[0]}): it compares pictures and captions, it does not answer"
        remedy = "use a model of stage tune or preference; a dual encoder is measured by `evaluation` in its recipe"
        raise ModelError(Problem(message, file=str(folder), remedy=remedy))
    device, dtype = inference_device()
    loaded = load_vlm(VlmConfig.model_validate({"from": str(folder)}), dtype=dtype)
    loaded.model.to(device)
    return loaded


def inference_device() -> tuple[torch.device, torch.dtype]:
    """A GPU, in bfloat16 where it computes in it, or the CPU in float32."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda"), torch.bfloat16 if has_bfloat16 else torch.float32


def answering_of(loaded: LoadedVlm, max_new_tokens: int, batch: int = 16) -> Answering:
    """A loaded model as something that answers, in its own chat template."""
    limit = context_length(loaded) or MAX_CONTEXT
    return make_answering(loaded, make_encoder(loaded, template_name(loaded), limit), max_new_tokens, batch)


def chat_in_terminal(model: Path, image: str | None, system: str, max_new_tokens: int) -> None:
    """Talk until `/exit` or end of input; mistakes are reported and the conversation goes on."""
    console = Console(highlight=False)
    chat = Chat(answering_of(load_for_use(model), max_new_tokens, batch=1), system)
    if image is not None:
        console.print(chat.add_image(image), markup=False, soft_wrap=True)
    console.print("/image PATH or NUMBER adds a picture, /reset starts over, /exit leaves", style="dim")
    prompt = "[bold]you:[/bold] " if console.is_terminal else ""
    while True:
        try:
            line = console.input(prompt).strip()
        except EOFError:
            break
        if line == "/exit":
            break
        if not line:
            continue
        try:
            reply = chat.say(line)
        except TriptychError as error:
            console.print(f"error: {error}", markup=False, soft_wrap=True)
        else:
            speaker = "" if line.startswith("/") else "model: "
            console.print(f"{speaker}{reply or '(empty answer)'}", markup=False, soft_wrap=True)


class Chat:
    """A conversation with a model; pictures belong to the next question."""

    def __init__(self, answering: Answering, system: str = "") -> None:
        self.answering = answering
        self.system = system
        self.messages: list[Message] = []
        self.waiting: list[Part] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [Message("system", (Text(self.system),))] if self.system else []
        self.waiting = []

    def add_image(self, name: str) -> str:
        """Show a picture with the next question: a file, or the test scene with a number.

        Returns:
            What was added, in words.

        Raises:
            DataError: it is not a readable picture.
        """
        path = Path(name).expanduser().resolve()
        if name.isdigit() and not path.exists():
            scene = sample_scene("test", 0, int(name))
            self.waiting.append(_drawn(draw(scene), f"scene {name}"))
            return f"scene {name} ({describe(scene)})"
        if not path.is_file():
            remedy = "the path of a picture, absolute or from here, or the number of a test scene"
            raise DataError(Problem("no such picture", file=str(path), remedy=remedy))
        reference = resolve_image(path.parent, path.name)
        decode(reference)
        self.waiting.append(reference)
        return f"picture {name}"

    def say(self, line: str) -> str:
        """Handle one line of input; the reply, or a confirmation of a command.

        Raises:
            DataError: a picture cannot be read, or the conversation is too long; nothing has changed then.
        """
        command, _, argument = line.partition(" ")
        if command == "/image":
            if not argument.strip():
                raise DataError(Problem("no picture given", remedy="/image PATH, or /image NUMBER of a test scene"))
            return f"({self.add_image(argument.strip())} goes with your next question)"
        if command == "/reset":
            self.reset()
            return "(started over)"
        if command.startswith("/"):
            known = ("/image", "/reset", "/exit")
            raise DataError(Problem(f"`{command}` is not a command", remedy=did_you_mean(command, known)))
        messages = [*self.messages, Message("user", (*self.waiting, Text(line)))]
        (reply,) = self.answering.answer([messages])
        self.messages = [*messages, Message("assistant", (Text(reply),))]
        self.waiting = []
        return reply


def export_run(run: Path, output: Path | None, checkpoint: str) -> Parity:
    """Write a checkpoint of a run as a plain Hugging Face folder and verify it in a fresh process.

    Raises:
        ConfigError: the folder is not a run of a stage that can be exported.
        CheckpointError: the checkpoint does not fit.
        ModelError: what plain transformers loads is not the same model; the folder is kept for inspection.
    """
    tree = load_tree(run / "recipe.yaml")
    schema, _ = STAGES[find_stage(tree)]
    recipe = validate(schema, tree)
    if not isinstance(recipe, VlmRecipe):
        message = "a dual encoder needs no export"
        raise ConfigError(Problem(message, file=str(run), remedy=f"{run / 'model'} is a plain Hugging Face folder"))
    target = output or run / "export"
    own = {run / name for name in ("", "model", "checkpoints", ADAPTERS)}
    if target.resolve() in {folder.resolve() for folder in own}:
        message = "this folder belongs to the run; exporting into it would replace the run's files"
        raise ConfigError(Problem(message, file=str(target), key="--output", remedy=f"use e.g. {run / 'export'}"))
    # A checkpoint holds what was trained; parts that started at random and stayed frozen come from the seed again.
    seed_everything(recipe.train.seed)
    vlm = build_vlm(recipe)
    folder = find_checkpoint(run / "checkpoints", checkpoint)
    snapshot = read(folder)
    # Not the state_dict: it leaves out buffers that a checkpoint holds.
    targets = {**dict(vlm.scorer.named_parameters()), **dict(vlm.scorer.named_buffers())}
    trained = {name for name, item in vlm.scorer.named_parameters() if item.requires_grad}
    saved = {name: item for name, item in targets.items() if name in snapshot.weights or name in trained}
    restore_tensors(saved, snapshot.weights, "weights")
    write_model(target, vlm.loaded)
    parity = check_parity(vlm.loaded, target)
    Console().print(
        f"{target}: plain transformers gives the same greedy answer; largest difference of a logit "
        f"{parity.logit_difference:.1e} of the largest",
        soft_wrap=True,
    )
    return parity


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


def check_parity(loaded: LoadedVlm, folder: Path, max_new_tokens: int = 12) -> Parity:
    """Compare the model in memory with what plain transformers loads, on a drawn picture and a question."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    question = "What is in the picture?"
    encoder = make_encoder(loaded, template_name(loaded), MAX_CONTEXT)
    example = encoder.encode_prompt([Message("user", (_drawn(picture, "probe"), Text(question)))])
    model = loaded.model.float()
    inputs = prompt_inputs(model, [Prompt(example.trunk.input_ids, (picture,))], loaded.pictures, pad=0)
    has_processor = (folder / "processor_config.json").is_file() and loaded.source is None
    parity = verify(
        model,
        folder,
        inputs,
        picture=torch.from_numpy(pixels) if has_processor else None,
        prompt=question,
        max_new_tokens=max_new_tokens,
    )
    theirs = parity.processor.get("input_ids")
    if theirs is not None and theirs[0].tolist() != example.trunk.input_ids.tolist():
        raise ModelError(
            Problem(
                f"the saved processor makes {theirs.shape[1]} prompt tokens, training made "
                f"{len(example.trunk.input_ids)}, or they differ",
                file=str(folder),
                remedy="report the recipe that made this model",
            )
        )
    return parity


def _drawn(picture: Image.Image, name: str) -> ImageReference:
    """A picture in memory as data sets give them."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return ImageReference(data=encoded.getvalue(), name=name)
