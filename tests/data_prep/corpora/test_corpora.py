"""Every reader on a small faithful raw corpus; ``golden.jsonl`` holds the expected outcome of each raw row.

After an intended change, print the new lines with ``render`` and read them before replacing the old ones.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.common.errors import UserError
from data_prep.corpora import CORPORA, Corpus, build_corpus
from data_prep.corpora.nlvr import held_out
from data_prep.example import Example, ImageRef, Reject
from data_prep.quarantine import CODES
from data_prep.recipe import load_recipe
from tests.data_prep.raw import make_recipe, png, prepare, write_tar

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOLDENS = [
    pytest.param("table", "table", {"data": "rows.jsonl", "images": "images", "id_column": "id"}, "golden", id="table"),
    pytest.param(
        "table",
        "table",
        {"data": "captions.jsonl", "images": "images", "question_column": None, "answer_column": "caption"},
        "golden_captions",
        id="table-captions",
    ),
    pytest.param("image_folder", "image_folder", {}, "golden", id="image-folder"),
    pytest.param("webdataset", "webdataset", {"tars": "cc12m/*.tar"}, "golden", id="webdataset"),
    pytest.param(
        "webdataset",
        "webdataset",
        {"tars": "cc12m/00000.tar", "caption_key": "cogvlm_caption"},
        "golden_kale",
        id="webdataset-caption-key",
    ),
    pytest.param(
        "webdataset", "webdataset", {"tars": "ocr/*.tar", "granularity": 0}, "golden_ocr", id="webdataset-granularity"
    ),
    pytest.param("vqav2", "vqav2", {}, "golden", id="vqav2"),
    pytest.param("refcoco", "refcoco", {"direction": "both"}, "golden", id="refcoco"),
    pytest.param(
        "refcoco", "refcoco", {"annotations": "finetune_refcocog_train.json"}, "golden_refcocog", id="refcocog"
    ),
    pytest.param("llava", "llava", {}, "golden", id="llava"),
    pytest.param(
        "chat",
        "chat",
        {"data": "part-*.jsonl", "images_column": "images", "id_column": "uid", "images": "pictures"},
        "golden_jsonl",
        id="chat-jsonl",
    ),
    pytest.param(
        "chat",
        "chat",
        {
            "data": "*.parquet",
            "messages_column": "conversations",
            "images_column": "image",
            "role_key": "from",
            "content_key": "value",
        },
        "golden_parquet",
        id="chat-parquet",
    ),
    pytest.param("gqa", "gqa", {}, "golden", id="gqa"),
    pytest.param("vsr", "vsr", {}, "golden", id="vsr"),
    pytest.param("ocrvqa", "ocrvqa", {}, "golden", id="ocrvqa"),
    pytest.param("aokvqa", "aokvqa", {}, "golden", id="aokvqa"),
    pytest.param("aokvqa", "aokvqa", {"shuffle": False}, "golden_in_order", id="aokvqa-in-order"),
    pytest.param("scienceqa", "scienceqa", {}, "golden", id="scienceqa"),
    pytest.param("scienceqa", "scienceqa", {"only_images": True}, "golden_only_images", id="scienceqa-images"),
    pytest.param("visual_genome", "visual_genome", {}, "golden", id="visual-genome"),
    pytest.param("interleaved", "interleaved", {"data": "obelics/*.parquet"}, "golden_obelics", id="obelics"),
    pytest.param(
        "interleaved",
        "interleaved",
        {"data": "obelics/*.parquet", "names": "sha256", "images": "hashed", "missing": "reject"},
        "golden_obelics_sha256",
        id="obelics-sha256",
    ),
    pytest.param(
        "interleaved",
        "interleaved",
        {"data": "mmc4/*.jsonl", "format": "mmc4", "id_column": "url"},
        "golden_mmc4",
        id="mmc4",
    ),
    pytest.param(
        "captions", "captions", {"data": "kale-*.parquet", "caption_key": "cogvlm_caption"}, "golden_kale", id="kale"
    ),
    pytest.param(
        "captions",
        "captions",
        {"data": "files/*.parquet", "images": "files", "names": "img2dataset"},
        "golden_img2dataset",
        id="captions-img2dataset",
    ),
    pytest.param(
        "captions",
        "captions",
        {"data": "own.jsonl", "images": ".", "names": "path", "image_key": "file"},
        "golden_path",
        id="captions-path",
    ),
    pytest.param("nlvr", "nlvr", {"permutations": 2}, "golden_verify", id="nlvr-verify"),
    pytest.param("nlvr", "nlvr", {"task": "caption"}, "golden_caption", id="nlvr-caption"),
]


def render(item: Example | Reject) -> dict[str, Any]:
    """Return an outcome as JSON; of a reject, the code without the detail."""
    if isinstance(item, Reject):
        return {"reject": item.sample, "code": item.code}
    turns = [
        [turn.role, *({"image": part.name} if isinstance(part, ImageRef) else part for part in turn.parts)]
        for turn in item.turns
    ]
    return {"id": item.id, "kind": item.kind, "family": item.family, "turns": turns, "meta": dict(item.meta)}


def outcomes(corpus: Corpus) -> list[Example | Reject]:
    return [item for shard in corpus.shards() for item in corpus.examples(shard)]


@pytest.mark.parametrize(("kind", "folder", "options", "golden"), GOLDENS)
def test_the_outcome_of_each_raw_row_equals_the_golden_file(
    kind: str, folder: str, options: Mapping[str, Any], golden: str
) -> None:
    items = outcomes(build_corpus(kind, options, FIXTURES / folder))
    expected = [json.loads(line) for line in (FIXTURES / folder / f"{golden}.jsonl").read_text().splitlines()]
    assert [render(item) for item in items] == expected


@pytest.mark.parametrize(("kind", "folder", "options", "golden"), GOLDENS)
def test_ids_are_unique_codes_are_known_and_images_are_readable(
    kind: str, folder: str, options: Mapping[str, Any], golden: str
) -> None:
    items = outcomes(build_corpus(kind, options, FIXTURES / folder))
    examples = [item for item in items if isinstance(item, Example)]
    assert len({example.id for example in examples}) == len(examples)
    assert {item.code for item in items if isinstance(item, Reject)} <= set(CODES)
    assert all(image.read() for example in examples for image in example.images if not image.optional)
    assert all(example.turns[-1].role == "assistant" for example in examples)
    for item in items:
        (item.id if isinstance(item, Example) else item.sample + item.detail).encode()


def test_every_corpus_type_has_a_golden() -> None:
    assert {case.values[0] for case in GOLDENS} == set(CORPORA)


@pytest.mark.parametrize(("kind", "folder", "options", "golden"), GOLDENS)
def test_shards_do_not_depend_on_each_other_or_on_their_order(
    kind: str, folder: str, options: Mapping[str, Any], golden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [render(item) for item in outcomes(build_corpus(kind, options, FIXTURES / folder))]
    for reader in CORPORA.values():
        if hasattr(reader, "rows_per_shard"):
            monkeypatch.setattr(reader, "rows_per_shard", 3)
    shards = build_corpus(kind, options, FIXTURES / folder).shards()
    by_shard = {
        shard: [render(item) for item in build_corpus(kind, options, FIXTURES / folder).examples(shard)]
        for shard in reversed(shards)  # each with its own reader, as in different processes
    }
    assert [item for shard in shards for item in by_shard[shard]] == whole
    assert all(shard == Path(shard).name for shard in shards)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        pytest.param("vqa", {}, r"unknown corpus type 'vqa' \(did you mean 'vqav2'\?\)", id="kind"),
        pytest.param("vqav2", {"image": "x"}, r"vqav2\.image: unknown option \(did you mean 'images'\?\)", id="option"),
        pytest.param("vqav2", {"root": "/"}, r"vqav2\.root: unknown option", id="root"),
        pytest.param("vqav2", {"images": "nowhere"}, r"vqav2\.images: folder .*nowhere does not exist", id="folder"),
        pytest.param("vqav2", {"questions": "gone.json"}, r"vqav2\.questions: file .*gone.* does not exist", id="file"),
        pytest.param("vqav2", {"prompt": "Answer."}, r"vqav2\.prompt: .*\{question\}.*found 'Answer\.'", id="prompt"),
        pytest.param("refcoco", {"direction": "up"}, r"refcoco\.direction: .*'phrase'.*found 'up'", id="choice"),
        pytest.param("nlvr", {"permutations": 7}, r"nlvr\.permutations: .*equal to 6.*found 7", id="range"),
        pytest.param("webdataset", {"tars": "none/*.tar"}, r"tars='none/\*\.tar' matches no file", id="no-tars"),
        pytest.param("chat", {}, r"chat: set either data or dataset", id="required"),
        pytest.param("chat", {"data": "*.csv"}, r"chat: data must end in \.jsonl, .*found '\*\.csv'", id="format"),
        pytest.param("chat", {"data": "none*.jsonl"}, r"data='none\*\.jsonl' matches no file", id="no-data"),
        pytest.param(
            "webdataset",
            {"tars": "../*.tar"},
            r"webdataset\.tars: .*relative to the recipe's root",
            id="climbing-pattern",
        ),
        pytest.param("chat", {"data": "**.jsonl"}, r"chat\.data: \*\* must be a whole path component", id="stars"),
    ],
)
def test_wrong_options_are_named(kind: str, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_corpus(kind, options, FIXTURES / kind)


def test_a_root_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matches no file under .*/gone: this folder does not exist; set"):
        build_corpus("webdataset", {}, tmp_path / "gone")


@pytest.mark.parametrize(
    ("kind", "file", "content", "message"),
    [
        pytest.param("vqav2", "questions", b'{"questions": [', "not a JSON file", id="cut"),
        pytest.param("vqav2", "questions", b"[]", "a list under 'questions'", id="no-key"),
        pytest.param("vqav2", "annotations", b'{"annotations": {}}', "a list under 'annotations'", id="no-list"),
        pytest.param("refcoco", "annotations", b'{"images": []}', "a list under 'annotations'", id="no-annotations"),
        pytest.param(
            "llava", "conversations", b'{"id": 1}', "a JSON list or JSON lines, found a single", id="no-array"
        ),
        pytest.param("llava", "conversations", b'[{"id": 1}, {"id"', "cut short, from byte 12", id="cut-array"),
        pytest.param("chat", "data", b"PAR1 cut", "not a Parquet file", id="cut-parquet"),
    ],
)
def test_an_unusable_file_is_named(kind: str, file: str, content: bytes, message: str, tmp_path: Path) -> None:
    pattern = kind == "chat"
    bad = tmp_path / ("bad.parquet" if pattern else "bad.json")
    bad.write_bytes(content)
    corpus = build_corpus(kind, {file: bad.name if pattern else str(bad)}, tmp_path if pattern else FIXTURES / kind)
    with pytest.raises(UserError, match=message) as caught:
        outcomes(corpus)
    assert str(bad) in str(caught.value)


@pytest.mark.parametrize("kind", ["0", "x", "L"], ids=["file", "pax header", "long name"])
@pytest.mark.parametrize("size", [-3072, -512, 1 << 40, (1 << 63) - 5000, 1 << 70])
def test_a_damaged_size_in_a_tar_is_named(tmp_path: Path, size: int, kind: str) -> None:
    write_tar(tmp_path / "00000.tar", {f"{key}": (png(key), "a caption") for key in range(3)})
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    header = data.index(b"1.txt")
    data[header + 124 : header + 136] = (size % (1 << 96)).to_bytes(12) if size < 0 else b"\x80" + size.to_bytes(11)
    data[header + 156] = ord(kind)
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    (tmp_path / "00000.tar").write_bytes(data)
    first, *_, last = outcomes(build_corpus("webdataset", {}, tmp_path))
    assert isinstance(first, Example) and isinstance(last, Reject) and last.code == "damaged-tar"


def rewritten(data: bytes, how: str) -> bytes:
    return {"": lambda whole: whole, "gz": gzip.compress}[how](data)


@pytest.mark.parametrize("how", ["", "gz"])
@pytest.mark.parametrize("damage", ["header", "hole", "another tar", "no end"])
def test_a_tar_never_ends_early_silently(tmp_path: Path, damage: str, how: str) -> None:
    write_tar(tmp_path / "00000.tar", {f"{key}": (png(key), "a caption") for key in range(4)})
    whole = (tmp_path / "00000.tar").read_bytes()
    at, end = whole.index(b"2.png"), len(whole.rstrip(b"\0")) // 512 * 512 + 512
    harmless = damage == "no end"  # some writers omit the final zero blocks: nothing is lost
    cases = {
        "header": [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(at, at + 512, 3)],
        "hole": [whole[:at] + bytes(512) + whole[at + 512 :]],
        "another tar": [whole + whole],
        "no end": [whole[:end]],
    }[damage]
    for data in cases:
        (tmp_path / "00000.tar").write_bytes(rewritten(data, how))
        *kept, last = outcomes(build_corpus("webdataset", {}, tmp_path))
        assert isinstance(last, Example) if harmless else isinstance(last, Reject) and last.code == "damaged-tar"
        before = {"header": 2, "hole": 2, "another tar": 4, "no end": 4}[damage]
        assert len(kept) == before - 1  # the last sample before the damage may have had more members


def test_a_damaged_tar_contributes_the_samples_before_the_damage_and_is_named(tmp_path: Path) -> None:
    whole = (FIXTURES / "webdataset/cc12m/00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole)
    samples = outcomes(build_corpus("webdataset", {}, tmp_path))
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2 + 1000])
    *kept, damage = outcomes(build_corpus("webdataset", {}, tmp_path))
    assert 0 < len(kept) < len(samples) and kept == samples[: len(kept)]
    assert isinstance(damage, Reject) and damage.code == "damaged-tar"
    assert f"{tmp_path / '00000.tar'}: unexpected end of data; download it again" in damage.detail
    (tmp_path / "00000.tar").write_bytes(b"<html>not found</html>")
    (damage,) = outcomes(build_corpus("webdataset", {}, tmp_path))
    assert isinstance(damage, Reject) and damage.code == "damaged-tar"


def test_a_missing_parquet_column_is_named() -> None:
    corpus = build_corpus("chat", {"data": "*.parquet", "messages_column": "conversation"}, FIXTURES / "chat")
    with pytest.raises(UserError, match=r"no column 'conversation' \(did you mean 'conversations'\?\)"):
        corpus.shards()


def test_an_image_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "train2017/a.jpg").symlink_to(tmp_path / "secret.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    (tmp_path / "llava_instruct_150k.json").write_text(
        json.dumps([{"id": "1", "image": "a.jpg", "conversations": turns}])
    )
    [item] = outcomes(build_corpus("llava", {}, tmp_path))
    assert isinstance(item, Reject)
    assert item.code == "unsafe-path"


def test_the_image_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    real = FIXTURES / "vqav2"
    (tmp_path / "train2014").symlink_to(real / "train2014")
    for name in ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"):
        (tmp_path / name).symlink_to(real / name)
    linked, direct = (outcomes(build_corpus("vqav2", {}, root)) for root in (tmp_path, real))
    assert [render(item) for item in linked] == [render(item) for item in direct]


def test_nlvr_groups_partition_the_readable_sentences() -> None:
    def kept(**options: Any) -> set[str]:
        items = outcomes(build_corpus("nlvr", options, FIXTURES / "nlvr"))
        return {item.id for item in items if isinstance(item, Example)}

    held_out, rest = kept(groups=[2]), kept(exclude_groups=["2"])
    assert held_out == {"3125-1-0", "3125-0-0"}
    assert not held_out & rest
    assert held_out | rest == kept()


@pytest.mark.skipif(
    "NLVR_DIR" not in os.environ, reason="set NLVR_DIR to the folder that holds NLVR's dev/ and hidden/"
)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"permutations": 6}, 5934, id="dev"),
        pytest.param(
            {"sentences": "hidden/hidden.json", "images": "hidden/images", "permutations": 6}, 5910, id="hidden"
        ),
        pytest.param({"task": "caption", "groups": [0]}, 165, id="captions-of-one-group"),
    ],
)
def test_the_real_nlvr_is_read_without_a_reject(options: Mapping[str, Any], expected: int) -> None:
    items = outcomes(build_corpus("nlvr", options, Path(os.environ["NLVR_DIR"])))
    assert [item for item in items if isinstance(item, Reject)] == []
    assert len(items) == expected


@pytest.mark.skipif("CC12M_DIR" not in os.environ, reason="set CC12M_DIR to a folder of CC12M tars")
def test_real_cc12m_tars_are_read_without_a_reject() -> None:
    items = outcomes(build_corpus("webdataset", {}, Path(os.environ["CC12M_DIR"])))
    assert items
    assert [item for item in items if isinstance(item, Reject)] == []


def test_equal_keys_in_two_tars_are_two_samples_and_a_key_twice_in_one_is_a_duplicate(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        write_tar(tmp_path / f"{shard}.tar", {"000000001": (png(1), "a"), "x/2": (png(2), "b")})
    with tarfile.open(tmp_path / "00001.tar", "a") as tar:
        for name, data in (("000000001.png", png(3)), ("000000001.txt", b"again")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    items = outcomes(build_corpus("webdataset", {}, tmp_path))
    kept = [item.id for item in items if isinstance(item, Example)]
    assert kept == ["00000/000000001", "00000/x/2", "00001/000000001", "00001/x/2"]
    assert [(item.sample, item.code) for item in items if isinstance(item, Reject)] == [
        ("00001/000000001", "duplicate-id")
    ]


@pytest.mark.parametrize("kind", CORPORA)
def test_every_option_of_every_reader_is_documented(kind: str) -> None:
    assert CORPORA[kind].__doc__
    for name, option in CORPORA[kind].model_fields.items():
        assert option.description and len(option.description) > 15 and option.description.rstrip()[-1] == ".", name


SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]


def test_llava_rows_need_no_id_and_video_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    rows: list[dict[str, Any]] = [{}, {"id": None}, {"id": 7, "video": "a.mp4"}]
    content = [{**row, "conversations": SAID} for row in rows]
    (tmp_path / "llava_instruct_150k.json").write_text(json.dumps(content))
    first, second, third = outcomes(build_corpus("llava", {}, tmp_path))
    assert isinstance(first, Example) and isinstance(second, Example) and (first.id, second.id) == ("row-0", "row-1")
    assert isinstance(third, Reject) and third.code == "unsupported-media"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_captions_may_hold_their_images(suffix: str, tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": png(1), "path": "a.png"}, {"bytes": None, "path": "a.png"}, None]
    table = pa.table({"caption": ["one", "two", "three"], "image": pa.array(cells, kind), "plain": [png(2)] * 3})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "data.parquet")
    else:
        with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    options = {"data": f"data.{suffix}", "names": "bytes"}
    first, *others = outcomes(build_corpus("captions", options, tmp_path))
    assert isinstance(first, Example) and first.images[0].read() == png(1)
    assert [item.code for item in others if isinstance(item, Reject)] == ["missing-image"] * 2
    plain = outcomes(build_corpus("captions", {**options, "image_key": "plain"}, tmp_path))
    assert [image.read() for item in plain if isinstance(item, Example) for image in item.images] == [png(2)] * 3


def test_vsr_finds_its_images_in_both_coco_folders(tmp_path: Path) -> None:
    rows = []
    for number, folder in enumerate(("train2017", "val2017", "test2017")):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / f"{number}.jpg").write_bytes(png(number))
        link = f"http://images.cocodataset.org/{folder}/{number}.jpg"
        rows.append({"image": f"{number}.jpg", "image_link": link, "caption": "It is there.", "label": 1})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, val, other = outcomes(build_corpus("vsr", {}, tmp_path))
    assert [image.name for item in (train, val) if isinstance(item, Example) for image in item.images] == [
        "train2017/0.jpg",
        "val2017/1.jpg",
    ]
    assert isinstance(other, Reject) and other.code == "missing-image"
    (tmp_path / "images/val2017/1.jpg").unlink()
    [missing] = [item for item in outcomes(build_corpus("vsr", {}, tmp_path))[1:2] if isinstance(item, Reject)]
    assert missing.detail == "no file val2017/1.jpg in the image folder"


def test_nlvr_does_not_ask_for_images_of_groups_that_are_not_used(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "nlvr", tmp_path / "nlvr")
    shutil.rmtree(tmp_path / "nlvr/dev/images/2")
    wanted = [{"reject": "99-0", "code": "missing-image"}]
    for options in ({"groups": ["0"]}, {"exclude_groups": ["2"]}):
        items = [render(item) for item in outcomes(build_corpus("nlvr", options, tmp_path / "nlvr"))]
        missing = [item for item in items if item.get("code") == "missing-image"]
        assert missing == ([] if "groups" in options else wanted)  # 99-0 lies in folder 1


def test_nlvr_holds_out_presentations_that_share_nothing_with_the_others() -> None:
    def row(presentation: int, sentence: str, *colours: str) -> dict[str, Any]:
        boxes = [[{"color": colour}] for colour in colours]
        return {"identifier": f"{presentation}-0", "sentence": sentence, "structured_rep": boxes}

    dev = [row(n, f"Sentence {n % 150}.", "red", f"dev {n}") for n in range(200)]  # 50 share a sentence
    hidden = [row(n, f"Other {n}", f"dev {n + 100 if n < 60 else -n}", "red") for n in range(200)]  # 60 share a scene
    rows = [*(("dev", one) for one in dev), *(("hidden", one) for one in hidden)]
    sides = {split: held_out(rows, split, 0.3) for split in ("dev", "hidden")}
    assert sides == {split: held_out(reversed(rows), split, 0.3) for split in sides}, "the order does not matter"
    assert all(35 < len(side) < 85 for side in sides.values())
    for n in range(50):
        assert (str(n) in sides["dev"]) == (str(n + 150) in sides["dev"])
    for n in range(60):
        assert (str(n) in sides["hidden"]) == (str(n + 100) in sides["dev"])


@pytest.mark.skipif(
    "NLVR_DIR" not in os.environ, reason="set NLVR_DIR to the folder that holds NLVR's dev/ and hidden/"
)
def test_the_nlvr_recipe_holds_out_what_it_never_trains_on() -> None:
    recipe = load_recipe("nlvr")
    seen: dict[str, set[tuple[str, str]]] = {"train": set(), "held_out": set()}
    counts: Counter[str] = Counter()
    for config in recipe.corpora.values():
        corpus, part = build_corpus(config.type, config.options, recipe.root_dir), config.options.get("part", "train")
        used = {item.id.rpartition("-")[0] for item in outcomes(corpus) if isinstance(item, Example)}
        for line in (recipe.root_dir / config.options["sentences"]).read_text().splitlines():
            about = json.loads(line)
            if about["identifier"] in used:
                boxes = sorted(sorted(map(json.dumps, box)) for box in about["structured_rep"])
                seen[part] |= {("sentence", about["sentence"]), ("scene", json.dumps(boxes))}
                counts[part, config.options.get("task")] += 1
    assert not seen["train"] & seen["held_out"]
    assert counts["train", "verify"] + counts["held_out", "verify"] == 1974 and counts["held_out", "verify"] > 200


@pytest.mark.parametrize("kind", ["llava", "captions", "interleaved", "nlvr"])
def test_a_wrong_image_folder_is_one_error_before_anything_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "raw" / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "image": f"{n}.png", "url": f"https://example.org/{n}.png", "caption": "a", "conversations": SAID,
            "images": [f"https://example.org/{n}.png", None], "texts": [None, "a"], "identifier": f"{n}-0",
        }
        for n in range(1000)
    ]  # fmt: skip
    (tmp_path / "raw" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = {"llava": "conversations", "nlvr": "sentences"}.get(kind, "data")
    corpus = {"type": kind, key: "rows.jsonl", "images": "images"}
    pack = {"corpora": ["rows"], "template": "plain", "seq_len": 64, "epochs": 1}
    recipe = make_recipe(tmp_path, corpora={"rows": corpus}, packs={"p": pack}, max_bad_fraction=0.1)
    with pytest.raises(
        UserError, match=r"^corpora\.rows: none of the 150 probed images found under .*/raw, first: .*0"
    ) as caught:
        prepare(recipe)
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").rglob("*.rejects"))
    for n in (0, 500, 999):
        (tmp_path / "raw" / "images" / f"{n}.png").write_bytes(png(n))
    if kind != "nlvr":  # one image is enough to go on to the quarantine
        with pytest.raises(UserError, match=r"997 of 1000 samples .* missing-image"):
            prepare(recipe)
