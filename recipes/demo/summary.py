"""The last lines of `make demo`: right answers before and after, and what to try next."""

import json
from pathlib import Path

from rich.console import Console

RUN = Path("runs/demo/instruct")
PICTURE = Path("runs/demo/data/pictures/validation-000003.png")


def main() -> None:
    """Read the answers that the run left."""
    console = Console(highlight=False, soft_wrap=True)
    console.rule("what it learned")
    for moment in ("before", "after"):
        lines = (RUN / f"answers-{moment}-training.jsonl").read_text(encoding="utf-8").splitlines()
        right = sum(json.loads(line)["is_right"] for line in lines)
        console.print(f"{moment} training: {right / len(lines):.1%} right ({right} of {len(lines)} pictures kept out)")
    console.print(f"talk with it: .venv/bin/triptych chat {RUN}/model --image {PICTURE}")


if __name__ == "__main__":
    main()
