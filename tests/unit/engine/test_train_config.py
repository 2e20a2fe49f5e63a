"""The defaults of a run."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from triptych.engine.train_config import TrainConfig


@pytest.mark.requirement("F-23", "F-32", "G-8")
def test_the_documented_defaults() -> None:
    config = TrainConfig()

    assert (config.save_every, config.keep_last, config.log_every) == (500, 3, 10)
    assert config.optimizer.max_gradient_norm == 1.0
    assert config.schedule.kind == "cosine" and config.schedule.warmup == 0.03
    assert [monitor.kind for monitor in config.monitors] == ["console", "jsonl", "tensorboard", "health"]
    assert config.best is None and config.evaluate_every is None


def test_a_memory_limit_is_a_share_or_a_size() -> None:
    assert TrainConfig().memory_limit == 0.7
    assert TrainConfig(memory_limit="6 GiB").memory_limit == "6 GiB"
    with pytest.raises(ValidationError, match="a size such as `6 GiB`") as caught:
        TrainConfig(memory_limit="plenty")
    assert caught.value.error_count() == 1


def test_keeping_no_checkpoint_is_refused() -> None:
    with pytest.raises(ValidationError, match="keep_last"):
        TrainConfig(keep_last=0)
