"""The probe is a program of its own that knows transformers alone."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import noise, tiny_family
from triptych.export import plain_probe
from triptych.models.chat_templates import chat_template
from triptych.models.generation import Prompt, prompt_inputs
from triptych.models.load import VlmConfig, load_vlm, save_vlm

SOURCE = Path(plain_probe.__file__)


def test_it_imports_nothing_of_this_package() -> None:
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.startswith("triptych") for name in names)


def test_it_writes_logits_answer_and_what_the_processor_makes_of_the_picture(tmp_path: Path) -> None:
    for item in tiny_family("llava"):
        item.save_pretrained(tmp_path / "base")
    template = chat_template("chatml", "<image>")
    loaded = load_vlm(VlmConfig.model_validate({"from": str(tmp_path / "base")}), chat_template=template)
    save_vlm(loaded, tmp_path / "model")
    picture = noise(40, 30)
    ids = torch.tensor([5, *loaded.pictures.token_ids(40, 30), 6])
    inputs = prompt_inputs(loaded.model, [Prompt(ids, (picture,))], loaded.pictures, pad=0)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(30, 40, 3)
    extra = {"probe_picture": pixels, "probe_prompt": torch.tensor(list(b"Who?"), dtype=torch.uint8)}
    save_file({**inputs, **extra}, tmp_path / "in.safetensors")
    plain_probe.main(str(tmp_path / "model"), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), 3)
    out = load_file(tmp_path / "out.safetensors")
    assert out["logits"].shape == (1, 18, 384)
    assert out["generated"].shape[0] <= 3
    assert torch.equal(out["processor/pixel_values"], inputs["pixel_values"])
    text = loaded.tokenizer.decode(out["processor/input_ids"][0])
    assert text.count("<image>") == 16
    assert text.endswith("<image>Who?<|im_end|>\n<|im_start|>assistant\n")
