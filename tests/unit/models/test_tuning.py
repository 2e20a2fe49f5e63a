"""Tuning plans: what each rule trains, and that nothing else is touched."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.tiny import FAMILIES, VOCABULARY, tiny_family, tiny_siglip, token_id
from triptych.core.errors import ModelError
from triptych.models.adapters import load_adapters, save_adapters
from triptych.models.components import Components, find_components
from triptych.models.tuning import TuningPlan, apply_tuning, check_gradients, eval_frozen
from triptych.models.tuning_rules import FrozenRule, FullRule, LoraRule

LANGUAGE = "model.language_model."
VISION = "model.vision_tower."


def frozen(match: str) -> FrozenRule:
    return FrozenRule(match=match, method="frozen")


def full(match: str, **fields: Any) -> FullRule:
    return FullRule(match=match, method="full", **fields)


def lora(match: str, **fields: Any) -> LoraRule:
    return LoraRule(match=match, method="lora", **fields)


def tune(model: PreTrainedModel, *rules: Any, lr: float = 1e-4, weight_decay: float = 0.1) -> TuningPlan:
    return apply_tuning(model, find_components(model), rules, lr, weight_decay)


def llava(**changes: Any) -> PreTrainedModel:
    return tiny_family("llava", **changes)[0]


def tied_llava() -> PreTrainedModel:
    """Sharing one weight is all that tying means here."""
    model = llava()
    model.config.tie_word_embeddings = True
    model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def logits(model: PreTrainedModel, pixel_seed: int = 0) -> Tensor:
    """[1, 22, vocabulary] of a picture (16 tokens) between six words."""
    generator = torch.Generator().manual_seed(pixel_seed)
    words = torch.tensor([[5, 6, 7, *[token_id("<image>")] * 16, 8, 9, 10]])
    pixels = torch.randn(1, 3, 32, 32, generator=generator).to(model.dtype)
    return model(input_ids=words, pixel_values=pixels, use_cache=False).logits


def text_logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits.detach()


def adapted(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def move_adapters(model: nn.Module, seed: int = 1) -> None:
    """Give every B random numbers, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


class OneLinear(nn.Module):
    """The smallest model with a linear layer: h = W x + b, 3 -> 2."""

    def __init__(self, linear: nn.Linear | None = None) -> None:
        super().__init__()
        self.layer = linear or nn.Linear(3, 2)
        self.embeddings = nn.Embedding(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


ONE = Components({"language": ("layer", "embeddings")}, {"language": ("layer",)}, "embeddings", None, None)


def tune_one(model: nn.Module, **fields: Any) -> TuningPlan:
    return apply_tuning(model, ONE, [lora("language", precision="model", **fields)], 1e-4)


# --- LoRA arithmetic ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("E-1", "E-2", "E-4")
def test_lora_forward_and_gradients_equal_the_hand_formula() -> None:
    torch.manual_seed(0)
    model = OneLinear().double()
    weight, bias = model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    tune_one(model, rank=2, alpha=6)
    scale = 6 / 2
    layer = model.layer
    a, b = layer.lora_A["lora-rank2-alpha6"].weight, layer.lora_B["lora-rank2-alpha6"].weight
    with torch.no_grad():
        b.normal_()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 2, dtype=torch.float64)  # G = dL/dh, one row a sample

    h = model(x)
    (h * upstream).sum().backward()

    torch.testing.assert_close(h, x @ weight.T + bias + scale * (x @ a.T) @ b.T)
    assert a.shape == (2, 3) and b.shape == (2, 2)
    torch.testing.assert_close(b.grad, scale * upstream.T @ (x @ a.T))  # s G (A x)^T
    torch.testing.assert_close(a.grad, scale * b.T @ upstream.T @ x)  # s B^T G x^T
    torch.testing.assert_close(x.grad, upstream @ (weight + scale * b @ a))  # (W + s B A)^T G
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None


@pytest.mark.requirement("E-3", "E-9")
def test_dropout_acts_on_the_input_of_a() -> None:
    torch.manual_seed(0)
    model = OneLinear().train()
    tune_one(model, rank=2, alpha=4, dropout=0.5)
    move_adapters(model)
    layer = model.layer
    a, b = layer.lora_A["lora-rank2-alpha4"].weight, layer.lora_B["lora-rank2-alpha4"].weight
    x = torch.randn(4, 3)
    torch.manual_seed(7)
    h = model(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(h, layer.base_layer(x) + 2 * (dropped @ a.T) @ b.T)
    model.eval()
    torch.testing.assert_close(model(x), layer.base_layer(x) + 2 * (x @ a.T) @ b.T)


@pytest.mark.requirement("E-7")
def test_the_base_module_is_called_not_its_weight() -> None:
    class Packed(nn.Linear):
        """Stands for a quantised layer: what it computes is not x W^T of its `weight`."""

        def forward(self, input: Tensor) -> Tensor:
            return 10 * input[..., :2]

    model = OneLinear(Packed(3, 2))
    x = torch.randn(4, 3)
    tune_one(model, rank=1)
    torch.testing.assert_close(model(x), 10 * x[:, :2])


@pytest.mark.requirement("E-12", "E-13")
def test_scale_and_dropout_reach_the_layer_and_the_table() -> None:
    model = OneLinear()
    plan = tune_one(model, rank=16, alpha=16, dropout=0.1)
    assert model.layer.scaling == {"lora-rank16-alpha16": 1.0}
    assert model.layer.lora_dropout["lora-rank16-alpha16"].p == 0.1
    assert "lora 16/16/1" in printed(plan)
    model = OneLinear()
    tune_one(model, rank=4, alpha=8, use_rslora=True)
    assert model.layer.scaling["lora-rank4-alpha8"] == 8 / math.sqrt(4)


# --- what is wrapped ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("E-5", "E-8", "E-10", "E-41")
def test_a_language_rule_adapts_the_real_language_layers_and_nothing_else() -> None:
    model = llava()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tune(model, lora("language", rank=2), frozen("*"))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {path.rpartition(".")[2] for path in adapted(model)} == set(names)
    assert len(adapted(model)) == 2 * 7 and all(path.startswith(LANGUAGE) for path in adapted(model))
    assert type(model.get_submodule(f"{VISION}encoder.layers.0.self_attn.q_proj")) is nn.Linear
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
    plain = {name.replace(".base_layer.", "."): value for name, value in model.named_parameters()}
    assert all(torch.equal(plain[name], value) for name, value in before.items())
    base = logits(model)
    move_adapters(model)
    assert (logits(model) - base).abs().max() > 1e-2  # the layers in use, not children of the root


@pytest.mark.requirement("E-5")
def test_a_second_plan_is_refused_and_changes_nothing() -> None:
    model = llava()
    tune(model, lora("language", rank=2), frozen("*"))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ModelError, match="already has the adapters lora-rank2-alpha4"):
        tune(model, lora("language", rank=2), frozen("*"))
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.requirement("E-10")
@pytest.mark.parametrize(
    ("targets", "endings"),
    [
        ("qv", {"q_proj", "v_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("self_attn.k_proj", "down_proj"), {"k_proj", "down_proj"}),
    ],
)
def test_target_presets_and_lists(targets: Any, endings: set[str]) -> None:
    model = llava()
    tune(model, lora("language", rank=2, targets=targets), frozen("*"))
    assert {path.rpartition(".")[2] for path in adapted(model)} == endings


@pytest.mark.requirement("E-11", "E-40")
def test_an_ending_is_whole_name_parts_and_convolutions_are_never_hit() -> None:
    model = tiny_family("qwen2_5_vl")[0]
    tune(model, frozen("connector"), lora("vision", rank=2, targets=("attn.qkv", "proj")), frozen("language"))
    # `proj` is attn.proj here: not up_proj, not gate_proj, not the convolution patch_embed.proj.
    wanted = {f"model.visual.blocks.{layer}.attn.{name}" for layer in (0, 1) for name in ("qkv", "proj")}
    assert adapted(model) == wanted


@pytest.mark.requirement("E-11")
def test_vision_presets_follow_the_tower() -> None:
    model = tiny_family("llava_clip")[0]
    tune(model, lora("vision.layers[1:]", rank=2, targets="all-linear"), frozen("*"))
    names = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"}
    assert {path.split("layers.1.")[1] for path in adapted(model)} == names


def test_the_inner_linear_of_multihead_attention_is_left_alone() -> None:
    model = tiny_siglip()[0]
    parts = {"vision": ("vision_model",), "text": ("text_model",), "projection": ("logit_scale", "logit_bias")}
    components = Components(parts, {}, "text_model.embeddings.token_embedding", None, None)
    apply_tuning(model, components, [lora("vision", rank=2), frozen("text"), frozen("projection")], 1e-4)
    assert any(path.startswith("vision_model.encoder") for path in adapted(model))
    assert not any("head.attention" in path for path in adapted(model))


@pytest.mark.requirement("E-6", "F-15")
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_at_step_zero_equal_the_base(family: str) -> None:
    model = tiny_family(family)[0]
    before = text_logits(model)
    rules = [lora("vision", rank=2), full("connector"), lora("language", rank=4, train_tokens=(5, 8))]
    tune(model, *rules)
    assert torch.equal(text_logits(model), before)
    move_adapters(model)
    assert not torch.equal(text_logits(model), before)


@pytest.mark.requirement("E-6", "F-15")
def test_outputs_at_step_zero_equal_the_base_with_a_picture_in_training_mode() -> None:
    model = llava()
    before = logits(model).detach()
    tune(model, lora("vision", rank=2, dropout=0.3), full("connector"), lora("language", rank=4, dropout=0.3))
    assert torch.equal(logits(model.train()), before)  # dropout changes B A dropout(x) = 0 by nothing
    biased = tiny_family("qwen2_5_vl")[0].model.language_model.layers[0].self_attn.q_proj
    assert biased.bias is not None  # the families above include projections with a bias


def test_several_settings_side_by_side_are_all_active() -> None:
    model = llava(num_hidden_layers=3)
    rules = [
        lora("language.layers[0:1]", rank=2),
        lora("language.layers[1:2]", rank=4, dropout=0.1),
        lora("language.layers[2:]", rank=4),
        frozen("*"),
    ]
    plan = tune(model, *rules)
    assert plan.adapters == ("lora-rank2-alpha4", "lora-rank4-alpha8", "lora-rank4-alpha8-2")
    ranks = {
        path.split(".")[3]: set(layer.r.items()) for path, layer in model.named_modules() if path in adapted(model)
    }
    assert ranks == {
        "0": {("lora-rank2-alpha4", 2)},
        "1": {("lora-rank4-alpha8", 4)},
        "2": {("lora-rank4-alpha8-2", 4)},
    }
    for layer in range(3):
        base = logits(model).detach()
        b = next(value for name, value in model.named_parameters() if f"layers.{layer}" in name and "lora_B" in name)
        with torch.no_grad():
            b.add_(0.5)
        assert not torch.equal(logits(model), base), layer


def test_equal_settings_are_one_adapter_with_two_rates() -> None:
    model = llava()
    plan = tune(model, lora("language.layers[0]", rank=2, lr=1e-3), lora("language", rank=2), frozen("*"))
    assert plan.adapters == ("lora-rank2-alpha4",)
    assert [(group.name, group.lr) for group in plan.groups] == [
        ("language.layers[0].lora", 1e-3),
        ("language.lora", 1e-4),
    ]


# --- rules -------------------------------------------------------------------------------------------------------


def test_the_first_match_wins() -> None:
    model = llava()
    tune(model, full("vision.layers[-1]"), frozen("vision"), full("connector"), frozen("language"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith(f"{VISION}encoder.layers.1.") for name in trained)
    assert not any(name.startswith(f"{VISION}encoder.layers.0.") for name in trained)
    assert not any(name.startswith((LANGUAGE, "lm_head")) for name in trained)


def test_every_fault_of_a_plan_is_reported_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        tune(llava(), frozen("visoin"), frozen("language"), full("language.layers[0]"))
    text = str(caught.value)
    assert "rule 1 `visoin`" in text and "did you mean `vision`" in text
    assert "rule 3 `language.layers[0]` decides nothing: all it matches is taken by rule 2 `language`" in text


def test_uncovered_parameters_are_listed_by_component() -> None:
    model = llava()
    with pytest.raises(ModelError) as caught:
        tune(model, lora("language", rank=2), frozen("vision.layers"))
    first, second = caught.value.problems
    assert "of `vision`" in first.message and "embeddings.patch_embedding" in first.message
    assert second.message.startswith("no rule covers 4 parameters of `connector`")
    assert "method: frozen" in str(second.remedy)
    assert not adapted(model)  # nothing was changed


@pytest.mark.requirement("E-5")
def test_targets_that_match_nothing_are_an_error() -> None:
    with pytest.raises(ModelError, match="rule 1 `language` finds no linear layer") as caught:
        tune(llava(), lora("language", targets=("q_prj",)), frozen("*"))
    assert "q_proj" in str(caught.value)


def test_a_tied_head_cannot_be_adapted() -> None:
    model = llava()
    tune(model, lora("language.head", rank=2), frozen("*"))
    assert adapted(model) == {"lm_head"}
    with pytest.raises(ModelError, match="whose weight is also the embedding"):
        tune(tied_llava(), lora("language.head", rank=2), frozen("*"))


# --- groups, counts, table ---------------------------------------------------------------------------------------


@pytest.mark.requirement("F-3", "F-6")
def test_groups_carry_component_rate_and_decay() -> None:
    model = llava()
    plan = tune(model, full("vision", lr=1e-5, weight_decay=0.05), full("connector", lr=5e-4), lora("language", rank=2))
    found = [(group.name, group.component, group.lr, group.weight_decay) for group in plan.groups]
    assert found == [
        ("vision.full", "vision", 1e-5, 0.05),
        ("connector.full", "connector", 5e-4, 0.1),
        ("language.lora", "language", 1e-4, 0.0),  # never decayed
    ]
    grouped = [id(parameter) for group in plan.groups for parameter in group.parameters.values()]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained) and len(set(grouped)) == len(grouped)


def test_a_rule_over_two_components_gives_two_groups() -> None:
    plan = tune(llava(), full("*.self_attn.*"), frozen("*"))
    assert [(group.name, group.component) for group in plan.groups] == [
        ("vision:*.self_attn.*.full", "vision"),
        ("language:*.self_attn.*.full", "language"),
    ]


def test_tied_parameters_count_once_and_obey_the_first_rule() -> None:
    plan = tune(tied_llava(), full("language.head"), frozen("*"))
    (group,) = plan.groups
    assert list(group.parameters) == [f"{LANGUAGE}embed_tokens.weight"]
    assert plan.count.trainable == VOCABULARY * 32
    with pytest.raises(ModelError, match="taken by rule 1"):
        tune(tied_llava(), full("language.embeddings"), frozen("language.head"), frozen("*"))


@pytest.mark.requirement("E-15", "E-41")
def test_trainable_count_of_qwen2_5_7b_with_rank_16_on_attention() -> None:
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        components = Components({"language": ("model", "lm_head")}, {}, "model.embed_tokens", "lm_head", None)
        plan = apply_tuning(model, components, [lora("language", rank=16, alpha=32, targets="attention")], 1e-4)
    # A layer: q and o 16 x (3584 + 3584) each, k and v 16 x (3584 + 512) each; 28 layers.
    assert plan.count.trainable == 28 * 16 * (2 * (3584 + 3584) + 2 * (3584 + 512)) == 10_092_544
    assert str(plan.count) == "trainable params: 10,092,544 || all params: 7,625,709,056 || trainable%: 0.1323"


def printed(plan: TuningPlan, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(plan.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_80_columns() -> None:
    plan = tune(
        llava(), frozen("vision.layers[0:1]"), full("vision"), full("connector", lr=2e-4, weight_decay=0.05),
        lora("language.layers[0:2]", rank=128, lr=5e-5), frozen("*"),
    )  # fmt: skip
    lines = printed(plan, width=80).splitlines()
    assert len([line for line in lines if line.split()[:1] and line.split()[0].isdigit()]) == 5
    (language,) = [line for line in lines if "language.layers[0:2]" in line]
    assert "lora 128/256/2" in language and "5e-05" in language
    assert language.split()[-1] == f"{plan.rows[3].count.total:,}"
    assert not any("…" in line for line in lines)


def test_the_summary_holds_the_rows_of_the_table() -> None:
    rules = frozen("vision"), full("connector", lr=2e-4, weight_decay=0.1), lora("language", rank=4)
    plan = tune(llava(), *rules)
    rows = plan.summary()
    assert [row["match"] for row in rows] == ["vision", "connector", "language"]
    connector = plan.rows[1].count
    assert rows[1] == {
        "match": "connector",
        "method": "full",
        "lr": 2e-4,
        "weight_decay": 0.1,
        "trainable": connector.trainable,
        "total": connector.total,
    }
    assert (rows[0]["lr"], rows[0]["trainable"]) == (None, 0) and rows[2]["method"] == "lora 4/8/2"


@pytest.mark.requirement("E-15")
def test_the_table_shows_every_rule() -> None:
    plan = tune(
        llava(), frozen("vision"), full("connector", lr=2e-4), lora("language.layers[0:2]", rank=8), frozen("*")
    )
    lines = printed(plan).splitlines()
    (connector,) = [line for line in lines if " connector " in line]
    assert (
        "full" in connector
        and "0.0002" in connector
        and "0.1" in connector
        and connector.split()[-2:] == ["2,112", "2,112"]
    )
    (language,) = [line for line in lines if "language.layers[0:2]" in line]
    assert "lora 8/16/2" in language
    assert str(plan.count) in printed(plan)


# --- token rows --------------------------------------------------------------------------------------------------


def step(model: PreTrainedModel, plan: TuningPlan) -> None:
    """One plain gradient step on the sum of log-probabilities of token 8."""
    logits(model).log_softmax(-1)[..., 8].sum().backward()
    with torch.no_grad():
        for group in plan.groups:
            for parameter in group.parameters.values():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=0.1)


def rows_changed(before: Tensor, after: Tensor) -> list[int]:
    return (before != after).any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("build", [llava, tied_llava])
def test_trained_tokens_change_their_rows_in_embedding_and_head_only(build: Any) -> None:
    model = build()
    embedding, head = (module.weight.detach().clone() for module in (model.get_input_embeddings(), model.lm_head))
    plan = tune(model, lora("language", rank=2, targets="qv", train_tokens=(5, 8)), frozen("*"))
    rows = [name for group in plan.groups for name in group.parameters if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if build is tied_llava else 2)
    step(model, plan)
    assert rows_changed(embedding, model.get_input_embeddings().weight) == [5, 8]
    assert rows_changed(head, model.get_output_embeddings().weight) == [5, 8]


def test_trained_tokens_of_a_frozen_embedding_leave_its_other_rows_as_they_are() -> None:
    model = llava()
    embedding = model.get_input_embeddings().weight.detach().clone()
    plan = tune(model, lora("language.layers", rank=2, train_tokens=(5,)), frozen("*"))
    assert "lora 2/4/2 and 1 tokens" in printed(plan)
    step(model, plan)
    assert rows_changed(embedding, model.get_input_embeddings().weight) == [5]


def test_trained_tokens_need_an_embedding_that_is_not_trained_whole_and_one_rule() -> None:
    with pytest.raises(ModelError, match=r"rule 2 `language` trains all rows of `model.language_model.embed_tokens`"):
        tune(llava(), lora("language.layers", rank=2, train_tokens=(5,)), full("language"), frozen("*"))
    with pytest.raises(ModelError, match="is the second with `train_tokens`"):
        rules = [lora("language.layers[1]", train_tokens=(5,)), lora("language", train_tokens=(6,)), frozen("*")]
        tune(llava(), *rules)


# --- types, modes, gradients -------------------------------------------------------------------------------------


def test_adapters_are_float32_under_a_half_precision_base_unless_asked() -> None:
    for precision, dtype in (("float32", torch.float32), ("model", torch.bfloat16)):
        model = llava(dtype=torch.bfloat16)
        before = logits(model).detach()
        plan = tune(model, lora("language", rank=2, precision=precision, train_tokens=(5, 8)), frozen("*"))
        (group,) = plan.groups
        assert {value.dtype for value in group.parameters.values()} == {dtype}
        assert torch.equal(logits(model), before)


@pytest.mark.requirement("F-24")
def test_frozen_towers_stay_in_evaluation_mode() -> None:
    model = llava()
    components = find_components(model)
    rules = [frozen("vision.layers[0]"), full("vision.layers[1]"), frozen("vision"), frozen("connector")]
    apply_tuning(model, components, [*rules, lora("language", rank=2)], 1e-4)
    model.train()
    eval_frozen(model, components)
    layers = model.model.vision_tower.encoder.layers
    assert not any(module.training for module in layers[0].modules())
    assert all(module.training for module in layers[1].modules())
    assert not model.model.multi_modal_projector.training
    assert model.model.language_model.training


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def test_gradient_check_passes_at_step_zero_although_a_has_no_gradient() -> None:
    model = llava()
    tune(model, lora("vision", rank=2), full("connector"), lora("language", rank=2))
    logits(model).square().sum().backward()
    a = next(value for name, value in model.named_parameters() if ".lora_A." in name)
    assert a.grad is not None and not a.grad.any()  # B = 0
    assert check_gradients(trainable(model)) == []


def test_gradient_check_names_what_was_not_reached() -> None:
    model = llava()
    tune(model, full("vision.layers[0]"), frozen("vision"), full("connector"), lora("language", rank=2))
    text = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
    (text.sum() + 0 * logits(model)[..., 0].sum()).backward()  # a picture at weight zero
    missed = check_gradients(trainable(model))
    assert {name.split(".")[1] for name in missed} == {"vision_tower", "multi_modal_projector"}
    model.model.multi_modal_projector.linear_1.bias.grad = None
    model.model.multi_modal_projector.linear_1.weight.grad.fill_(1.0)
    missed = check_gradients(trainable(model))
    assert "model.multi_modal_projector.linear_1.bias" in missed
    assert "model.multi_modal_projector.linear_1.weight" not in missed


def test_gradient_check_accepts_a_zero_beside_a_live_parameter_of_the_same_module() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    layer.bias.grad = torch.zeros(2)
    assert check_gradients(dict(layer.named_parameters())) == []
    layer.weight.grad = torch.zeros(2, 2)
    assert check_gradients(dict(layer.named_parameters())) == ["weight", "bias"]


@pytest.mark.requirement("F-12")
def test_fresh_adapters_are_initialised_and_loaded_ones_are_kept(tmp_path: Any) -> None:
    trained = llava()
    tune(trained, lora("language", rank=2), frozen("*"))
    b = {name: value for name, value in trained.named_parameters() if ".lora_B." in name}
    a = {name: value for name, value in trained.named_parameters() if ".lora_A." in name}
    assert not any(value.any() for value in b.values())
    # kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(fan in)
    assert all(value.abs().max() <= 1 / math.sqrt(value.shape[1]) and value.any() for value in a.values())
    move_adapters(trained)
    save_adapters(trained, tmp_path)
    other = llava()
    tune(other, lora("language", rank=2), frozen("*"))
    load_adapters(other, tmp_path)
    with pytest.raises(ModelError):
        tune(other, lora("language", rank=2), frozen("*"))
    assert torch.equal(logits(other), logits(trained))
