"""Batched generation: rows do not interact, whatever their lengths and pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny import FAMILIES, noise, tiny_family
from triptych.core.protocols import PictureProcessor
from triptych.models import generation, tree_attention
from triptych.models.generation import Prompt, generate, prompt_inputs
from triptych.models.growing_cache import GrowingLayer
from triptych.models.pictures import make_pictures, model_inputs
from triptych.models.tree_attention import TREE_ATTENTION

SIZES = [[(32, 32)], [(64, 24), (20, 50)], [], [(90, 90)]]
TEXTS = ["What is it?", "Compare!", "A question without any picture, longer than others.", "?"]


def prompts(tokenizer: Any, pictures: PictureProcessor) -> list[Prompt]:
    result = []
    for number, (sizes, text) in enumerate(zip(SIZES, TEXTS, strict=True)):
        ids = tokenizer.encode("Q: ", add_special_tokens=False)
        for width, height in sizes:
            ids += pictures.token_ids(width, height)
        ids += tokenizer.encode(text, add_special_tokens=False)
        images = tuple(noise(*size, seed=10 * number + index) for index, size in enumerate(sizes))
        result.append(Prompt(torch.tensor(ids), images))
    return result


def greedy(model: PreTrainedModel, prompt: Prompt, pictures: PictureProcessor, count: int) -> list[int]:
    """The plainest way: one row, no padding, the whole row again for every token."""
    ids = prompt.input_ids
    for _ in range(count):
        row = prompt_inputs(model, [Prompt(ids, prompt.pictures)], pictures, pad=0)
        row.pop("attention_mask")
        with torch.no_grad():
            ids = torch.cat([ids, model(**row, use_cache=False).logits[0, -1].argmax().view(1)])
    return ids[len(prompt.input_ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_row_alone(family: str) -> None:
    model, tokenizer, processor = tiny_family(family, dtype=torch.float64)
    pictures = make_pictures(model.config, processor, tokenizer)
    rows = prompts(tokenizer, pictures)
    together = generate(model, rows, pictures, max_new_tokens=5, stop_ids=[0])
    alone = [generate(model, [row], pictures, max_new_tokens=5, stop_ids=[0])[0] for row in rows]
    assert together == alone
    assert together == [_cut(greedy(model, row, pictures, 5), 0) for row in rows]
    assert len({tuple(answer) for answer in together}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_samples_of_a_prompt_are_those_of_the_prompt_repeated(family: str, temperature: float) -> None:
    model, tokenizer, processor = tiny_family(family, dtype=torch.float64)
    pictures = make_pictures(model.config, processor, tokenizer)
    rows = prompts(tokenizer, pictures)
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    options: dict[str, Any] = {"max_new_tokens": 5, "stop_ids": [0], "temperature": temperature}
    torch.manual_seed(3)
    shared = generate(model, rows, pictures, samples=3, **options)
    longest = max(len(row.input_ids) for row in rows)
    assert seen[0] == (len(rows), longest - 1) and set(seen[1:]) == {(3 * len(rows), 1)}
    torch.manual_seed(3)
    repeated = generate(model, [row for row in rows for _ in range(3)], pictures, **options)
    assert shared == repeated and len(shared) == 3 * len(rows)
    if temperature:
        assert len({tuple(answer) for answer in shared[:3]}) > 1


def test_a_prompt_of_one_token_has_nothing_to_share() -> None:
    model, tokenizer, processor = tiny_family("llava")
    pictures = make_pictures(model.config, processor, tokenizer)
    one = [Prompt(torch.tensor([5]), ())]
    options: dict[str, Any] = {"max_new_tokens": 3, "stop_ids": [383]}
    assert generate(model, one, pictures, samples=2, **options) == generate(model, one * 2, pictures, **options)


def test_the_answer_ends_before_the_first_stop_token() -> None:
    model, tokenizer, processor = tiny_family("llava")
    pictures = make_pictures(model.config, processor, tokenizer)
    rows = prompts(tokenizer, pictures)
    whole = generate(model, rows, pictures, max_new_tokens=6, stop_ids=[383])
    stop = whole[0][2]
    cut = generate(model, rows, pictures, max_new_tokens=6, stop_ids=[stop, 383])
    assert cut == [_cut(answer, stop) for answer in whole]
    assert len(cut[0]) <= 2


def test_head_and_cache_are_the_fast_ones_and_the_head_is_itself_again_also_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, image_processor = tiny_family("llava")
    pictures = make_pictures(model.config, image_processor, tokenizer)
    head, names = model.get_output_embeddings(), list(model.state_dict())
    plain = model.generate
    seen: list[tuple[type, type]] = []

    def watched(**inputs: Any) -> Any:
        seen.append((type(model.get_output_embeddings()), type(inputs["past_key_values"].layers[0])))
        return plain(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    for samples, calls in ((1, 1), (2, 2)):  # several samples share a first call for their prompts
        seen.clear()
        generate(model, prompts(tokenizer, pictures), pictures, max_new_tokens=2, stop_ids=(), samples=samples)
        assert seen == [(generation._TurnedHead, GrowingLayer)] * calls
    assert model.get_output_embeddings() is head and list(model.state_dict()) == names
    monkeypatch.setattr(model, "generate", lambda **inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, prompts(tokenizer, pictures), pictures, max_new_tokens=2, stop_ids=())
    assert model.get_output_embeddings() is head


def test_modes_are_restored_and_sampling_follows_the_seed() -> None:
    model, tokenizer, processor = tiny_family("llava")
    pictures = make_pictures(model.config, processor, tokenizer)
    rows = prompts(tokenizer, pictures)[2:3]
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(generate(model, rows, pictures, max_new_tokens=8, stop_ids=[], temperature=2.0))
    assert answers[0] == answers[1] != answers[2]
    assert [module.training for module in model.modules()] == modes


def test_prompts_are_padded_on_the_left_in_the_type_of_the_model() -> None:
    model, tokenizer, processor = tiny_family("llava", dtype=torch.bfloat16)
    pictures = make_pictures(model.config, processor, tokenizer)
    rows = [Prompt(torch.tensor([5, 6]), ()), Prompt(torch.tensor([7, *pictures.token_ids(32, 32)]), (noise(),))]
    inputs = prompt_inputs(model, rows, pictures, pad=9)
    assert inputs["input_ids"][0].tolist() == [9] * 15 + [5, 6]
    assert inputs["attention_mask"][0].tolist() == [0] * 15 + [1, 1]
    assert inputs["pixel_values"].dtype == torch.bfloat16
    expected = model_inputs(pictures.pixels([noise()]))["pixel_values"].to(torch.bfloat16)
    assert torch.equal(inputs["pixel_values"], expected)


def _cut(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_its_own_attention_back_after_an_answer(family: str) -> None:
    model, tokenizer, processor = tiny_family(family)
    pictures = make_pictures(model.config, processor, tokenizer)
    text = model.config.get_text_config()
    before = text._attn_implementation
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(text._attn_implementation))
    generate(model, prompts(tokenizer, pictures), pictures, max_new_tokens=2, stop_ids=[0])
    assert before == text._attn_implementation == "sdpa" and set(seen) == {TREE_ATTENTION}

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    model.get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        generate(model, prompts(tokenizer, pictures), pictures, max_new_tokens=2, stop_ids=[0])
    assert text._attn_implementation == "sdpa"


def test_next_tokens_of_one_prompt_attend_by_the_heads_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, processor = tiny_family("llava")
    pictures = make_pictures(model.config, processor, tokenizer)
    seen: list[tuple[int, ...]] = []
    plain = tree_attention._next_token
    monkeypatch.setattr(
        tree_attention, "_next_token", lambda query, *rest: seen.append(tuple(query.shape[:1])) or plain(query, *rest)
    )
    options: dict[str, Any] = {"max_new_tokens": 3, "stop_ids": [], "samples": 2}
    generate(model, prompts(tokenizer, pictures)[:1], pictures, **options)
    assert seen == [(2,)] * 3 * model.config.get_text_config().num_hidden_layers
