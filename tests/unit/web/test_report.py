"""The page about a run: complete, self-contained, escaped, and readable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.commands import triptych
from triptych.web.report import write_report

EVIL = "<script>alert('x')</script>&\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def step(number: int, loss: float | str) -> dict[str, Any]:
    return {"event": "step", "step": number, "epoch": 0.1, "loss": loss, "samples": 8, "seconds": 1.5}


def summary(accuracy: float, n: int) -> dict[str, Any]:
    ends = {"accuracy": accuracy, "low": accuracy / 2, "high": (1 + accuracy) / 2, "n": n}
    return {**ends, "count_error": None, "without_number": 0, "confusion": {}}


def answer(number: int, prediction: str, picture: str = "a.png") -> dict[str, Any]:
    row = {"origin": f"t.json:{number}", "task": "naming", "question": f"What? {EVIL}", "truth": "dog"}
    return {**row, "prediction": prediction, "metric": "exact", "pictures": [picture], "is_right": prediction == "dog"}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline's folder: a finished stage, one that was interrupted, and an evaluation."""
    run = tmp_path / "demo"
    titles = ["1/2 towers: see", f"2/2 {EVIL}"]
    write_json(
        run / "pipeline.json", {"stages": [{"title": t, "folder": f} for t, f in zip(titles, "ab", strict=True)]}
    )
    for folder in "ab":
        (run / folder).mkdir()
        (run / folder / "recipe.yaml").write_text(yaml.safe_dump({"stage": "tune", "output": "x"}))
        row = {"match": EVIL, "method": "full", "lr": 0.001, "weight_decay": None, "trainable": 5, "total": 5000}
        facts = {"tuning": [row], "environment": {"torch": "9.9", "host": EVIL}}
        write_json(run / folder / "facts.json", facts)
        events = [step(number, 5.0 / number) for number in range(1, 41)]
        events.insert(3, step(41, "nan"))
        for number in (10, 20, 40):
            results = {"accuracy": number / 50, "accuracy/naming": number / 40, "loss": 1.0}
            events.append({"event": "evaluation", "step": number, "epoch": 0.1, "results": results})
        (run / folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(run / "a" / "finished.json", {"steps": 40, "evaluation": {"recall_i2t@1": 0.95}})
    pictures = tmp_path / "data" / "pictures"
    pictures.mkdir(parents=True)
    Image.new("RGB", (96, 96), "orange").save(pictures / "a.png")
    (tmp_path / "data" / "scenes.json").write_text("{}")
    config = {"format": "llava", "path": str(tmp_path / "data" / "t.json"), "images": str(pictures)}
    confusion = {"left": {"left": 3}, "right": {"left": 1, "right": 2}, EVIL: {"(other)": 1}}
    after = {"all": summary(0.6, 100), "position": {**summary(0.6, 100), "confusion": confusion}}
    counting = {**summary(0.5, 10), "count_error": 0.25, "without_number": 2}
    gains = {"all": {"gain": 0.4, "low": 0.3, "high": 0.5, "n": 100}}
    summaries = {"after": {**after, "counting": counting}, "blind": {"all": summary(0.2, 100), "later": summary(0, 1)}}
    ahead = {"run": "after", "rival": "blind", "tasks": gains}
    tree = {"tables": [{"title": "test", "summaries": summaries, "gains": [ahead]}]}
    write_json(run / "evaluation" / "summary.json", tree)
    for name, rows in {
        "after": [answer(1, "dog"), answer(2, EVIL), answer(3, "cat", "../../secret.png"), answer(4, "cow")],
        "blind": [answer(1, "cat")],
    }.items():
        write_json(run / "evaluation" / f"{name}-test.json", {"data": config})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "evaluation" / f"{name}-test.jsonl").write_text(lines)
    return run


def test_the_page_says_everything_and_escapes_it(pipeline: Path) -> None:
    done = triptych("report", pipeline)
    assert done.status == 0 and done.out.splitlines() == [
        f"report: {pipeline / 'report.html'}",
        "pictures not found: 1 (run this in the folder where the model was trained)",
    ]
    page = (pipeline / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;" in page
    assert "60.0 %" in page and "+40.0 " in page and "after - blind, points" in page and "[+30, +50]" in page
    assert "later" in page  # a task that only the second run answered
    assert "wrong by 0.25 on average; 2 answers name no number" in page
    assert page.count("(not finished)") == 1 and "recall_i2t@1 0.95" in page
    assert "towers 5.00" in page and "CC BY-SA 4.0" in page and "9.9" in page and "5,000" in page
    # Two wrong ones at most, in order; the second picture is outside the root and not shown.
    assert page.count('class="sample"') == 3 and page.count("data:image/png;base64,") == 2
    assert "../../secret.png: not found" in page and "cow" not in page
    assert re.search(r"<dt>after</dt><dd class=\"good\">dog ✓</dd>\s*<dt>blind</dt><dd class=\"bad\">cat ✗</dd>", page)
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "url(" not in page and "@import" not in page


def test_a_single_run_shows_the_answers_it_wrote(pipeline: Path) -> None:
    run = pipeline / "a"
    data = [{"format": "llava", "path": "nowhere/t.json", "images": str(pipeline.parent / "data" / "pictures")}]
    (run / "recipe.yaml").write_text(yaml.safe_dump({"stage": "tune", "evaluation": {"data": data}}))
    for moment, said in (("after", "dog"), ("before", "I see")):
        (run / f"answers-{moment}-training.jsonl").write_text(json.dumps(answer(1, said)) + "\n")
    page = write_report(run, pipeline / "page.html")[0].read_text()
    assert page.count('class="sample"') == 1 and page.count("data:image/png;base64,") == 1
    assert "dog ✓" in page and "I see ✗" in page and "Right answers" not in page
    assert page.count("<svg") == 2 and "What was trained" in page and "Environment" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    done = triptych("report", tmp_path)
    assert done.status == 1 and "no run in this folder" in done.err and "Traceback" not in done.err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_opens_in_chromium_without_errors_and_fits(pipeline: Path, tmp_path: Path, width: int) -> None:
    page = write_report(pipeline)[0].read_text()
    probe = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join(' ')</script>"
    frame = f'<iframe id="page" src="report.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    (pipeline / "report.html").write_text(page.replace("</body>", f"{probe}</body>"))
    read = "page.onload = () => { document.body.append(page.contentDocument.title) }"
    (pipeline / "frame.html").write_text(f"<!doctype html><body>{frame}<script>{read}</script></body>")
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--enable-logging=stderr"),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,1000",
        "--virtual-time-budget=4000",
        "--dump-dom",
        (pipeline / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"(\d+) (\d+)</body>", done.stdout)
    assert found is not None, done.stdout[-500:]
    assert int(found[1]) == width and int(found[2]) <= width  # nothing sticks out to the right
