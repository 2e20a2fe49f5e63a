"""All rows in the order of the table, what each should reach, and how often it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks import contrastive, loading, rollout, rows, training_rows
from benchmarks.row import Build
from benchmarks.timing import Turns

EAGER = "sft_full_196_eager"
_BUILDS: Mapping[str, Build] = {
    **rows.ROWS,
    EAGER: rows.sft_full_196,
    **training_rows.ROWS,
    **contrastive.ROWS,
    **rollout.ROWS,
    **loading.LOADING,
}


COMPILED = {*rows.ROWS, *training_rows.ROWS} - {EAGER}
"""Rows in which our blocks are compiled (`train.runtime.compile`)."""


PLAIN = {EAGER}
"""Rows in which our process gives freed memory back to the system, as peers do; elsewhere as `triptych train` runs."""


@dataclass(frozen=True)
class Target:
    """What a row should reach."""

    ratio: float
    """Times as fast as the peer, at least."""
    memory: float | None
    """Share of the peer's added peak, at most; None where memory is not compared."""


TARGETS: Mapping[str, Target] = {
    "sft_full_196": Target(1.8, 0.75),
    "sft_full_196_trl": Target(1.15, 1.0),
    "sft_tree8_576": Target(4.0, 0.4),
    "align_196": Target(2.2, 0.7),
    "sft_lora_196": Target(1.6, 0.8),
    "dpo_196": Target(2.4, 0.75),
    "dpo_576": Target(2.8, 0.65),
    "dpo_576_full": Target(4.5, 0.5),
    "group8_576": Target(4.0, 0.5),
    "contrastive_4096": Target(0.7, 0.25),
    "rollout_k8": Target(1.6, 1.0),
    "loader_vqa": Target(1.5, None),
    "loader_vqa_draft": Target(2.0, None),
}
"""Rows without an entry are measured for what they show, see `BESIDE`."""

TURNS = Turns(least=3, most=9, seconds=60)
OTHER_TURNS: Mapping[str, Turns] = {
    # Half a second, so that a moment's disturbance shows.
    "loader_vqa": Turns(least=41, most=41),
    "loader_vqa_draft": Turns(least=41, most=41),
    "loader_vqa_thread": Turns(least=11, most=11),
    "loader_vqa_draft_thread": Turns(least=11, most=11),
}
"""Timed turns of rows whose steps are short."""

_FIRST = tuple(TARGETS)
ROWS: Mapping[str, Build] = {
    **{name: _BUILDS[name] for name in _FIRST if name in _BUILDS},
    **{name: build for name, build in _BUILDS.items() if name not in _FIRST},
}
"""Name -> what builds the row: those with a target first, in the order of the targets."""

BESIDE = tuple(name for name in ROWS if name not in TARGETS)
"""Rows that explain others; a whole run leaves them out, so that it ends within 40 minutes on two cores."""
