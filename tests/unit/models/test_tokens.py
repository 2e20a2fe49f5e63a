"""New tokens: ids, rows, and that they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny import tiny_family, tiny_llama, tiny_tokenizer
from triptych.core.errors import ModelError
from triptych.models.components import find_components
from triptych.models.tokens import TokensConfig, grow_embeddings, register_tokens
from triptych.models.tuning import LoraRule, apply_tuning


@pytest.mark.requirement("A-44", "A-27", "D-16", "D-17")
def test_ids_follow_the_vocabulary_in_order_and_overlap_nothing() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    config = TokensConfig(names=("<box>", "</box>"), series={"<x{}>": 1000, "<grid{}>": 16})
    registry = register_tokens(tokenizer, config, special=["<image>", "<new>"])
    assert registry.ids["<image>"] == tiny_tokenizer().convert_tokens_to_ids("<image>")
    assert [registry.ids[name] for name in ("<new>", "<box>", "</box>")] == [size, size + 1, size + 2]
    assert registry.series["<x{}>"] == range(size + 3, size + 1003)
    assert registry.series["<grid{}>"] == range(size + 1003, size + 1019)
    assert registry.new_ids == tuple(range(size, size + 1019))
    assert len(set(registry.ids.values())) == len(registry.ids)
    assert tokenizer.unk_token_id not in registry.ids.values()
    assert tokenizer.encode("a<x999><box>", add_special_tokens=False)[1:] == [size + 1002, size + 1]
    assert tokenizer.decode([size, size + 1], skip_special_tokens=True) == "<box>"


@pytest.mark.requirement("A-44")
def test_registry_is_the_same_after_saving_and_adds_nothing_twice(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = TokensConfig(series={"<x{}>": 10})
    first = register_tokens(tokenizer, config)
    tokenizer.save_pretrained(tmp_path)
    second = register_tokens(AutoTokenizer.from_pretrained(tmp_path), config)
    assert second.ids == first.ids
    assert second.new_ids == ()


@pytest.mark.requirement("A-27")
def test_token_that_stays_unknown_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.add_tokens = lambda tokens: 0  # a tokenizer that takes no new tokens
    with pytest.raises(ModelError, match="token `<picture>`"):
        register_tokens(tokenizer, TokensConfig(names=("<picture>",)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokensConfig(names=("<x1>",), series={"<x{}>": 3}), "named more than once: <x1>"),
        (TokensConfig(series={"<x>": 3}), "token series `<x>`"),
    ],
)
@pytest.mark.requirement("D-17")
def test_overlap_and_bad_series_are_refused(config: TokensConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        register_tokens(tiny_tokenizer(), config)


@pytest.mark.requirement("D-17")
def test_series_that_would_have_a_gap_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    register_tokens(tokenizer, TokensConfig(names=("<x1>", "<other>")))
    with pytest.raises(ModelError, match="does not have ids in a row"):
        register_tokens(tokenizer, TokensConfig(series={"<x{}>": 3}))


@pytest.mark.requirement("F-17", "A-44")
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_in_embedding_and_head(tied: bool) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.5, 1.0)
        if not tied:
            model.lm_head.weight.normal_(-0.5, 2.0)
    before = {"embedding": model.model.embed_tokens.weight.clone(), "head": model.lm_head.weight.clone()}
    registry = register_tokens(tokenizer, TokensConfig(series={"<x{}>": 1000}))
    grow_embeddings(model, tokenizer, registry.new_ids)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.vocab_size == size + 1000
    after = {"embedding": model.model.embed_tokens.weight, "head": model.lm_head.weight}
    for name, weight in after.items():
        old = before[name]
        assert torch.equal(weight[:size], old)
        difference = weight[size:] - old.mean(0)
        assert difference.std().item() == pytest.approx(0.01 * old.std().item(), rel=0.05)
        assert torch.unique(weight[size:], dim=0).shape[0] == 1000


@pytest.mark.requirement("F-17")
def test_spare_rows_of_the_checkpoint_are_used_and_initialised_too() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocabulary=384)
    size = len(tokenizer)
    assert size < 384
    registry = register_tokens(tokenizer, TokensConfig(names=("<box>",)))
    old = model.model.embed_tokens.weight[:size].clone()
    spare = model.model.embed_tokens.weight[size + 1].clone()
    grow_embeddings(model, tokenizer, registry.new_ids)
    assert model.model.embed_tokens.weight.shape[0] == 384
    assert (model.model.embed_tokens.weight[size] - old.mean(0)).abs().max() < 0.1 * old.std()
    assert torch.equal(model.model.embed_tokens.weight[size + 1], spare)


@pytest.mark.requirement("A-44")
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_train_while_everything_else_is_lora(tied: bool) -> None:
    model, tokenizer, _ = tiny_family("llava", tie_word_embeddings=tied)
    registry = register_tokens(tokenizer, TokensConfig(names=("<box>", "</box>")))
    grow_embeddings(model, tokenizer, registry.new_ids)
    components = find_components(model)
    rules = [
        LoraRule(match="language", method="lora", rank=2, train_tokens=registry.new_ids),
        LoraRule(match="vision", method="lora", rank=2),
        LoraRule(match="connector", method="lora", rank=2),
    ]
    plan = apply_tuning(model, components, rules, default_lr=0.1)
    parameters = [parameter for group in plan.groups for parameter in group.parameters.values()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    box, end = registry.new_ids
    ids = torch.tensor([[5, box, 6, end, 7]])
    before = model(input_ids=ids).logits.detach()
    embedding = model.get_input_embeddings()
    rows_before = embedding(torch.tensor([5, box])).detach().clone()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    rows_after = embedding(torch.tensor([5, box])).detach()
    assert torch.equal(rows_after[0], rows_before[0])
    assert not torch.equal(rows_after[1], rows_before[1])
    # The score of the new token at a position before it has been seen moves through the head's row too.
    assert (model(input_ids=ids).logits[0, 0, box] - before[0, 0, box]).item() != 0
    assert (model(input_ids=ids[:, :2], labels=ids[:, :2]).loss < -before[0, 0].log_softmax(-1)[box]).item()
