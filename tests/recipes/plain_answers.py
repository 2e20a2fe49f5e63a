"""Answer test pictures with transformers alone, and compare with the answers that an evaluation wrote.

Usage: python tests/recipes/plain_answers.py MODEL ANSWERS.jsonl PICTURES [COUNT]. Imports nothing of Triptych. Exit
status 1 where an answer differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(folder: str, answers: str, pictures: str, count: int = 10) -> int:
    """Print question, both answers and whether they are equal; return how many differ."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    differing = 0
    lines = Path(answers).read_text(encoding="utf-8").split("\n")[:-1][:count]
    for line in lines:
        row = json.loads(line)
        (name,) = row["pictures"]
        content = [{"type": "image"}, {"type": "text", "text": row["question"].removeprefix("\n")}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.open(Path(pictures) / name).convert("RGB")
        inputs = processor(text=prompt, images=picture, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            new = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = processor.decode(new, skip_special_tokens=True).strip()
        is_same = said == row["prediction"].strip()
        differing += not is_same
        print(f"{name}: {row['question']!r}: {said!r} {'as' if is_same else 'but not as'} {row['prediction']!r}")
    print(f"{differing} of {len(lines)} answers differ")
    return differing


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:4], *map(int, sys.argv[4:5])) else 0)
