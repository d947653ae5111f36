"""``mma-prep init``: a user's own data, from files to verified packs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.cli import main
from data_prep.corpora import build_corpus
from data_prep.example import Example
from data_prep.packs import PackReader
from data_prep.recipe import load_recipe
from tests.data_prep.init.own_data import (
    LAYOUTS,
    ROWS,
    caption_lines,
    captioned_folder,
    llava,
    parquet,
    pictures,
    question_lines,
    saved,
    sharegpt,
    write_lines,
)
from tests.data_prep.raw import png
from tests.data_prep.text.test_chat_template import CHATML, GEMMA, GEMMA3, tokenizer


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(recipe: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(recipe).read_text())
    return content


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_data_becomes_verified_packs_in_three_commands(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, kind, samples = LAYOUTS[layout]
    place = write(tmp_path / "raw")
    assert main(["init", str(place), "--recipe", f"{layout}.yaml", "--image-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count("  sample ") >= 3 and f"(type {kind})" in said and f"wrote {layout}.yaml" in said
    assert main(["run", f"{layout}.yaml", "--workers", "1"]) == 0
    assert main(["verify", f"prepared/{layout}"]) == 0
    recipe = load_recipe(f"{layout}.yaml")
    name = next(name for name in recipe.packs if name != "eval")
    reader = PackReader(Path(f"prepared/{layout}/packs") / name)
    assert sum(len(row.source) for row in reader) == samples
    assert all(corpus.type == kind for corpus in recipe.corpora.values())
    rejected = Path(f"prepared/{layout}/rejects.jsonl").read_text()
    assert not rejected, "every row is used"


def test_the_recipe_is_commented_and_relative_to_the_working_folder(tmp_path: Path) -> None:
    question_lines(tmp_path / "raw")
    assert main(["init", "raw/questions.jsonl", "--image-tokens", "4"]) == 0
    text = Path("questions.yaml").read_text()
    assert text.startswith("# Written by `mma-prep init raw/questions.jsonl`.") and text.count("#") >= 6
    assert read("questions.yaml") == {
        "root": "raw",
        "out": "prepared/questions",
        "tokenizer": {"train": {"vocab_size": 1024}},
        "image_tokens": 4,
        "max_bad_fraction": 0.02,
        "corpora": {
            "questions": {
                "type": "table",
                "data": "questions.jsonl",
                "images": "img",
                "image_column": "image",
                "question_column": "question",
                "answer_column": "answer",
            }
        },
        "packs": {"sft": {"corpora": ["questions"], "template": "plain", "seq_len": 256, "epochs": 1}},
    }


def test_a_recipe_is_never_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(parquet(tmp_path / "raw"))
    Path("mine.yaml").write_text("precious")
    assert main(["init", place, "--recipe", "mine.yaml"]) == 2
    assert "mine.yaml: exists already; overwrite it with --force" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "precious" and sorted(path.name for path in Path().iterdir()) == [
        "mine.yaml",
        "raw",
    ]
    assert main(["init", place, "--recipe", "mine.yaml", "--force"]) == 0
    assert read("mine.yaml")["root"] == "raw"


def test_a_held_out_share_splits_by_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "raw" / "img")
    rows = [{"image": f"{n % ROWS}.png", "question": f"how many {n}?", "answer": "2"} for n in range(4 * ROWS)]
    write_lines(tmp_path / "raw" / "q.jsonl", rows)
    assert main(["init", "raw/q.jsonl", "--held-out", "25%", "--image-tokens", "4"]) == 0
    recipe = load_recipe("q.yaml")
    assert recipe.packs["sft"].corpora == {"q": 1.0} and recipe.packs["eval"].corpora == {"q_held_out": 1.0}
    parts = []
    for name in ("q", "q_held_out"):
        corpus = build_corpus(recipe.corpora[name].type, recipe.corpora[name].options, recipe.root_dir)
        found = [item for shard in corpus.shards() for item in corpus.examples(shard)]
        parts.append({(item.id, item.images[0].name) for item in found if isinstance(item, Example)})
    assert len(parts[0]) + len(parts[1]) == 4 * ROWS and parts[1]
    assert not {image for _, image in parts[0]} & {image for _, image in parts[1]}, "no image is on both sides"
    assert main(["run", "q.yaml", "--workers", "1"]) == 0
    assert main(["init", "raw/q.jsonl", "--held-out", "0.0001", "--force"]) == 2
    assert "q_held_out would hold no sample: choose another share" in capsys.readouterr().err


@pytest.mark.parametrize(("source", "template"), [(CHATML, "tokenizer"), (GEMMA3, "tokenizer"), (None, "plain")])
def test_a_given_tokenizer_is_used_with_its_chat_template(source: str | None, template: str, tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "tok", source, bos="<bos>")
    place = str(llava(tmp_path / "raw"))
    assert main(["init", place, "--tokenizer", str(folder), "--recipe", "own.yaml", "--image-tokens", "4"]) == 0
    content = read("own.yaml")
    assert content["tokenizer"] == str(folder) and content["packs"]["sft"]["template"] == template
    out = str(tmp_path / "out")  # readers of one process remember files by their paths
    assert main(["run", "own.yaml", "--workers", "1", "--out", out]) == 0


def test_samples_that_a_template_cannot_write_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tokenizer(tmp_path / "tok", GEMMA, bos="<bos>")
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    ruled = [{"role": "system", "content": "be kind"}, *said]
    write_lines(tmp_path / "raw" / "talk.jsonl", [{"messages": said}] * 3 + [{"messages": ruled}])
    assert main(["init", "raw/talk.jsonl", "--tokenizer", str(folder)]) == 0
    assert "cannot write 1 of 4 samples; row-3: wrong-template: template 'tokenizer' has no system" in (
        capsys.readouterr().out
    )
    write_lines(tmp_path / "raw" / "talk.jsonl", [{"messages": ruled}])
    assert main(["init", "raw/talk.jsonl", "--tokenizer", str(folder), "--force"]) == 2
    assert "no sample can be written with the template tokenizer, row-0: wrong-template" in capsys.readouterr().err


def test_several_inputs_become_one_recipe(tmp_path: Path) -> None:
    for write in (llava, caption_lines, saved):
        write(tmp_path / write.__name__)
    inputs = ["llava", "caption_lines/metadata.jsonl", "saved/saved"]
    assert main(["init", *inputs, "--recipe", "all.yaml", "--image-tokens", "4"]) == 0
    recipe = load_recipe("all.yaml")
    assert {name: corpus.type for name, corpus in recipe.corpora.items()} == {
        "llava": "llava",
        "metadata": "table",
        "saved": "chat",
    }
    assert recipe.root == "." and list(recipe.packs) == ["sft"]
    assert main(["run", "all.yaml", "--workers", "1"]) == 0


AMBIGUOUS = {"image": "0.png", "question": "q", "prompt": "p", "answer": "a", "response": "r", "text": "t"}


@pytest.mark.parametrize(
    ("flags", "notes", "options"),
    [
        (
            [],
            [
                "the question is 'question'; 'prompt' would be possible too (--question-column)",
                "the answer is 'answer'; 'response' would be possible too (--answer-column)",
                "'text' may be a caption, it is not used (--caption-column)",
            ],
            {"question_column": "question", "answer_column": "answer"},
        ),
        (["--answer-column", "response"], [], {"question_column": "question", "answer_column": "response"}),
        (["--caption-column", "text"], [], {"question_column": None, "answer_column": "text"}),
    ],
)
def test_what_is_ambiguous_is_said_with_the_flag_that_decides_it(
    flags: list[str], notes: list[str], options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "raw")
    write_lines(tmp_path / "raw" / "rows.jsonl", [AMBIGUOUS] * 5)
    assert main(["init", "raw/rows.jsonl", *flags, "--image-tokens", "4"]) == 0
    said = capsys.readouterr().out
    for note in notes:
        assert note in said
    for flag in flags[::2]:
        assert flag not in said, "it is decided"
    assert options.items() <= read("rows.yaml")["corpora"]["rows"].items()


def test_unknown_roles_are_guessed_aloud_and_decided_by_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"role": "human", "content": "hi"}, {"role": "model", "content": "yes"}]
    write_lines(tmp_path / "raw" / "talk.jsonl", [{"messages": said}] * 4)
    assert main(["init", "raw/talk.jsonl"]) == 0
    assert "the role 'model' is taken for assistant (--role model=user|assistant|system)" in capsys.readouterr().out
    assert read("talk.yaml")["corpora"]["talk"]["roles"] == {"human": "user", "model": "assistant"}
    said[1]["role"] = "Narrator"
    write_lines(tmp_path / "raw" / "talk.jsonl", [{"messages": said}] * 4)
    assert main(["init", "raw/talk.jsonl", "--force"]) == 2
    assert "all of its first 4 samples are rejected, row-0: bad-label" in capsys.readouterr().err
    assert main(["init", "raw/talk.jsonl", "--force", "--role", "Narrator=assistant"]) == 0


def test_rows_with_several_images_and_no_marker_put_images_first(tmp_path: Path) -> None:
    pictures(tmp_path / "raw")
    said = [{"from": "human", "value": "compare"}, {"from": "gpt", "value": "same"}]
    write_lines(tmp_path / "raw" / "two.jsonl", [{"conversations": said, "images": ["0.png", "1.png"]}] * 4)
    assert main(["init", "raw/two.jsonl", "--image-tokens", "4"]) == 0
    assert read("two.yaml")["corpora"]["two"]["unmarked"] == "first"


def test_unusable_samples_are_counted_and_the_recipe_still_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = captioned_folder(tmp_path / "raw")
    (folder / "sub" / "1.txt").unlink()
    (folder / "sub" / "2.png").write_bytes(png(2)[:40])
    assert main(["init", str(folder), "--image-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert (
        "samples looked at: 24, rejected: 2; the first: sub/1.png: missing-key (no caption file 1.txt or .json)" in said
    )
    assert re.search(r": 1 x [a-z-]+, 1 x [a-z-]+: max_bad_fraction is raised to 0.13", said)
    assert main(["run", "pics.yaml", "--workers", "1"]) == 0


def test_names_that_are_patterns_are_taken_literally(tmp_path: Path) -> None:
    place = sharegpt(tmp_path / "raw [v1]")
    place.rename(place.with_name("a[1]*.jsonl"))
    assert main(["init", str(place.with_name("a[1]*.jsonl")), "--recipe", "literal.yaml", "--image-tokens", "4"]) == 0
    assert main(["run", "literal.yaml", "--workers", "1"]) == 0


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("files", "place", "message"),
    [
        ({}, "nothing", "nothing: does not exist"),
        ({"raw/a.csv": b"a,b"}, "raw/a.csv", r"a\.csv: not a format that is read: \.jsonl, \.json"),
        ({"raw/a.csv": b"a,b"}, "raw", "raw: no data"),
        ({"raw/a.png": png(1)}, "raw", r"1 images without caption files \(a\.jpg needs a\.txt or a\.json\)"),
        ({"raw/a.png": png(1)}, "raw/a.png", "one image: give its folder"),
        ({"raw/a.jsonl": b'{"x": 1, "y": 2}\n'}, "raw", r"among its columns \(x, y\): name them \(--image-column"),
        (
            {"raw/a.json": b'{"questions": []}'},
            "raw",
            "found a single object; .*formats have readers .*: mma-prep types",
        ),
        ({"raw/a.jsonl": b"[1]\n[2]\n"}, "raw", "is an object with keys|is this the right file"),
        ({"raw/a.jsonl": b""}, "raw", "none of its first 50 rows is an object"),
        ({"raw/a.parquet": b"PAR1"}, "raw", "not a Parquet file"),
        (
            {"raw/a.jsonl": b'{"image": "gone.png", "caption": "c"}\n'},
            "raw",
            r"no image file gone\.png near .*: name the folder of the images with --images",
        ),
        (
            {"raw/a.jsonl": b'{"image": "/data/a.png", "caption": "c"}\n'},
            "raw",
            r"/data/a\.png has an absolute path; readers stay below one folder",
        ),
        (
            {"raw/a.jsonl": b'{"image": "http://x/a.png", "caption": "c"}\n'},
            "raw",
            "all of its first 1 samples are rejected, row-0: missing-image .*http: URL; download it",
        ),
        ({"raw/state.json": b"{"}, "raw", r"state\.json: damaged"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_the_reason(
    files: dict[str, bytes], place: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        _write(Path(name), content)
    assert main(["init", place]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
    assert not list(Path().glob("*.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held-out", "2"], "'2' is not a share between 0 and 1, such as 5%"),
        (["--role", "a=b"], "give NAME=ROLE with a role of system, user, assistant"),
        (["--images", "gone"], "--images gone: not a folder"),
        (["--tokenizer", "gone"], "--tokenizer gone: does not exist"),
        (["--answer-column", "gone"], "--answer-column gone: it has the columns image, question, answer"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(parquet(tmp_path / "raw"))
    try:
        code = main(["init", place, *flags])
    except SystemExit as error:
        code = int(str(error.code))
    said = capsys.readouterr().err
    assert code == 2 and message in said and said.count("\n") == 1


def test_control_characters_of_samples_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "raw")
    write_lines(tmp_path / "raw" / "a.jsonl", [{"image": "1.png", "caption": "a\x1b[31m red \x07 ring"}] * 3)
    assert main(["init", "raw/a.jsonl", "--image-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "red" in said
    assert json.dumps(said)
