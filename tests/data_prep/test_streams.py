"""Every command of ``mma-prep``, with every odd stdout and odd value: success or one line, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.cli import main
from tests.data_prep.raw import png, recipe_dict, write_recipe, write_tar, write_world

MARKUP = "[/red] [bold]loud :smile: \x1b[31m caf\u00e9 \u202eevil"
COMMANDS = {
    "help": "--help",
    "help of a command": "run --help",
    "unknown command": "runn",
    "run": "run {recipe} --workers 1",
    "ingest": "ingest {recipe} --workers 1",
    "share of ingest": "ingest {recipe} --workers 1 --shard 0/2",
    "plan": "plan {recipe}",
    "row lengths": "plan {recipe} --suggest-seq-len",
    "materialize": "materialize {recipe} --workers 1",
    "verify": "verify {out}",
    "stats": "stats {out}",
    "inspect": "inspect {out}/packs/pt --rows 0:2",
    "page": "inspect {out}/packs/pt --html {tmp}/rows.html",
    "rejects": "rejects {out}",
    "page of rejects": "rejects {out} --html {tmp}/rejects.html",
    "user error": "stats {tmp}",
    "demo": "demo {tmp}/demo --scenes 0",
    "types": "types",
    "one type": "types llava",
    "init": "init {out}/../raw/llava.json --recipe {tmp}/own.yaml --force",
}
STREAMS = ("ascii", "closed", "full", "head")
FORKING = """
import io, json, os, sys
import data_prep.cli, data_prep.materialize, data_prep.steps, data_prep.demo.packs
import data_prep.show.inspect, data_prep.show.page, data_prep.show.rejects, data_prep.show.stats, data_prep.verify

def redirect(stream):
    if stream == "ascii":
        sys.stdout = io.TextIOWrapper(open(os.dup(1), "wb"), encoding="ascii")
    elif stream == "closed":
        sys.stdout = None
        os.close(1)
    elif stream == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

os.fsync = lambda descriptor: None
for stream, words, errors in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:  # goes on to the end of the interpreter, which flushes what is left
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o666), 2)
        redirect(stream)
        sys.exit(data_prep.cli.main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams") / "[bold]odd caf\u00e9"
    write_world(folder / "raw", tars=1, captions=5, talks=5)
    dirt = {"[/b]broken": (b"<html>", MARKUP), "good": (png(1), MARKUP), "[red]empty": (png(2), "")}
    write_tar(folder / "raw" / "captions" / "dirt.tar", dirt)
    content = recipe_dict(folder / "raw", folder / "out") | {"max_bad_fraction": 0.5}
    write_recipe(folder / "recipe.yaml", content)
    assert main(["run", str(folder / "recipe.yaml"), "--workers", "1"]) == 0
    return folder


def words_of(command: str, made: Path, tmp: Path) -> list[str]:
    places = {"recipe": made / "recipe.yaml", "out": made / "out", "tmp": tmp}
    return [word.format(**places) for word in command.split()]


def test_every_command_survives_every_stdout(made: Path, tmp_path: Path) -> None:
    cases = [
        (stream, name)
        for stream in STREAMS
        for name, command in COMMANDS.items()
        if stream in ("closed", "full") or "{recipe}" not in command  # these print alike, and take long
    ]
    jobs = [
        (stream, words_of(COMMANDS[name], made, tmp_path), str(tmp_path / f"{number}.err"))
        for number, (stream, name) in enumerate(cases)
    ]
    run = subprocess.run(
        [sys.executable, "-c", FORKING, json.dumps(jobs)], capture_output=True, text=True, timeout=300, check=True
    )
    codes = [int(line) for line in run.stderr.split()]
    for number, ((stream, name), code) in enumerate(zip(cases, codes, strict=True)):
        errors = (tmp_path / f"{number}.err").read_text()
        case = f"{name} > {stream}: exit {code}, {errors}"
        fails = name in ("unknown command", "user error", "demo")
        either = stream == "full" or (name == "demo" and stream == "head")  # it prints a line before it fails
        assert code in ((0, 2) if either else (2,) if fails else (0,)), case
        assert "Traceback" not in errors and "Exception ignored" not in errors, case
        assert errors.count("\n") == (code == 2), case
        assert stream != "full" or fails or "No space left on device" in errors, case
    assert (tmp_path / "rows.html").is_file() and (tmp_path / "rejects.html").is_file()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("stats {out} | head -1", 0),
        ("inspect {out}/packs/pt --rows 0:2 | head -1", 0),
        ("--help > /dev/full", 2),
        ("rejects {out} >&-", 0),
        ("rejects {out} >&- 2>&-", 0),
    ],
)
def test_a_real_shell_sees_the_same(made: Path, tmp_path: Path, line: str, code: int) -> None:
    command = line.format(out=f"'{made / 'out'}'", tmp=f"'{tmp_path}'")
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m data_prep {command}"],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr
    assert run.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{out}/packs/pt", "--html", ""],
        ["inspect", "{out}/packs/pt", "--html", "/"],
        ["inspect", "{out}/packs/pt", "--html", "."],
        ["inspect", "{out}/packs/pt", "--html", "/dev/null"],
        ["inspect", "{out}/packs/pt", "--html", "x" * 5000],
        ["inspect", "{out}/packs/pt", "--html", "{tmp}"],
        ["inspect", "{out}/packs/pt", "--html", "{recipe}/rows.html"],
        ["inspect", "{out}/packs/pt", "--html", "/dev/null/rows.html"],
        ["inspect", "{out}/packs/pt", "--row", ""],
        ["inspect", "{out}/packs/pt", "--row", "-1"],
        ["inspect", "{out}/packs/pt", "--row", "9" * 5000],
        ["inspect", "{out}/packs/pt", "--rows", "::"],
        ["inspect", ""],
        ["inspect", "/"],
        ["inspect", "/dev/null"],
        ["stats", ""],
        ["stats", "{out}", ""],
        ["stats", "{out}", "--json", "/"],
        ["stats", "{out}", "--device", "."],
        ["verify", " "],
        ["verify", "x" * 5000],
        ["rejects", "{out}", "--html", ""],
        ["rejects", "{out}", "--html", "/"],
        ["rejects", "/dev"],
        ["ingest", "{recipe}", "--shard", ""],
        ["ingest", "{recipe}", "--shard", "/"],
        ["ingest", "{recipe}", "--shard", "9" * 5000 + "/1"],
        ["ingest", "{recipe}", "--workers", "-1"],
        ["ingest", "{recipe}", "--workers", "9" * 5000],
        ["ingest", "{recipe}", "--strict", "nothing"],
        ["ingest", "{recipe}", "--out", ""],
        ["ingest", "{recipe}", "--root", ""],
        ["ingest", "{recipe}", "--out", "/dev/null"],
        ["ingest", ""],
        ["ingest", "/"],
        ["ingest", "\udcff"],
        ["demo", ""],
        ["types", "nothing"],
        ["init", ""],
        ["init", "/dev/zero"],
        ["init", "{tmp}/nothing"],
        ["init", "{recipe}", "--recipe", "/"],
        ["init", "{recipe}", "--held-out", "nan"],
        ["demo", "/dev/null"],
        ["demo", "{tmp}/d", "--scenes", "9" * 5000],
        ["demo", "{tmp}/d", "--seed", "x"],
        [""],
        ["\udcff"],
    ],
    ids=lambda words: " ".join(word[:20] for word in words).encode("ascii", "replace").decode(),
)
def test_an_odd_value_is_one_short_line(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: Sequence[str]
) -> None:
    places = {"recipe": made / "recipe.yaml", "out": made / "out", "tmp": tmp_path}
    try:
        code = main([word.format(**places) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    errors = capfd.readouterr().err
    if words[1:] == ["{out}/packs/pt", "--row", ""]:
        assert code == 0
        return
    lines = [line for line in errors.splitlines() if not line.startswith("  - ")]  # all problems of a recipe, listed
    assert code == 2 and errors.startswith("mma-prep: ") and len(lines) == 1 and "Traceback" not in errors
    assert len(errors) < 1500
    assert list(tmp_path.rglob(".*.tmp")) == []


def test_text_of_corpora_is_never_markup(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rejects", str(made / "out")]) == 0
    shown = capsys.readouterr().out
    assert "[/b]broken" in shown and "[red]empty" in shown and "[/red] [bold]loud :smile:" in shown
    assert "\x1b" not in shown and "\u202e" not in shown
    assert main(["stats", str(made / "out")]) == 0
    assert "[bold]odd caf\u00e9" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    "line",
    [b"\xff\n", b"[" * 100_000 + b"\n", b"7\n", b'{"corpus": 1}\n', b'{"corpus": "a"}\n', b"9" * 5000 + b"\n",
     b'{"corpus": "a", "shard": "b", "sample": "c", "code": "d", "detail": "e", "more": "f"}\n'],
)  # fmt: skip
def test_a_damaged_list_of_rejects_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes) -> None:
    (tmp_path / "rejects.jsonl").write_bytes(line)
    assert main(["rejects", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "rejects.jsonl: line 1 is damaged" in errors and errors.count("\n") == 1 and len(errors) < 500


def test_a_foreign_list_of_rejects_opens_no_device_and_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = ["/dev/zero", str(tmp_path / "pipe"), str(tmp_path), "a\x00b", "x" * 9999]
    item = {"corpus": "a", "shard": "b", "sample": MARKUP, "code": "[/x]", "detail": MARKUP, "member": ""}
    lines = [json.dumps({**item, "image": place}) for place in places]
    (tmp_path / "rejects.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["rejects", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert main(["rejects", str(tmp_path)]) == 0


def test_an_empty_page_of_rejects_says_that_nothing_was_rejected(tmp_path: Path) -> None:
    (tmp_path / "rejects.jsonl").write_text("")
    assert main(["rejects", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Nothing was rejected" in page and "<table>" not in page
