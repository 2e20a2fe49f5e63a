"""`triptych eval`: answers by task, blind and side by side, computed once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.commands import triptych
from tests.recipes.tiny_recipes import Files
from tests.unit.stages.conftest import Run
from triptych.core.types import ImageReference
from triptych.evaluation.answers import Answer
from triptych.stages import evaluating
from triptych.stages.evaluating import SUMMARY, blind, read_answers


def words(text: str) -> list[list[str]]:
    """The cells of each line of a printed table."""
    return [line.split() for line in text.replace("│", " ").splitlines() if line.split()]


def rows_of_two_tasks(files: Files, folder: Path) -> Path:
    rows = json.loads((files.data / "test.json").read_text())[:5]
    for number, row in enumerate(rows):
        row["task"] = "even" if number % 2 == 0 else "odd"
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_accuracy_by_task_and_a_line_for_each_answer(lora_run: Run, files: Files, tmp_path: Path) -> None:
    rows = rows_of_two_tasks(files, tmp_path)
    options = ["--images", files.data / "pictures", "--output", tmp_path / "out"]
    done = triptych("eval", lora_run.output / "model", rows, "max_new_tokens=2", *options)
    assert done.status == 0, done.err
    assert "model: 5 questions of rows" in done.out
    table = [line for line in words(done.out) if line[-1].endswith("]")]
    assert [line[:2] for line in table] == [["all", "5"], ["even", "3"], ["odd", "2"]]
    lines = [json.loads(line) for line in (tmp_path / "out" / "model-rows.jsonl").read_text().splitlines()]
    assert [answer["truth"] for answer in lines] == ["dog", "cat", "frog", "pig", "banana"]
    assert lines[0].keys() == {"origin", "task", "question", "truth", "prediction", "metric", "pictures", "is_right"}
    assert "rows.json:" in lines[0]["origin"] and lines[1]["task"] == "odd"
    assert lines[0]["pictures"] == ["test-000-dog.png"]
    limited = triptych("eval", lora_run.output / "model", rows, *options[:2], "--limit", "2", "max_new_tokens=2")
    assert any(line[1:2] == ["2"] for line in words(limited.out))
    answers = read_answers(tmp_path / "out" / "model-rows.jsonl")
    assert [answer.row() for answer in answers] == [{**line, "pictures": tuple(line["pictures"])} for line in lines]


def test_two_models_and_a_blind_one_side_by_side(lora_run: Run, files: Files, tmp_path: Path) -> None:
    rows, model = rows_of_two_tasks(files, tmp_path), lora_run.output / "model"
    options = ["--images", files.data / "pictures", "--against", model, "--blind", "--output", tmp_path / "out"]
    done = triptych("eval", model, rows, "max_new_tokens=2", "metrics.even=objects", *options)
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "out" / SUMMARY).read_text())
    (table,) = summary["tables"]
    assert table["title"] == "rows" and list(table["summaries"]) == ["model", "against", "blind"]
    assert table["summaries"]["model"] == table["summaries"]["against"]
    assert table["summaries"]["model"]["even"]["n"] == 3
    assert [(gain["run"], gain["rival"]) for gain in table["gains"]] == [("model", "against"), ("model", "blind")]
    assert table["gains"][0]["tasks"]["all"] == {"gain": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert json.loads((tmp_path / "out" / "model-rows.jsonl").read_text().splitlines()[0])["metric"] == "objects"


@pytest.fixture
def evaluation(lora_run: Run, files: Files, tmp_path: Path) -> dict[str, Any]:
    rows = rows_of_two_tasks(files, tmp_path)
    return {
        "kind": "evaluation",
        "output": str(tmp_path / "out"),
        "data": {"rows": {"format": "llava", "path": str(rows), "images": str(files.data / "pictures")}},
        "runs": [
            {"name": "after", "model": str(lora_run.output / "model")},
            {"name": "blind", "model": str(lora_run.output / "model"), "pictures": "grey", "limit": 3},
        ],
        "max_new_tokens": 2,
    }


def test_an_evaluation_file_is_computed_once(
    evaluation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "evaluation.yaml"
    file.write_text(yaml.safe_dump(evaluation))
    first = triptych("eval", file)
    assert first.status == 0, first.err
    table = next(line for line in words(first.out) if line[0] == "all")
    assert table[1] == "5" and "3" in table
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(kept) == {"after-rows.jsonl", "after-rows.json", "blind-rows.jsonl", "blind-rows.json", SUMMARY}

    # An interrupted run has no stamp for what it did not finish: only that is computed again.
    (tmp_path / "out" / "blind-rows.json").unlink()
    loaded: list[Path] = []
    load = evaluating.load_for_use
    monkeypatch.setattr(evaluating, "load_for_use", lambda folder: loaded.append(folder) or load(folder))
    again = triptych("eval", file)
    assert again.status == 0 and len(loaded) == 1
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "all" in triptych("eval", file).out and len(loaded) == 1
    assert triptych("eval", file, "max_new_tokens=1").status == 0 and len(loaded) == 3


def test_answers_are_computed_again_when_what_they_depend_on_changed(
    evaluation: dict[str, Any], lora_run: Run, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pictures = tmp_path / "model", tmp_path / "pictures"
    shutil.copytree(lora_run.output / "model", model)
    shutil.copytree(files.data / "pictures", pictures)
    evaluation["runs"] = [{"name": "after", "model": str(model), "limit": 1}]
    evaluation["data"]["rows"]["images"] = str(pictures)
    file = tmp_path / "evaluation.yaml"
    file.write_text(yaml.safe_dump(evaluation))
    loaded: list[Path] = []
    load = evaluating.load_for_use
    monkeypatch.setattr(evaluating, "load_for_use", lambda folder: loaded.append(folder) or load(folder))
    assert triptych("eval", file).status == 0 and triptych("eval", file).status == 0 and len(loaded) == 1
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "max_length": 99}))
    assert triptych("eval", file).status == 0 and len(loaded) == 2
    Image.new("RGB", (9, 9), "red").save(pictures / "test-000-dog.png")
    assert triptych("eval", file).status == 0 and len(loaded) == 3


def test_runs_are_compared_with_the_one_they_name_and_seeds_are_counted_together(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    one, other = evaluation["runs"][0]["model"], {"pictures": "grey"}
    evaluation["runs"] = [
        {"name": "full_1", "model": one},
        {"name": "less_1", "model": one, **other},
        {"name": "full_2", "model": one, "limit": 4},
        {"name": "less_2", "model": one, "limit": 4, "against": "full_2", **other},
    ]
    evaluation["together"] = {"full": ["full_1", "full_2"], "less": ["less_1", "less_2"]}
    file = tmp_path / "evaluation.yaml"
    file.write_text(yaml.safe_dump(evaluation))
    done = triptych("eval", file)
    assert done.status == 0, done.err
    apart, together = json.loads((tmp_path / "out" / SUMMARY).read_text())["tables"]
    compared = [(gain["run"], gain["rival"], gain["tasks"]["all"]["n"]) for gain in apart["gains"]]
    assert compared == [("full_1", "less_1", 5), ("full_1", "full_2", 4), ("full_2", "less_2", 4)]
    assert together["title"] == "rows, together"
    assert {name: tasks["all"]["n"] for name, tasks in together["summaries"].items()} == {"full": 9, "less": 9}
    (gain,) = together["gains"]
    assert (gain["run"], gain["rival"], gain["tasks"]["all"]["n"]) == ("full", "less", 9)
    right = {name: tasks["all"]["accuracy"] for name, tasks in together["summaries"].items()}
    assert gain["tasks"]["all"]["gain"] == pytest.approx(right["full"] - right["less"])
    assert "rows, together: points that full is ahead" in " ".join(done.out.split())
    assert "a run is ahead" in done.out and "full_2 of less_2" in " ".join(done.out.split())


@pytest.mark.parametrize("options", [("--limit", "2"), ("--blind",), ("--output", "x"), ("--format", "messages")])
def test_options_are_refused_with_an_evaluation_file(
    evaluation: dict[str, Any], options: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "evaluation.yaml"
    file.write_text(yaml.safe_dump(evaluation))
    done = triptych("eval", file, *options)
    assert done.status == 2 and options[0] in done.err and "runs.0.limit=20" in done.err


def test_answers_with_any_line_separator_are_read_again(tmp_path: Path) -> None:
    answers = [Answer("a.json:1", "", "what\u2028is it?", "a\x85dog", "a\u2029cat", "exact", ("a.png",))] * 2
    lines = "".join(json.dumps(answer.row(), ensure_ascii=False) + "\n" for answer in answers)
    (tmp_path / "answers.jsonl").write_text(lines, encoding="utf-8")
    assert read_answers(tmp_path / "answers.jsonl") == tuple(answers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("runs.1.against=aftr", r"`aftr` is no other run(.|\n)*did you mean `after`"),
        ("runs.0.against=after", "`after` is no other run"),
        ("together={one: [after], two: [blnd]}", r"`blnd` is no run(.|\n)*did you mean `blind`"),
        ("together={one: [after, blind], two: [blind]}", "they have different numbers of runs"),
        ("runs.0.data=[row]", r"evaluation.yaml|command line(.|\n)*`row` is not in `data`(.|\n)*did you mean `rows`"),
        ("runs.1.name=after", "two runs are called `after`"),
        ("runs=[{name: a, model: m, data: [nothing]}]", "no run answers `rows`"),
        ("metrics.even=objcts", "did you mean `objects`"),
        ("runs.0.picture=grey", r"unknown key `picture`(.|\n)*did you mean `pictures`"),
        ("runs=[]", "at least 1 item"),
    ],
)
def test_a_wrong_evaluation_file_is_refused(evaluation: dict[str, Any], change: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "evaluation.yaml"
    file.write_text(yaml.safe_dump(evaluation))
    done = triptych("eval", file, change)
    assert done.status == 1 and "Traceback" not in done.err
    assert re.search(said, done.err), done.err


def test_blind_pictures_keep_their_size_and_show_nothing() -> None:
    seen = blind(lambda image: Image.new("RGB", (12, 7), "red"))(ImageReference(path="/a.png", name="a.png"))
    assert seen.size == (12, 7) and seen.getcolors() == [(84, (128, 128, 128))]


def test_the_folder_is_made_and_every_row_is_read_before_any_work(
    lora_run: Run, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(evaluating, "load_for_use", fail)
    (tmp_path / "file").write_text("")
    arguments = ["eval", "model", files.data / "test.json", "--images", files.data / "pictures"]
    done = triptych(*arguments, "--output", tmp_path / "file")
    assert done.status == 1 and done.err.startswith("error: [Errno 17]") and str(tmp_path) in done.err
    pairs = triptych("eval", "model", files.data / "pairs.json", "--format", "preference")
    assert pairs.status == 1 and "hold answers to compare" in pairs.err
    rows = json.loads((files.data / "test.json").read_text())
    for row in rows[1:3]:
        row["image"] = f"no-{row['image']}"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    broken = triptych("eval", "model", tmp_path / "rows.json", "--images", files.data / "pictures")
    assert broken.status == 1 and broken.err.count("is not a file") == 2
    without = triptych("eval", "model")
    assert without.status == 2 and "give a data file" in without.err
