"""The scorer equals Hugging Face's own loss, gradients included, for all families."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from tests.tiny import FAMILIES, Answer, Row, batch_of, noise, randomise, tiny_family, token_id
from triptych.core.errors import ModelError
from triptych.core.types import Batch
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.models.components import component_parameters, find_components
from triptych.models.pictures import make_pictures, model_inputs
from triptych.models.vlm import VlmScorer, row_balance

EVERY = (*FAMILIES, "llava_clip")
A, B = noise(40, 60, seed=1), noise(64, 32, seed=2)
ROWS: tuple[Row, ...] = (
    (A, "what?", Answer("a cat<|im_end|>")),
    ("hello", Answer("good day to you, and more<|im_end|>"), "next", Answer("bye<|im_end|>")),
    ("one", A, "two", B, "same?", Answer("no<|im_end|>")),
)


def _build(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[VlmScorer, Any, Any]:
    model, tokenizer, image_processor = tiny_family(family, dtype=dtype)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    return VlmScorer(model, find_components(model), pictures=pictures, **options), tokenizer, pictures


def _reference(family: str, model: PreTrainedModel, batch: Batch, rows: tuple[Row, ...], pictures: Any) -> Any:
    """Hugging Face's own forward: an attention mask, one picture input per appearance, `labels=`."""
    shown = [part for row in rows for part in row if not isinstance(part, str | Answer)]
    inputs: dict[str, Tensor] = model_inputs(pictures.pixels(shown)) if shown else {}
    is_image = (batch.input_ids == model.config.image_token_id).long()
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_image
    if family == "gemma3":
        inputs["token_type_ids"] = is_image
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **inputs)


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.requirement("B-12", "B-14", "B-15", "C-1", "C-8", "A-34", "A-35", "H-28")
@pytest.mark.parametrize("family", EVERY)
def test_loss_and_gradients_equal_hugging_face(family: str) -> None:
    scorer, tokenizer, pictures = _build(family)
    batch = batch_of(ROWS, tokenizer, pictures)
    assert len(batch.images) == 2 and batch.row_images == ((0,), (), (0, 1))
    theirs = _reference(family, scorer.hf, batch, ROWS, pictures)
    theirs.loss.backward()
    expected = _gradients(scorer.hf)
    scorer.zero_grad()
    logprobs = scorer(batch).token_logprobs
    assert logprobs.shape == (int(batch.supervised.sum()),)
    loss = -logprobs.mean()
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    ours = _gradients(scorer.hf)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.requirement("H-28", "B-12")
@pytest.mark.parametrize("family", EVERY)
def test_each_logprob_equals_hugging_faces_logits_in_float64(family: str) -> None:
    scorer, tokenizer, pictures = _build(family, torch.float64, chunk_size=7)
    batch = batch_of(ROWS, tokenizer, pictures)
    with torch.no_grad():
        logits = _reference(family, scorer.hf, batch, ROWS, pictures).logits[:, :-1]
        full = logits.log_softmax(-1).gather(2, batch.labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        ours = scorer(batch).token_logprobs
    # Norms and rotary angles are float32 inside the models whatever their dtype.
    torch.testing.assert_close(ours, full[batch.supervised[:, 1:]], rtol=1e-6, atol=1e-6)


@pytest.mark.requirement("A-35", "B-12")
@pytest.mark.parametrize("family", EVERY)
def test_a_row_does_not_depend_on_its_neighbours_or_padding(family: str) -> None:
    scorer, tokenizer, pictures = _build(family)
    batch = batch_of(ROWS, tokenizer, pictures)
    together = scorer(batch).token_logprobs
    for index, row in enumerate(ROWS):
        alone = scorer(batch_of([row], tokenizer, pictures)).token_logprobs
        torch.testing.assert_close(alone, together[batch.supervised_rows == index], rtol=1e-5, atol=1e-5)
    garbage = torch.where(batch.attention_mask == 1, batch.input_ids, 7)
    other = scorer(dataclasses.replace(batch, input_ids=garbage)).token_logprobs
    torch.testing.assert_close(other, together, rtol=0, atol=0)


@pytest.mark.requirement("A-34", "A-35")
@pytest.mark.parametrize("family", EVERY)
def test_pictures_land_in_their_own_places(family: str) -> None:
    scorer, tokenizer, pictures = _build(family)

    def score(first: Any, second: Any) -> Tensor:
        rows = [(first, "x", second, "y", Answer("zz"))]
        return scorer(batch_of(rows, tokenizer, pictures)).token_logprobs

    other = noise(40, 60, seed=9)
    assert not torch.allclose(score(A, other), score(other, A), atol=1e-4)
    assert not torch.allclose(score(A, other), score(A, A), atol=1e-4)
    torch.testing.assert_close(score(A, A), score(A, A.copy()), rtol=1e-5, atol=1e-5)


def test_a_shared_picture_passes_the_tower_once() -> None:
    scorer, tokenizer, pictures = _build("llava")
    seen: list[int] = []
    scorer.hf.model.vision_tower.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    scorer(batch_of(ROWS, tokenizer, pictures))
    assert seen == [2]


@pytest.mark.requirement("H-18", "C-2")
def test_chunks_equal_one_chunk() -> None:
    results = []
    for chunk_size in (3, 10_000):
        scorer, tokenizer, pictures = _build("llava", torch.float64, chunk_size=chunk_size)
        logprobs = scorer(batch_of(ROWS, tokenizer, pictures)).token_logprobs
        logprobs.sum().backward()
        results.append((logprobs.detach(), _gradients(scorer.hf)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-12, atol=1e-12)


def _cut(batch: Batch, column: int) -> Batch:
    keep = [index for index in range(batch.input_ids.shape[1]) if index != column]
    return dataclasses.replace(batch, input_ids=batch.input_ids[:, keep], labels=batch.labels[:, keep])


@pytest.mark.requirement("A-34", "A-35", "C-8", "C-10")
@pytest.mark.parametrize("family", EVERY)
def test_placeholders_and_features_that_disagree_are_named(family: str) -> None:
    scorer, tokenizer, pictures = _build(family)
    batch = batch_of(ROWS[:1], tokenizer, pictures)
    features = int((batch.input_ids == scorer.components.image_token_id).sum())
    first = int((batch.input_ids[0] == scorer.components.image_token_id).nonzero()[0])
    with pytest.raises(ModelError) as caught:
        scorer(_cut(batch, first))
    assert caught.value.problems[0].message == (
        f"sample tiny.json:1 has {features - 1} image placeholders, but its 1 pictures have {features} features"
    )


@pytest.mark.requirement("A-35")
def test_equal_totals_in_wrong_rows_are_found() -> None:
    scorer, tokenizer, pictures = _build("llava")
    batch = batch_of([(A, Answer("a")), ("text", Answer("b"))], tokenizer, pictures)
    swapped = dataclasses.replace(batch, row_images=((), (0,)))
    with pytest.raises(ModelError, match="2 problems") as caught:
        scorer(swapped)
    assert [problem.message for problem in caught.value.problems] == [
        "sample tiny.json:1 has 16 image placeholders, but its 0 pictures have 0 features",
        "sample tiny.json:2 has 0 image placeholders, but its 1 pictures have 16 features",
    ]


def test_missing_pixels_and_unknown_needs_are_named() -> None:
    scorer, tokenizer, pictures = _build("llava")
    batch = batch_of(ROWS, tokenizer, pictures)
    with pytest.raises(ModelError, match="a batch of 2 pictures has no pixels"):
        scorer(dataclasses.replace(batch, pixels=None))
    with pytest.raises(ModelError, match="cannot compute rewards, values"):
        VlmScorer(scorer.hf, scorer.components, needs=frozenset({"values", "rewards"}))


@pytest.mark.requirement("A-5")
@pytest.mark.parametrize("family", EVERY)
def test_text_only_batches_give_every_used_parameter_a_zero_gradient(family: str) -> None:
    scorer, tokenizer, pictures = _build(family)
    scorer(batch_of(ROWS, tokenizer, pictures)).token_logprobs.sum().backward()
    used = set(_gradients(scorer.hf))
    scorer.zero_grad()
    batch = batch_of(ROWS[1:2], tokenizer, pictures)
    logprobs = scorer(batch).token_logprobs
    logprobs.sum().backward()
    gradients = _gradients(scorer.hf)
    assert set(gradients) == used
    for component in ("vision", "connector"):
        for name in component_parameters(scorer.components, component, scorer.hf):
            assert name not in used or gradients[name].abs().max() == 0
    theirs = _reference(family, scorer.hf, batch, ROWS[1:2], pictures)
    torch.testing.assert_close(-logprobs.mean(), theirs.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.requirement("A-5")
def test_no_dummy_picture_where_nothing_needs_it() -> None:
    scorer, tokenizer, pictures = _build("llava")
    text = batch_of(ROWS[1:2], tokenizer, pictures)
    calls: list[int] = []
    scorer.hf.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        scorer(text)
    assert calls == []
    scorer(text)
    assert calls == [1]
    for component in ("vision", "connector"):
        for parameter in component_parameters(scorer.components, component, scorer.hf).values():
            parameter.requires_grad_(False)
    scorer(text)
    assert calls == [1]


@pytest.mark.requirement("A-5")
def test_a_scorer_that_cannot_make_the_dummy_says_so() -> None:
    scorer, tokenizer, pictures = _build("llava")
    bare = VlmScorer(scorer.hf, scorer.components)
    with pytest.raises(ModelError, match="no pictures while vision or connector train"):
        bare(batch_of(ROWS[1:2], tokenizer, pictures))


@pytest.mark.requirement("C-2")
def test_a_batch_without_supervision_is_zero_not_nan() -> None:
    scorer, tokenizer, pictures = _build("llava")
    logprobs = scorer(batch_of([(A, "only a prompt")], tokenizer, pictures)).token_logprobs
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert all(gradient.abs().max() == 0 for gradient in _gradients(scorer.hf).values())


def _freeze(scorer: VlmScorer, *components: str) -> None:
    for component in components:
        for parameter in component_parameters(scorer.components, component, scorer.hf).values():
            parameter.requires_grad_(False)


@pytest.mark.requirement("F-24")
def test_frozen_parts_stay_in_evaluation_mode() -> None:
    scorer, _, _ = _build("llava")
    _freeze(scorer, "vision")
    scorer.hf.model.language_model.layers[0].requires_grad_(False)
    scorer.train()
    assert not any(module.training for module in scorer.hf.model.vision_tower.modules())
    assert not any(module.training for module in scorer.hf.model.language_model.layers[0].modules())
    assert all(module.training for module in scorer.hf.model.language_model.layers[1].modules())
    assert scorer.hf.model.multi_modal_projector.training
    torch.nn.Sequential(scorer).train()  # as a wrapper such as DDP does
    assert not scorer.hf.model.vision_tower.training
    scorer.hf.model.vision_tower.requires_grad_(True)
    scorer.train()
    assert scorer.hf.model.vision_tower.training
    scorer.eval()
    assert not any(module.training for module in scorer.modules())


@pytest.mark.requirement("F-24")
def test_a_frozen_tower_ignores_dropout_and_keeps_no_graph() -> None:
    scorer, tokenizer, pictures = _build("llava")
    for module in scorer.hf.model.vision_tower.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    batch = batch_of(ROWS, tokenizer, pictures)
    outputs: list[Tensor] = []
    scorer.hf.model.vision_tower.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    _freeze(scorer, "vision")
    first, second = (scorer.train()(batch).token_logprobs for _ in range(2))
    assert torch.equal(first, second)
    assert not any(output.requires_grad for output in outputs)
    scorer.hf.model.vision_tower.requires_grad_(True)
    scorer.train()
    outputs.clear()
    third, fourth = (scorer(batch).token_logprobs for _ in range(2))
    assert not torch.equal(third, fourth)  # the dropout is real: without freezing it shows
    assert all(output.requires_grad for output in outputs)


def _recompute_blocks(scorer: VlmScorer) -> None:
    """As a training run does it."""
    runtime = Runtime(RuntimeConfig(precision="fp32", activation_checkpointing=True))
    runtime.wrap(scorer, [f"hf.{path}" for paths in scorer.components.layers.values() for path in paths])


@pytest.mark.requirement("I-6")
@pytest.mark.parametrize("family", EVERY)
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    results = []
    for enabled in (False, True):
        scorer, tokenizer, pictures = _build(family)
        scorer.train()
        if enabled:
            _recompute_blocks(scorer)
        logprobs = scorer(batch_of(ROWS, tokenizer, pictures)).token_logprobs
        logprobs.sum().backward()
        results.append((logprobs.detach(), _gradients(scorer.hf)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.requirement("I-6", "F-24")
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_checkpointing_through_a_frozen_language_model_reaches_the_connector(family: str) -> None:
    """The alignment stage: only the connector trains, its gradient comes through blocks that are frozen."""
    results = []
    for enabled in (False, True):
        scorer, tokenizer, pictures = _build(family)
        _freeze(scorer, "vision", "language")
        scorer.train()
        if enabled:
            _recompute_blocks(scorer)
        block = scorer.hf.get_submodule(scorer.components.layers["language"][0])
        calls: list[int] = []
        block.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        scorer(batch_of(ROWS, tokenizer, pictures)).token_logprobs.sum().backward()
        assert len(calls) == (2 if enabled else 1)  # computed again in the backward pass
        assert not block.self_attn.training
        results.append(_gradients(scorer.hf))
    assert (
        results[0].keys() == results[1].keys() == set(component_parameters(scorer.components, "connector", scorer.hf))
    )
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.requirement("I-6")
def test_a_trainable_adapter_over_frozen_embeddings_gets_gradients() -> None:
    scorer, tokenizer, pictures = _build("llava")
    _freeze(scorer, "vision", "connector", "language")
    weight = scorer.hf.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight").requires_grad_(True)
    scorer.train()
    _recompute_blocks(scorer)
    scorer(batch_of(ROWS, tokenizer, pictures)).token_logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_the_model_inside_still_generates_after_scoring() -> None:
    scorer, tokenizer, pictures = _build("qwen3_vl")
    batch = batch_of([(A, "what?", Answer("x"))], tokenizer, pictures)
    inputs = {
        "input_ids": batch.input_ids,
        "mm_token_type_ids": (batch.input_ids == scorer.components.image_token_id).long(),
        **model_inputs(batch.pixels or {}),
    }
    before = scorer(batch).token_logprobs
    generated = scorer.hf.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= batch.input_ids.shape[1] + 3
    # generate leaves rope offsets of its own rows behind; ours are passed explicitly
    assert torch.equal(scorer(batch).token_logprobs, before)


@pytest.mark.parametrize("family", EVERY)
def test_bfloat16_weights_and_autocast(family: str) -> None:
    scorer, tokenizer, pictures = _build(family)
    batch = batch_of(ROWS, tokenizer, pictures)
    full = scorer(batch).token_logprobs
    with torch.autocast("cpu", torch.bfloat16):
        mixed = scorer(batch).token_logprobs
    half, _, _ = _build(family, torch.bfloat16)
    for logprobs in (mixed, half(batch).token_logprobs):
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs.mean(), full.mean(), rtol=0.05, atol=0.05)


@pytest.mark.requirement("A-5")
def test_sharded_parameters_are_gathered_for_text_too() -> None:
    """Under FSDP2 every rank must run the vision side in every forward pass, frozen or not, else gathering hangs."""
    plain, tokenizer, pictures = _build("llava")
    batches = [batch_of(ROWS, tokenizer, pictures), batch_of(ROWS[1:2], tokenizer, pictures)]
    expected = []
    for batch in batches:
        logprobs = plain(batch).token_logprobs
        logprobs.sum().backward()
        expected.append(logprobs.detach())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        scorer, _, _ = _build("llava", chunk_size=5)
        calls: list[int] = []
        scorer.hf.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
        mesh = dist.init_device_mesh("cpu", (1,))
        for path in (*scorer.components.layers["vision"], *scorer.components.layers["language"]):
            fully_shard(scorer.hf.get_submodule(path), mesh=mesh)
        fully_shard(scorer, mesh=mesh)
        for batch, logprobs in zip(batches, expected, strict=True):
            result = scorer(batch).token_logprobs
            torch.testing.assert_close(result.detach(), logprobs, rtol=1e-5, atol=1e-5)
            result.sum().backward()
        for name, parameter in plain.named_parameters():
            gradient = scorer.get_parameter(name).grad
            assert (gradient is None) == (parameter.grad is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient.full_tensor(), parameter.grad, rtol=1e-4, atol=2e-6, msg=name)
        calls.clear()
        with torch.no_grad():
            scorer(batches[1])
        assert calls == [1]
    finally:
        dist.destroy_process_group()


def _tiny_experts() -> Qwen3VLMoeForConditionalGeneration:
    dense, _, _ = tiny_family("qwen3_vl")
    text = dense.config.text_config.to_dict() | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    for name in ("model_type", "architectures"):
        text.pop(name, None)
    config = Qwen3VLMoeConfig(
        vision_config={
            name: value for name, value in dense.config.vision_config.to_dict().items() if name != "model_type"
        },
        text_config=text,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = randomise(Qwen3VLMoeForConditionalGeneration(config)).eval()
    assert isinstance(model, Qwen3VLMoeForConditionalGeneration)
    return model


def test_router_loss_is_the_sum_of_the_rows_own_losses() -> None:
    model = _tiny_experts()
    _, tokenizer, image_processor = tiny_family("qwen3_vl")
    pictures = make_pictures(model.config, image_processor, tokenizer)
    scorer = VlmScorer(model, find_components(model), pictures=pictures)
    batch = batch_of(ROWS, tokenizer, pictures)
    scores = scorer(batch)
    expected = 0.0
    for row in ROWS:
        alone = batch_of([row], tokenizer, pictures)
        theirs = _reference("qwen3_vl", model, alone, (row,), pictures)
        expected += 0.1 * theirs.aux_loss.item()
    assert scores.auxiliary.item() == pytest.approx(expected, rel=1e-5)
    theirs = _reference("qwen3_vl", model, batch, ROWS, pictures)
    without = theirs.loss - 0.1 * theirs.aux_loss
    torch.testing.assert_close(-scores.token_logprobs.mean(), without, rtol=1e-5, atol=1e-5)
    scores.auxiliary.backward()
    assert model.model.language_model.layers[0].mlp.gate.weight.grad.abs().max() > 0


def test_row_balance_by_hand() -> None:
    # one layer, two experts, one row of two tokens and padding; both tokens prefer expert 0 with probability 3/4
    logits = torch.log(torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.1, 0.9]]))
    result = row_balance((logits,), torch.tensor([[1, 1, 0]]), top_k=1)
    assert result.tolist() == pytest.approx([2 * (1.0 * 0.75 + 0.0 * 0.25)])
    theirs = load_balancing_loss_func((logits,), 2, 1, torch.tensor([[1, 1, 0]]))
    assert result.item() == pytest.approx(theirs.item())


def test_no_router_no_auxiliary() -> None:
    scorer, tokenizer, pictures = _build("llava", needs=frozenset())
    scores = scorer(batch_of(ROWS, tokenizer, pictures))
    assert scores.auxiliary is None and scores.token_logprobs is None
