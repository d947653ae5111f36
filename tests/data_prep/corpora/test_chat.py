"""The ``chat`` reader on datasets as people have them, with no option but the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data_prep.common.errors import UserError
from data_prep.corpora import build_corpus
from data_prep.corpora.conversation import MEDIA_KEYS
from data_prep.example import Example, Reject
from data_prep.text.template import Order, Template
from tests.data_prep.corpora.test_corpora import outcomes, render
from tests.data_prep.raw import png
from tests.data_prep.text.test_template import spell

SAID = [["user", {"image": "a.png"}, "What is this?"], ["assistant", "A field."]]
ANSWER = {"role": "assistant", "content": "A field."}
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "<image>\nWhat is this?"}, ANSWER], "images": ["a.png"]},
    "conversations": {
        "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A field."}],
        "image": "a.png",
    },
    "an-empty-list-beside": {
        "messages": [{"role": "user", "content": "<image>\nWhat is this?"}, ANSWER],
        "images": [],
        "image": "a.png",
    },
    "no-marker": {"conversation": [{"role": "user", "content": "What is this?"}, ANSWER], "image": "a.png"},
    "typed-parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A field."}]},
        ],
        "images": ["a.png"],
    },
    "image-in-its-part": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is this?"}],
            },
            ANSWER,
        ]
    },
    "image-url": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "file://a.png"}},
                    {"type": "text", "text": "What is this?"},
                ],
            },
            ANSWER,
        ]
    },
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_usual_shapes_need_no_option(shape: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [SHAPES[shape]] * 2
    text = json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"data.{suffix}").write_text(text)
    found = outcomes(build_corpus("chat", {"data": f"*.{suffix}"}, tmp_path))
    assert [render(item).get("turns") for item in found] == [SAID] * 2


def _dataset(rows: int = 3) -> Dataset:
    """Rows as ``datasets`` stores them: images as bytes and path; typed parts with null keys."""
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]
    asked = {"role": "user", "content": content}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A field."}]}
    images = [{"bytes": png(1), "path": None}]
    return Dataset.from_list([{"messages": [asked, answer], "images": images, "more": n} for n in range(rows)])


def test_a_dataset_saved_to_disk_or_as_parquet_needs_no_option(tmp_path: Path) -> None:
    _dataset().save_to_disk(tmp_path / "saved", num_shards=2)
    _dataset().to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for pattern in ("saved/*.arrow", "hub/data/*.parquet"):
        found = outcomes(build_corpus("chat", {"data": pattern}, tmp_path))
        assert len(found) == 3
        for item in found:
            assert isinstance(item, Example) and [image.read() for image in item.images] == [png(1)]
            assert [turn.role for turn in item.turns] == ["user", "assistant"] and item.turns[0].parts[
                1
            ] == "What is this?"


def test_text_only_data_needs_no_images_and_an_unknown_column_is_named(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    Dataset.from_list([{"messages": talk}]).to_parquet(tmp_path / "talk.parquet")
    [item] = outcomes(build_corpus("chat", {"data": "talk.parquet"}, tmp_path))
    assert isinstance(item, Example) and not item.images
    Dataset.from_list([{"mesages": talk}]).to_parquet(tmp_path / "odd.parquet")
    with pytest.raises(UserError, match=r"no column 'messages' \(did you mean 'mesages'\?\); it has mesages"):
        outcomes(build_corpus("chat", {"data": "odd.parquet"}, tmp_path))
    (tmp_path / "cut.arrow").write_bytes(b"ARROW")
    with pytest.raises(UserError, match="not an Arrow file"):
        outcomes(build_corpus("chat", {"data": "cut.arrow"}, tmp_path))


TEXT, SHOWN = [{"type": "text", "text": text} for text in ("first", "second")], {"type": "image"}


@pytest.mark.parametrize(
    ("content", "first", "as_written"),
    [
        ("The dog in <image> or in <image> ?", "[0][1]The dog in or in ?", "The dog in [0] or in [1] ?"),
        ("<image>\nWhat is <image>", "[0][1]What is", "[0]What is[1]"),
        ([SHOWN, TEXT[0], SHOWN, TEXT[1]], "[0][1]first\nsecond", "[0]first\n[1]\nsecond"),
    ],
)
def test_words_around_images_are_not_glued_together(content: Any, first: str, as_written: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": ["a.png", "a.png"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    [item] = outcomes(build_corpus("chat", {"data": "data.jsonl"}, tmp_path))
    assert isinstance(item, Example)
    orders: dict[Order, str] = {"image_first": first, "as_written": as_written}
    for order, asked in orders.items():
        written = spell(Template("plain", order=order).prompt_pieces(item.turns))
        assert written == f"<user>{asked}<end><assistant>"


@pytest.mark.parametrize("speaker", ["system", "assistant"])
@pytest.mark.parametrize("content", ["Look: <image>", [SHOWN, TEXT[0]]], ids=["marker", "part"])
def test_only_user_turns_hold_images(content: Any, speaker: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    said = {"system": "Be kind.", "user": "What is this?", "assistant": "A field.", speaker: content}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    rows = [{"messages": messages, "images": images} for images in (["a.png"], [])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown, spelled = outcomes(build_corpus("chat", {"data": "data.jsonl"}, tmp_path))
    assert isinstance(shown, Reject) and shown.code == "bad-label" and "assistant or system turn" in shown.detail
    assert isinstance(spelled, Example if isinstance(content, str) else Reject), "without images, a marker is text"


@pytest.mark.parametrize("address", ["https://example.org/a.png", "data:image/png;base64,iVBORw0KGgo="])
def test_an_image_url_is_rejected_with_the_fix(address: str, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image> What?"}, ANSWER], "image": address}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    [item] = outcomes(build_corpus("chat", {"data": "data.jsonl"}, tmp_path))
    assert isinstance(item, Reject) and item.code == "missing-image"
    assert f"is a {address.partition(':')[0]}: URL; download it and give its file name" in item.detail


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ([{"type": "image", "image": "https://example.org/a.png"}, {"type": "text", "text": "?"}], "missing-image"),
        ([{"type": "image", "image": "/etc/passwd"}, {"type": "text", "text": "?"}], "unsafe-path"),
        ([{"type": "image"}, {"type": "text", "text": "?"}], "missing-image"),
        ([{"type": "table"}, {"type": "text", "text": "?"}], "bad-label"),
        ([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}], "unsupported-media"),
        ([{"type": "input_audio", "input_audio": {"data": ""}}, {"type": "text", "text": "?"}], "unsupported-media"),
    ],
)
def test_parts_that_cannot_be_used_are_rejected(content: list[Any], code: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": content}, ANSWER]}))
    [item] = outcomes(build_corpus("chat", {"data": "data.jsonl"}, tmp_path))
    assert isinstance(item, Reject) and item.code == code


@pytest.mark.parametrize("key", MEDIA_KEYS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_video_and_audio_beside_the_messages_are_rejected(key: str, suffix: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<video> What happens?"}, ANSWER]
    rows = [{"messages": messages, key: ["a.mp4"]}, {"messages": messages, key: []}]
    write = Dataset.from_list(rows).to_json if suffix == "jsonl" else Dataset.from_list(rows).to_parquet
    write(tmp_path / f"data.{suffix}")
    media, text = outcomes(build_corpus("chat", {"data": f"data.{suffix}"}, tmp_path))
    assert isinstance(media, Reject) and media.code == "unsupported-media" and f"'{key}' is set" in media.detail
    assert isinstance(text, Example)


@pytest.mark.parametrize(("unmarked", "images"), [("reject", 0), ("first", 2)])
def test_several_images_without_a_marker_come_first_by_an_option(unmarked: str, images: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    row = {"messages": [{"role": "user", "content": "Compare."}, ANSWER], "images": ["a.png", "a.png"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    [item] = outcomes(build_corpus("chat", {"data": "data.jsonl", "unmarked": unmarked}, tmp_path))
    if images:
        assert render(item)["turns"][0][1:] == [{"image": "a.png"}] * images + ["Compare."]
    else:
        assert isinstance(item, Reject) and item.code == "missing-image" and "unmarked: first" in item.detail
