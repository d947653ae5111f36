"""Asks a trained run the held-out questions, and writes all answers beside it."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.common.files import hash_json, write_atomic
from data_prep.common.yaml_files import read_mapping
from data_prep.packs import Manifest, PackReader, last_answer
from pipeline.config.schema import RunConfig, build_config
from pipeline.parallel.launch import configure_libraries
from pipeline.study.folder import ANSWERS, VERSION, StudyFolder
from pipeline.study.graph import Run
from pipeline.study.spec import MeasureSpec, load_study

TRAINED_SAMPLES = 20_000
"""Training samples that the guesses are learned from."""


def main(argv: Sequence[str]) -> int:
    """Measure the run ``argv[1]`` of the study ``argv[0]``; return 0. Raises UserError if it cannot be asked."""
    configure_libraries()
    folder = StudyFolder(load_study(argv[0]))
    measure(folder, next(run for run in folder.runs() if run.name == argv[1]))
    return 0


def measure(folder: StudyFolder, run: Run) -> None:
    """Export a finished run, ask it in every way of the study, save the answers and remove the export."""
    from pipeline.serving.export import export_run

    run_dir = folder.run_dir(run)
    made = run_dir / "export"
    if made.exists():
        shutil.rmtree(made)
    export_run(run_dir, made)
    packs = PackReader(folder.study.test_folder(run.arm))
    skip, limit = test_part(folder, run, packs), folder.study.held_out.test_samples or None
    sets = {name: _ask(made, spec, packs, skip, limit) for name, spec in folder.study.measure.items()}
    first = next(iter(sets.values()))
    config = build_config(read_mapping(run_dir / "config.yaml"), str(run_dir / "config.yaml"))
    guesses = _guesses(folder, PackReader(config.data.packs), packs, first, skip)
    found = {
        "version": VERSION, "asked": folder.asked(run), "sets": sets, "guesses": guesses,
        "flops": _flops(run_dir, made, config),
    }  # fmt: skip
    write_atomic(run_dir / ANSWERS, json.dumps(found, separators=(",", ":")).encode() + b"\n")
    shutil.rmtree(made)


def test_part(folder: StudyFolder, run: Run, packs: PackReader) -> int:
    """Return how many questions at the start of the test packs belong to the validation."""
    from pipeline.serving.evaluate import questions

    if not folder.study.tests_validation_rows(run.arm):
        return 0
    rows = packs.rows_that_hold(folder.study.held_out.validation_samples)
    return sum(1 for _ in questions(packs, range(rows)))


def _ask(made: Path, spec: MeasureSpec, packs: PackReader, skip: int, limit: int | None) -> list[dict[str, Any]]:
    import torch

    from pipeline.serving.evaluate import evaluate
    from pipeline.serving.flow import AdaptiveFlow
    from pipeline.serving.model import MultimodalModel, load_model

    model = load_model(made, device="cuda" if torch.cuda.is_available() else "cpu")
    if spec.policy:
        model = MultimodalModel(
            replace(model.export_config, policy=spec.policy), model.stage, model.tokenizer, model.coverage
        )  # fmt: skip
    flow = AdaptiveFlow() if spec.adaptive_flow else None
    return [vars(answer) for answer in evaluate(model, packs, skip=skip, limit=limit, flow=flow)]


def _flops(run_dir: Path, made: Path, config: RunConfig) -> float:
    """Return the FLOPs of all steps of a run, without attention scores (see `ParamCounts.step_flops`)."""
    from pipeline.planning.stage_split import StageSplit
    from pipeline.serving.export_config import ExportConfig

    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_bytes().splitlines()]
    sums = {name: sum(step[name] for step in steps) for name in ("tokens", "targets", "images")}
    one_stage = config.model_copy(update={"parallel": type(config.parallel)()})
    spec = ExportConfig.load(made).spec
    split = StageSplit.of(spec, one_stage, image_share=0.0, target_share=1.0)
    media_tokens = media_tokens_of(Manifest.load(config.data.packs), sums.pop("images"))
    return split.counts.step_flops(**sums, images=spec.views(media_tokens))


def media_tokens_of(manifest: Manifest, images: int) -> int:
    """Return the tokens of so many images, at the mean of the packs: images of `media` packs differ in size."""
    return round(images * manifest.all_media_tokens / max(1, manifest.images))


def _guesses(
    folder: StudyFolder, trained: PackReader, packs: PackReader, answers: list[dict[str, Any]], skip: int
) -> dict[str, list[bool]]:
    """Return which questions two guesses get right that see no picture, learned from the training rows.

    ``constant``: the most frequent answer of the question's family; ``question_only``: the most frequent answer to the
    same question, else the constant. They are the same for all runs with the same packs and questions, and kept in a
    file. ``answers`` are to the questions of ``packs`` after the first ``skip``, in order.
    """
    asked = [(answer["sample"], answer["family"]) for answer in answers]
    key = hash_json([trained.manifest.plan_sha256, packs.manifest.plan_sha256, skip, asked, VERSION])[:12]
    path = folder.path / "guesses" / f"{key}.json"
    if path.is_file():
        return dict(json.loads(path.read_bytes()))
    by_family, by_question = _frequencies(trained)
    found: dict[str, list[bool]] = {"constant": [], "question_only": []}
    questions = islice(_segments(packs, skip + len(answers)), skip, None)
    for (sample, family), (source, prompt, truth) in zip(asked, questions, strict=True):
        assert source.sample == sample, "questions and segments are in the same order"
        constant = (by_family.get(family) or _total(by_family)).most_common(1)[0][0]
        found["constant"].append(constant == truth)
        same = by_question.get(prompt)
        found["question_only"].append((same.most_common(1)[0][0] if same else constant) == truth)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found).encode() + b"\n")
    return found


_Text = tuple[int, ...]


def _segments(packs: PackReader, limit: int) -> Any:
    """Yield (source, token ids of the text before the answer, token ids of the answer) of up to ``limit`` samples."""
    count = 0
    for row in packs:
        for number, source in enumerate(row.source, start=1):
            answer = last_answer(row, number)
            if answer is None:
                continue
            text = (row.segment == number) & (row.instance < 0)
            text[answer.start :] = False
            ids = row.input_ids
            yield source, tuple(ids[text].tolist()), tuple(ids[answer.start : answer.stop].tolist())
            count += 1
            if count == limit:
                return


def _frequencies(packs: PackReader) -> tuple[dict[str, Counter[_Text]], dict[_Text, Counter[_Text]]]:
    by_family: dict[str, Counter[_Text]] = defaultdict(Counter)
    by_question: dict[_Text, Counter[_Text]] = defaultdict(Counter)
    for source, prompt, answer in _segments(packs, TRAINED_SAMPLES):
        by_family[source.family or source.dataset][answer] += 1
        by_question[prompt][answer] += 1
    return by_family, by_question


def _total(by_family: dict[str, Counter[_Text]]) -> Counter[_Text]:
    return sum(by_family.values(), Counter())
