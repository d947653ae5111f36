"""The page of ``mma report``, from run folders that are written here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from pipeline.cli import main
from pipeline.config.flags import parse
from pipeline.report.accuracy import wilson
from pipeline.report.chart import Line, chart, smoothed
from pipeline.report.history import History
from pipeline.report.page import write_report
from pipeline.training.run.folder import RunFolder
from tests.browser import browsing, chromium
from tests.pipeline.serving.test_evaluate import trained_on

STEPS = 120


def run_folder(path: Path, packs: Path, *, evaluated: bool = True) -> Path:
    """A finished run: two losses are not finite, one line is torn, a hostile answer."""
    folder = RunFolder(str(path))
    folder.create()
    config = parse(["--recipe", "demo_sft", "--run-dir", str(path), "--data.packs", str(packs)]).config
    folder.record_start(config, world=2, steps=STEPS)
    folder.record("loss-spike", step=7)
    with (path / "metrics.jsonl").open("w") as stream:
        for step in range(1, STEPS + 1):
            line = {"step": step, "loss": None if step in (5, 6) else 3 / step, "grad_norm": 1 / step, "lr": 1e-3}
            speed = {"tokens": 1000, "tokens_per_s": 500.0, "step_s": 2.0, "data_s": 0.1, "save_s": 0.0, "mfu": None}
            held_out = {
                "val/loss": 2 / step,
                "val/loss/vqa": 1 / step,
                "val/loss/cap": None,
                "val/teacher_forced_accuracy": 0.5,
            }
            stream.write(json.dumps({**line, **speed, "eval": held_out if step % 40 == 0 else None}) + "\n")
        stream.write('{"step": 12')
    folder.set_status("done", STEPS)
    if evaluated:
        scores = {name: {"asked": 20, "right": 15, "guess": 8} for name in ("count", "all")}
        answers = [
            {
                "sample": f"s{n}",
                "family": "count",
                "reference": "2",
                "answer": "<script>alert(1)</script>",
                "right": n % 2 == 0,
            }
            for n in range(20)
        ]
        other = {name: {**score, "right": 5} for name, score in scores.items()}
        found = {str(path): {"scores": scores, "answers": answers}}
        found[str(path.with_name("other") / "export")] = {"scores": other, "answers": answers}
        (path / "evaluation.json").write_text(json.dumps(found))
    return path


def test_a_page_about_two_runs(small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_folder(tmp_path / "first", small_demo / "packs/sft")
    other = run_folder(tmp_path / "other", tmp_path / "no packs", evaluated=False)
    assert main(["report", str(first), str(other)]) == 0
    assert "nothing in it loads from a network" in capsys.readouterr().out
    page = (first / "report.html").read_text()
    assert len(page) < 5e6
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "default-src &#x27;none&#x27;" in page
    assert "75.0% [53.1%, 88.8%]" in page and "25.0% [11.2%, 46.9%]" in page, "the other model is in the same file"
    assert "loss-spike" in page and "2 lines of metrics.jsonl cannot be read" in page
    assert "no packs is not a pack folder" in page
    assert page.count("<svg") == 7, "five of training, two of held-out metrics"


def test_the_demo_packs_show_their_pictures(small_demo: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", small_demo / "packs/sft")
    plain = write_report([folder], tmp_path / "plain.html")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation[str(folder)]["answers"][0]["sample"] = first_sample(small_demo / "packs/eval")
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert write_report([folder], tmp_path / "page.html", small_demo / "packs/eval") > plain
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="small"') == 1 and re.search(r"<p>(what|how|is) [a-z ]+\?</p>", page)


def first_sample(packs: Path) -> str:
    from data_prep.packs import PackReader

    return PackReader(packs)[0].source[0].sample


def test_pictures_show_how_their_states_move(
    small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, packs = run_folder(tmp_path / "run", small_demo / "packs/sft"), small_demo / "packs/eval"
    trained_on(PackReader(packs), tmp_path / "model")
    monkeypatch.setattr("pipeline.report.page.model_folder", lambda run: tmp_path / "model")
    assert main(["report", str(folder), "--packs", str(packs), "--look", "1"]) == 0
    page = (folder / "report.html").read_text()
    assert "Image states of run under two questions" in page and page.count("exactly 0 in every layer") == 1
    assert main(["report", str(folder), "--look"]) == 2
    assert "add --packs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="Chromium is not on PATH")
@pytest.mark.parametrize("width", [500, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_its_window(width: int, dark: bool, small_demo: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", small_demo / "packs/sft")
    write_report([folder], tmp_path / "page.html", small_demo / "packs/eval")
    with browsing() as page:
        page.open((tmp_path / "page.html").as_uri(), width=width, height=900, dark=dark)
        assert page.value("document.documentElement.scrollWidth") <= width
        ink, paper = (page.value(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        assert (brightness(ink) > brightness(paper)) == dark
        assert page.complaints == []


def brightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)))


def test_held_out_metrics_are_lines(small_demo: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", small_demo / "packs/sft")
    (run,) = History.read_all([folder])
    steps, values = run.held_out("val/loss")
    assert steps.tolist() == [40, 80, 120] and np.allclose(values, [2 / 40, 2 / 80, 2 / 120])
    assert np.isnan(run.held_out("val/loss/cap")[1]).all() and np.isnan(run.held_out("unknown")[1]).all()
    write_report([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(f">{name}</span>" in page for name in ("all", "vqa", "cap")) and "val: teacher forced accuracy" in page


@pytest.mark.parametrize("window", [1, 3, 10])
def test_a_smoothed_line_is_the_mean_of_the_last_values(window: int) -> None:
    values = np.array([np.nan, 1.0, 2.0, np.nan, 4.0, 8.0])
    expected = [
        float(np.mean(kept))
        if (kept := [x for x in values[max(0, at - window + 1) : at + 1] if np.isfinite(x)])
        else math.nan
        for at in range(len(values))
    ]
    assert np.allclose(smoothed(values, window), expected, equal_nan=True)


def test_the_interval_of_a_share() -> None:
    """Against the closed form's published example: 4 of 20 (Wilson): 0.081 to 0.416."""
    assert wilson(4, 20) == pytest.approx((0.0807, 0.4160), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)


def test_gaps_and_scales_of_a_chart() -> None:
    x = np.arange(5.0)
    assert "no finite value" in chart([Line("a", x, np.full(5, np.nan))])
    drawn = chart([Line("a", x, np.array([1.0, 0.0, 10.0, 100.0, 5.0]))], log=True)
    line = re.search(r'd="([^"]+)" class="line', drawn)
    assert line is not None and line[1].count("M") == 2, "0 has no place on a log scale: a gap"
    assert re.findall(r">(\d+)</text>", drawn)[:3] == ["1", "10", "100"]
    within_a_decade = chart([Line("a", x, np.array([3.0, 4, 5, 20, 40]))], log=True)
    assert re.findall(r">(\d+)</text>", within_a_decade)[:3] == ["5", "10", "20"]
    constant = chart([Line("a", x, np.full(5, 7.0))])
    assert "NaN" not in constant and "nan" not in constant


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("empty", "has trained no step yet"),
        ("evaluation", r"evaluation\.json is damaged .*run mma evaluate again"),
        ("missing", "is not a run folder"),
        ("twice", "two runs are called run"),
    ],
)
def test_what_cannot_be_reported_is_one_line(damage: str, message: str, small_demo: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", small_demo / "packs/sft")
    folders = [folder]
    if damage == "empty":
        (folder / "metrics.jsonl").write_text("")
    elif damage == "evaluation":
        (folder / "evaluation.json").write_text('{"run": {"scores": 3}}')
    elif damage == "missing":
        folders = [tmp_path / "nowhere"]
    else:
        folders = [folder, run_folder(tmp_path / "more/run", small_demo / "packs/sft")]
    with pytest.raises(UserError, match=message):
        write_report(folders, tmp_path / "page.html")


def test_numbers_of_ill_will_are_gaps(small_demo: Path, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", small_demo / "packs/sft")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(f'\n{{"step": 121, "loss": 1{"0" * 400}, "lr": "x"}}\n')
    (run,) = History.read_all([folder])
    assert math.isnan(run.series("loss")[-1]) and math.isnan(run.series("lr")[-1])
    assert len(run.steps) == STEPS + 1
