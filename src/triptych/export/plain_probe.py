"""Run by path in a fresh process: load a folder with transformers alone and answer a probe.

Usage: python plain_probe.py FOLDER INPUTS.safetensors OUTPUTS.safetensors MAX_NEW_TOKENS. Imports nothing of Triptych,
so that what it finds is what any user of the folder finds.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor


def main(folder: str, inputs_file: str, outputs_file: str, max_new_tokens: int) -> None:
    """Write `logits` [1, L, V], `generated` [n] and, given a picture and a prompt, the processor's view.

    With no new tokens the folder holds a dual encoder: `logits` are its similarities, [pictures, texts].
    """
    inputs = load_file(inputs_file)
    picture = inputs.pop("probe_picture", None)
    prompt = inputs.pop("probe_prompt", None)
    outputs: dict[str, torch.Tensor] = {}
    if max_new_tokens == 0:
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            outputs["logits"] = encoder(**inputs).logits_per_image.float().contiguous()
        outputs["generated"] = torch.empty(0, dtype=torch.int64)
        save_file(outputs, outputs_file)
        return
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs["logits"] = model(**inputs).logits.float().contiguous()
        new = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        outputs["generated"] = new[0, inputs["input_ids"].shape[1] :].contiguous()
    if picture is not None and prompt is not None:
        from PIL import Image

        processor = AutoProcessor.from_pretrained(folder)
        text = bytes(prompt.tolist()).decode("utf-8")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        # A chat template writes the beginning of the sequence itself.
        view = processor(
            text=rendered, images=Image.fromarray(picture.numpy()), add_special_tokens=False, return_tensors="pt"
        )
        outputs |= {f"processor/{name}": value.contiguous() for name, value in view.items()}
    save_file(outputs, outputs_file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
