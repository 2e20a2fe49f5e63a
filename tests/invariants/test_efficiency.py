"""What makes a step smaller works together: LoRA, recomputed activations, bf16 and packed trees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny import Answer as A
from tests.tiny import noise, tiny_family, tree_batch
from triptych.core.types import Batch
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.models.components import find_components
from triptych.models.pictures import make_pictures
from triptych.models.tuning import apply_tuning, check_gradients
from triptych.models.tuning_rules import FrozenRule, LoraRule
from triptych.models.vlm import VlmScorer

TREES = (
    (("look", noise(40, 60, seed=1), "and say"), (("what is it?", A("a cat<|im_end|>")), ("how many?", A("two")))),
    (("one", noise(64, 32, seed=2)), (("two, same?", A("no<|im_end|>")),)),
)


def gradients(family: str, precision: str, recompute: bool) -> dict[str, Tensor]:
    model, tokenizer, image_processor = tiny_family(family)
    pictures = make_pictures(model.config, image_processor, tokenizer)
    components = find_components(model)
    torch.manual_seed(0)  # of the factors A
    rules = [FrozenRule(match=part, method="frozen") for part in ("vision", "connector")]
    apply_tuning(model, components, [*rules, LoraRule(match="language", method="lora", rank=4)], 1e-3)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would leave A without a gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    scorer = VlmScorer(model, components, pictures=pictures).train()
    assert scorer.packs_trees
    runtime = Runtime(RuntimeConfig(precision=precision, activation_checkpointing=recompute))
    runtime.wrap(scorer, [f"hf.{path}" for path in components.layers["language"]])
    batch: Batch = tree_batch(TREES, tokenizer, pictures)
    with runtime.autocast():
        logprobs = scorer(batch).token_logprobs
    assert logprobs is not None
    (-logprobs.float().mean()).backward()
    assert not check_gradients(dict(scorer.named_parameters()))
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


@pytest.mark.requirement("I-16")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_lora_recomputation_and_bf16_give_the_gradients_of_each_without_the_others(family: str) -> None:
    exact = gradients(family, "fp32", recompute=False)
    assert exact and all("lora_" in name for name in exact)
    for name, gradient in gradients(family, "fp32", recompute=True).items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-5, atol=1e-7)
    low = gradients(family, "bf16", recompute=False)
    together = gradients(family, "bf16", recompute=True)
    assert together.keys() == exact.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, low[name], rtol=1e-5, atol=1e-7)
    joined = [torch.cat([item[name].flatten() for name in exact]) for item in (together, exact)]
    assert float(torch.cosine_similarity(*joined, dim=0)) > 0.99
