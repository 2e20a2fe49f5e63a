"""Where the parts of each family are, and what a pattern means."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, LlamaConfig, SiglipVisionConfig

from tests.tiny import FAMILIES, tiny_family, tiny_llama
from triptych.core.errors import ModelError
from triptych.models.components import (
    Components,
    check_coverage,
    check_plain_head,
    component_parameters,
    find_components,
    picture_kind,
    resolve_pattern,
    row_inputs,
    row_inputs_kind,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_exactly_one_component(family: str) -> None:
    model, _, _ = tiny_family(family)
    components = find_components(model)
    parts = [component_parameters(components, name, model) for name in ("vision", "connector", "language")]
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_are_where_the_table_says(family: str) -> None:
    model, _, _ = tiny_family(family)
    components = find_components(model)
    language = "model.text_model" if family in ("smolvlm", "idefics3") else "model.language_model"
    assert components.layers["language"] == (f"{language}.layers.0", f"{language}.layers.1")
    assert components.embeddings == f"{language}.embed_tokens"
    assert components.head == "lm_head"
    assert len(components.layers["vision"]) == 2
    connector = {
        "qwen2_5_vl": ("model.visual.merger",),
        "qwen3_vl": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "smolvlm": ("model.connector",),
        "idefics3": ("model.connector",),
    }.get(family, ("model.multi_modal_projector",))
    assert components.modules["connector"] == connector


@pytest.mark.parametrize("family", FAMILIES)
def test_connector_feeds_the_language_model(family: str) -> None:
    """The last connector weights have the width of the language model's hidden states."""
    model, _, _ = tiny_family(family)
    shapes = [value.shape for value in component_parameters(find_components(model), "connector", model).values()]
    assert any(model.config.get_text_config().hidden_size in shape for shape in shapes)


def test_coverage_lists_leftovers_and_overlaps() -> None:
    model, _, _ = tiny_family("llava")
    good = find_components(model)
    missing = Components(
        {**good.modules, "connector": ("model.multi_modal_projector.linear_1",)}, {}, good.embeddings, None, None
    )
    with pytest.raises(ModelError) as caught:
        check_coverage(missing, model)
    assert [problem.message for problem in caught.value.problems] == [
        "parameter model.multi_modal_projector.linear_2.weight is in no component",
        "parameter model.multi_modal_projector.linear_2.bias is in no component",
    ]
    double = Components({**good.modules, "more": ("lm_head",)}, {}, good.embeddings, None, None)
    with pytest.raises(ModelError, match=r"parameter lm_head.weight is in language and more"):
        check_coverage(double, model)


def test_a_text_model_has_no_vision() -> None:
    with pytest.raises(ModelError, match="LlamaModel has no language part"):
        find_components(tiny_llama())


class TestPatterns:
    model, _, _ = tiny_family("llava", num_hidden_layers=6)
    components = find_components(model)

    def resolve(self, pattern: str) -> set[str]:
        return resolve_pattern(self.components, pattern, self.model)

    def layers(self, pattern: str) -> list[int]:
        return sorted({int(name.split(".")[3]) for name in self.resolve(pattern)})

    @pytest.mark.parametrize("component", ["vision", "connector", "language"])
    def test_component(self, component: str) -> None:
        assert self.resolve(component) == set(component_parameters(self.components, component, self.model))

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("language.layers", [0, 1, 2, 3, 4, 5]),
            ("language.layers[0:4]", [0, 1, 2, 3]),
            ("language.layers[-2:]", [4, 5]),
            ("language.layers[:2]", [0, 1]),
            ("language.layers[1:-1]", [1, 2, 3, 4]),
            ("language.layers[:]", [0, 1, 2, 3, 4, 5]),
            ("language.layers[3]", [3]),
            ("language.layers[-1]", [5]),
        ],
    )
    def test_layers(self, pattern: str, expected: list[int]) -> None:
        assert self.layers(pattern) == expected

    def test_embeddings_and_head(self) -> None:
        assert self.resolve("language.embeddings") == {"model.language_model.embed_tokens.weight"}
        assert self.resolve("language.head") == {"lm_head.weight"}

    def test_a_tied_head_is_the_embedding(self) -> None:
        model, _, _ = tiny_family("gemma3")
        found = resolve_pattern(find_components(model), "language.head", model)
        assert found == {"model.language_model.embed_tokens.weight"}

    def test_paths_and_globs(self) -> None:
        assert self.resolve("model.language_model.norm") == {"model.language_model.norm.weight"}
        assert self.resolve("lm_head.weight") == {"lm_head.weight"}
        assert len(self.resolve("model.language_model.layers.*.self_attn.q_proj")) == 6
        assert len(self.resolve("*.multi_modal_projector.*.bias")) == 2

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("visoin", "matches no parameter\n    -> did you mean `vision`"),
            ("language.layer", "did you mean `language.layers`"),
            ("language.embedding", "did you mean `language.embeddings`"),
            ("connector.layers", "`connector.layers` matches no parameter"),
            ("language.layers[2:2]", "matches no parameter"),
            ("language.layers[0:8]", "there are 6, numbered 0 to 5"),
            ("language.layers[6]", "there are 6, numbered 0 to 5"),
            ("language.layers[-7:]", "there are 6, numbered 0 to 5"),
            ("language.layers[a:b]", r"`\[a:b\]` is not a layer range"),
            ("language.layers[]", "is not a layer range"),
            ("model.no.such.*", "matches no parameter"),
        ],
    )
    def test_errors(self, pattern: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            self.resolve(pattern)

    def test_names_inside_an_adapter_still_belong(self) -> None:
        model, _, _ = tiny_family("llava")
        components = find_components(model)
        block = model.get_submodule("model.language_model.layers.1.self_attn")
        block.q_proj = nn.ModuleDict({"base_layer": block.q_proj, "lora_A": nn.Linear(32, 2)})
        check_coverage(components, model)
        assert "model.language_model.layers.1.self_attn.q_proj.lora_A.weight" in resolve_pattern(
            components, "language.layers[-1]", model
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_family_needs_beside_ids(family: str) -> None:
    model, _, _ = tiny_family(family)
    expected = {"qwen2_5_vl": "rotary_grid", "qwen3_vl": "rotary_grid", "gemma3": "image_blocks"}
    assert row_inputs_kind(model) == expected.get(family, "plain")
    assert picture_kind(model.config) in ("fixed", "grid", "marked_tiles", "tiles", "wrapped")


def test_rotary_positions_by_hand() -> None:
    model, _, _ = tiny_family("qwen2_5_vl")
    image = model.config.image_token_id
    # text, a picture of 4 x 6 patches merged to 2 x 3, text; then a shorter row of text and padding
    ids = torch.tensor([[1, image, image, image, image, image, image, 2], [3, 4, 0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 8, [1, 1, 0, 0, 0, 0, 0, 0]])
    positions = row_inputs("rotary_grid", model, ids, mask, torch.tensor([[1, 4, 6]]))["position_ids"]
    assert positions.shape == (4, 2, 8)
    assert positions[0].tolist() == [list(range(8))] * 2
    assert positions[1, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 4]  # time
    assert positions[2, 0].tolist() == [0, 1, 1, 1, 2, 2, 2, 4]  # height
    assert positions[3, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 4]  # width; the text goes on after the longer side
    assert positions[1:, 1, :2].tolist() == [[0, 1]] * 3


def test_logits_that_are_more_than_the_head_are_refused() -> None:
    model, _, _ = tiny_family("gemma3", final_logit_softcapping=30.0)
    with pytest.raises(ModelError, match=r"final_logit_softcapping = 30.0, which is not applied"):
        check_plain_head(model.config)
    check_plain_head(LlamaConfig())


def test_a_family_with_other_token_types_is_refused() -> None:
    model, _, _ = tiny_family("gemma3")
    model.config.model_type = "paligemma"
    with pytest.raises(ModelError, match="`paligemma` needs token_type_ids"):
        row_inputs_kind(model)
    with pytest.raises(ModelError, match="do not know how a `paligemma` model"):
        picture_kind(model.config)


class _NoConnector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Linear(2, 2)
        self.language_model = nn.Linear(2, 2)


def test_a_model_without_connector_is_named() -> None:
    model, _, _ = tiny_family("llava")
    model.model = _NoConnector()
    with pytest.raises(
        ModelError, match=r"no connector: none of multi_modal_projector, connector, vision_tower.merger"
    ):
        find_components(model)


def test_a_family_outside_the_table_with_the_standard_names() -> None:
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
        ),
        image_token_index=60,
    )
    model = AyaVisionForConditionalGeneration(config)
    components = find_components(model)
    assert components.modules["connector"] == ("model.multi_modal_projector",)
    assert len(components.layers["language"]) == 3
    assert components.image_token_id == 60
    assert row_inputs_kind(model) == "plain"
    model.config = LlamaConfig()
    with pytest.raises(ModelError, match="`llama` configuration names no image token"):
        find_components(model)
