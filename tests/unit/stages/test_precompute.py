"""A reference whose numbers are computed before training is the same reference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.commands import FP32, read_recipe, triptych, write
from tests.recipes.tiny_recipes import Files, preference
from tests.tiny import noise
from triptych.core.errors import ModelError
from triptych.data.collate import collate
from triptych.data.images import decode
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.models.reference import REFERENCE_LOGPROBS, reference_logprobs
from triptych.stages import precompute
from triptych.stages.build import make_loader, open_datasets
from triptych.stages.precompute import PrecomputedReference
from triptych.stages.vlm import build_vlm

LORA_FREE = [
    {"match": "vision", "method": "frozen"},
    {"match": "connector", "method": "full"},
    {"match": "language", "method": "full"},
]


def recipe(files: Files, folder: Path, **changes: Any) -> Path:
    values = {"output": str(folder / "run"), **preference(files), "tuning": LORA_FREE}
    language = values["model"]["language"]
    without_dropout = {**language, "config": {**language["config"], "attention_dropout": 0.0}}
    values["model"] = {**values["model"], "language": without_dropout}
    loader = {"global_batch": 8, "micro_batch": 4, "epochs": 2}
    return write(folder / "recipe.yaml", values, **{"loader": loader, "train": {"save_every": 1}, **changes})


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_a_run_learns_the_same_as_with_a_frozen_copy(files: Files, tmp_path: Path) -> None:
    held_out = {"data": preference(files)["data"]}
    results = []
    for kind in ("frozen", "precomputed"):
        file = recipe(files, tmp_path / kind, reference=kind, evaluation=held_out)
        done = triptych("train", file, FP32)
        assert done.status == 0, done.err
        results.append(json.loads((tmp_path / kind / "run" / "finished.json").read_text())["evaluation"])
    assert losses(tmp_path / "precomputed") == pytest.approx(losses(tmp_path / "frozen"), rel=1e-5)
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_the_pass_of_the_reference_counts_for_keeping_features(files: Files, tmp_path: Path) -> None:
    """Of one epoch, every picture is seen twice: before training and in it."""
    reasons = {}
    for kind in ("frozen", "precomputed"):
        file = recipe(files, tmp_path / kind, reference=kind, loader={"epochs": 1})
        assert triptych("train", file, FP32).status == 0
        reasons[kind] = json.loads((tmp_path / kind / "run" / "features.json").read_text())["reason"]
    assert reasons["frozen"] == "a picture goes through the tower 1.0 times on average, which is hardly twice"
    assert "ms to read" in reasons["precomputed"]  # it was worth a look
    assert losses(tmp_path / "precomputed") == pytest.approx(losses(tmp_path / "frozen"), rel=1e-5)


def test_pairs_about_one_picture_may_share_it(files: Files, tmp_path: Path) -> None:
    """Grouped by the loader and packed, the same pairs have the same loss and lead to the same weights."""
    pairs = json.loads((files.data / "pairs.json").read_text())[:8]
    for number, pair in enumerate(pairs):
        pair["images"] = pairs[number % 2]["images"]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs))
    data = [{**preference(files)["data"][0], "path": str(path)}]
    found, weights = {}, {}
    for name, rows, trees in (("apart", 1, False), ("together", 8, True), ("as rows", 8, False)):
        loader = {"global_batch": 8, "micro_batch": 8, "epochs": 2, "rows_per_picture": rows}
        file = recipe(files, tmp_path / name, data=data, trees=trees, loader=loader, features={"keep": "always"})
        assert triptych("train", file, FP32).status == 0
        found[name] = losses(tmp_path / name)
        weights[name] = load_file(tmp_path / name / "run" / "model" / "model.safetensors")
    for name in ("together", "as rows"):
        assert found[name] == pytest.approx(found["apart"], rel=1e-5)
        for key, value in weights["apart"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-3, atol=1e-4)


def test_an_interrupted_run_ends_as_one_that_was_not(files: Files, tmp_path: Path) -> None:
    file = recipe(files, tmp_path, reference="precomputed")
    assert triptych("train", file).status == 0
    run = tmp_path / "run"
    whole = load_file(run / "model" / "model.safetensors")
    kept = {path: path.stat().st_mtime_ns for path in (run / "reference_logprobs").glob("*/*")}
    for step in sorted((run / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(step)
    (run / "finished.json").unlink()
    assert triptych("train", file).status == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "reference_logprobs").glob("*/*")} == kept
    shutil.rmtree(run / "reference_logprobs")
    shutil.rmtree(sorted((run / "checkpoints").glob("step-*"))[-1])
    assert triptych("train", file).status == 0
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def _pairs(files: Files, folder: Path, size: tuple[int, int], kind: str) -> list[dict[str, str]]:
    """Data of eight pairs about pictures of this size and kind of their own."""
    rows = json.loads((files.data / "pairs.json").read_text())[:8]
    for number, row in enumerate(rows):
        noise(*size, seed=number).save(folder / f"{number}.{kind}")
        row["images"] = [f"{number}.{kind}"]
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1))
    return [{"format": "preference", "path": str(folder / "pairs.json"), "images": str(folder)}]


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_row_whose_picture_is_damaged_is_that_rows_fault(files: Files, tmp_path: Path, on_bad_row: str) -> None:
    """With `stop` the run ends before anything takes long; with `skip` the row is listed and left out."""
    data = _pairs(files, tmp_path, (40, 30), "png")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:-200])
    loader = {"global_batch": 8, "micro_batch": 4, "epochs": 1, "on_bad_row": on_bad_row}
    done = triptych("train", recipe(files, tmp_path, data=data, loader=loader), "reference=precomputed")
    run = tmp_path / "run"
    if on_bad_row == "stop":
        assert done.status == 1
        assert "pairs.json" in done.err and "5.png" in done.err and "cannot be decoded" in done.err
        assert not (run / "log.jsonl").exists()
    else:
        assert done.status == 0, done.err
        (left_out,) = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
        assert "5.png" in left_out["message"]


def test_what_an_interruption_leaves_is_not_computed_again(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, vlm, datasets, loader = _reference(files, tmp_path)
    rows: list[int] = []
    compute = precompute.reference_logprobs

    def interrupted(scorer: Any, batch: Any) -> torch.Tensor:
        if len(rows) == 2:
            raise KeyboardInterrupt
        rows.append(batch.num_rows)
        return compute(scorer, batch)

    monkeypatch.setattr(precompute, "reference_logprobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _prepare(known, vlm, datasets, loader, tmp_path)
    before = sum(rows)
    assert 0 < before < 2 * len(datasets[0])
    rows.append(0)  # from here on it is not interrupted
    _prepare(known, vlm, datasets, loader, tmp_path)
    assert sum(rows) == 2 * len(datasets[0])


def test_another_recipe_is_refused_before_anything_is_computed(files: Files, tmp_path: Path) -> None:
    file = recipe(files, tmp_path, reference="precomputed")
    assert triptych("train", file).status == 0
    kept = sorted((tmp_path / "run" / "reference_logprobs").rglob("*"))
    refused = triptych("train", file, "max_length=200")
    assert refused.status == 1 and "max_length" in refused.err
    assert sorted((tmp_path / "run" / "reference_logprobs").rglob("*")) == kept


def _reference(files: Files, folder: Path) -> tuple[PrecomputedReference, Any, list[Any], Any]:
    values = read_recipe(recipe(files, folder))
    vlm = build_vlm(values)
    datasets = open_datasets(values.data)
    return PrecomputedReference(vlm.encoder.encode, vlm.loaded.pictures, {}), vlm, datasets, values.loader


def _prepare(known: PrecomputedReference, vlm: Any, datasets: list[Any], loader: Any, folder: Path) -> None:
    runtime = Runtime(RuntimeConfig(precision="fp32"))
    known.prepare(vlm.scorer, datasets, loader, folder, runtime, Console(quiet=True))


def test_every_branch_gets_its_numbers(files: Files, tmp_path: Path) -> None:
    known, vlm, datasets, loader = _reference(files, tmp_path)
    assert not known.encode(datasets[0].sample(0)).branches[0].token_values
    _prepare(known, vlm, datasets, loader, tmp_path / "numbers")
    for index in (0, 5, len(datasets[0]) - 1):
        example = known.encode(datasets[0].sample(index))
        batch = collate([example])
        pixels = vlm.loaded.pictures.pixels([decode(image) for image in batch.images])
        expected = reference_logprobs(vlm.scorer, replace(batch, pixels=pixels))
        torch.testing.assert_close(batch.token_values[REFERENCE_LOGPROBS], expected, rtol=1e-5, atol=1e-5)


def test_what_is_known_is_not_computed_again_and_another_model_is(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, vlm, datasets, loader = _reference(files, tmp_path)
    rows: list[int] = []
    compute = precompute.reference_logprobs

    def counting(scorer: Any, batch: Any) -> torch.Tensor:
        rows.append(batch.num_rows)
        return compute(scorer, batch)

    monkeypatch.setattr(precompute, "reference_logprobs", counting)
    _prepare(known, vlm, datasets, loader, tmp_path)
    assert sum(rows) == 2 * len(datasets[0])
    home = next(path for path in tmp_path.iterdir() if list(path.glob("*.done")))
    for marker in home.glob("*.done"):
        marker.unlink()  # as if it had been stopped at the very end
    _prepare(known, vlm, datasets, loader, tmp_path)
    assert sum(rows) == 2 * len(datasets[0])
    next(vlm.loaded.model.parameters()).data.add_(0.1)
    _prepare(known, vlm, datasets, loader, tmp_path)
    assert sum(rows) == 4 * len(datasets[0])


def test_what_a_damaged_file_held_is_computed_again(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known, vlm, datasets, loader = _reference(files, tmp_path)
    _prepare(known, vlm, datasets, loader, tmp_path / "numbers")
    sample = datasets[0].sample(3)
    before = known.encode(sample).branches[0].token_values[REFERENCE_LOGPROBS].clone()
    for says_what in (True, False):  # earlier versions listed no files
        (kept,) = (tmp_path / "numbers").glob("*/*.safetensors")
        kept.write_bytes(kept.read_bytes()[:-9])
        (mark,) = (tmp_path / "numbers").glob("*/*.done")  # it is still there
        mark.write_text(mark.read_text() * says_what)
        _prepare(known, vlm, datasets, loader, tmp_path / "numbers")
    assert torch.equal(known.encode(sample).branches[0].token_values[REFERENCE_LOGPROBS], before)
    assert not kept.exists() and f"{kept.name} is damaged" in caplog.text


def test_numbers_that_are_lost_in_the_middle_of_a_run_make_no_row_a_bad_one(files: Files, tmp_path: Path) -> None:
    known, vlm, datasets, loader = _reference(files, tmp_path)
    _prepare(known, vlm, datasets, loader, tmp_path / "numbers")
    (kept,) = (tmp_path / "numbers").glob("*/*.safetensors")
    kept.unlink()
    lenient = loader.model_copy(update={"on_bad_row": "skip"})
    source = make_loader(datasets, known.encode, vlm.loaded.pictures, lenient, None, by_picture=False, packed=True)
    with pytest.raises(ModelError, match=f"{kept.name} cannot be read"):
        next(source.windows())


def test_held_out_rows_are_scored_with_the_pictures_they_are_evaluated_with(files: Files, tmp_path: Path) -> None:
    """Training decodes smaller pictures; before the first step policy and reference must agree all the same."""
    data = _pairs(files, tmp_path, (259, 197), "jpg")
    loader = {"global_batch": 8, "micro_batch": 8, "epochs": 1, "decode": "draft"}
    file = recipe(files, tmp_path, data=data, loader=loader, evaluation={"data": data}, lr=1e-30)
    done = triptych("train", file, "reference=precomputed")
    assert done.status == 0, done.err
    measured = json.loads((tmp_path / "run" / "finished.json").read_text())["evaluation"]
    margins = [value for name, value in measured.items() if name.endswith("reward_margin")]
    assert margins == [pytest.approx(0, abs=1e-6)]


def test_a_row_that_changed_since_is_refused(files: Files, tmp_path: Path) -> None:
    known, vlm, datasets, loader = _reference(files, tmp_path)
    _prepare(known, vlm, datasets, loader, tmp_path)
    plain = known.encode_plain
    known.encode_plain = lambda sample: _with_other_answer(plain(sample))
    with pytest.raises(ModelError, match=r"log-probabilities of this row are not known"):
        known.encode(datasets[0].sample(0))


def _with_other_answer(example: Any) -> Any:
    first = replace(example.branches[0], input_ids=example.branches[0].input_ids + 1)
    return replace(example, branches=(first, *example.branches[1:]))


def test_another_picture_is_another_row(files: Files, tmp_path: Path) -> None:
    known, vlm, datasets, loader = _reference(files, tmp_path)
    _prepare(known, vlm, datasets, loader, tmp_path)
    plain, sample = known.encode_plain, datasets[0].sample(0)
    other = next(
        image
        for index in range(1, len(datasets[0]))
        for image in datasets[0].sample(index).images
        if image.identity != sample.images[0].identity
    )
    known.encode_plain = lambda given: replace(plain(given), images=(other,))
    with pytest.raises(ModelError, match="are not known"):
        known.encode(sample)
