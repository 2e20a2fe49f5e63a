"""Chat templates as they are written into a checkpoint, so that other tools prompt the model as it was trained.

Each is the Jinja form of a built-in template of the data folder; tests hold the two together byte for byte. They are
written for plain text messages; `flatten_parts` puts pictures in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from triptych.core.config import did_you_mean
from triptych.core.errors import ModelError

CHATML: Final = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The built-in template `chatml`."""

VICUNA_V1: Final = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% elif message['content'] %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The built-in template `vicuna_v1`."""

LLAMA2: Final = (
    "{% set block = namespace(text='You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible.') %}"
    "{% if messages and messages[0]['role'] == 'system' %}{% set block.text = messages[0]['content'] %}{% endif %}"
    "{% if block.text %}{% set block.text = '<<SYS>>\\n' + block.text + '\\n<</SYS>>\\n\\n' %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token }}{{ '[INST] ' + block.text + message['content'] + ' [/INST]' }}"
    "{% set block.text = '' %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""The built-in template `llama2`; every round begins with the beginning-of-sequence token."""

BASIC: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% set user = namespace(text=message['content'], has_lead=false) %}"
    "{% for _ in range(message['content'].count(picture)) %}{% if user.text.startswith(picture) %}"
    "{{ picture + '\\n' }}{% set user.text = user.text[picture|length:] %}{% set user.has_lead = true %}"
    "{% endif %}{% endfor %}"
    "{% if user.has_lead and user.text.startswith('\\n') %}{% set user.text = user.text[1:] %}{% endif %}"
    "{{ 'User: ' + user.text + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['content'] %}{{ 'System: ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The built-in template `basic`; pictures that lead a user turn stand before its role marker."""

PLAIN: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% for _ in range(message['content'].count(picture)) %}{{ picture }}{% endfor %}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""The built-in template `plain`: a model trained with it captions, so its prompt is the picture alone. The words of a
user or system message are left out here as they were in training, instead of confusing the model."""

CHAT_TEMPLATES: Final[Mapping[str, str]] = {
    "plain": PLAIN,
    "basic": BASIC,
    "vicuna_v1": VICUNA_V1,
    "llama2": LLAMA2,
    "chatml": CHATML,
}
"""Name of a built-in template -> its Jinja form for text messages; where it names no `bos_token`, without one."""


def chat_template(name: str, picture: str, begin: str = "") -> str:
    """The Jinja template that renders what the built-in template `name` renders.

    Args:
        name: A key of `CHAT_TEMPLATES`.
        picture: The text that stands for one picture.
        begin: The beginning-of-sequence token if the tokenizer puts it before a text of its own accord, else empty.
            Chat templates write it themselves, since renderings are tokenised without special tokens.

    Raises:
        ModelError: there is no built-in template of this name.
    """
    if name not in CHAT_TEMPLATES:
        raise ModelError(f"unknown template `{name}`", remedy=did_you_mean(name, CHAT_TEMPLATES))
    text = CHAT_TEMPLATES[name]
    # Some ChatML vocabularies name `<|im_start|>` as their bos; `llama2` writes it in every round,
    # and templates that begin with a picture write it for tokenizers, too, that would not add it.
    writes_begin = "bos_token" in text or (begin and f"{{{{ '{begin}" in text)
    start = "{{ bos_token }}" if begin and not writes_begin else ""
    return flatten_parts(f"{{%- set picture = '{picture}' -%}}{start}{text}", picture)


def flatten_parts(template: str, image_token: str) -> str:
    """Let a chat template for plain text take messages made of parts, a picture becoming `image_token` in its place.

    The template itself is kept as it is, so text-only messages render byte for byte as before. Applying it twice
    changes nothing.
    """
    head = (
        "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
        "{%- if message['content'] is string -%}{%- set flat.messages = flat.messages + [message] -%}{%- else -%}"
        "{%- set part = namespace(text='') -%}{%- for item in message['content'] -%}"
        "{%- if item['type'] == 'image' -%}{%- set part.text = part.text + '" + image_token + "' -%}"
        "{%- else -%}{%- set part.text = part.text + item['text'] -%}{%- endif -%}{%- endfor -%}"
        "{%- set flat.messages = flat.messages + [dict(message, content=part.text)] -%}"
        "{%- endif -%}{%- endfor -%}{%- set messages = flat.messages %}"
    )
    return template if template.startswith(head) else head + template
