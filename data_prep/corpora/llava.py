"""LLaVA conversations: several turns about one image, or text only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus, as_row
from data_prep.corpora.conversation import Message, check_order, insert_images, refuse_media
from data_prep.corpora.fields import find_image, require, require_id, require_text
from data_prep.corpora.json_files import json_rows
from data_prep.example import Example, Role
from data_prep.quarantine import BadSample

SPEAKERS: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class LLaVA(RowCorpus):
    """Rows ``[{id, image, conversations: [{from: human|gpt, value}]}]``; the whole conversation is one example.

    ``<image>`` may be anywhere in the human turns; without a marker, the image comes first. The published file joins
    three sets and repeats ids, so ids get a hash of the conversation: only the same id with the same conversation is
    a duplicate. Rows without an id are numbered. Several images per row: use type ``chat``.
    """

    conversations: RawFile = Path("llava_instruct_150k.json")
    """JSON file with the list of conversations."""
    images: RawFolder = Path("train2017")
    """Folder that the ``image`` names are relative to."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; a conversation is parsed when it is needed."""
        return json_rows(self.root / self.conversations)

    def row_id(self, row: Row) -> str:
        """Return the id with a hash of the conversation, or "" for a row without an id."""
        if row.get("id") is None:
            return ""
        content = json.dumps([row.get("image"), row.get("conversations")])
        return f"{require_id(row, 'id')}-{xxhash.xxh32_hexdigest(content.encode())}"

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the conversation."""
        refuse_media(row)
        messages = [_message(as_row(turn)) for turn in require(row, "conversations", list)]
        check_order(messages)
        image = find_image(self.root / self.images, require(row, "image", str)) if row.get("image") else None
        yield Example(sample, insert_images(messages, [image] if image else []))


def _message(turn: Row) -> Message:
    speaker = require(turn, "from", str)
    if speaker not in SPEAKERS:
        raise BadSample("bad-label", f"'from' is {speaker!r}, expected human or gpt")
    role = SPEAKERS[speaker]
    return Message(role, require_text(turn, "value", empty="no-answer" if role == "assistant" else "empty-text"))
