"""``mma-prep rejects``: what was quarantined, with reasons, text and the images that can still be opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.show.rejects import EXAMPLES, read_rejects
from tests.data_prep.raw import make_recipe, png, prepare, write_llava, write_tar
from tests.data_prep.show.test_inspect_page import HOSTILE, Elements


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rejects")
    samples = {f"a/{key:09d}": (png(key), f"a caption about {key}") for key in range(60)}
    samples |= {f"a/{key:09d}": (png(key), " ") for key in range(60, 80)}
    samples["a/000000090"] = (b"<html>gone</html>", HOSTILE)
    samples["a/000000091"] = (png(91)[:40], "a broken picture")
    samples["a/000000092"] = (png(92), "much " * 300)
    write_tar(folder / "raw" / "captions" / "0.tar", samples)
    talks = [(f"t{n}", n, (f"<image>\nwhat is {n}?", f"it is {n}.")) for n in range(8)]
    write_llava(folder / "raw", [*talks, ("silent", 9, ("<image>\nwhat is it?",)), ("long", 7, ("what? " * 99, "it."))])
    (folder / "raw" / "images" / "3.png").unlink()
    prepare(make_recipe(folder, max_bad_fraction=0.5))
    return folder / "out"


def test_every_rejected_sample_is_counted_by_corpus_and_reason(out: Path) -> None:
    counts = {(group.corpus, group.code): group.count for group in read_rejects(out)}
    lines = (out / "rejects.jsonl").read_text().splitlines()
    assert sum(counts.values()) == len(lines)
    assert counts["captions", "empty-text"] == 20 * 2, "both pack sets write it in their own way"
    assert {code for corpus, code in counts if corpus == "talk"} == {"missing-image", "no-answer", "too-long"}


def test_examples_are_few_and_tell_what_was_found(out: Path) -> None:
    groups = {(group.corpus, group.code): [item for _, item in group.examples] for group in read_rejects(out)}
    assert len(groups["captions", "empty-text"]) == EXAMPLES
    assert {item.raw for item in groups["captions", "not-an-image"]} == {
        f"assistant: {HOSTILE}",
        "assistant: a broken picture",
    }
    assert not any(item.picture() for item in groups["captions", "not-an-image"])
    assert all(item.picture() for item in groups["captions", "too-long"] + groups["captions", "empty-text"])
    assert '"what is it?"' in groups["talk", "no-answer"][0].raw.replace("<image>\\n", "")
    long = groups["talk", "too-long"][0]
    assert long.raw.startswith("user: what? what?") and len(long.raw) <= 400 and long.picture()


def test_the_page_shows_images_that_open_and_escapes_everything(out: Path, tmp_path: Path) -> None:
    assert main(["rejects", str(out), "--html", str(tmp_path / "r.html")]) == 0
    found = Elements((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert HOSTILE in found.text and len(found.all("script")) == 1 and not found.all("img", "onerror")
    opened = sum(item.picture() is not None for group in read_rejects(out) for _, item in group.examples)
    assert len(found.all("img")) == opened > EXAMPLES
    assert "the bytes are in no supported image format" in found.text


def test_the_terminal_shows_reasons_and_examples(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rejects", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "captions: empty-text" in shown and HOSTILE in shown and "not-an-image" in shown


@pytest.mark.parametrize(("line", "message"), [(None, "no rejects.jsonl here"), ("{", "line 1 is damaged")])
def test_what_is_no_list_is_refused(
    line: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if line is not None:
        (tmp_path / "rejects.jsonl").write_text(line)
    assert main(["rejects", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_list_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rejects.jsonl").write_text("")
    assert main(["rejects", str(tmp_path)]) == 0
    assert "nothing was rejected" in " ".join(capsys.readouterr().out.split())
