"""The whole-file report finds each planted fault with file and line, and nothing in clean files."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from tests.unit.data.formats.reading import ADAPTER, open_rows, picture
from triptych.core.errors import DataError, Problem
from triptych.core.types import IGNORE, Branch, Example, Sample
from triptych.data import check as check_module
from triptych.data.check import CheckReport, check_datasets, open_datasets, summarise_lengths

SHARED = Path(os.environ.get("TRIPTYCH_SHARED", Path(__file__).resolve().parents[4] / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason=f"no sample files of other projects in {SHARED}; set TRIPTYCH_SHARED"
)
MAX_LENGTH = 450


def encode(sample: Sample) -> Example:
    """One token a character and four a picture; answers are supervised; one branch for each answer."""

    def branch(turns: Any) -> Branch:
        answers = sum(len(turn.text) for turn in turns if turn.role == "assistant")
        others = sum(len(turn.text) + 4 * len(turn.images) for turn in turns) - answers
        labels = torch.tensor([IGNORE] * others + [1] * answers, dtype=torch.long)
        return Branch(labels.clamp(min=0), labels, torch.zeros_like(labels), torch.ones(len(labels)))

    if sample.preference:
        trunk, branches = branch(sample.messages), [branch(answer) for answer in sample.preference.answers]
    else:
        trunk, branches = branch(()), [branch(sample.messages)]
    example = Example(trunk, tuple(branches), sample.images, (), sample.origin)
    if example.max_row_tokens > MAX_LENGTH:
        problem = Problem(f"the row has {example.max_row_tokens} tokens, more than {MAX_LENGTH}", remedy="cut it")
        raise DataError(problem)
    return example


def check(base: Path, *configs: dict[str, Any]) -> CheckReport:
    datasets, findings = open_datasets([ADAPTER.validate_python(config) for config in configs], base)
    return check_datasets(datasets, encode, findings=findings)


def errors(report: CheckReport) -> list[tuple[str | None, int | None, str]]:
    return [
        (item.problem.file, item.problem.line, item.problem.message)
        for item in report.findings
        if item.level == "error"
    ]


Change = Callable[[dict[str, Any], Path], None]


def _set_images(value: Any) -> Change:
    return lambda row, folder: row.update(images=value)


def _set_answer(row: dict[str, Any], folder: Path) -> None:
    row["messages"][1]["content"] = ""


def _swap_roles(row: dict[str, Any], folder: Path) -> None:
    row["messages"][0]["role"], row["messages"][1]["role"] = "assistant", "user"


def _make_long(row: dict[str, Any], folder: Path) -> None:
    row["messages"][1]["content"] = "long " * 100


def _write_text(row: dict[str, Any], folder: Path) -> None:
    (folder / "mllm_demo_data/fake.jpg").write_text("not a picture")
    row["images"] = ["mllm_demo_data/fake.jpg"] * len(row["images"])


def _leave(row: dict[str, Any], folder: Path) -> None:
    shutil.copy(folder / "mllm_demo_data/1.jpg", folder.parent / "outside.jpg")
    row["images"][0] = "../outside.jpg"


def _repeat_id(row: dict[str, Any], folder: Path) -> None:
    row["id"] = "mllm_demo-1"


FAULTS: dict[str, tuple[Change, str]] = {
    "missing image": (_set_images(["mllm_demo_data/9.jpg"]), "`mllm_demo_data/9.jpg` is not a file"),
    "too many placeholders": (_set_images([]), "1 placeholder (<image>) for 0 pictures"),
    "too few placeholders": (_set_images(["mllm_demo_data/1.jpg"] * 2), "1 placeholder (<image>) for 2 pictures"),
    "an image that is text": (_write_text, "is not a picture in a known format"),
    "empty answer": (_set_answer, "turn 2 of the row is an empty answer"),
    "wrong role order": (_swap_roles, "turn 1 of the row is from `assistant` where `user` is expected"),
    "over-long row": (_make_long, "tokens, more than 450"),
    "path that leaves the root": (_leave, "leaves the image root"),
    "duplicate id": (_repeat_id, "id `mllm_demo-1` was already used in copy/mllm_demo.json:2"),
}


def _chat(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **keys}


def _copy_demo(folder: Path, origin: str) -> list[dict[str, Any]]:
    """Three rows with their pictures in `folder`: our own, or LLaMA-Factory's."""
    folder.mkdir()
    if origin == "own":
        picture(folder, *(f"mllm_demo_data/{number}.jpg" for number in (1, 2, 3)))
        images = [[f"mllm_demo_data/{number}.jpg"] for number in (1, 2, 3)]
        return [_chat("<image>Who?", f"Number {number}.", images=names) for number, names in enumerate(images)]
    source = SHARED / "data/llamafactory"
    shutil.copytree(source / "mllm_demo_data", folder / "mllm_demo_data", copy_function=shutil.copyfile)
    rows: list[dict[str, Any]] = json.loads((source / "mllm_demo.json").read_text())
    return rows[:3]


ORIGINS = pytest.mark.parametrize("origin", ["own", pytest.param("llamafactory", marks=needs_shared)])


@ORIGINS
@pytest.mark.requirement("A-1")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_with_file_and_line(tmp_path: Path, fault: str, origin: str) -> None:
    change, said = FAULTS[fault]
    rows = _copy_demo(tmp_path / "copy", origin)
    change(rows[1], tmp_path / "copy")
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    (tmp_path / "copy/mllm_demo.json").write_text(text)
    report = check(tmp_path, {"format": "messages", "path": "copy/mllm_demo.json"})
    ((file, line, message),) = errors(report)
    # Row objects are the only ones indented by two.
    starts = [number for number, part in enumerate(text.split("\n"), 1) if part == "  {"]
    assert (file, line) == ("copy/mllm_demo.json", starts[1])
    assert said in message
    assert (report.has_errors, report.summary[0].broken) == (True, 1)


@ORIGINS
def test_all_faults_in_one_file_are_all_found(tmp_path: Path, origin: str) -> None:
    rows = []
    demo = _copy_demo(tmp_path / "copy", origin)
    for change, _ in FAULTS.values():
        row = json.loads(json.dumps(demo[1]))
        change(row, tmp_path / "copy")
        rows.append(row)
    lines = [json.dumps(demo[0]), *map(json.dumps, rows), '{"messages": [', json.dumps(demo[2])]
    (tmp_path / "copy/mllm_demo.jsonl").write_text("\n".join(lines))
    report = check(tmp_path, {"format": "messages", "path": "copy/mllm_demo.jsonl"})
    found = errors(report)
    assert [line for _, line, _ in found] == list(range(2, 12))
    for (_, _, message), (_, said) in zip(found, FAULTS.values(), strict=False):
        assert said.replace(".json:2", ".jsonl:1") in message
    assert "row is not valid JSON at line 11, column 15" in found[-1][2]
    assert (report.summary[0].samples, report.summary[0].broken) == (12, 10)


@needs_shared
@pytest.mark.requirement("A-1", "A-3", "A-6", "H-5")
@pytest.mark.parametrize(
    ("config", "samples", "pictures"),
    [
        ({"format": "messages", "path": "llamafactory/mllm_demo.json"}, 6, 8),
        ({"format": "llava", "path": "qwen3vl/demo/single_images.json", "images": "qwen3vl"}, 3, 3),
        ({"format": "captions", "path": "torchtitan/cc12m-train-0000.tar"}, 32, 32),
        ({"format": "preference", "path": "llamafactory/dpo_en_demo.json"}, 300, 0),
    ],
)
def test_clean_files_have_no_errors(config: dict[str, Any], samples: int, pictures: int) -> None:
    datasets, findings = open_datasets([ADAPTER.validate_python(config)], SHARED / "data")
    report = check_datasets(datasets, findings=findings)
    assert errors(report) == []
    (summary,) = report.summary
    assert (summary.samples, summary.broken, summary.pictures) == (samples, 0, pictures)


@needs_shared
def test_llamafactory_v1_parts_are_clean_where_their_pictures_are(tmp_path: Path) -> None:
    source = SHARED / "data/llamafactory"
    shutil.copytree(source / "mllm_demo_data", tmp_path / "data/mllm_demo_data")
    shutil.copyfile(source / "v1_multimodal_demo.jsonl", tmp_path / "v1.jsonl")
    datasets, _ = open_datasets([ADAPTER.validate_python({"format": "messages", "path": "v1.jsonl"})], tmp_path)
    report = check_datasets(datasets)
    assert errors(report) == []
    # Rows 7 to 24 repeat rows 1 to 6 three times: allowed, but said.
    assert [item.problem.line for item in report.findings] == list(range(7, 25))
    assert report.findings[0].problem.message == "the row repeats v1.jsonl:1"


@needs_shared
def test_remote_pictures_absent_pictures_and_broken_files_are_reported() -> None:
    report = check(
        SHARED / "data",
        {"format": "preference", "path": "oumi/vision_language_dpo_format.jsonl"},
        {"format": "captions", "path": "llava/caps_boxes_coco2014_val_80.jsonl"},
        {"format": "llava", "path": "internvl/debug_mpo.json"},
    )
    found = errors(report)
    index, *rows = found
    assert index[:2] == ("internvl/debug_mpo.json", 16)
    assert "line 16, column 1" in index[2]
    assert [(line, "remote URL" in message) for _, line, message in rows[:3]] == [(1, True), (2, True), (3, True)]
    assert {line for _, line, _ in rows[3:]} == set(range(1, 81))
    assert all("is not a file" in message for _, _, message in rows[3:])


def test_counts_can_be_checked_by_hand(tmp_path: Path) -> None:
    picture(tmp_path, "1.png", "2.png")
    rows = [
        _chat("<image>abc", "de", images=["1.png"], task="vqa"),  # 4 + 3 + 2 = 9 tokens, 2 supervised
        _chat("<image>", "d", images=["1.png"], task="vqa"),  # 5 tokens, 1 supervised
        _chat("<image><image>", "defg", images=["1.png", "2.png"], task="ocr"),  # 12 tokens, 4 supervised
        _chat("abcdef", "g"),  # 7 tokens, 1 supervised
    ]
    (summary,) = check_datasets([open_rows(tmp_path, "messages", *rows)], encode).summary
    assert (summary.samples, summary.broken, summary.text_only) == (4, 0, 1)
    assert (summary.pictures, summary.different_pictures) == (4, 2)
    assert summary.tasks == (("vqa", 2), ("ocr", 1), ("", 1))
    lengths = summary.lengths
    assert lengths is not None
    assert (lengths.rows, lengths.p50, lengths.p95, lengths.longest, lengths.total) == (4, 7, 12, 12, 33)
    assert lengths.histogram == ((8, 2), (16, 2))
    assert summary.supervised_share == 8 / 33


def test_branches_count_as_rows(tmp_path: Path) -> None:
    row = {"prompt": "abc", "chosen": "de", "rejected": "f"}  # rows of 3 + 2 and 3 + 1 tokens
    (summary,) = check_datasets([open_rows(tmp_path, "preference", row)], encode).summary
    assert summary.lengths is not None
    assert (summary.lengths.rows, summary.lengths.total, summary.supervised_tokens) == (2, 9, 3)


def test_percentiles_are_nearest_rank() -> None:
    lengths = summarise_lengths(range(1, 201))
    assert (lengths.p50, lengths.p95, lengths.p99, lengths.longest) == (100, 190, 198, 200)
    assert lengths.histogram == ((2, 2), (4, 2), (8, 4), (16, 8), (32, 16), (64, 32), (128, 64), (256, 72))
    assert sum(count for _, count in lengths.histogram) == 200


def test_each_different_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path, "1.png")
    (tmp_path / "2.png").write_text("text")
    decoded = []

    def count(reference: Any) -> Image.Image:
        decoded.append(reference.name)
        return real(reference)

    real = check_module.decode
    monkeypatch.setattr(check_module, "decode", count)
    rows = [_chat(f"<image>{n}", "A", images=[f"{n % 2 + 1}.png"]) for n in range(6)]
    report = check_datasets([open_rows(tmp_path, "messages", *rows)], encode)
    assert sorted(decoded) == ["1.png", "2.png"]
    # A broken picture is reported for every row that needs it.
    assert [line for _, line, _ in errors(report)] == [2, 4, 6]


class _NarrowProcessor:
    """A processor that refuses pictures more than twice as wide as high."""

    placeholder = "<image>"

    def token_ids(self, width: int, height: int) -> list[int]:
        return [0]

    def pixels(self, pictures: list[Image.Image]) -> dict[str, Tensor]:
        if pictures[0].width > 2 * pictures[0].height:
            raise ValueError("aspect ratio above 2")
        return {}

    def fingerprint(self) -> str:
        return ""


def test_a_picture_that_the_processor_refuses_is_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (30, 10)).save(tmp_path / "wide.png")
    dataset = open_rows(tmp_path, "messages", _chat("<image>", "A", images=["wide.png"]))
    assert not check_datasets([dataset]).has_errors
    report = check_datasets([dataset], pictures=_NarrowProcessor())
    assert "refuses picture `wide.png` (30 x 10): aspect ratio above 2" in errors(report)[0][2]


def test_a_row_without_supervised_tokens_is_an_error_among_rows_that_have_some(tmp_path: Path) -> None:
    def silence(sample: Sample) -> Example:
        example = encode(sample)
        (branch,) = example.branches
        quiet = Branch(branch.input_ids, torch.full_like(branch.labels, IGNORE), branch.kinds, branch.weights)
        return Example(example.trunk, (quiet,), (), (), sample.origin)

    dataset = open_rows(tmp_path, "messages", _chat("Q", "one"), _chat("Q", "two"))
    assert not check_datasets([dataset], silence).has_errors  # as for a contrastive objective, which reads no labels
    mixed = check_datasets([dataset], lambda sample: (silence if "two" in sample.messages[1].text else encode)(sample))
    assert errors(mixed) == [("rows.jsonl", 2, "no token of the row is supervised")]


def test_the_report_renders(tmp_path: Path) -> None:
    picture(tmp_path, "1.png")
    dataset = open_rows(tmp_path, "messages", _chat("<image>Q", "A", images=["1.png"], task="vqa"), {"x": 1}, {"x": 1})
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(check_datasets([dataset], encode).render(most=1))
    text = console.export_text()
    for part in ("rows.jsonl:2", "... and 1 more", "2 errors, 0 warnings", "vqa", "Token lengths of rows.jsonl"):
        assert part in text


def test_the_report_can_be_read_on_80_columns(tmp_path: Path) -> None:
    folder = tmp_path / ("long_name_" * 8)
    folder.mkdir()
    picture(folder, "1.png")
    dataset = open_rows(folder, "messages", _chat("<image>Q", "A", images=["1.png"], task="vqa"))
    console = Console(width=80, record=True, file=io.StringIO())
    report = check_datasets([dataset], encode)
    console.print(report.render())
    lines = console.export_text().splitlines()
    assert f"1  {dataset.name}" in lines  # whole, on a line of its own
    assert ["1", "rows.jsonl", "1", "0", "0", "1", "1"] in [line.split() for line in lines]
    share = f"{report.summary[0].supervised_share:.1%}"
    assert any(line.split()[:3] == ["1", "rows.jsonl", "1"] and line.split()[-1] == share for line in lines)
    assert not any("…" in line for line in lines)


def test_a_row_that_stands_in_two_data_sets_is_a_warning(tmp_path: Path) -> None:
    picture(tmp_path, "train.png", "test.png")  # two files of one content
    (train, test), texts = (tmp_path / "train", tmp_path / "test"), ("Q", "other")
    for folder, text in zip((train, test), texts, strict=True):
        folder.mkdir()
        shutil.copy(tmp_path / f"{folder.name}.png", folder)
        rows = [
            _chat(f"<image>{text}", "A", images=[f"{folder.name}.png"]),
            _chat("<image>Q", "B", images=[f"{folder.name}.png"]),
        ]
        open_rows(folder, "messages", *rows)
    configs = [{"format": "messages", "path": f"{name}/rows.jsonl"} for name in ("train", "test")]
    report = check(tmp_path, *configs)
    assert not report.has_errors
    (finding,) = report.findings
    assert (finding.dataset, finding.problem.line) == ("test/rows.jsonl", 2)
    assert finding.problem.message == "the row repeats train/rows.jsonl:2 of another data set"


def test_the_place_of_a_finding_is_never_broken(tmp_path: Path) -> None:
    folder = tmp_path / ("long_name_" * 12)
    folder.mkdir()
    name = f"{folder.name}/rows.jsonl"
    open_rows(folder, "messages", {"x": 1})
    stream = io.StringIO()
    Console(width=80, file=stream).print(check(tmp_path, {"format": "messages", "path": name}).render(), soft_wrap=True)
    assert any(
        f"error: {name}:1: messages: the row has no `messages`" in line for line in stream.getvalue().splitlines()
    )


def test_every_sample_advances_the_progress(tmp_path: Path) -> None:
    steps = []
    check_datasets([open_rows(tmp_path, "messages", {}, {}, {})], advance=lambda: steps.append(1))
    assert len(steps) == 3
