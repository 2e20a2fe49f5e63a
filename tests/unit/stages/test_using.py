"""`eval`, `chat` and `export` on a finished run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.commands import triptych
from tests.recipes.tiny_recipes import Files
from tests.unit.stages.conftest import Run
from triptych.core.errors import DataError
from triptych.core.types import ImageReference, Message
from triptych.data.images import decode
from triptych.data.scene_questions import describe
from triptych.data.scenes import draw, sample_scene
from triptych.stages.using import Chat, answering_of, inference_device, load_for_use


@dataclass
class Parrot:
    """Answers with the number of turns, pictures and the last words; too long questions are refused."""

    asked: list[Sequence[Message]] = field(default_factory=list)

    def answer(self, conversations: Sequence[Sequence[Message]], temperature: float = 0.0) -> list[str]:
        (messages,) = conversations
        if len(messages[-1].text) > 50:
            raise DataError("the conversation is too long")
        self.asked.append(messages)
        pictures = sum(len(message.images) for message in messages)
        return [f"{len(messages)} turns, {pictures} pictures: {messages[-1].text}"]


def test_a_conversation_keeps_turns_and_pictures_and_survives_mistakes(files: Files) -> None:
    chat = Chat(Parrot(), "Be brief.")  # type: ignore[arg-type]
    dog, cat = (files.data / "pictures" / f"test-000-{name}.png" for name in ("dog", "cat"))
    assert "goes with your next question" in chat.say(f"/image {dog}")
    assert chat.say("who?") == "2 turns, 1 pictures: who?"
    chat.add_image(str(cat))
    mistakes = ["/image", "/image nope.png", f"/image {files.data / 'train.json'}", "x" * 60, "/rest"]
    mistakes += ["/image ~nobody-here/a.png", "/image a\0b", "/image \u00b2", "who \udcff?"]
    for mistake in mistakes:
        with pytest.raises(DataError):
            chat.say(mistake)
    assert chat.say("and here?") == "4 turns, 2 pictures: and here?"
    assert chat.say("once more") == "6 turns, 2 pictures: once more"
    assert [message.role for message in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert chat.say("/reset") == "(started over)"
    assert chat.say("hello") == "2 turns, 0 pictures: hello"


def test_a_number_is_a_test_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat = Chat(Parrot())  # type: ignore[arg-type]
    scene = sample_scene("test", 0, 12)
    assert chat.say("/image 12") == f"(scene 12 ({describe(scene)}) goes with your next question)"
    (shown,) = chat.waiting
    assert isinstance(shown, ImageReference)
    assert decode(shown).tobytes() == draw(scene).tobytes()
    # A file of that name comes first.
    draw(sample_scene("test", 0, 1)).save(tmp_path / "12", "PNG")
    assert chat.say("/image 12") == "(picture 12 goes with your next question)"
    with pytest.raises(DataError, match="NUMBER of a test scene"):
        chat.say("/image")


def test_a_real_model_talks_over_several_turns_and_pictures(lora_run: Run, files: Files) -> None:
    chat = Chat(answering_of(load_for_use(lora_run.output / "model"), 3, batch=1))
    for name in ("dog", "cat"):
        chat.add_image(str(files.data / "pictures" / f"test-000-{name}.png"))
        chat.say("What is in the picture?")
    assert [len(message.images) for message in chat.messages] == [1, 0, 1, 0]


def test_chat_in_the_terminal(lora_run: Run, files: Files) -> None:
    dog = files.data / "pictures" / "test-000-dog.png"
    typed = f"What is it?\n\n/image nope.png\n/image {dog}\nAnd here?\n/reset\n/exit\nnever read\n"
    arguments = ["chat", lora_run.output / "model", "--image", dog, "--max-new-tokens", 2, "--system", "Be brief."]
    done = triptych(*arguments, typed=typed)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert sum(line.startswith("model: ") for line in lines) == 2
    assert any("nope.png: no such picture" in line for line in lines) and "(started over)" in lines
    assert triptych(*arguments, typed="What?").out.count("model: ") == 1  # ends with the input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "{run}"], "no model in this folder(.|\n)*use .*model"),
        (["chat", "{tmp}"], "no model in this folder(.|\n)*train one first"),
        (["chat", "{tmp}/nowhere"], "there is no folder .*nowhere(.|\n)*train one first"),
        (["chat", "{data}/scenes"], "there is no folder .*scenes(.|\n)*train one first"),
        (["chat", "{run}/modle"], "there is no folder .*modle(.|\n)*did you mean `model`"),
        (["chat", "{data}/picture/model"], "there is no folder .*picture\n(.|\n)*did you mean `pictures`"),
        (["eval", "{run}/model", "{tmp}/nope.json"], "nope.json"),
        (["eval", "{run}/model", "{data}/test.json", "--format", "lava"], "`lava` is not a format(.|\n)*`llava`"),
        (
            ["eval", "{run}/model", "{data}/test.json", "--images", "{tmp}/nope"],
            "image root .*nope of .* is not a folder",
        ),
        (["chat", "{run}/model", "--image", "{tmp}/nope.png"], "nope.png: no such picture"),
        (["export", "{tmp}"], "recipe not found"),
        (["export", "{run}", "--checkpoint", "bast"], "did you mean .*`best`"),
    ],
)
def test_wrong_input_is_an_error_with_a_remedy(
    arguments: list[str], said: str, lora_run: Run, files: Files, tmp_path: Path
) -> None:
    places = {"run": lora_run.output, "tmp": tmp_path, "data": files.data}
    done = triptych(*(argument.format(**places) for argument in arguments))
    assert done.status == 1
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    assert re.search(said, done.err), done.err


@pytest.mark.parametrize("command", ["eval", "chat"])
def test_a_dual_encoder_does_not_answer(command: str, files: Files, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["VisionTextDualEncoderModel"]}))
    data = [files.data / "test.json", "--images", files.data / "pictures"] if command == "eval" else []
    done = triptych(command, tmp_path, *data)
    assert done.status == 1 and "this is a dual encoder" in done.err and "Traceback" not in done.err


def test_a_gpu_is_used_in_bfloat16_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inference_device() == (torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert inference_device() == (torch.device("cuda"), dtype)
