"""`eval`, `chat` and `export` on a finished run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.commands import triptych
from tests.recipes.tiny_recipes import Files
from tests.unit.stages.conftest import Run
from triptych.core.errors import ConfigError, DataError
from triptych.core.types import ImageReference, Message
from triptych.data.images import decode
from triptych.data.scene_questions import describe
from triptych.data.scenes import draw, sample_scene
from triptych.export.parity import Parity
from triptych.stages import using
from triptych.stages.using import Chat, answering_of, find_checkpoint, inference_device, load_for_use


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
    for mistake in ("/image", "/image nope.png", f"/image {files.data / 'train.json'}", "x" * 60, "/rest"):
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


def test_export_merges_and_plain_transformers_agrees(lora_run: Run, tmp_path: Path) -> None:
    done = triptych("export", lora_run.output, "--output", tmp_path / "export")
    assert done.status == 0, done.err
    assert "plain transformers gives the same greedy answer" in done.out
    assert {"chat_template.jinja", "processor_config.json", "tokenizer.json"} <= {
        item.name for item in (tmp_path / "export").iterdir()
    }
    exported = load_file(tmp_path / "export" / "model.safetensors")
    finished = load_file(lora_run.output / "model" / "model.safetensors")
    assert exported.keys() == finished.keys()
    # The finished model is the best checkpoint too.
    assert all(torch.allclose(exported[name], item, atol=1e-6) for name, item in finished.items())


def test_another_checkpoint_gives_another_model(lora_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Verified in a fresh process above, which takes seconds.
    monkeypatch.setattr(using, "check_parity", lambda loaded, folder: Parity(0.0, True, [], {}))
    done = triptych("export", lora_run.output, "--checkpoint", "step-00000002", "--output", tmp_path / "export")
    assert done.status == 0, done.err
    exported = load_file(tmp_path / "export" / "model.safetensors")
    checkpoint = load_file(lora_run.output / "checkpoints" / "step-00000002" / "weights.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    (projector,) = [item for key, item in exported.items() if key.endswith("multi_modal_projector.linear_1.weight")]
    assert torch.equal(projector, checkpoint[f"hf.{name}"])


def test_best_falls_back_to_last_and_names_are_corrected(tmp_path: Path) -> None:
    for name in ("step-00000004", "last"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "best") == tmp_path / "last"
    with pytest.raises(ConfigError, match=r"no checkpoint `step-0000004`(?s:.*)did you mean `step-00000004`"):
        find_checkpoint(tmp_path, "step-0000004")
    with pytest.raises(ConfigError, match=r"no checkpoint `best`(?s:.*)train first"):
        find_checkpoint(tmp_path / "nowhere", "best")


def test_a_checkpoint_of_other_weights_is_refused(lora_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run.output, run, symlinks=True)
    file = run / "checkpoints" / "step-00000003" / "weights.safetensors"
    weights: dict[str, Any] = load_file(file)
    weights["hf.other"] = weights.pop(next(iter(weights)))
    save_file(weights, file)
    refused = triptych("export", run, "--checkpoint", "step-00000003")
    assert refused.status == 1 and "Traceback" not in refused.err
    assert "error:" in refused.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "{run}"], "no model in this folder(.|\n)*use .*model"),
        (["chat", "{tmp}/nowhere"], "no model in this folder(.|\n)*train one first"),
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


@pytest.mark.parametrize("inner", ["", "model", "checkpoints", "adapters"])
def test_an_export_replaces_nothing_of_the_run(inner: str, lora_run: Run) -> None:
    refused = triptych("export", lora_run.output, "--output", lora_run.output / inner)
    assert refused.status == 1 and "this folder belongs to the run" in refused.err
    assert f"use e.g. {lora_run.output / 'export'}" in refused.err


def test_an_export_needs_everything_that_was_trained(lora_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run.output, run, symlinks=True)
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["tuning"][-1] = {"match": "language", "method": "full"}  # the checkpoint holds no weights of it
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    refused = triptych("export", run, "--checkpoint", "last")
    assert refused.status == 1 and "not in the checkpoint" in refused.err and not (run / "export").exists()
