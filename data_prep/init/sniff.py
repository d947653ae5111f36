"""What the rows of a table are: conversations, questions with answers, captions or interleaved documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.corpora.chat import CONTENT_KEYS, IMAGES, MESSAGES, ROLE_KEYS, ROLES
from data_prep.corpora.downloads import url_file_name
from data_prep.corpora.files import COLUMNAR
from data_prep.corpora.json_files import json_rows
from data_prep.corpora.parquet import column_names
from data_prep.corpora.tables import Rows

SNIFFED_ROWS = 50
QUESTIONS = ("question", "query", "prompt", "instruction", "input", "problem", "user")
ANSWERS = (
    "answer",
    "answers",
    "response",
    "output",
    "multiple_choice_answer",
    "label",
    "target",
    "solution",
    "assistant",
)
CAPTIONS = ("caption", "text", "description", "captions", "alt_text", "alt", "title", "sentence")
PICTURES = ("image", "images", "image_path", "image_file", "file_name", "filename", "img", "picture", "photo", "path")
GUESSED_ROLES = {
    "human": "user", "user": "user", "question": "user", "instruction": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "answer": "assistant", "system": "system",
}  # fmt: skip
"""Roles under other names than the readers know; a guess is printed with the flag that changes it."""


@dataclass(frozen=True)
class Columns:
    """Columns that the user names, instead of those that would be chosen."""

    question: str | None = None
    answer: str | None = None
    caption: str | None = None
    image: str | None = None


@dataclass
class Sniffed:
    """What a table is."""

    kind: str
    """Corpus type."""
    what: str
    """In words, such as "rows with a question and an answer"."""
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was ambiguous, how it was decided, and the flag that decides otherwise."""
    image_names: list[str] = field(default_factory=list)
    """Image files that the sniffed rows name."""
    documents: bool = False
    """Whether its samples are captions or documents, not conversations."""


def sniff_rows(path: Path) -> list[Mapping[str, Any]]:
    """Return the first rows of a table that are objects, with all columns. Raises UserError where it is no table."""
    rows = _open(path)
    found = [row for row in rows.read(range(min(len(rows), SNIFFED_ROWS))) if isinstance(row, Mapping)]
    if not found:
        raise UserError(f"{path}: none of its first {SNIFFED_ROWS} rows is an object with keys")
    return found


def _open(path: Path) -> Rows:
    reader = COLUMNAR.get(path.suffix)
    if reader:
        return reader(path, column_names(path))
    try:
        return json_rows(path)
    except UserError as problem:
        raise UserError(f"{problem}; published formats have readers of their own: mma-prep types") from None


def sniff(path: Path, rows: Sequence[Mapping[str, Any]], columns: Columns, roles: Mapping[str, str]) -> Sniffed:
    """Return what the rows of a table are. Raises UserError, naming the columns, where that cannot be told."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for flag, name in vars(columns).items():
        if name is not None and name not in keys:
            raise UserError(f"{path}: --{flag}-column {name}: it has the columns {', '.join(keys)}")
    if not any(vars(columns).values()) or (columns.image and not (columns.question or columns.caption)):
        messages = next((key for key in MESSAGES if _holds_messages(rows, key)), None)
        if messages:
            return _conversation(path, rows, messages, columns, roles)
        if _lists(rows, "images") and _lists(rows, "texts"):
            places = [place for row in rows for place in row["images"] if isinstance(place, str)]
            names = [url_file_name(place)[0] for place in places]
            return Sniffed("interleaved", "interleaved documents (OBELICS)", image_names=names, documents=True)
        if _lists(rows, "text_list") and _lists(rows, "image_info"):
            infos = [info for row in rows for info in row["image_info"] if isinstance(info, Mapping)]
            names = [str(info["image_name"]) for info in infos if info.get("image_name")]
            found = Sniffed("interleaved", "interleaved documents (mmc4)", {"format": "mmc4"}, documents=True)
            return replace(found, image_names=names)
    return _table(path, rows, keys, columns)


def _holds_messages(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    messages = [message for row in rows for message in (row.get(key) or ()) if isinstance(row.get(key), list)]
    return bool(messages) and all(
        isinstance(one, Mapping) and any(name in one for name in ROLE_KEYS) for one in messages
    )


def _lists(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(isinstance(row.get(key), list) for row in rows)


def _conversation(
    path: Path, rows: Sequence[Mapping[str, Any]], key: str, columns: Columns, given: Mapping[str, str]
) -> Sniffed:
    """Return the reader of conversations; LLaVA's own where the file is exactly in its format."""
    messages = [message for row in rows for message in row.get(key) or ()]
    speakers = Counter(str(message.get(name)) for message in messages for name in ROLE_KEYS if name in message)
    contents = [message.get(name) for message in messages for name in CONTENT_KEYS if name in message]
    parts = any(isinstance(content, list) for content in contents)
    image = columns.image or next((name for name in IMAGES if any(row.get(name) for row in rows)), None)
    names = [*_names(rows, image), *_part_names(contents)]
    llava = (
        path.suffix == ".json" and key == "conversations" and set(speakers) <= {"human", "gpt"} and not parts
        and all("from" in message and "value" in message for message in messages)
        and all(isinstance(row.get("image", ""), str) and row.get("id") is not None for row in rows)
    )  # fmt: skip
    if llava and not columns.image:
        return Sniffed("llava", "LLaVA conversations", image_names=names)
    found = Sniffed("chat", "conversations" + (" in OpenAI's parts" if parts else ""), image_names=names)
    if columns.image:
        found.options["images_column"] = columns.image
    if image and key != "messages" and sum(key in row for row in rows) < len(rows):
        found.notes.append(f"some rows have no '{key}': they will be rejected")
    unknown = {name: given.get(name) or GUESSED_ROLES.get(name.lower()) for name in speakers if name not in ROLES}
    if unknown or given:
        known = {name: role for name, role in ROLES.items() if name in speakers}
        found.options["roles"] = {**known, **given, **{name: role for name, role in unknown.items() if role}}
    for name, role in unknown.items():
        if name not in given:
            decided = f"is taken for {role}" if role else "is unknown, so its rows will be rejected"
            found.notes.append(f"the role {name!r} {decided} (--role {name}=user|assistant|system)")
    marked = sum(str(content).count("<image>") for content in contents if isinstance(content, str))
    several = any(isinstance(row.get(image), list) and len(row[image]) > 1 for row in rows) if image else False
    if several and not marked:
        found.options["unmarked"] = "first"
        found.notes.append("rows have several images and no <image> marker: the images come first (unmarked: first)")
    return found


def _table(path: Path, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], columns: Columns) -> Sniffed:
    image = columns.image or _choose(rows, keys, PICTURES, _is_image)
    texts = {
        "question": columns.question or (None if columns.caption else _choose(rows, keys, QUESTIONS, _is_text)),
        "answer": columns.answer or (None if columns.caption else _choose(rows, keys, ANSWERS, _is_answer)),
        "caption": columns.caption or _choose(rows, keys, CAPTIONS, _is_text),
    }
    names = _names(rows, image)
    found = Sniffed("table", "", {"image_column": image}, image_names=names)
    if texts["question"] and texts["answer"] and not columns.caption:
        found.what = f"rows with a question, an answer and {'an image' if image else 'no image'}"
        found.options |= {"question_column": texts["question"], "answer_column": texts["answer"]}
        roles: dict[str, tuple[str, ...]] = {"question": QUESTIONS, "answer": ANSWERS, "image": PICTURES}
        if texts["caption"]:
            found.notes.append(f"'{texts['caption']}' may be a caption, it is not used (--caption-column)")
    elif texts["caption"] and image:
        found.what, found.documents = "captioned images", True
        found.options |= {"question_column": None, "answer_column": texts["caption"]}
        roles = {"caption": CAPTIONS, "image": PICTURES}
    else:
        raise UserError(
            f"{path}: found neither messages, nor a question with an answer, nor an image with a caption among its "
            f"columns ({', '.join(keys)}): name them (--image-column, --question-column, --answer-column, "
            "--caption-column)"
        )
    chosen = {**texts, "image": image}
    found.notes += _rivals(rows, keys, chosen, roles, columns)
    return found


def _rivals(
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    chosen: Mapping[str, str | None],
    roles: Mapping[str, Sequence[str]],
    columns: Columns,
) -> Iterator[str]:
    """Yield what else could have been chosen, for each role that the user did not decide."""
    tests = {"image": _is_image, "answer": _is_answer}
    for role, known in roles.items():
        if getattr(columns, role) is None:
            test = tests.get(role, _is_text)
            others = [
                key for key in keys if key.lower() in known and key not in chosen.values() and _all(rows, key, test)
            ]
            if others:
                also = ", ".join(f"'{name}'" for name in others)
                yield f"the {role} is '{chosen[role]}'; {also} would be possible too (--{role}-column)"


def _choose(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], known: Sequence[str], test: Any) -> str | None:
    """Return the column whose name stands first among the known ones and whose values pass the test."""
    fitting = [key for key in keys if key.lower() in known and _all(rows, key, test)]
    return min(fitting, key=lambda key: known.index(key.lower()), default=None)


def _all(rows: Sequence[Mapping[str, Any]], key: str, test: Any) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return bool(values) and all(test(value) for value in values)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_answer(value: object) -> bool:
    cells = value if isinstance(value, list) else [value]
    return all(isinstance(cell, str | int | float) and not isinstance(cell, bool) for cell in cells)


def _is_image(value: object) -> bool:
    cells = value if isinstance(value, list) else [value]
    return all(isinstance(cell, str | bytes) or (isinstance(cell, Mapping) and "bytes" in cell) for cell in cells)


def _names(rows: Sequence[Mapping[str, Any]], key: str | None) -> list[str]:
    """Return the image files that rows name in a column."""
    values = [row.get(key) for row in rows] if key else []
    cells = [cell for value in values for cell in (value if isinstance(value, list) else [value])]
    paths = [cell.get("path") if isinstance(cell, Mapping) and not cell.get("bytes") else cell for cell in cells]
    return [path for path in paths if isinstance(path, str)]


def _part_names(contents: Sequence[object]) -> list[str]:
    """Return the image files that OpenAI's content parts name."""
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    values = [part.get(key) for part in parts for key in ("image", "path", "url", "image_url") if part.get(key)]
    urls = [value.get("url") if isinstance(value, Mapping) else value for value in values]
    return [url.removeprefix("file://") for url in urls if isinstance(url, str)]
