"""Using a trained model: `chat`, and what `eval` shares with it."""

from __future__ import annotations

import difflib
import io
import json
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from triptych.core.config import did_you_mean
from triptych.core.errors import DataError, ModelError, Problem, TriptychError
from triptych.core.types import ImageReference, Message, Part, Text
from triptych.data.images import decode, resolve_image
from triptych.data.scene_questions import describe
from triptych.data.scenes import draw, sample_scene
from triptych.evaluation.answers import Answering
from triptych.models.load import LoadedVlm, VlmConfig, load_vlm
from triptych.stages.vlm import context_length, make_answering, make_encoder, template_name

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
        raise _no_model(folder)
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["?"]
    if set(architectures) & DUAL_ENCODERS:
        message = f"this is a dual encoder ({architectures[0]}): it compares pictures and captions, it does not answer"
        remedy = "use a model of stage tune or preference; a dual encoder is measured by `evaluation` in its recipe"
        raise ModelError(Problem(message, file=str(folder), remedy=remedy))
    device, dtype = inference_device()
    loaded = load_vlm(VlmConfig.model_validate({"from": str(folder)}), dtype=dtype)
    loaded.model.to(device)
    return loaded


def _no_model(folder: Path) -> ModelError:
    missing = next((path for path in (*reversed(folder.parents), folder) if not path.exists()), None)
    if missing is not None:
        names = [item.name for item in missing.parent.iterdir() if item.is_dir()] if missing.parent.is_dir() else []
        close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.55)
        remedy = f"did you mean `{close[0]}`?" if close else "train one first: triptych train RECIPE"
        return ModelError(Problem(f"no model: there is no folder {missing}", file=str(folder), remedy=remedy))
    inner = folder / "model"
    remedy = f"use {inner}" if (inner / "config.json").is_file() else "train one first: triptych train RECIPE"
    return ModelError(Problem("no model in this folder (config.json is missing)", file=str(folder), remedy=remedy))


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
        try:
            path = Path(name).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # no such home folder, a loop of links, a null character
            raise DataError(Problem(f"`{name}` is not a path: {error}", remedy="/image PATH")) from error
        if name.isdecimal() and not path.exists():
            scene = sample_scene("test", 0, int(name))
            self.waiting.append(drawn(draw(scene), f"scene {name}"))
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
        try:
            line.encode()
        except UnicodeEncodeError as error:  # bytes of the terminal that are not UTF-8
            raise DataError(Problem("the line is not UTF-8", remedy="type it again")) from error
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


def drawn(picture: Image.Image, name: str) -> ImageReference:
    """A picture in memory as data sets give them."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return ImageReference(data=encoded.getvalue(), name=name)
