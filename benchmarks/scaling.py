"""How time and memory grow: supervised training through trees against one row a question, one number varied at a time.

All points but those of model size use a language model of 8 layers, so that the whole takes minutes on two cores; it is
small against its vocabulary of 49,152 words, which flatters neither way: both score learned positions only.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks import ours, peers
from benchmarks.models import FULL, VOCABULARY, Scale, make_example
from benchmarks.row import Row, Setting
from benchmarks.rows import prepare, training_way
from benchmarks.timing import Local, Turns, interleave, turn_ratios

TURNS = Turns(least=2, most=2)
PEER_NAME = "TRL's GPU algorithm written down again, one row a question"
_VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}


def _language(width: int, layers: int) -> dict[str, int]:
    heads = width // 64
    return {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3,
        "vocab_size": VOCABULARY,
    }


MODELS: Mapping[str, dict[str, int]] = {
    "8 x 384": _language(384, 8),
    "16 x 384": _language(384, 16),
    "30 x 576": dict(FULL.language),
}
"""Layers x width; the last is SmolLM2-135M."""


@dataclass(frozen=True)
class Point:
    """What is trained on in one step."""

    image_tokens: int = 196
    branches: int = 4
    """Questions of 24 tokens with answers of 24 about each picture."""
    batch: int = 1
    """Pictures."""
    model: str = "8 x 384"


_VALUES: Mapping[str, tuple[int | str, ...]] = {
    "image_tokens": (64, 196, 576, 1024, 2304),
    "branches": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8),
    "model": tuple(MODELS),
}


def axes() -> Iterator[tuple[str, Point]]:
    """(name of what varies, the point), axis after axis."""
    for name, values in _VALUES.items():
        for value in values:
            yield name, replace(Point(), **{name: value})  # type: ignore[arg-type]


def build(point: Point, setting: Setting, scale: Scale | None = None) -> Row:
    """Both ways at a point.

    Args:
        scale: instead of the point's model; for tests.
    """
    scale = scale or Scale(language=MODELS[point.model], vision=_VISION)
    setting = replace(setting, scale=scale)
    generator = torch.Generator().manual_seed(1)
    examples = [
        make_example(picture * point.branches + question, picture, point.image_tokens, 24, [24], generator)
        for picture in range(point.batch)
        for question in range(point.branches)
    ]
    scorer, batch, peer = prepare(setting, point.image_tokens, examples)
    return Row(
        training_way("ours", scorer.hf, setting, lambda: ours.supervised(scorer, batch)),
        training_way("peer", peer, setting, lambda: peers.supervised_only(peer, batch)),
        PEER_NAME,
    )


def measure(setting: Setting) -> list[dict[str, Any]]:
    """All points; one that lies on several axes is measured once."""
    known: dict[Point, dict[str, Any]] = {}
    points = []
    for axis, point in axes():
        if point not in known:
            start = time.monotonic()
            known[point] = _measure(point, setting)
            known[point]["seconds"] = round(time.monotonic() - start)
            _say(axis, point, known[point])
        points.append({"axis": axis, **asdict(point), **known[point]})
    return points


def _measure(point: Point, setting: Setting) -> dict[str, Any]:
    row = build(point, setting)
    timings = interleave({"ours": Local(row.ours), "peer": Local(row.peer)}, TURNS)
    first, second = timings["ours"], timings["peer"]
    return {
        "ours": first.median,
        "peer": second.median,
        "unit": row.unit,
        "peer_name": row.peer_name,
        "ours_bytes": first.added,
        "peer_bytes": second.added,
        "ratio": statistics.median(turn_ratios(first.seconds, second.seconds)),
        "memory_ratio": first.added / second.added,
        "parameters": sum(parameter.numel() for parameter in row.ours.model.parameters()),
        "n": len(first.seconds),
        "disturbed": first.disturbed + second.disturbed,
    }


def _say(axis: str, point: Point, found: Mapping[str, Any]) -> None:
    value = asdict(point)[axis]
    text = f"{axis} {value}: {found['ours']:.3f} s against {found['peer']:.3f} s, measured in {found['seconds']} s"
    print(text, file=sys.stderr, flush=True)
