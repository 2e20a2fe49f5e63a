"""Writing the embedded data set in the project's own file formats, so that every reader can be tried on it.

Everything is a pure function of the seed and the sizes. `scenes.json` is written last and says what the folder holds.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triptych.data.scene_questions import (
    CORE,
    OTHERS,
    Ask,
    Question,
    ask_text,
    compare,
    describe,
    describe_places,
    dialogue,
    invent,
)
from triptych.data.scenes import Scene, Split, draw, mask, sample_scene, sample_sign

TURNS = 6
"""Questions of a training dialogue."""
NOTE = "Pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).\n"


@dataclass(frozen=True)
class Sizes:
    """What a folder holds; equal sizes and seed give equal files."""

    train: int
    """Training scenes."""
    test: int
    """Test questions of each task."""
    seed: int = 0

    @property
    def validation(self) -> int:
        """Validation scenes."""
        return max(8, min(200, self.train // 20))


@dataclass(frozen=True)
class _Picture:
    """A picture to be drawn."""

    name: str
    scene: Scene


def write_scenes(folder: Path, sizes: Sizes, advance: Callable[[int, int], None] | None = None) -> bool:
    """Write pictures and files; False where the folder holds exactly this already.

    Files: `{train,validation,validation_questions,test,test_others,combinations}.json` (LLaVA), `train_others.json`
    (signs, pairs of pictures, boxes), `questions/<task>.jsonl` (messages, one question a training scene),
    `{train,validation}_{brief,dense}.tsv` (captions), `preferences.jsonl` (TRL), `validation.parquet` (pictures
    inside), `validation.tar` (webdataset), `masks.jsonl` and `masks/`.

    Args:
        folder: made if absent; files of these names are replaced.
        sizes: how much.
        advance: called with (pictures drawn, pictures in all).
    """
    stamp = {**asdict(sizes), "format": 5}
    marker = folder / "scenes.json"
    if marker.is_file() and marker.read_text(encoding="utf-8") == json.dumps(stamp) + "\n":
        return False
    marker.unlink(missing_ok=True)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    pictures = [*_write_training(folder, sizes), *_write_test(folder, sizes)]
    _draw_all(folder / "pictures", pictures, advance)
    _write_containers(folder, sizes)
    _write_masks(folder, sizes)
    (folder / "LICENSE.txt").write_text(NOTE, encoding="utf-8")
    marker.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    return True


def _write_training(folder: Path, sizes: Sizes) -> Iterator[_Picture]:
    counts: dict[Split, int] = {"train": sizes.train, "validation": sizes.validation}
    for split, count in counts.items():
        scenes = _scenes(split, sizes.seed, count)
        dialogues, preferences = [], []
        questions: dict[str, list[dict[str, Any]]] = {task: [] for task in (*CORE, *OTHERS)}
        for number, (name, scene) in enumerate(scenes):
            generator = random.Random(f"{sizes.seed}/{split}/questions/{number}")
            asked = dialogue(scene, generator, TURNS)
            dialogues.append(_llava(name, [name], asked))
            for task, ask in (CORE | OTHERS).items():
                question = ask(scene, generator)
                if question is not None:
                    questions[task].append(_messages(f"{name}-{task}", name, question))
            preferences.append(_preference(name, scene, generator))
            yield _Picture(name, scene)
        _write_json(folder / f"{split}.json", dialogues)
        _write_tsv(folder / f"{split}_brief.tsv", [(_file(name), describe(scene)) for name, scene in scenes])
        _write_tsv(folder / f"{split}_dense.tsv", [(_file(name), describe_places(scene)) for name, scene in scenes])
        if split == "train":
            (folder / "questions").mkdir(exist_ok=True)
            for task, rows in questions.items():
                _write_jsonl(folder / "questions" / f"{task}.jsonl", rows)
            _write_jsonl(folder / "preferences.jsonl", preferences)
    others, pictures = _others("train", sizes.seed, max(1, sizes.train // 20))
    _write_json(folder / "train_others.json", others)
    yield from pictures


def _write_test(folder: Path, sizes: Sizes) -> Iterator[_Picture]:
    """Each question about a scene of its own; the tasks take turns, so that the first rows are a fair sample."""
    # A single thing stands at a held-out place; where there are several, the number is held out.
    combinations = {
        "counting": _about(CORE["counting"], is_single=False),
        "position": _about(CORE["position"], is_single=True),
        "caption": _about(CORE["caption"], is_single=False),
    }
    few = -(-sizes.test // 4)
    plans: tuple[tuple[Split, str, dict[str, Ask], int], ...] = (
        ("validation", "validation_questions.json", CORE, min(10, few)),
        ("test", "test.json", CORE, sizes.test),
        ("combinations", "combinations.json", combinations, few),
    )
    for split, file, tasks, count in plans:
        rows = []
        stock = _stock(split, sizes.seed)
        for number in range(count):
            for task, ask in tasks.items():
                name, scene, question = _next_question(stock, ask, f"{sizes.seed}/{split}/{task}/{number}")
                rows.append(_llava(f"{name}-{task}", [name], [question]))
                yield _Picture(name, scene)
        _write_json(folder / file, rows)
    rows, pictures = _others("test", sizes.seed, few)
    _write_json(folder / "test_others.json", rows)
    yield from pictures


def _others(split: Split, seed: int, count: int) -> tuple[list[dict[str, Any]], list[_Picture]]:
    """`count` questions of each task that is not among the core ones, and their pictures."""
    rows: list[dict[str, Any]] = []
    pictures: list[_Picture] = []
    stock = ((f"other-{name}", scene) for name, scene in _stock(split, seed + 1))
    for number in range(count):
        for task, ask in OTHERS.items():
            name, scene, question = _next_question(stock, ask, f"{seed}/{split}/{task}/{number}")
            rows.append(_llava(f"{name}-{task}", [name], [question]))
            pictures.append(_Picture(name, scene))
        sign = _Picture(f"{split}-sign-{number:06d}", sample_sign(split, seed, number))
        asked = ask_text(sign.scene, random.Random(0))
        pair, compared = _pair(stock)
        assert asked is not None
        rows += [
            _llava(sign.name, [sign.name], [asked]),
            _llava(pair[0].name, [item.name for item in pair], [compared]),
        ]
        pictures += [sign, *pair]
    return rows, pictures


def _pair(stock: Iterator[tuple[str, Scene]]) -> tuple[list[_Picture], Question]:
    while True:
        pair = [_Picture(*next(stock)) for _ in (0, 1)]
        question = compare(pair[0].scene, pair[1].scene)
        if question is not None:
            return pair, question


def _scenes(split: Split, seed: int, count: int) -> list[tuple[str, Scene]]:
    return list(itertools.islice(_stock(split, seed), count))


def _stock(split: Split, seed: int) -> Iterator[tuple[str, Scene]]:
    """Scenes of a split without end, with the names of their pictures."""
    for number in itertools.count():
        yield f"{split}-{number:06d}", sample_scene(split, seed, number)


def _next_question(stock: Iterator[tuple[str, Scene]], ask: Ask, key: str) -> tuple[str, Scene, Question]:
    """The next scene that allows this question."""
    generator = random.Random(key)
    return next((name, scene, question) for name, scene in stock if (question := ask(scene, generator)) is not None)


def _about(ask: Ask, is_single: bool) -> Ask:
    """The question, about scenes of a single thing or of several only."""
    return lambda scene, generator: ask(scene, generator) if (scene.target == "") == is_single else None


def _file(name: str) -> str:
    return f"{name}.png"


def _llava(identity: str, pictures: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    turns = []
    for number, question in enumerate(questions):
        places = "<image>\n" * len(pictures) if number == 0 else ""
        turns.append({"from": "human", "value": places + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    files = [_file(name) for name in pictures]
    shown = {"image": files[0]} if len(files) == 1 else {"images": files}
    task = questions[0].task if len(questions) == 1 else "dialogue"
    return {"id": identity, **shown, "task": task, "conversations": turns}


def _messages(identity: str, picture: str, question: Question) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"<image>\n{question.text}"},
        {"role": "assistant", "content": question.answer},
    ]
    return {"id": identity, "images": [_file(picture)], "task": question.task, "messages": turns}


def _preference(name: str, scene: Scene, generator: random.Random) -> dict[str, Any]:
    question, wrong, fault = invent(scene, generator)
    prompt = [{"role": "user", "content": f"<image>\n{question.text}"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (question.answer, wrong))
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"id": name, "images": [_file(name)], "task": f"invented_{fault}", **row}


def _draw_all(folder: Path, pictures: Iterable[_Picture], advance: Callable[[int, int], None] | None) -> None:
    """Draw each picture once, in several processes: half of the time goes into PNG."""
    waiting = list({picture.name: picture for picture in pictures}.values())
    chunks = [waiting[start : start + 200] for start in range(0, len(waiting), 200)]
    done = 0
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for count in pool.map(_draw_chunk, [folder] * len(chunks), chunks):
            done += count
            if advance:
                advance(done, len(waiting))


def _draw_chunk(folder: Path, pictures: Sequence[_Picture]) -> int:
    for picture in pictures:
        draw(picture.scene).save(folder / _file(picture.name), compress_level=1)
    return len(pictures)


def _write_containers(folder: Path, sizes: Sizes) -> None:
    """The validation scenes once more with their pictures inside, as Parquet and as a webdataset."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    with tarfile.open(folder / "validation.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (name, scene) in enumerate(_scenes("validation", sizes.seed, sizes.validation)):
            data = (folder / "pictures" / _file(name)).read_bytes()
            asked = dialogue(scene, random.Random(f"{sizes.seed}/validation/questions/{number}"), TURNS)
            texts = [{"user": question.text, "assistant": question.answer} for question in asked]
            rows.append({"images": [{"bytes": data, "path": _file(name)}], "texts": texts})
            for suffix, member in (("png", data), ("txt", describe(scene).encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "validation.parquet")


def _write_masks(folder: Path, sizes: Sizes) -> None:
    """One mask a thing of the validation scenes."""
    (folder / "masks").mkdir(exist_ok=True)
    rows = []
    for name, scene in _scenes("validation", sizes.seed, sizes.validation):
        for number, item in enumerate(scene.items):
            file = f"masks/{name}-{number}.png"
            mask(item).save(folder / file)
            rows.append({"image": _file(name), "mask": file, "name": item.name, "box": list(item.box)})
    _write_jsonl(folder / "masks.jsonl", rows)


def _write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_tsv(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(("filepath", "title"))
        writer.writerows(rows)
