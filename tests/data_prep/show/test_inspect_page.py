"""The page of ``inspect --html``: everything of a corpus is text there, whatever it spells."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from data_prep.show.inspect import chosen_rows
from data_prep.show.web_page import Html, el, join
from pipeline.cli import main as mma
from tests.data_prep.raw import make_recipe, png, prepare, recipe_dict, write_llava, write_tar

HOSTILE = '<script>alert(1)</script> & <img src=x onerror=alert(2)> "quoted" </span></section> \'<!--'

TALKS = [(f"<b>talk{n}</b>[/x]", n, (f"<image>\nwhat is {n}?", f"it is \x1b[2J{n}.")) for n in range(30)]


class Elements(HTMLParser):
    """Names and attributes of all elements, and all text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.text += data

    def all(self, tag: str, key: str = "") -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag and (not key or key in attributes)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    captions = {f"{key:09d}": (png(key), HOSTILE if key == 3 else f"caption number {key}") for key in range(40)}
    write_tar(folder / "raw" / "captions" / "0.tar", captions)
    write_llava(folder / "raw", TALKS)
    packs = recipe_dict(folder, folder)["packs"]
    packs["sft"] |= {"corpora": ["talk", "captions"], "draws": None, "epochs": 1, "seq_len": 512}
    prepare(make_recipe(folder, packs={"sft": packs["sft"]}))
    return folder / "out" / "packs" / "sft"


@pytest.fixture(scope="module")
def page(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Elements:
    out = tmp_path_factory.mktemp("html") / "rows.html"
    assert main(["inspect", str(made), "--html", str(out)]) == 0
    return Elements(out.read_text(encoding="utf-8"))


def test_a_corpus_cannot_write_markup(page: Elements) -> None:
    assert HOSTILE in page.text and "<b>talk7</b>" in page.text
    assert len(page.all("script")) == 1 and not page.all("img", "onerror")
    known = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "script",
        "h1",
        "h2",
        "p",
        "div",
        "b",
        "i",
        "span",
        "nav",
    }
    known |= {"table", "tr", "th", "td", "svg", "rect", "text", "button", "label", "input", "select", "option"}
    assert {name for name, _ in page.found} <= known | {"section", "figure", "figcaption", "img"}


def test_the_page_needs_nothing_from_outside_and_lets_nothing_else_run(page: Elements) -> None:
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not any(key in attributes for _, attributes in page.found for key in ("href", "onclick", "onload"))
    [policy] = [meta["content"] for meta in page.all("meta", "content") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:") and "script-src 'sha256-" in policy
    assert "http" not in page.text


def test_the_page_holds_rows_samples_labels_and_images(page: Elements, made: Path) -> None:
    reader = PackReader(made)
    assert [section["data-row"] for section in page.all("section")] == [str(n) for n in range(len(reader))]
    sources = [source for row in reader for source in row.source]
    assert [one["data-corpus"] for one in page.all("div", "data-corpus")] == [source.dataset for source in sources]
    text = " ".join(page.text.split())
    for row in reader:
        lengths = np.bincount(row.segment)[1:]
        for segment, source in enumerate(row.source, start=1):
            supervised = int(row.generated[row.segment == segment][1:].sum())
            counted = f"{lengths[segment - 1]} tokens, {supervised} supervised"
            assert f"{source.dataset} sample {source.sample}, draw {source.draw}; {counted}" in text
    assert len(page.all("img")) == sum(len(row.image_row) for row in reader) and "8x6 px" in text
    assert f"{len(reader)} of {len(reader)} rows on this page" in text


def test_what_is_generated_is_marked(page: Elements, made: Path) -> None:
    [generated] = {one["class"] for one in page.all("span") if one.get("class") == "generated"}
    assert generated and len([one for one in page.all("span") if one.get("class") == "generated"]) == 70
    assert any(one.get("class") == "generated special" for one in page.all("span"))


@pytest.mark.parametrize(
    ("text", "rows"),
    [("3", range(3, 4)), ("2:5", range(2, 5)), (":2", range(2)), ("8:", range(8, 10)), (":", range(10))],
)
def test_rows_are_chosen_as_python_slices(text: str, rows: range) -> None:
    assert chosen_rows(text, 10) == rows


@pytest.mark.parametrize("text", ["10", "-1", "5:5", "3:11", "x", "1:2:3"])
def test_rows_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--rows? {re.escape(text)}: "):
        chosen_rows(text, 10)


def test_elements_escape_what_is_not_markup() -> None:
    assert el("p", "a<b", el("i", "&"), title='"x"') == '<p title="&quot;x&quot;">a&lt;b<i>&amp;</i></p>'
    assert join(["<", Html("<br>")]) == "&lt;<br>"


def test_masks_are_drawn_by_whoever_knows_them(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mma(["inspect", str(made), "--rows", "0:2", "--html", str(tmp_path / "a.html")]) == 0
    assert "2 of " in capsys.readouterr().out
    found = Elements((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert [image["alt"] for image in found.all("img") if image["alt"].startswith("mask")] == [
        "mask of row 0",
        "mask of row 1",
    ]
    assert mma(["inspect", str(made), "--rows", "9999", "--html", str(tmp_path / "b.html")]) == 2
    assert "the folder holds rows 0 to" in capsys.readouterr().err and not (tmp_path / "b.html").exists()


def test_data_preparation_knows_no_mask() -> None:
    import data_prep

    sources = [path.read_text() for path in Path(data_prep.__file__).parent.rglob("*.py")]
    found = [line for text in sources for line in re.findall(r"^ *(?:from|import) (?:pipeline|torch).*", text, re.M)]
    assert not found, "the page takes the drawing of masks as an argument"


def test_the_terminal_shows_what_a_sample_spells_and_obeys_none_of_it(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(made), "--rows", f"0:{PackReader(made).manifest.rows}"]) == 0
    shown = capsys.readouterr().out
    assert "</b>[/x]" in shown and "\ufffd[2J" in shown and "\x1b" not in shown
