"""``mma-prep`` as users call it: what it prints, what it refuses, and that it never shows a traceback unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.common.errors import UserError
from data_prep.common.workers import form_team
from data_prep.demo.packs import Demo, ensure_demo
from data_prep.ingest.workspace import lock_of
from data_prep.packs import PackReader
from tests.data_prep.raw import recipe_dict, write_recipe, write_world


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_world(folder / "raw")
    write_recipe(folder / "recipe.yaml", recipe_dict(folder / "raw", folder / "out"))
    assert main(["run", str(folder / "recipe.yaml"), "--workers", "1"]) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run nlvrr", "recipe 'nlvrr' is neither a file nor a shipped name (did you mean 'nlvr'?)"),
        ("run {recipe} --workers 0", "--workers 0: give 1 or more"),
        ("ingest {recipe} --shard 2/2", "--shard 2/2: give i/n with 0 <= i < n"),
        ("ingest {recipe} --shard 1", "--shard 1: give i/n"),
        ("run {recipe} --root {tmp}/nowhere --out {tmp}/o", "nowhere does not exist; the raw data must be there"),
        ("plan {recipe} --out {tmp}/empty", "nothing is ingested yet: run `mma-prep ingest` with this recipe"),
        ("plan {recipe} --out {tmp}/empty --root {tmp}/nowhere", "nowhere does not exist; the raw data must be there"),
        ("materialize {recipe} --out {tmp}/empty", "nothing is ingested yet: run `mma-prep ingest` with this recipe"),
        ("verify {tmp}", "neither a pack folder nor an output folder of mma-prep"),
        ("stats {tmp}/nothing", "neither a pack folder nor an output folder of mma-prep"),
        ("inspect {out}", "several pack folders here: give one of"),
        ("inspect {out}/packs/pt --row 999", "--row 999: "),
        ("demo {tmp}/demo --scenes 0", "scenes=0"),
        ("run {recipe} --out {recipe}/out", "Not a directory"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    places = {"recipe": made / "recipe.yaml", "out": made / "out", "tmp": tmp_path}
    assert main(words.format(**places).split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mma-prep: ") and message in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_inspect_shows_given_and_generated_text_images_and_sources(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(made / "out" / "packs" / "eval"), "--row", "0"]) == 0
    shown = capsys.readouterr().out
    for part in ("row 0 of", "talk", "8x6 px, 4 of 4 tokens", "<user>", "<assistant>it is 1.<end>"):
        assert part in " ".join(shown.split()), part


def test_stats_and_verify_cover_every_pack_set(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(made / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    manifest = PackReader(made / "out" / "packs" / "pt").manifest
    assert (
        f"{manifest.rows} rows of 64 tokens" in shown
        and "lengths of packed samples in tokens (log scale)" in shown
        and "captions" in shown
    )
    assert main(["verify", str(made / "out")]) == 0
    assert capsys.readouterr().out.count(": ok, ") == 5


def test_every_step_is_a_command_of_its_own(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = str(made / "recipe.yaml"), str(tmp_path / "out")
    for share in ("0/2", "1/2"):
        assert main(["ingest", recipe, "--out", out, "--shard", share, "--workers", "1"]) == 0
    assert main(["plan", recipe, "--out", out]) == 0
    assert "epochs: captions 2.00" in capsys.readouterr().out
    assert main(["materialize", recipe, "--out", out, "--workers", "1"]) == 0
    same = [PackReader(folder / "packs" / "sft").manifest for folder in (tmp_path / "out", made / "out")]
    assert same[0] == same[1]


def test_the_demo_recipe_leads_to_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "demo"]) == 2
    assert "run `mma-prep demo data/demo`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["run", "ingest", "plan", "plan --suggest-seq-len", "materialize"])
def test_one_writer_at_a_time_but_shares_of_a_step_together(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr("data_prep.common.folder_lock.HERE_S", 0.1)
    lock, command = lock_of(made / "out"), [*step.split(), str(made / "recipe.yaml"), "--workers", "1"]
    with lock.hold(print, shared=step == "ingest"):
        assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{made / 'out'} is being written by another mma-prep (process " in said and said.count("\n") == 1
    with lock.hold(print, shared=True):
        assert step not in ("ingest", "materialize") or main([*command, "--shard", "0/2"]) == 0


def test_help_teaches_and_loads_no_heavy_library() -> None:
    shown = subprocess.run([sys.executable, "-m", "data_prep", "--help"], capture_output=True, text=True, check=True)
    for part in ("mma-prep demo", "mpiexec -n", "--shard", "ingest", "materialize", "verify", "stats", "inspect"):
        assert part in shown.stdout
    code = "import sys, data_prep.cli; assert not {'torch', 'numpy', 'pyarrow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mpiexec_without_an_mpi_library_falls_back_to_processes_on_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_RANK", "0")
    team = form_team(2, None, said.append)
    assert team is not None and team.description == "2 processes"
    assert "MPI cannot be loaded" in said[0]
    monkeypatch.setenv("PMI_RANK", "1")
    assert form_team(2, None, said.append) is None and len(said) == 1


@pytest.mark.slow
def test_the_demo_is_made_once_also_when_two_ask_at_the_same_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    call = (
        "import sys, pathlib; from data_prep.demo.packs import Demo, ensure_demo; "
        "ensure_demo(pathlib.Path(sys.argv[1]), Demo(scenes=300, held_out=20))"
    )
    asking = [
        subprocess.Popen([sys.executable, "-c", call, str(out)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = "".join(process.communicate(timeout=120)[0] for process in asking)
    assert [process.returncode for process in asking] == [0, 0]
    assert said.count("demo: drawing 300 scenes") == 1
    assert len(PackReader(out / "packs" / "eval"))

    words = ["demo", str(out), "--scenes", "300", "--held-out", "20"]
    for held_out, code, part in (
        ("20", 0, "is complete"),
        ("21", 2, "already holds the world"),
        ("20", 0, "is complete"),
    ):
        assert main([*words[:-1], held_out]) == code
        assert part in "".join(capsys.readouterr())
        ensure_demo(out)
    for lost in (out / "packs" / "eval" / "rows-00000.arrow", next(out.glob("images/*/images-00000.arrow"))):
        whole = lost.read_bytes()
        lost.unlink()
        assert main(words) == 0 and lost.read_bytes() == whole


def test_a_rank_beside_another_prepares_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with pytest.raises(UserError, match="could not be prepared"):
            ensure_demo(tmp_path / "demo", Demo(scenes=-1), quiet=quiet)
        assert ("-1" in capfd.readouterr().err) is not quiet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runn demo", "unknown command 'runn' (did you mean 'run'?); known: demo, run, ingest"),
        ("inspect x --htlm y", "unrecognized arguments: --htlm y (did you mean '--html'?)"),
        ("plan r --shard 0/1", "unrecognized arguments: --shard 0/1 (--shard is for ingest, materialize)"),
        ("stats d --row=3", "unrecognized arguments: --row=3 (--row is for inspect)"),
        ("plan", "the following arguments are required: RECIPE; mma-prep plan --help shows all"),
        ("inspect d --row 1 --rows 2:3", "argument --rows: not allowed with argument --row"),
    ],
)
def test_a_wrong_word_is_one_line_with_the_closest_known_one(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("mma-prep: ") and message in said and said.count("\n") == 1


def test_row_lengths_are_suggested_and_nothing_is_planned(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "out" / "packs").rglob("*")}
    assert main(["plan", str(made / "recipe.yaml"), "--suggest-seq-len"]) == 0
    shown = capsys.readouterr().out
    for name, length in (("pt", 64), ("sft", 96), ("eval", 96)):
        assert f"packs.{name}" in shown
        manifest = PackReader(made / "out" / "packs" / name).manifest
        full = manifest.tokens / (manifest.rows * length)
        assert name == "eval" or f"{full:.1%}  in the recipe" in shown, "eval keeps its order, and packs looser"
    assert {path: path.stat().st_mtime_ns for path in (made / "out" / "packs").rglob("*")} == before
