"""Packed trees equal their rows, gradients included, for every family; and no branch sees another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import FAMILIES, Answer, DoubleThroughout, Tree, batch_of, noise, tiny_family, tree_batch
from triptych.core.errors import ModelError
from triptych.core.types import IGNORE, Batch
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.models.components import find_components, tree_obstacle
from triptych.models.generation import Prompt, generate
from triptych.models.pictures import make_pictures
from triptych.models.tree_attention import TREE_ATTENTION
from triptych.models.trees import _runs, make_layout
from triptych.models.vlm import VlmScorer

EVERY = (*FAMILIES, "llava_clip", "gemma3 narrow")
"""`gemma3 narrow`: a sliding window shorter than a picture, whose tokens see each other within it only."""
A, B = noise(40, 60, seed=1), noise(64, 32, seed=2)
TREES: tuple[Tree, ...] = (
    # A long trunk with a picture; one branch is a single token.
    (
        ("look", A, "and say"),
        (("what is it?", Answer("a cat<|im_end|>")), (Answer("no"),), ("how many?", Answer("two cats and a dog"))),
    ),
    # No picture, and labels in the trunk that count once per branch.
    (("hello", Answer("good day to you"), "and"), ((Answer("bye"),), ("then", Answer("good night to all of you")))),
    # Twice the same row.
    (("twice", A, Answer("the same")), ((), ())),
    # One branch: a plain sample.
    (("one", A), (("two", B, "same?", Answer("no<|im_end|>")),)),
    # Branches with pictures of their own.
    (("first", B), (("second", A, "same?", Answer("no")), ("nothing more?", Answer("yes<|im_end|>")))),
)


def _scorers(family: str, dtype: torch.dtype) -> tuple[VlmScorer, VlmScorer, Any, Any]:
    built = []
    for trees in (False, True):
        changes = {"sliding_window": 3} if "narrow" in family else {}
        model, tokenizer, image_processor = tiny_family(family.split()[0], dtype=dtype, **changes)
        pictures = make_pictures(model.config, image_processor, tokenizer)
        built.append(VlmScorer(model, find_components(model), pictures=pictures, trees=trees))
    assert built[1].packs_trees and not built[0].packs_trees
    return built[0], built[1], tokenizer, pictures


def _run(scorer: VlmScorer, batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    scorer.zero_grad()
    logprobs = scorer(batch).token_logprobs
    assert logprobs is not None
    (logprobs * weights).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in scorer.hf.named_parameters() if p.grad is not None}


def _mlp(scorer: VlmScorer) -> torch.nn.Module:
    return scorer.hf.get_submodule(f"{scorer.components.layers['language'][0]}.mlp")


def _double(batch: Batch) -> Batch:
    pixels = {name: value.double() if value.is_floating_point() else value for name, value in batch.pixels.items()}
    return replace(batch, pixels=pixels)


@pytest.mark.parametrize("family", EVERY)
def test_packed_trees_equal_their_rows_in_float64(family: str) -> None:
    plain, fast, tokenizer, pictures = _scorers(family, torch.float64)
    batch = _double(tree_batch(TREES, tokenizer, pictures))
    weights = torch.linspace(0.5, 2.0, int(batch.supervised.sum()), dtype=torch.float64)
    with DoubleThroughout():
        expected, gradients = _run(plain, batch, weights)
        found, ours = _run(fast, batch, weights)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-10 * max(1.0, float(gradient.norm())), name


@pytest.mark.parametrize("family", EVERY)
def test_checkpointing_changes_nothing(family: str) -> None:
    _, fast, tokenizer, pictures = _scorers(family, torch.float32)
    batch = tree_batch(TREES, tokenizer, pictures)
    weights = torch.ones(int(batch.supervised.sum()))
    fast.train()
    expected, gradients = _run(fast, batch, weights)
    calls = []
    _mlp(fast).register_forward_pre_hook(lambda module, inputs: calls.append(1))
    fast.hf.activation_checkpointing_enable()
    found, ours = _run(fast, batch, weights)
    assert len(calls) == 2  # once more in the backward pass
    assert torch.equal(found, expected)
    assert all(torch.equal(ours[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_trees_equal_their_rows_in_float32(family: str) -> None:
    plain, fast, tokenizer, pictures = _scorers(family, torch.float32)
    batch = tree_batch(TREES, tokenizer, pictures)
    weights = torch.full((int(batch.supervised.sum()),), 1 / 20)
    expected, gradients = _run(plain, batch, weights)
    found, ours = _run(fast, batch, weights)
    torch.testing.assert_close((found * weights).sum(), (expected * weights).sum(), rtol=1e-5, atol=1e-5)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * float(gradient.norm()) + 1e-6 * float(total), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_computed_once(family: str) -> None:
    _, fast, tokenizer, pictures = _scorers(family, torch.float32)
    batch = tree_batch(TREES, tokenizer, pictures)
    seen = []
    fast.hf.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fast(batch)
    trunks = {int(e): int(n) for e, n in zip(batch.example_index, batch.trunk_lengths, strict=True)}
    own = int((batch.lengths - batch.trunk_lengths).sum())
    assert seen[0][:2] == (1, own + sum(trunks.values()))
    assert seen[0][1] < 0.8 * batch.input_ids.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_in_one_branch_or_tree_changes_no_other(family: str) -> None:
    _, fast, tokenizer, pictures = _scorers(family, torch.float64)
    batch = _double(tree_batch(TREES, tokenizer, pictures))
    before = fast(batch).token_logprobs
    for row in range(batch.num_rows):
        ids = batch.input_ids.clone()
        own = slice(int(batch.trunk_lengths[row]), int(batch.lengths[row]))
        text = batch.labels[row, own] != IGNORE
        ids[row, own] = torch.where(text, (ids[row, own] + 1) % 7, ids[row, own])
        after = fast(replace(batch, input_ids=ids)).token_logprobs
        others = batch.supervised_rows != row
        assert torch.equal(after[others], before[others])
        first = batch.supervised_rows == row
        if int(text.sum()) > 1:
            assert not torch.equal(after[first], before[first])


def test_no_token_sees_another_row_of_its_packed_row() -> None:
    """By gradients, not by values: what a label's log-probability depends on is its own row, no more."""
    _, fast, tokenizer, pictures = _scorers("llava", torch.float64)
    batch = _double(tree_batch(TREES, tokenizer, pictures))
    layout = make_layout(batch, None)
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    fast.hf.get_input_embeddings().register_forward_hook(keep)
    logprobs = fast(batch).token_logprobs
    for index, (row, column) in enumerate(batch.supervised.nonzero().tolist()):
        (gradient,) = torch.autograd.grad(logprobs[index], kept[0], retain_graph=True)
        touched = set(gradient[0].abs().sum(-1).nonzero()[:, 0].tolist())
        assert touched <= set(layout.places[row, :column].tolist())


def test_a_model_that_attends_by_trees_generates_as_before() -> None:
    plain, fast, tokenizer, pictures = _scorers("llava", torch.float32)
    prompts = [
        Prompt(batch_of([row], tokenizer, pictures).input_ids[0], images)
        for row, images in ((("look", A, "what?"), (A,)), (("hello you and all",), ()))
    ]
    options = {"max_new_tokens": 8, "stop_ids": [1]}
    assert generate(fast.hf, prompts, pictures, **options) == generate(plain.hf, prompts, pictures, **options)
    assert fast.hf.config.text_config._attn_implementation == TREE_ATTENTION


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_inside_is_as_it_was(family: str, tmp_path: Path) -> None:
    plain, fast, tokenizer, pictures = _scorers(family, torch.float32)
    fast(tree_batch(TREES, tokenizer, pictures))
    rows = batch_of([("hello you",), ("and a longer one",)], tokenizer, pictures)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    if family == "gemma3":
        inputs["token_type_ids"] = torch.zeros_like(rows.input_ids)
    assert torch.equal(fast.hf(**inputs).logits, plain.hf(**inputs).logits)
    fast.hf.save_pretrained(tmp_path)
    assert TREE_ATTENTION not in (tmp_path / "config.json").read_text()


def test_a_trunk_that_cuts_a_picture_is_refused() -> None:
    _, fast, tokenizer, pictures = _scorers("llava", torch.float32)
    batch = tree_batch([(("look", A), ((Answer("a"),), (Answer("b"),)))], tokenizer, pictures)
    with pytest.raises(ModelError, match=r"trees\.json:1 ends inside a picture: .* of 16 tokens"):
        fast(replace(batch, trunk_lengths=batch.trunk_lengths - 3))


@pytest.mark.parametrize(
    "spans",
    [[(3, 4), (20, 4), (9, 4)], [(3, 5), (20, 4), (9, 3)], [(0, 4), (4, 4)], [(5, 6)], [(20, 4), (3, 4)]],
    ids=["uneven", "padded", "even", "single", "descending"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_are_taken_written_and_added_in_place(spans: list[tuple[int, int]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    runs = _runs(spans, torch.device("cpu"))
    for states in (
        torch.randn(30, 3, 2, generator=generator).to(dtype),
        torch.randn(3, 30, 2, generator=generator).to(dtype).transpose(0, 1),
        torch.randn(30, 3, generator=generator).to(dtype),
    ):
        taken = runs.take(states)
        values = torch.randn(taken.shape, generator=generator).to(dtype)
        put, added = states.clone(), states.clone()
        runs.put(put, values)
        runs.add(added, values)
        expected_put, expected_added = states.clone(), states.clone()
        for number, (start, size) in enumerate(spans):
            assert torch.equal(taken[number, :size], states[start : start + size])
            expected_put[start : start + size] = values[number, :size]
            expected_added[start : start + size] += values[number, :size]
        assert torch.equal(put, expected_put) and torch.equal(added, expected_added)


def test_a_language_model_that_is_not_known_takes_the_plain_path(caplog: pytest.LogCaptureFixture) -> None:
    model, _, _ = tiny_family("llava")
    model.config.text_config.model_type = "bloom"
    scorers = [VlmScorer(model, find_components(model)) for _ in range(2)]
    assert not any(scorer.packs_trees for scorer in scorers)
    message = "the attention of a `bloom` language model is not known"
    assert tree_obstacle(model) == message
    assert caplog.messages == [f"trees are expanded to padded rows: {message}"]
    caplog.clear()
    assert not VlmScorer(tiny_family("llava")[0], scorers[0].components, trees=False).packs_trees
    assert not caplog.messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "recomputed"), [("llava", False), ("llava", True), ("qwen3_vl", False), ("gemma3", False)]
)
def test_compiled_blocks_score_the_same(family: str, recomputed: bool) -> None:
    _, fast, tokenizer, pictures = _scorers(family, torch.float32)
    batch = tree_batch(TREES, tokenizer, pictures)
    weights = torch.full((int(batch.supervised.sum()),), 1 / 20)
    expected, gradients = _run(fast, batch, weights)
    blocks = [path for paths in fast.components.layers.values() for path in paths]
    runtime = Runtime(RuntimeConfig(precision="fp32", compile=True, activation_checkpointing=recomputed))
    assert runtime.wrap(fast, [f"hf.{path}" for path in blocks]) is fast
    assert all(fast.hf.get_submodule(path)._compiled_call_impl is not None for path in blocks)
    found, ours = _run(fast, batch, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_compiled_block_is_two_graphs_around_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast, tokenizer, pictures = _scorers("llava", torch.float32)
    monkeypatch.setattr(torch._dynamo.config, "nested_graph_breaks", False)
    blocks = [f"hf.{path}" for path in fast.components.layers["language"]]
    runtime = Runtime(RuntimeConfig(precision="bf16", compile=True))
    runtime.wrap(fast, blocks)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batch = tree_batch(TREES, tokenizer, pictures)
    with runtime.autocast():
        _run(fast, batch, torch.full((int(batch.supervised.sum()),), 1 / 20))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_another_layout_compiles_nothing_again() -> None:
    plain, fast, tokenizer, pictures = _scorers("llava", torch.float32)
    plain.hf.load_state_dict(fast.hf.state_dict())
    blocks = [path for paths in fast.components.layers.values() for path in paths]
    Runtime(RuntimeConfig(precision="fp32", compile=True)).wrap(fast, [f"hf.{path}" for path in blocks])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of earlier tests
    compiled = []
    chosen = ((0, 1, 2, 3, 4), (0,), (3,), (1, 2), (4, 0), (2, 3), (0, 1, 4), (2,), (4,), (1, 3), (0, 3), (4, 2, 1))
    for numbers in chosen:
        batch = tree_batch([TREES[number] for number in numbers], tokenizer, pictures)
        weights = torch.linspace(-1, 1, int(batch.supervised.sum()))
        expected, gradients = _run(plain, batch, weights)
        found, ours = _run(fast, batch, weights)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # Batches with and without pictures, or a single token of something, may differ; more layouts than that do not.
    assert compiled[-1] == compiled[len(chosen) // 2] <= 16
