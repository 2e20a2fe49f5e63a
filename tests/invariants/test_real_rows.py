"""Rows of other projects' files, from disk to batches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fake_pictures import FakePictures
from tests.real_tokenizers import REAL_TOKENIZERS, with_tokens
from tests.unit.data.test_tokenize import row, tokenise_whole
from triptych.core.types import IGNORE
from triptych.data.formats import Dataset, LlavaConfig, MessagesConfig, PreferenceConfig, open_dataset
from triptych.data.loader import Loader, LoaderConfig
from triptych.data.mixture import Mixture
from triptych.data.tokenize import ConversationEncoder

SHARED = Path(os.environ.get("TRIPTYCH_SHARED", Path(__file__).parents[2] / "../shared")) / "data"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real files are not in {SHARED}; set TRIPTYCH_SHARED")


def conversations() -> list[Dataset]:
    return [
        open_dataset(MessagesConfig(format="messages", path="llamafactory/mllm_demo.json"), SHARED),
        open_dataset(LlavaConfig(format="llava", path="qwen3vl/demo/single_images.json", images="qwen3vl"), SHARED),
    ]


@pytest.mark.requirement("A-20", "A-25", "A-29", "A-30")
@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_rows_equal_the_whole_text_and_inference_prompts_are_prefixes(name: str) -> None:
    tokenizer = with_tokens(name)
    pictures = FakePictures(tokenizer)
    encoder = ConversationEncoder(tokenizer, "chatml", pictures, 50_000)
    for dataset in conversations():
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            example = encoder.encode(sample)
            columns = row(example)
            sizes = dict(zip(example.images, example.image_sizes, strict=True))
            assert columns["input_ids"] == tokenise_whole(tokenizer, encoder.template.segments(sample.messages), sizes)
            expected = sum(len(pictures.token_ids(*size)) for size in example.image_sizes)
            assert columns["input_ids"].count(pictures.image_id) == expected
            for count, message in enumerate(sample.messages):
                if message.role == "assistant":
                    prompt = encoder.encode_prompt(sample.messages[:count]).trunk.input_ids.tolist()
                    assert columns["input_ids"][: len(prompt)] == prompt
                    assert columns["labels"][len(prompt)] != IGNORE


@pytest.mark.requirement("H-5")
def test_preference_rows_share_their_prompt() -> None:
    tokenizer = with_tokens("smollm2")
    encoder = ConversationEncoder(tokenizer, "chatml", FakePictures(tokenizer), 50_000)
    dataset = open_dataset(PreferenceConfig(format="preference", path="llamafactory/dpo_en_demo.json"), SHARED)
    for index in range(30):
        sample = dataset.sample(index)
        assert sample.preference is not None
        example = encoder.encode(sample)
        prompt = encoder.encode_prompt(sample.messages).trunk.input_ids.tolist()
        for branch, answer in enumerate(sample.preference.answers):
            columns = row(example, branch)
            assert columns["input_ids"][: len(prompt)] == prompt
            assert set(columns["labels"][: len(prompt)]) == {IGNORE}
            learned = [token for token in columns["labels"] if token != IGNORE]
            assert tokenizer.decode(learned) == answer[0].text + "<|im_end|>"


@pytest.mark.requirement("A-5", "A-33")
def test_both_files_mix_into_windows_with_pixels() -> None:
    tokenizer = with_tokens("smollm2")
    pictures = FakePictures(tokenizer)
    encoder = ConversationEncoder(tokenizer, "chatml", pictures, 50_000)
    datasets = conversations()
    mixture = Mixture([len(item) for item in datasets], [None, None], seed=0)
    config = LoaderConfig(global_batch=4, micro_batch=2, epochs=1)
    loader = Loader(datasets, mixture, encoder.encode, pictures, config)
    num_rows = 0
    for window in loader.windows():
        for batch in map(loader.attach, window.batches):
            num_rows += batch.num_rows
            assert batch.pixels is not None
            assert len(batch.pixels["pixel_values"]) == len(batch.images)
    assert num_rows == sum(len(item) for item in datasets)
