"""`mma bench` end to end: every benchmark on a real export, resuming, shards, changed conditions, comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from data_prep.common.errors import UserError
from data_prep.example import ImageRef
from pipeline.cli import main
from pipeline.evaluation.answers import AnswerStore, Conditions
from pipeline.evaluation.asking import Asking, rank_shard
from pipeline.evaluation.bench import Candidate, Settings, run
from pipeline.evaluation.judge import JudgeSettings
from pipeline.evaluation.registry import BENCHMARKS, PAPER, chosen
from pipeline.evaluation.result import Result, _cluster_sums, _drawn, _strata, compare
from pipeline.evaluation.survey import Survey
from pipeline.evaluation.table import paper_score
from pipeline.serving.model import load_model
from tests.pipeline.evaluation.conftest import JudgeServer
from tests.pipeline.evaluation.official import Scripted, png, write_mmbench, write_mme_parquet, write_own, write_pope

JUDGED = ("llava-w", "mathvista", "mm-vet")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result(out: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((out / name / "result.json").read_text(encoding="utf-8")))


def candidate(folder: Path, out: Path, model: Scripted) -> Candidate:
    return Candidate(folder, out, lambda: model)


def first_letter_right(text: str) -> str:
    """Answer yes, B, or the first option."""
    return "B" if "A." in text or "(A)" in text else "Yes."


def measure(folder: Path, out: Path, data: Path, names: str, model: Scripted, **settings: Any) -> dict[str, Result]:
    said: list[str] = []
    outcome = run(chosen(names), [candidate(folder, out, model)], Settings(data, **settings), said.append)
    return {line.result.benchmark.name: line.result for line in outcome.lines}


def test_all_twelve_run_on_an_export_with_a_judge(
    exports: tuple[Path, Path], official: Path, tmp_path: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(exports[0]), "--data", str(official), "--out", str(tmp_path), "--max-new-tokens", "3"]
    flags += ["--device", "cpu", "--judge-url", judge.url, "--judge-model", "stand-in"]
    assert main(["bench", "all", *flags]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / exports[0].name
    for one in PAPER:
        saved = result(out, one.name)
        assert one.name in printed and saved["scores"] and saved["prompt"] and saved["extractor"] and saved["rule"]
        assert saved["questions"] == len(lines(out / one.name / "graded.jsonl")) > 0
        assert (saved["judge"] or {}).get("model") == ("stand-in" if one.name in JUDGED else None)
        assert saved["unanswerable"] == 0
    assert result(out, "llava-w")["scores"]["all"] == pytest.approx(75)
    assert result(out, "mm-vet")["scores"]["total"] == 50
    asked = len(judge.requests)
    assert main(["bench", "all", *flags]) == 0  # nothing is asked again, neither of the model nor of the judge
    assert len(judge.requests) == asked and capsys.readouterr().out == printed


def test_without_a_judge_all_skips_and_a_name_is_refused(
    exports: tuple[Path, Path], official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(exports[0]), "--data", str(official), "--out", str(tmp_path), "--max-new-tokens", "2"]
    assert main(["bench", "mm-vet", *flags]) == 2
    assert "mm-vet: needs a judge" in capsys.readouterr().err
    assert main(["bench", "all", *flags, "--limit", "1", "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in JUDGED:
        assert f"skipped {name}: needs a judge" in printed
    saved = {path.parent.name for path in tmp_path.rglob("result.json")}
    assert saved == {f"{one.name}-first-1" for one in PAPER if one.name not in JUDGED}


def test_the_answers_are_those_of_generate(exports: tuple[Path, Path], official: Path, tmp_path: Path) -> None:
    """Batches, order and resuming change nothing: every answer equals that of the model asked by itself."""
    model = load_model(exports[0])
    settings = Settings(official, batch=4, max_new_tokens=3)
    run(chosen("mmmu,pope"), [Candidate(exports[0], tmp_path, lambda: model)], settings, print)
    for name in ("mmmu", "pope"):
        expected = [
            model.generate([model.prompt([question.turn(inline=False)])], max_new_tokens=3)[0]
            for question in BENCHMARKS[name].questions(official)
        ]
        assert [line["answer"] for line in lines(tmp_path / name / "graded.jsonl")] == expected


class Interrupted(Scripted):
    """Stops like a killed process after some batches."""

    def __init__(self, answer: Callable[[str], str], batches: int) -> None:
        super().__init__(answer)
        self._left = batches

    def generate(self, prompts: Any, *, max_new_tokens: int, **options: Any) -> list[str]:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return super().generate(prompts, max_new_tokens=max_new_tokens, **options)


def test_interrupted_and_resumed_equals_undisturbed(exports: tuple[Path, Path], official: Path, tmp_path: Path) -> None:
    whole = measure(exports[0], tmp_path / "whole", official, "pope", Scripted(first_letter_right), batch=2)
    with pytest.raises(KeyboardInterrupt):
        measure(exports[0], tmp_path / "cut", official, "pope", Interrupted(first_letter_right, 3), batch=2)
    (path,) = (tmp_path / "cut" / "pope").glob("answers-*.jsonl")
    assert len(lines(path)) == 1 + 6
    with path.open("a") as file:
        file.write('{"hash": "cut off in the mid')  # what a crash during a write leaves
    rest = Scripted(first_letter_right)
    resumed = measure(exports[0], tmp_path / "cut", official, "pope", rest, batch=2)
    assert sum(rest.batches) == 6
    assert resumed["pope"].scores == whole["pope"].scores
    for name in ("graded.jsonl", "result.json"):
        assert (tmp_path / "cut/pope" / name).read_bytes() == (tmp_path / "whole/pope" / name).read_bytes()


def test_merged_shards_equal_one_run(exports: tuple[Path, Path], official: Path, tmp_path: Path) -> None:
    names = "pope,mmbench,mmmu"
    measure(exports[0], tmp_path / "one", official, names, Scripted(first_letter_right))
    said: list[str] = []
    for index in (2, 0, 1):
        shard = Settings(official, shard=(index, 3), batch=2)
        model = Scripted(first_letter_right)
        outcome = run(chosen(names), [candidate(exports[0], tmp_path / "many", model)], shard, said.append)
        assert bool(outcome.lines) == (index == 1)
    assert sum("other shards have" in line for line in said) == 6
    for name in names.split(","):
        assert len(list((tmp_path / "many" / name).glob("answers-*.jsonl"))) == 3
        for file in ("graded.jsonl", "result.json"):
            assert (tmp_path / "many" / name / file).read_bytes() == (tmp_path / "one" / name / file).read_bytes()


def test_another_number_of_shards_goes_on_with_the_answers(
    exports: tuple[Path, Path], official: Path, tmp_path: Path
) -> None:
    measure(exports[0], tmp_path, official, "pope", Scripted(first_letter_right), shard=(0, 2))
    rest = Scripted(first_letter_right)
    assert measure(exports[0], tmp_path, official, "pope", rest)["pope"].graded
    assert sum(rest.batches) == 6


@pytest.mark.parametrize("changed", ["model", "prompt", "data files", "generation settings"])
def test_changed_conditions_start_afresh_and_keep_the_old_answers(
    changed: str, exports: tuple[Path, Path], tmp_path: Path
) -> None:
    data, said, settings = tmp_path / "data", [], {}
    write_pope(data)
    measure(exports[0], tmp_path / "out", data, "pope", Scripted(first_letter_right))
    model = Scripted(first_letter_right)
    if changed == "data files":
        (data / "pope/val2014/COCO_val2014_1.jpg").write_bytes(png(9))
    if changed == "prompt":
        path = data / "pope/coco_pope_random.json"
        path.write_text(path.read_text().replace("dog", "horse"))
    if changed == "generation settings":
        settings = {"max_new_tokens": 5}
    folder = exports[1] if changed == "model" else exports[0]
    run(chosen("pope"), [candidate(folder, tmp_path / "out", model)], Settings(data, **settings), said.append)
    assert sum(model.batches) == 12
    assert len(said) == 1 and f"another {changed}" in said[0] and "old answers are kept" in said[0]
    assert len(list((tmp_path / "out/pope").glob("old-1-answers-*.jsonl"))) == 1


def test_two_processes_cannot_answer_the_same_shard(tmp_path: Path) -> None:
    conditions = Conditions("m", "p", "d", "g")
    stores = [AnswerStore(tmp_path, conditions, print) for _ in range(2)]
    with (
        stores[0].writer((0, 1)),
        pytest.raises(UserError, match="answering shard 0/1"),
        stores[1].writer((0, 1)),
    ):
        pass


def test_compare_pairs_questions_and_repeats_its_interval(
    exports: tuple[Path, Path], official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [Scripted(first_letter_right), Scripted(lambda text: "no")]
    both = [candidate(folder, tmp_path / str(n), models[n]) for n, folder in enumerate(exports)]
    (line,) = run(chosen("pope"), both, Settings(official), print).lines
    assert line.other is not None and line.difference is not None
    one = line.difference
    assert one.value == pytest.approx(200 / 3 - 0)  # always yes: F1 2/3; always no: 0
    assert one.low <= one.value <= one.high and one.low > 0
    assert compare(line.result, line.other) == one
    assert len({compare(line.result, line.other, resamples=3, seed=seed) for seed in range(5)}) > 1
    assert compare(line.result, line.result).high == compare(line.result, line.result).low == 0
    assert main(["bench", "pope", "--model", str(exports[0]), "--compare", str(exports[0]), "--data", "x"]) == 2
    assert "is the model itself" in capsys.readouterr().err


@pytest.mark.parametrize("name", [one.name for one in PAPER])
def test_the_bootstrap_sums_give_the_headline_of_the_summary(
    name: str, exports: tuple[Path, Path], official: Path, tmp_path: Path, judge: JudgeServer
) -> None:
    """On any draw with repetitions, against the benchmark's own summary of the repeated answers."""
    settings = {"judge": JudgeSettings(judge.url, "stand-in")}
    random = Random(name)
    model = Scripted(lambda _: random.choice(["Yes", "No", "A", "B", "C"]))
    got = measure(exports[0], tmp_path, official, name, model, **settings)[name]
    metric, strata = got.benchmark.metric, _strata(got.graded)
    for _ in range(5):
        counts = [np.array([random.randint(0, 2) for _ in range(len(own) - 1)] + [1]) for own in strata]
        repeated = [
            got.graded[number]
            for clusters, drawn in zip(strata, counts, strict=True)
            for cluster, times in zip(clusters, drawn, strict=True)
            for number in cluster * int(times)
        ]
        fast = _drawn(got, [_cluster_sums(got, clusters) for clusters in strata], counts)
        assert fast == pytest.approx(next(iter(metric.summarize(repeated).values())))


def test_compare_prints_both_models_beside_the_paper(
    exports: tuple[Path, Path], official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate(exports):  # exports have the same name, so they need folders of their own
        (tmp_path / f"model{number}").symlink_to(folder)
    names = [str(tmp_path / f"model{number}") for number in (0, 1)]
    flags = ["--data", str(official), "--out", str(tmp_path / "out"), "--max-new-tokens", "2", "--device", "cpu"]
    assert main(["bench", "cv-bench-3d", "--model", names[0], "--compare", names[1], *flags]) == 0
    printed = capsys.readouterr().out
    assert "64.1" in printed and "Table 1 of arXiv 2503.02597" in printed
    assert {path.parent.parent.name for path in (tmp_path / "out").rglob("result.json")} == {"model0", "model1"}
    assert paper_score("MMA", "cv-bench-3d") == 64.1 and paper_score("AKI-4B", "mme-p") == 1491.9
    assert paper_score("MMA", "vqa") is None


def test_a_limit_keeps_whole_groups_and_its_answers_apart(
    exports: tuple[Path, Path], official: Path, tmp_path: Path
) -> None:
    limited = measure(exports[0], tmp_path, official, "mmbench,mme-p", Scripted(first_letter_right), limit=1)
    assert len(limited["mmbench"].graded) == 4 and len(limited["mme-p"].graded) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"mmbench-first-1", "mme-p-first-1"}


def test_prompts_too_long_for_the_model_are_counted_and_scored_as_empty(
    exports: tuple[Path, Path], official: Path, tmp_path: Path
) -> None:
    class Short(Scripted):
        def generate(self, prompts: Any, *, max_new_tokens: int, **options: Any) -> list[str]:
            if any("dog" in prompt.text for prompt in prompts):
                raise UserError("the conversation takes 900 tokens, more than the model's 256")
            return super().generate(prompts, max_new_tokens=max_new_tokens, **options)

    got = measure(exports[0], tmp_path, official, "pope", Short(first_letter_right))["pope"]
    assert got.unanswerable == 3
    stored = [line for path in (tmp_path / "pope").glob("answers-*.jsonl") for line in lines(path)[1:]]
    assert sum(bool(line["problem"]) for line in stored) == 3
    with pytest.raises(UserError, match="can answer no question"):
        model = Short(first_letter_right)
        model.generate = lambda *_, **__: (_ for _ in ()).throw(UserError("too long"))  # type: ignore[assignment,method-assign]
        measure(exports[0], tmp_path / "none", official, "pope", model)


def test_mmmu_puts_images_where_the_template_can(exports: tuple[Path, Path], official: Path, tmp_path: Path) -> None:
    shape: dict[str, list[str]] = {}
    for order in ("as_written", "image_first"):
        model = Scripted(first_letter_right, order)
        measure(exports[0], tmp_path / order, official, "mmmu", model)
        turn = next(turn for turn in model.asked if "Compare" in "".join(p for p in turn.parts if isinstance(p, str)))
        shape[order] = ["image" if isinstance(part, ImageRef) else part[:26] for part in turn.parts]
    assert shape["as_written"] == ["Compare ", "image", " with ", "image", ".\n(A) red\n(B) blue\n\nAnswer"]
    assert shape["image_first"] == ["image", "image", "Compare <image 1> with <im"]


def test_official_prompts(official: Path) -> None:
    """One prompt of every benchmark, to the letter."""
    first = {one.name: next(iter(one.questions(official))) for one in PAPER}
    letter = "\nAnswer with the option's letter from the given choices directly."
    short = "\nAnswer the question using a single word or phrase."
    options = " There are several options:\nA. cat\nB. dog\nC. bus\nD. car"
    assert {name: question.text for name, question in first.items()} == {
        "mme-p": "Is there a cat in this image?" + short,
        "mme-c": "Does it print a cat?" + short,
        "mmbench": "What is it?" + options + "\n" + letter,
        "seed-i": "How many?\nA. one\nB. two\nC. six\nD. ten" + letter,
        "llava-w": "What is 0?",
        "mmmu": "Compare  with .\n(A) red\n(B) blue\n" + letter,
        "mathvista": "Choices: (A) 3/11 (B) 8/11",
        "pope": "Is there a catrandom in the image?" + short,
        "mm-vet": "What is x?",
        "realworldqa": "Which way?\n\nA. left\nB. right\nC. on\nPlease answer directly with only the letter of the "
        "correct option.",
        "cv-bench-2d": "Note: You only need to respond with A, B, C without providing any additional information.\n\n"
        "How many? Select from the following choices.\n(A) 0\n(B) 1\n(C) 2",
        "cv-bench-3d": "Note: You only need to respond with A, B, C without providing any additional information.\n\n"
        "How many? Select from the following choices.\n(A) 0\n(B) 1\n(C) 2",
    }
    hinted = [question.text for question in BENCHMARKS["mmbench"].questions(official)][1]
    assert hinted == "Look. Which side? There are several options:\nA. left\nB. right\n" + letter


def test_mme_and_mmbench_read_their_other_formats(tmp_path: Path, exports: tuple[Path, Path]) -> None:
    write_mme_parquet(tmp_path, "artwork")
    asked = list(BENCHMARKS["mme-p"].questions(tmp_path))
    assert [(question.group, question.facts["answer"]) for question in asked] == [
        (f"artwork/artwork/{n // 2}.png", ("yes", "no")[n % 2]) for n in range(4)
    ]
    write_mmbench(tmp_path)
    survey = Survey.of(BENCHMARKS["mmbench"], tmp_path)
    assert [question.group for question in survey.questions] == ["7", "8", "7", "8", "7", "7"]
    images = [question.images[0].data for question in BENCHMARKS["mmbench"].questions(tmp_path)]
    assert len(set(images)) == 2  # rotations share the image of their question


def test_own_questions_with_the_other_metrics(tmp_path: Path, exports: tuple[Path, Path]) -> None:
    write_own(tmp_path)
    answers = {"vqa": "three", "gqa": "Red.", "boxes": "[0.1, 0.1, 0.5, 0.5]", "captions": "a red circle on white"}
    scores = {
        name: measure(exports[0], tmp_path / "out", tmp_path, name, Scripted(lambda _, word=word: word))[name].headline
        for name, word in answers.items()
    }
    assert scores == {"vqa": pytest.approx(30), "gqa": 100, "boxes": 100, "captions": 0}  # one caption: idf is 0


def test_ranks_divide_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert rank_shard() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert rank_shard() == (2, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_shard() == (1, 2)


def test_asking_loads_no_model_when_nothing_is_left(official: Path, tmp_path: Path) -> None:
    benchmark = BENCHMARKS["cv-bench-2d"]
    survey = Survey.of(benchmark, official)
    asking = Asking(benchmark, official, survey, AnswerStore(tmp_path, Conditions("m", "p", "d", "g"), print))
    assert asking.run(lambda: Scripted(first_letter_right), (0, 1), batch=2, max_new_tokens=4)
    assert asking.run(lambda: pytest.fail("loaded"), (0, 1), batch=2, max_new_tokens=4)
