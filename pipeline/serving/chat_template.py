"""The training template as a Jinja chat template, for tools that read nothing else of an export.

It writes the text of a conversation. Training encodes pieces instead, so text that spells a special token is safe there
and not here; the exported processor does both (`pipeline.serving.remote.processing_mma`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from data_prep.text.template import EOS, Piece, Special, Template, Text

_PARTS = """\
{%- macro plain(parts) -%}
{%- for part in parts -%}{{- IMAGE if part.type != 'text' else part.text -}}{%- endfor -%}
{%- endmacro -%}
{%- macro sentence(parts) -%}
{%- set texts = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
{%- if texts | length == 1 -%}{{- texts[0] -}}{%- else -%}
{%- set whole = namespace(text='') -%}
{%- for text in texts -%}
{%- set bare = whole.text.rstrip() -%}
{%- set border = whole.text[bare | length:] + text[:(text | length) - (text.lstrip() | length)] -%}
{%- set whole.text = bare + ('\\n' if '\\n' in border else ' ') + text.lstrip() -%}
{%- endfor -%}
{{- whole.text.strip() -}}
{%- endif -%}
{%- endmacro -%}
"""
_CHAT = """\
{{- START -}}
{%- set chat = messages -%}
{%- if SYSTEM and (not messages or messages[0].role != 'system') -%}
{%- set chat = [{'role': 'system', 'content': SYSTEM}] + messages -%}
{%- endif -%}
{%- set state = namespace(first=true, joined='') -%}
{%- for message in chat -%}
{%- if message.role not in HEADERS and not (message.role == 'system' and JOINS) -%}
{{- raise_exception('this template has no turn of the role ' + message.role) -}}
{%- endif -%}
{%- set content = message.content -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- if message.role == 'system' and JOINS -%}
{%- set state.joined = plain(parts) + JOINER -%}
{%- else -%}
{%- if not state.first -%}{{- SEPARATOR -}}{%- endif -%}
{%- set state.first = false -%}
{{- HEADERS[message.role] -}}{{- state.joined -}}
{%- set state.joined = '' -%}
{%- if message.role == 'assistant' -%}
{{- PREFIX -}}{{- plain(parts) -}}{{- END -}}
{%- else -%}
{%- if message.role == 'user' and ORDER != 'as_written' -%}
{%- set images = parts | rejectattr('type', 'equalto', 'text') | list -%}
{%- if ORDER == 'image_first' -%}
{%- for image in images -%}{{- IMAGE + (BETWEEN if loop.last else GAP) -}}{%- endfor -%}
{%- endif -%}
{%- if ORDER == 'text_first' or not images -%}{{- OPENING -}}{%- endif -%}
{{- sentence(parts) -}}
{%- if ORDER == 'text_first' -%}
{%- for image in images -%}{{- (BETWEEN if loop.first else GAP) + IMAGE -}}{%- endfor -%}
{%- endif -%}
{%- else -%}
{%- if message.role == 'user' and (not parts or parts[0].type == 'text') -%}{{- OPENING -}}{%- endif -%}
{{- plain(parts) -}}
{%- endif -%}
{{- FOOTERS[message.role] if message.role in FOOTERS else END -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- if chat -%}{{- SEPARATOR -}}{%- endif -%}{{- HEADERS['assistant'] -}}{%- endif -%}
"""
_DOCUMENT = """\
{%- set found = namespace(text='', words=false) -%}
{%- for message in messages -%}
{%- set content = message.content -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- for part in parts if part.type == 'text' and part.text -%}{%- set found.words = true -%}{%- endfor -%}
{%- set found.text = found.text + plain(parts) -%}
{%- if message.role == 'assistant' -%}{%- set found.text = found.text + CHUNK_END -%}{%- endif -%}
{%- endfor -%}
{%- set prompt = '' if found.words else PROMPT -%}
{{- prompt + found.text if ORDER == 'text_first' else found.text + prompt -}}
{%- if not add_generation_prompt -%}{{- END -}}{%- endif -%}
"""


def chat_template(template: Template, name_of: Callable[[str], str], image_token: str) -> str:
    """Return the Jinja source of a template.

    Args:
        template: the training template.
        name_of: the tokenizer's own name of a special token, by its name in templates.
        image_token: text that stands for one image.
    """
    chat = template.chat_format

    def text(pieces: Iterable[Piece]) -> str:
        return "".join(
            name_of(one.token) if isinstance(one, Special) else one.text
            for one in pieces
            if isinstance(one, Special | Text)
        )

    marks = ["".join(name_of(one) if special else one for one, special in side) for side in template.image_marks]
    before, after = marks or ("", "")
    values: dict[str, object] = {"IMAGE": f"{before}{image_token}{after}", "ORDER": template.order}
    if chat is None:
        prompt = template.prompts[0] if template.prompts else ""
        chunk_end = name_of(template.chunk_end) if template.chunk_end else ""
        return _defined({**values, "PROMPT": prompt, "CHUNK_END": chunk_end, "END": name_of(EOS)}) + _PARTS + _DOCUMENT
    values |= {
        "START": text(chat.start),
        "SYSTEM": template.system,
        "JOINS": chat.system_joiner is not None,
        "JOINER": chat.system_joiner or "",
        "SEPARATOR": chat.turn_separator,
        "BETWEEN": chat.image_separator,
        "GAP": chat.image_separator if chat.image_gap is None else chat.image_gap,
        "OPENING": chat.text_start,
        "PREFIX": chat.answer_prefix,
        "END": name_of(chat.end),
        "HEADERS": {role: text(pieces) for role, pieces in chat.headers.items()},
        "FOOTERS": {role: text(pieces) for role, pieces in chat.footers.items()},
    }
    return _defined(values) + _PARTS + _CHAT


def _defined(values: dict[str, object]) -> str:
    return "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in values.items())


def _literal(value: object) -> str:
    """Return a value as a Jinja literal."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
