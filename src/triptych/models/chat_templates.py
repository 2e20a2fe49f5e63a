"""Chat templates as they are written into a checkpoint, so that other tools prompt the model as it was trained."""

from __future__ import annotations

CHATML = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The built-in template `chatml`; takes plain text messages, see `flatten_parts` for pictures."""


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
