"""Model, template and encoder of the stages: what is trained is what is saved and asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import Files, tune
from triptych.core.errors import ModelError
from triptych.core.types import ImageReference, Message, Text
from triptych.data.formats import open_dataset
from triptych.models.chat_templates import CHAT_TEMPLATES
from triptych.models.load import VlmConfig, load_vlm, save_vlm
from triptych.stages.vlm import Vlm, build_vlm, make_encoder, read_samples, stop_at, template_name


def build(files: Files, folder: Path, *overrides: str, **changes: Any) -> Vlm:
    return build_vlm(
        read_recipe(write(folder / "recipe.yaml", {"output": "run", **tune(files)}, **changes), *overrides)
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> ImageReference:
    file = tmp_path_factory.mktemp("picture") / "a.png"
    Image.new("RGB", (40, 30)).save(file)
    return ImageReference(path=str(file), name="a.png")


@pytest.mark.requirement("A-18", "A-29")
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_saved_model_is_prompted_as_it_was_trained(
    name: str, files: Files, tmp_path: Path, picture: ImageReference
) -> None:
    vlm = build(files, tmp_path, f"template={name}", "max_length=512")
    save_vlm(vlm.loaded, tmp_path / "model")
    loaded = load_vlm(VlmConfig.model_validate({"from": str(tmp_path / "model")}))
    assert template_name(loaded) == name
    encoder = make_encoder(loaded, template_name(loaded), 512)
    messages = [Message("user", (picture, Text("\nWhat is it?")))]
    if name != "plain":
        messages += [Message("assistant", (Text("A dog."),)), Message("user", (Text("Sure?"),))]
    expected = vlm.encoder.encode_prompt(messages).trunk.input_ids.tolist()
    assert encoder.encode_prompt(messages).trunk.input_ids.tolist() == expected
    assert encoder.stop_ids == vlm.encoder.stop_ids
    if name != "plain":  # whose words are dropped: no other tool could tell
        own = make_encoder(loaded, "model", 512)
        assert own.encode_prompt(messages).trunk.input_ids.tolist() == expected
        assert own.stop_ids == vlm.encoder.stop_ids


def test_a_template_of_the_model_s_own_is_kept(files: Files, tmp_path: Path) -> None:
    jinja = "{% for message in messages %}<s>{{ message['content'] }}<|im_end|>{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer)
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = tune(files)["model"]
    language = {**model["language"], "tokenizer": str(tmp_path / "tokenizer")}
    vlm = build(files, tmp_path, "template=model", model={**model, "language": language})
    assert vlm.loaded.template is not None and vlm.loaded.template.endswith(jinja)
    assert template_name(vlm.loaded) == "model"


def test_a_model_without_a_template_and_an_unknown_one_are_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        build(files, tmp_path, "template=model")
    with pytest.raises(ModelError, match=r"unknown template `vicuna`(?s:.*)did you mean `vicuna_v1`"):
        build(files, tmp_path, "template=vicuna")


def test_plain_generate_stops_where_training_did(files: Files, tmp_path: Path) -> None:
    vlm = build(files, tmp_path, "template=chatml")
    (stop,) = vlm.encoder.stop_ids
    generation = vlm.loaded.model.generation_config
    assert generation.eos_token_id in (stop, [stop]) or stop in generation.eos_token_id
    generation.eos_token_id = 7
    stop_at(vlm.loaded, [stop])
    assert generation.eos_token_id == [7, stop]
    save_vlm(vlm.loaded, tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [7, stop]


def test_added_tokens_with_a_frozen_language_model_are_refused(files: Files, tmp_path: Path) -> None:
    model = {**tune(files)["model"], "tokens": {"series": {"<x{}>": 3}}}
    rules = [{"match": "connector", "method": "full"}, {"match": "*", "method": "frozen"}]
    with pytest.raises(ModelError, match="3 tokens were added"):
        build(files, tmp_path, model=model, tuning=rules)
    build(files, tmp_path, tuning=rules)  # the picture token alone needs no training


def test_samples_are_read_in_order_up_to_a_limit(files: Files, tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "recipe.yaml", {"output": "run", **tune(files)}))
    datasets = [open_dataset(item, tmp_path) for item in (*recipe.data, *recipe.evaluation.data)]
    assert len(read_samples(datasets)) == 48
    assert [sample.origin.id for sample in read_samples(datasets, 2)] == ["train-000-dog", "train-000-cat"]


def test_rows_longer_than_the_language_model_takes_are_refused(files: Files, tmp_path: Path) -> None:
    assert build(files, tmp_path, "max_length=512")
    with pytest.raises(ModelError, match=r"max_length: max_length 513 is more than the 512 tokens"):
        build(files, tmp_path, "max_length=513")
