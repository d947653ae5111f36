"""Studies: their runs and rates, kills and resumes of the real command, and the report."""

from __future__ import annotations

import csv
import json
import re
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from pipeline.checkpoints.writing import DivergedError
from pipeline.cli import main
from pipeline.commands.study import status
from pipeline.config.recipes import load_config
from pipeline.masks import get_policy
from pipeline.serving.evaluate import questions
from pipeline.study.folder import StudyFolder, best_rate
from pipeline.study.graph import as_word
from pipeline.study.measure import _guesses as guesses_of
from pipeline.study.measure import media_tokens_of
from pipeline.study.page import conclusions, write_report
from pipeline.study.results import results
from pipeline.study.runner import StudyRunner
from pipeline.study.spec import STUDIES, load_study
from pipeline.study.statistics import holm, permutation_p
from pipeline.training.run.folder import RunFolder
from pipeline.training.supervise import end_with
from tests.browser import browsing, chromium
from tests.pipeline.report.test_report import brightness
from tests.pipeline.study.studies import finish, made_up, write_study


def test_chains_share_stages_and_name_what_they_need(small_demo: Path, tmp_path: Path) -> None:
    stages = {
        "pt": {"recipe": "demo_pt"},
        "mid": {"recipe": "demo_pt", "after": "pt"},
        "sft": {"recipe": "demo_sft", "after": "mid"},
    }
    arms = {"causal": {"set": {"mask.policy": "causal"}}, "mma": {}, "own": {"set_all": {"mask.policy": "prefix"}}}
    tuning = {"lr": [1e-3, 2e-3], "seeds": [1]}
    study = load_study(str(write_study(tmp_path, small_demo, stages=stages, arms=arms, tuning=tuning)))
    folder = StudyFolder(study)
    runs = {run.name: run for run in folder.runs()}
    assert {run.kind for run in runs.values()} == {"stages", "tuning"}, "no rate is chosen yet"
    assert [name for name in runs if name.startswith("stages/")] == [
        "stages/pt-s1",
        "stages/mid-s1",
        "stages/own.pt-s1",
        "stages/own.mid-s1",
    ]
    trial = runs["tuning/own-lr0.002-s1"]
    assert trial.after == "stages/own.mid-s1" and runs[trial.after].after == "stages/own.pt-s1"
    assert (
        dict(trial.settings)["train.lr"] == 2e-3 and dict(runs["stages/own.pt-s1"].settings)["mask.policy"] == "prefix"
    )
    assert "mask.policy" not in dict(runs["stages/pt-s1"].settings)
    assert folder.total == 4 + 6 + 8 + 6


def test_a_budget_in_tokens_becomes_steps(small_demo: Path, tmp_path: Path) -> None:
    manifest = PackReader(small_demo / "packs/sft").manifest
    of_step = manifest.tokens / manifest.rows * 6
    for steps in (5, 4 * manifest.rows // 6):
        stages = {"sft": {"recipe": "demo_sft", "tokens": round(steps * of_step)}}
        folder = StudyFolder(load_study(str(write_study(tmp_path, small_demo, stages=stages))))
        words = folder.command(folder.runs()[0])
        length = {words[at]: words[at + 1] for at in range(0, len(words), 2)}
        planned = int(length["--train.steps"]) or round(float(length["--train.epochs"]) * (manifest.rows // 6))
        assert planned == steps
        assert int(length["--eval.every-steps"]) == max(1, steps // 2)


def test_the_best_rate() -> None:
    assert best_rate({1e-3: [0.5, 0.7], 2e-3: [0.6, 0.6], 3e-3: [0.1, 0.2]}, higher=True) == 1e-3
    assert best_rate({1e-3: [2.0], 2e-3: [1.5]}, higher=False) == 2e-3
    assert best_rate({1e-3: [float("nan")], 2e-3: [9.0]}, higher=False) == 2e-3
    assert best_rate({1e-3: [float("nan")], 2e-3: [0.0]}, higher=True) == 2e-3


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_shipped_studies_are_whole(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every run's settings resolve to a configuration, its policy exists, and test and validation are apart."""
    for variable in ("NLVR_DIR", "SMOLLM2_DIR", "CC12M_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    folder = StudyFolder(load_study(name))
    study = folder.study
    assert len(study.seeds) >= 5 and study.about and all(step.run.startswith("mma-prep ") for step in study.prepare)
    runs = [*folder.runs(), *finals(folder)]
    assert {run.arm for run in runs if run.kind == "final"} == set(study.arms)
    for run in runs:
        config = load_config(study.stages[run.stage].recipe, [(key, as_word(value)) for key, value in run.settings])
        get_policy(config.mask.name, allow_leak=config.mask.allow_leak, grid=(4, 4))
        assert config.train.seed == run.seed and study.stages[run.stage].tokens > 0
        assert run.kind == "stages" or config.data.packs


def finals(folder: StudyFolder) -> list[Any]:
    from pipeline.study.graph import runs_of

    return runs_of(folder.study, dict.fromkeys(folder.study.arms, 1e-3))


def test_masks_demo_has_every_arm() -> None:
    study = load_study("masks_demo")
    policies = {str(arm.set.get("mask.policy", "")) for arm in study.arms.values()}
    assert {
        "causal",
        "mma",
        "mma_general",
        "mixed",
        "mma_mixed",
        "prefix",
        "cca",
        "future_v2v",
        "image_to_answer",
    } <= policies
    assert {"text_first", "dot", "mma_prompted_pt", "rave_style"} <= set(study.arms)
    chain, stage = [], study.last_stage("dot")
    while stage:
        chain.append(stage)
        stage = study.stages[stage].after
    assert len(chain) == 4, "dual-order training has four stages"
    equal = sum(study.stages[name].tokens for name in chain)
    assert equal == study.stages["pt"].tokens + study.stages["sft"].tokens, "at equal tokens"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"baseline": "cuasal"}, r"baseline: unknown arm 'cuasal' \(did you mean 'causal'\?\)"),
        ({"tuning": {"lr": [1e-3, 2e-3]}}, r"tuning\.seeds is empty"),
        ({"tuning": {"lr": [1e-3, 2e-3], "seeds": [4]}}, r"seeds: \[4\] also choose the learning rate"),
        ({"stages": {"sft": {"recipe": "demo_sft", "after": "pt"}}}, r"stages\.sft\.after: no stage 'pt' above it"),
        ({"arms": {"causal": {"sets": {}}}}, r"unknown key arms\.causal\.sets"),
        ({"held_out": {"validation": "x", "test": "x"}}, r"set validation_samples"),
        ({"held_out": {"validation": "x", "test": "y/../x/"}}, r"set validation_samples"),
    ],
)
def test_wrong_studies_are_one_line(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_study(str(write_study(tmp_path, tmp_path, **more)))
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "status", "mask_demo"]) == 2 and "did you mean 'masks_demo'" in capsys.readouterr().err
    path = str(write_study(tmp_path, tmp_path))
    assert main(["study", "run", path, "--arms", "mna"]) == 2 and "did you mean 'mma'" in capsys.readouterr().err
    assert main(["study", "run", path, "--slurm", "4"]) == 2 and "mma slurm init first" in capsys.readouterr().err
    assert main(["study", "run", path, "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == ["final/causal-s3", "final/mma-s3", "final/causal-s4", "final/mma-s4"]


def test_preparation_runs_only_mma_prep(tmp_path: Path) -> None:
    path = write_study(tmp_path, tmp_path, prepare=[{"run": "touch made", "makes": str(tmp_path / "made")}])
    with pytest.raises(UserError, match="is not a command of mma-prep"):
        StudyRunner(StudyFolder(load_study(str(path))), str(path), print).prepare()


def test_numbers_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_up(tmp_path, arms={"causal": 0.4, "mma": 0.8, "same": 0.4}, seeds=8, missing=("same-s12",))
    assert main(["study", "report", str(path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"mma - causal: BETTER: \+\d", said) and "same - causal: NO DIFFERENCE SHOWN" in said
    folder = StudyFolder(load_study(str(path)))
    found = json.loads((folder.path / "results.json").read_text())
    by_arm = {entry["arm"]: entry for entry in found["comparisons"]}
    assert by_arm["same"]["seeds"] == [10, 11, 13, 14, 15, 16, 17] and found["arms"]["same"]["missing"] == [12]
    right = {seed: slow_means(folder, seed) for seed in found["seeds"]}
    differences = np.array([right[seed]["mma"] - right[seed]["causal"] for seed in found["seeds"]])
    assert by_arm["mma"]["mean"] == pytest.approx(differences.mean())
    assert by_arm["mma"]["p"] == permutation_p(differences) == 2 / 256
    assert [by_arm[arm]["p_holm"] for arm in ("mma", "same")] == holm([by_arm["mma"]["p"], by_arm["same"]["p"]])
    assert found["guesses"]["constant"] == {"all": 0.5, "colour": 0.0, "count": 1.0}, "even questions are of count"
    assert found["arms"]["mma"]["curve"][-1] | {"teacher_forced": 0} == {
        "step": 4, "tokens": 4000, "runs": 8, "loss": 0.75, "teacher_forced": 0,
    }  # fmt: skip
    lines = list(csv.DictReader((folder.path / "results.csv").open()))
    assert len(lines) == 3 * 2 * 3 and float(lines[0]["mean"]) == pytest.approx(
        np.mean([r["causal"] for r in right.values()])
    )


def slow_means(folder: StudyFolder, seed: int) -> dict[str, float]:
    """The accuracy of each arm's run of a seed, from its file."""
    found = {}
    for arm in folder.study.arms:
        path = folder.path / f"final/{arm}-s{seed}/answers.json"
        if path.exists():
            asked = json.loads(path.read_text())["sets"]["plain"]
            found[arm] = sum(answer["right"] for answer in asked) / len(asked)
    return found


def test_few_seeds_are_said_to_decide_nothing(tmp_path: Path) -> None:
    folder = StudyFolder(load_study(str(made_up(tmp_path, arms={"causal": 0.2, "mma": 0.9}, seeds=3))))
    (line,) = conclusions(results(folder))
    assert "NOT DECIDABLE with so few seeds" in line and "p=0.2500" in line


def test_runs_that_were_asked_other_questions_are_refused(tmp_path: Path) -> None:
    folder = StudyFolder(load_study(str(made_up(tmp_path, arms={"causal": 0.2, "mma": 0.9}, seeds=2))))
    path = folder.path / "final/mma-s11/answers.json"
    path.write_text(path.read_text().replace('"q7"', '"other"'))
    with pytest.raises(UserError, match=r"mma-s11 was asked other questions than causal-s10"):
        results(folder)


def test_an_empty_study_has_a_report_too(tmp_path: Path) -> None:
    folder = StudyFolder(load_study(str(write_study(tmp_path, tmp_path))))
    write_report(folder)
    page = (folder.path / "report.html").read_text()
    assert "0 of 4" in page and "NOT FINISHED" in page and "Nothing to compare yet" in page
    assert status(folder)[-1] == "0 of 4 runs done"


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="Chromium is not on PATH")
def test_the_page_fits_its_window(tmp_path: Path) -> None:
    arms = {"causal": 0.4, "mma": 0.8, "a_mask_with_a_long_name": 0.41, "worse": 0.2}
    folder = StudyFolder(load_study(str(made_up(tmp_path, arms=arms, seeds=8, missing=("worse-s12",)))))
    write_report(folder)
    path = folder.path / "report.html"
    assert path.stat().st_size < 5e6 and not re.findall(r"(?:src|href)=\"(?!data:)", path.read_text())
    with browsing() as page:
        for width in (500, 1600):
            for dark in (False, True):
                page.open(path.as_uri(), width=width, height=1400, dark=dark)
                assert page.value("document.documentElement.scrollWidth") <= width
                ink, paper = (
                    page.value(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
                )
                assert (brightness(ink) > brightness(paper)) == dark
                page.photograph(tmp_path / f"{width}-{dark}.png")
        assert page.complaints == []


def edited(path: Path, **more: Any) -> StudyFolder:
    """Change keys of a study's file; return its folder."""
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | more, sort_keys=False))
    return StudyFolder(load_study(str(path)))


@pytest.mark.parametrize(
    "more",
    [
        {"arms": {"causal": {"set": {"mask.policy": "mma"}}, "mma": {}}},
        {"stages": {"sft": {"recipe": "demo_sft", "tokens": 3000}}},
        {"stages": {"sft": {"recipe": "demo_pt"}}},
        {"held_out": {"validation": "v", "test": "t", "evaluations": 2}},
    ],
)
def test_a_run_of_other_settings_is_refused_though_it_is_finished(
    more: dict[str, Any], small_demo: Path, tmp_path: Path
) -> None:
    path = write_study(tmp_path, small_demo)
    folder = StudyFolder(load_study(str(path)))
    run = folder.runs()[0]
    finish(folder, run.name, np.random.default_rng(0), 0.5)
    folder.define(run, folder.command(run))
    folder.check(run)
    folder = edited(path, **more)
    message = r"final/causal-s3 was made with other settings"
    with pytest.raises(UserError, match=message):
        StandIn(folder, lambda *call: pytest.fail("a run was started")).run(1)
    with pytest.raises(UserError, match=message):
        results(folder)


@pytest.mark.parametrize(
    "measure",
    [
        {"plain": {}, "adaptive_flow": {"adaptive_flow": True}, "more": {"policy": "mma"}},
        {"plain": {"policy": "causal"}, "adaptive_flow": {"adaptive_flow": True}},
    ],
)
def test_other_ways_to_ask_repeat_only_the_asking(measure: dict[str, Any], tmp_path: Path) -> None:
    path = made_up(tmp_path, arms={"causal": 0.4, "mma": 0.8}, seeds=2)
    assert all(map(StudyFolder(load_study(str(path))).is_done, StudyFolder(load_study(str(path))).runs()))
    folder = edited(path, measure=measure)
    finals = [run for run in folder.runs() if run.kind == "final"]
    assert len(finals) == 4 and all(folder.is_trained(run) and not folder.is_done(run) for run in finals)
    assert results(folder)["arms"]["mma"]["missing"] == [10, 11]
    shown = status(folder)
    assert "2 to be asked" in "\n".join(shown) and "(2s a run)" in shown[-1], "4 steps of 0.5 s"


def test_holms_correction_covers_what_is_not_finished_yet(tmp_path: Path) -> None:
    arms, missing = {"causal": 0.2, "mma": 0.9, "b": 0.4}, tuple(f"b-s{seed}" for seed in range(10, 16))
    found = results(StudyFolder(load_study(str(made_up(tmp_path, arms=arms, seeds=6, missing=missing)))))
    (entry,) = found["comparisons"]
    assert entry["p"] == 2 / 2**6 and entry["p_holm"] == entry["smallest_p_holm"] == 2 * 2 / 2**6 > 0.05
    first, line = conclusions(found)
    assert first.startswith("NOT FINISHED, numbers will change: b (seeds 10, 11") and "NOT DECIDABLE" in line
    assert 12 * 2 / 2**9 <= 0.05 < 12 * 2 / 2**8, "nine seeds are the fewest for twelve arms"


def test_a_trial_that_diverged_is_the_worst_and_blocks_nothing(small_demo: Path, tmp_path: Path) -> None:
    tuning = {"lr": [1e-3, 9.0], "seeds": [1]}
    folder = StudyFolder(load_study(str(write_study(tmp_path, small_demo, tuning=tuning, measure={"plain": {}}))))
    log: Any = SimpleNamespace(error=lambda error: None)

    def child(name: str, module: str, words: Sequence[str]) -> int:
        run = name.replace(".", "/", 1)
        if "lr9" in name:
            failed = RunFolder(str(folder.run_dir(run)))
            return end_with(DivergedError("20 steps in a row"), folder=failed, log=log, watch=None, rank=0)
        finish(folder, run, np.random.default_rng(0), 0.5)
        return int(module == "pipeline.study.measure")

    with pytest.raises(UserError, match="4 runs failed"):  # the final ones: nobody asks them here
        StandIn(folder, child).run(1)
    assert folder.chosen() == {"causal": 1e-3, "mma": 1e-3}
    trial = next(run for run in folder.runs() if run.lr == 9.0)
    assert folder.is_done(trial) and not folder.is_trained(trial)
    trials = results(folder)["arms"]["mma"]["trials"]
    assert trials["9"] == [None] and trials["0.001"][0] > 0.5


class StandIn(StudyRunner):
    """A runner with a function in place of child processes."""

    def __init__(self, folder: StudyFolder, child: Callable[[str, str, Sequence[str]], int]) -> None:
        self.said: list[str] = []
        super().__init__(folder, "study", self.said.append)
        self.child, self.stopped = child, self._stopped

    def _call(self, name: str, module: str, words: Sequence[str]) -> int:
        return self.child(name, module, words)


def test_ctrl_c_stops_a_study(small_demo: Path, tmp_path: Path) -> None:
    folder, started = StudyFolder(load_study(str(write_study(tmp_path, small_demo)))), []

    def child(name: str, module: str, words: Sequence[str]) -> int:
        """End as a child does that Ctrl-C has reached as well."""
        started.append(name)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert runner.stopped.wait(20)
        return 130

    runner = StandIn(folder, child)
    with pytest.raises(KeyboardInterrupt):
        runner.run(1)
    assert started == ["final.causal-s3"] and runner.said == ["final/causal-s3: training"], "nothing is said to fail"


def test_arms_need_only_their_own_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {
        "pt": {"recipe": "demo_pt"},
        "other": {"recipe": "demo_pt"},
        "long": {"recipe": "demo_sft", "after": "other"},
        "sft": {"recipe": "demo_sft", "after": "pt"},
    }
    path = str(write_study(tmp_path, tmp_path, stages=stages, arms={"causal": {}, "mma": {"stage": "long"}}))
    assert main(["study", "run", path, "--dry-run", "--arms", "mma"]) == 0
    assert capsys.readouterr().out.split() == [
        f"{name}-s{seed}" for seed in (3, 4) for name in ("stages/other", "final/mma")
    ]
    assert main(["study", "run", path, "--slurm", "2", "--arms", "mna"]) == 2
    assert "did you mean 'mma'" in capsys.readouterr().err


def test_fewer_rows_than_a_step_needs_are_one_line(small_demo: Path, tmp_path: Path) -> None:
    flags = {"data.packs": str(small_demo / "packs/sft"), "train.global_batch_size": 100_000}
    stages = {"sft": {"recipe": "demo_sft", "tokens": 1000}}
    folder = StudyFolder(load_study(str(write_study(tmp_path, small_demo, flags=flags, stages=stages))))
    with pytest.raises(UserError, match=r"fewer than train\.global_batch_size=100000"):
        folder.command(folder.runs()[0])


def test_evaluations_are_spread_over_all_epochs(small_demo: Path, tmp_path: Path) -> None:
    flags = {"data.packs": str(small_demo / "packs/sft"), "train.global_batch_size": 6}
    flags |= {"train.steps": 0, "train.epochs": 4.0}
    folder = StudyFolder(load_study(str(write_study(tmp_path, small_demo, flags=flags))))
    words = folder.command(folder.runs()[0])
    rows = PackReader(small_demo / "packs/sft").manifest.rows
    assert int(words[words.index("--eval.every-steps") + 1]) == 4 * (rows // 6) // 2


def test_guesses_are_of_the_questions_that_are_asked(small_demo: Path, tmp_path: Path) -> None:
    folder = StudyFolder(load_study(str(write_study(tmp_path, small_demo))))
    trained, packs = PackReader(small_demo / "packs/sft"), PackReader(small_demo / "packs/eval")
    asked = [{"sample": one.sample, "family": one.family} for one in questions(packs)]
    whole = guesses_of(folder, trained, packs, asked, 0)
    assert len(asked) > 12 and 0 < sum(whole["constant"]) < len(asked)
    half = len(asked) // 2
    for skip in (0, half):  # the same number of other questions
        part = guesses_of(folder, trained, packs, asked[skip : skip + half], skip)
        assert part == {name: right[skip : skip + half] for name, right in whole.items()}
    with pytest.raises(AssertionError):
        guesses_of(folder, trained, packs, asked[1:], 0)


def test_flops_count_images_by_their_tokens(small_demo: Path) -> None:
    manifest = PackReader(small_demo / "packs/sft").manifest
    assert media_tokens_of(manifest, 10) == 10 * manifest.image_tokens
    sized: Any = SimpleNamespace(images=4, all_media_tokens=600)
    assert media_tokens_of(sized, 10) == 1500


@pytest.mark.parametrize("flags", [["--arms", "mma"], ["--slurm", "2"], ["--dry-run"]])
@pytest.mark.parametrize("action", ["status", "report"])
def test_flags_of_run_are_refused_elsewhere(action: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", action, "masks_demo", *flags]) == 2
    assert f"{flags[0]} goes with mma study run alone" in capsys.readouterr().err
