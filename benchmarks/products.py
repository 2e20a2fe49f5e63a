"""How many operations the matrix products of both ways take: what a row could win if products were all there is.

Counted, not timed, so it may run beside other work. Writes `benchmarks/results/products.json`: row -> {"ours", "peer"},
floating-point operations of linear layers in a step, attention left out.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record, rows, training_rows
from benchmarks.row import Setting
from benchmarks.timing import Way

RESULT = record.FOLDER / "products.json"
ROWS = {**rows.ROWS, **training_rows.ROWS}
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def main() -> None:
    """Count all training rows, or those that are named."""
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for name in sys.argv[1:] or ROWS:
        row = ROWS[name](Setting())
        found[name] = {"ours": count(row.ours), "peer": count(row.peer)}
        print(f"{name}: {found[name]['peer'] / found[name]['ours']:.2f}", flush=True)
        ordered = {key: found[key] for key in ROWS if key in found}
        RESULT.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def count(way: Way) -> int:
    """Operations of the products of a step."""
    with FlopCounterMode(display=False) as counter:
        way.run()
    operations: dict[object, int] = counter.get_flop_counts()["Global"]
    return sum(number for operation, number in operations.items() if operation in PRODUCTS)


if __name__ == "__main__":
    main()
