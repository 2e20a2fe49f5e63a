"""What the demo learns in equal time with 1, 2, 4 and 8 questions a picture, as trees and as rows.

Seconds a step are measured first, all ways in turns on a quiet machine; each way then gets the steps that fit into the
same time, so that the training itself may run beside other work. Two seeds; the questions of all ten tasks.
Run `make demo` first: every way goes on from the demo's aligned model. Needs 30 GB in runs/questions, which may go
afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from benchmarks.timing import wait_until_quiet

HOME = Path("runs/questions")
RESULT = Path(__file__).parent / "results" / "questions.json"
QUESTIONS = (1, 2, 4, 8)
SEEDS = (1, 2)
TASKS = (
    "presence",
    "counting",
    "position",
    "caption",
    "naming",
    "lookup",
    "attribute",
    "referring",
    "box",
    "dense_caption",
)
WARM_UP = 3
MEASURED = 8


def main() -> None:
    """Measure, train, evaluate; what is there already is not done again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.questions", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="training time of each way")
    arguments = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    measured = HOME / "seconds.json"
    if not measured.is_file():
        measured.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    seconds: dict[str, float] = json.loads(measured.read_text(encoding="utf-8"))
    steps = {name: round(arguments.seconds / value) for name, value in seconds.items()}
    write_pipeline(steps)
    subprocess.run([*TRIPTYCH, "train", str(HOME / "pipeline.yaml")], check=True)
    RESULT.parent.mkdir(exist_ok=True)
    result = {**record.stamp(), "seconds": arguments.seconds, "ways": collect(seconds, steps)}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


TRIPTYCH = (sys.executable, "-m", "triptych")


def ways() -> dict[str, dict[str, Any]]:
    """Name -> keys of the recipe that it sets."""
    return {
        f"{count}_{kind}": {"loader.rows_per_picture": count, "trees": kind == "trees"}
        for count in QUESTIONS
        for kind in ("trees", "rows")
    }


def measure() -> dict[str, float]:
    """Median seconds of a step of each way, two turns."""
    found: dict[str, list[float]] = {name: [] for name in ways()}
    for turn in range(2):
        for name in list(ways())[:: 1 if turn == 0 else -1]:
            output = HOME / "measure" / f"{name}_{turn}"
            wait_until_quiet()
            keys = {**ways()[name], **common(WARM_UP + MEASURED, seed=7), "evaluation": None, "output": str(output)}
            subprocess.run([*TRIPTYCH, "train", str(write_recipe(f"measure_{name}", keys))], check=True)
            lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            found[name] += [line["seconds"] for line in lines if line["event"] == "step"][WARM_UP:]
            shutil.rmtree(output)  # 1.8 GB
    return {name: statistics.median(values) for name, values in found.items()}


def common(steps: int, seed: int) -> dict[str, Any]:
    """Keys that all ways share."""
    data = [
        {"format": "messages", "path": f"runs/demo/data/questions/{task}.jsonl", "images": "runs/demo/data/pictures"}
        for task in TASKS
    ]
    return {
        "data": data,
        "loader.steps": steps,
        "loader.seed": seed,
        "train.seed": seed,
        "train.save_every": None,
        "train.evaluate_every": None,
        "evaluation.answers": False,
    }


def write_recipe(name: str, keys: dict[str, Any]) -> Path:
    """The demo's third stage with these keys changed."""
    recipe: dict[str, Any] = yaml.safe_load(Path("recipes/demo/instruct.yaml").read_text(encoding="utf-8"))
    for key, value in keys.items():
        *path, last = key.split(".")
        if recipe.get(path[0] if path else last) is None and path:
            continue  # a section that was taken out
        section = recipe
        for part in path:
            section = section[part]
        section[last] = value
    file = HOME / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def write_pipeline(steps: dict[str, int]) -> None:
    """All trainings, and one evaluation of their models."""
    stages: list[dict[str, Any]] = []
    names = [(way, seed) for seed in SEEDS for way in ways()]
    for way, seed in names:
        keys = {**ways()[way], **common(steps[way], seed)}
        write_recipe(f"{way}_{seed}", keys)
        stages.append({"name": f"way_{way}_{seed}", "recipe": f"{way}_{seed}.yaml"})
    evaluation = {
        "kind": "evaluation",
        "output": str(HOME / "evaluation"),
        "data": {"test": {"format": "llava", "path": "runs/demo/data/test.json", "images": "runs/demo/data/pictures"}},
        "runs": [{"name": f"way_{way}_{seed}", "model": "to be set", "limit": 500} for way, seed in names],
        "together": {f"way_{way}": [f"way_{way}_{seed}" for seed in SEEDS] for way in ways()},
        "metrics": {"caption": "objects"},
        "batch": 50,
        "max_new_tokens": 32,
    }
    (HOME / "evaluation.yaml").write_text(yaml.safe_dump(evaluation, sort_keys=False), encoding="utf-8")
    init = {f"runs.{number}.model": f"way_{way}_{seed}" for number, (way, seed) in enumerate(names)}
    stages.append({"name": "evaluation", "recipe": "evaluation.yaml", "init": init})
    pipeline = {"kind": "pipeline", "output": str(HOME), "stages": stages}
    (HOME / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False), encoding="utf-8")


def collect(seconds: dict[str, float], steps: dict[str, int]) -> list[dict[str, Any]]:
    """One entry a way: accuracy of each seed and of both together."""
    tables = json.loads((HOME / "evaluation" / "summary.json").read_text(encoding="utf-8"))["tables"]
    (table,) = [item for item in tables if item["title"] == "test"]
    return [
        {
            "questions": settings["loader.rows_per_picture"],
            "way": "trees" if settings["trees"] else "rows",
            "seconds_a_step": seconds[name],
            "steps": steps[name],
            "accuracy": [table["summaries"][f"way_{name}_{seed}"]["all"]["accuracy"] for seed in SEEDS],
        }
        for name, settings in ways().items()
    ]


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown, for docs/benchmarks.md."""
    seeds = [f"seed {seed}" for seed in SEEDS]
    lines = [
        "## Questions about each picture, in equal time",
        "",
        f"What the demo's third stage learns in {result['seconds']:.0f} seconds of training from its aligned model, "
        "with so many questions about each picture of a step, as trees and with each question as a row of its own. "
        f"Right answers to 500 of the demo's test questions in percent, seeds {' and '.join(map(str, SEEDS))}. "
        "Pictures of the demo are 9 tokens: what a tree saves is small, and more questions a picture mean fewer "
        "pictures. All ways train on ten tasks, of which the test asks five. `python -m benchmarks.questions` writes "
        f"this. {record.measured(result)}",
        "",
        f"| questions a picture | way | seconds a step | steps | {' | '.join(seeds)} | mean |",
        f"| ---: | --- | ---: | ---: | {'---: | ' * len(SEEDS)}---: |",
    ]
    for way in result["ways"]:
        right = [100 * value for value in way["accuracy"]]
        cells = [
            str(way["questions"]),
            str(way["way"]),
            f"{way['seconds_a_step']:.2f}",
            str(way["steps"]),
            *(f"{value:.1f}" for value in (*right, statistics.mean(right))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
