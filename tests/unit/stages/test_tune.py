"""`triptych train` with `stage: tune`: everything in full, and LoRA on layer ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.commands import read_recipe, triptych, write
from tests.recipes.tiny_recipes import Files, tune
from tests.unit.stages.conftest import Run
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.engine.state import seed_everything
from triptych.evaluation.answers import AnswerAccuracy
from triptych.models.adapters import load_adapters, merge_adapters
from triptych.models.picture_words import ReadingRules
from triptych.stages.tune import build_tune


@pytest.mark.requirement("E-34")
def test_lora_on_layer_ranges_ends_with_a_model_and_its_adapters(lora_run: Run) -> None:
    names = {item.name for item in lora_run.output.iterdir()}
    assert {"model", "adapters", "checkpoints", "recipe.yaml", "finished.json"} <= names
    adapters = {item.name for item in (lora_run.output / "adapters").iterdir()}
    assert adapters == {"lora-rank4-alpha8", "lora-rank2-alpha4", "trainable.safetensors"}
    finished = json.loads((lora_run.output / "finished.json").read_text())
    assert finished["steps"] == 3 and set(finished["evaluation"]) >= {"loss", "accuracy"}
    assert "Held-out answers before training" in lora_run.out and "Held-out answers after training" in lora_run.out


@pytest.mark.requirement("A-44")
def test_added_tokens_are_trained_and_the_plan_says_so(lora_run: Run) -> None:
    assert "lora 4/8/2 and 2 tokens" in lora_run.out
    model = AutoModelForImageTextToText.from_pretrained(lora_run.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(lora_run.output / "model")
    ids = tokenizer.convert_tokens_to_ids(["<box>", "</box>"])
    seed_everything(0)
    start = merge_adapters(build_tune(read_recipe(lora_run.recipe)).scorer.hf).get_input_embeddings().weight
    moved = (model.get_input_embeddings().weight != start).any(dim=1).nonzero().flatten().tolist()
    assert moved == ids


@pytest.mark.requirement("E-38")
def test_merged_model_equals_base_with_adapters_and_frozen_parts_are_untouched(lora_run: Run) -> None:
    recipe = read_recipe(lora_run.recipe)
    seed_everything(recipe.train.seed)
    built = build_tune(recipe)
    hf = built.scorer.hf
    load_adapters(hf, lora_run.output / "adapters")
    merged = AutoModelForImageTextToText.from_pretrained(lora_run.output / "model", dtype=torch.float32)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, hf(**inputs).logits, rtol=1e-5, atol=1e-5)
    ours, theirs = dict(hf.model.vision_tower.state_dict()), dict(merged.model.vision_tower.state_dict())
    assert all(torch.equal(ours[name], item) for name, item in theirs.items())


@pytest.mark.requirement("A-15")
def test_the_saved_model_is_prompted_as_it_was_trained(lora_run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lora_run.output / "model")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWho?"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("A chat between a curious user") and text.endswith(" USER: <image>\nWho? ASSISTANT:")


def test_full_tuning_learns_and_trains_everything(files: Files, tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "run"), **tune(files)}
    loader = {"global_batch": 24, "micro_batch": 24, "epochs": None, "steps": 12}
    recipe = write(tmp_path / "recipe.yaml", values, loader=loader, train={"save_every": 100}, lr=1e-2)
    seed_everything(0)
    before = {name: item.clone() for name, item in build_tune(read_recipe(recipe)).scorer.hf.named_parameters()}
    done = triptych("train", recipe)
    assert done.status == 0, done.err
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if line["event"] == "step"]
    assert losses[-1] < 0.8 * losses[0]
    after = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model").named_parameters())
    moved = [name for name, item in before.items() if name in after and not torch.equal(item, after[name])]
    assert len(moved) == len(before)


def _aligning(files: Files, folder: Path, **changes: Any) -> Path:
    values = {"output": str(folder / "run"), **tune(files)}
    rules = [{"match": "vision", "method": "frozen"}, {"match": "connector", "method": "full"}]
    loader = {"global_batch": 24, "micro_batch": 12, "epochs": None, "steps": 12}
    options = {"objective": {"kind": "bag_of_words"}, "tuning": [*rules, {"match": "language", "method": "frozen"}]}
    return write(folder / "recipe.yaml", values, **{"loader": loader, "lr": 1e-2, **options, **changes})


def test_bag_of_words_teaches_the_connector_and_nothing_else(files: Files, tmp_path: Path) -> None:
    recipe = _aligning(files, tmp_path)
    seed_everything(0)
    before = {name: item.clone() for name, item in build_tune(read_recipe(recipe)).scorer.hf.named_parameters()}
    done = triptych("train", recipe)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert {"bag_of_words", "commitment"} <= steps[0]["terms"].keys()
    assert "silence" in steps[0]["metrics"]
    after = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model").named_parameters())
    moved = {name for name, item in before.items() if not torch.equal(item, after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name} and moved


def test_a_kernel_that_the_objective_does_not_use_is_no_obstacle(files: Files, tmp_path: Path) -> None:
    loader = {"global_batch": 24, "micro_batch": 12, "epochs": None, "steps": 1}
    done = triptych("train", _aligning(files, tmp_path, head_kernel="cut_cross_entropy", loader=loader))
    assert done.status == 0, done.err


def test_options_of_bag_of_words_reach_what_uses_them(files: Files, tmp_path: Path) -> None:
    rules = {"temperature": 0.2, "silence": 0.6, "context": 0.7, "silent_commitment": 0.4}
    options = {"kind": "bag_of_words", **rules}
    words = build_tune(read_recipe(_aligning(files, tmp_path, objective=options))).scorer.words
    assert words.rules == ReadingRules(**rules)
    refused = triptych("train", _aligning(files, tmp_path, objective={**options, "common_share": 1e-4}))
    assert refused.status == 1
    assert "objective.common_share: every token of" in refused.err and "raise it" in refused.err


def test_bag_of_words_refuses_what_it_cannot_train(files: Files, tmp_path: Path) -> None:
    rules = [{"match": part, "method": "full"} for part in ("vision", "connector", "language")]
    done = triptych("train", _aligning(files, tmp_path, tuning=rules))
    assert done.status == 1
    assert "trains vision and connector alone, the tuning plan trains language too" in done.err
    assert "freeze the language model here" in done.err


def test_bag_of_words_passes_over_a_window_without_one_usable_row(files: Files, tmp_path: Path) -> None:
    source = json.loads((files.data / "train.json").read_text())
    rows = [dict(row) for row in source]
    for row in rows[1:]:
        row.pop("image", None)
        row["conversations"] = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (tmp_path / "mostly.json").write_text(json.dumps(rows))
    data = [{"format": "llava", "path": str(tmp_path / "mostly.json"), "images": str(files.data / "pictures")}]
    loader = {"global_batch": 2, "micro_batch": 2, "epochs": 1, "steps": None, "on_bad_row": "skip"}
    done = triptych("train", _aligning(files, tmp_path, data=data, loader=loader))
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["samples"] for line in steps].count(0) == len(steps) - 1


def test_answers_are_scored_by_the_metric_of_their_task(files: Files, tmp_path: Path) -> None:
    recipe = {**tune(files), "output": str(tmp_path / "run")}
    recipe["evaluation"] = {**recipe["evaluation"], "answers": True, "metrics": {"caption": "objects"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    built = build_tune(read_recipe(tmp_path / "recipe.yaml"))
    accuracy = built.evaluators(built.scorer, Runtime(RuntimeConfig()))[-1]
    assert isinstance(accuracy, AnswerAccuracy) and accuracy.metrics == {"caption": "objects"}
