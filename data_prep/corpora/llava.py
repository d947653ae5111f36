"""LLaVA conversations: several turns about an image, or about none, kept whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from data_prep.corpora.base import RawFile, RawFolder, Row, RowCorpus, as_row
from data_prep.corpora.conversation import Spoken, check_order, insert_images
from data_prep.corpora.fields import find_image, key_text, require, text
from data_prep.corpora.tables import json_array
from data_prep.example import Example, Role
from data_prep.quarantine import BadSample

SPEAKERS: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class LLaVA(RowCorpus):
    """``[{id, image, conversations: [{from: human|gpt, value}]}]``; the whole conversation is one example.

    ``<image>`` may stand anywhere in the human turns; a conversation with an image and no marker opens with it.
    An id may repeat (the published file joins three sets): ids get a hash of the conversation, and only an id that
    repeats with the same conversation is a duplicate.
    """

    conversations: RawFile = Path("llava_instruct_150k.json")
    """The list of conversations."""
    images: RawFolder = Path("train2017")
    """Folder of the images."""

    def read_rows(self) -> Sequence[object]:
        """Index the file; conversations are read when needed."""
        return json_array(self.root / self.conversations)

    def row_id(self, row: Row) -> str:
        """Return the id and a hash of what is said."""
        said = json.dumps([row.get("image"), row.get("conversations")])
        return f"{key_text(row, 'id')}-{xxhash.xxh32_hexdigest(said.encode())}"

    def read_row(self, row: Row, sample: str) -> Iterable[Example]:
        """Return the conversation."""
        spoken = [_spoken(as_row(turn)) for turn in require(row, "conversations", list)]
        check_order(spoken)
        image = find_image(self.root / self.images, require(row, "image", str)) if row.get("image") else None
        yield Example(sample, insert_images(spoken, [image] if image else []))


def _spoken(turn: Row) -> Spoken:
    speaker = require(turn, "from", str)
    if speaker not in SPEAKERS:
        raise BadSample("bad-label", f"'from' is {speaker!r}, expected human or gpt")
    role = SPEAKERS[speaker]
    return Spoken(role, text(turn, "value", empty="no-answer" if role == "assistant" else "empty-text"))
