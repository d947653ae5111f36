"""Real lmms-eval, offline, through the plug-in: its scores equal those of ``mma bench`` and those computed by hand.

`make lmms-eval` makes the environment, beside the project's own packages; without it the tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from pipeline.evaluation.bench import Candidate, Settings, run
from pipeline.evaluation.benchmarks.mme import COGNITION, PERCEPTION
from pipeline.evaluation.registry import chosen
from pipeline.serving.export import export
from tests.launch import ROOT
from tests.pipeline.evaluation.official import cell, parquet, write_cv_bench, write_realworldqa
from tests.pipeline.serving.helpers import make_saved
from tests.pipeline.serving.lmms_eval_worker import Scripted

PYTHON = Path(os.environ.get("LMMS_EVAL_PYTHON", ROOT / ".venv-lmms-eval" / "bin" / "python"))
needs_lmms_eval = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no lmms-eval at {PYTHON}: run make lmms-eval")
TASKS = {
    "mme": ("mme", "mme/test.parquet"),
    "pope": ("pope", "pope/test.parquet"),
    "mmbench_en_dev_static": ("mmbench", "mmbench/dev.parquet"),
    "realworldqa": ("realworldqa", "realworldqa/test-00000-of-00001.parquet"),
    "cv_bench_2d": ("cv_bench", "cv-bench/test_2d.parquet"),
    "cv_bench_3d": ("cv_bench", "cv-bench/test_3d.parquet"),
}
"""Task -> folder of its code, and file of its data."""
SCORES = {
    "mme-p": ("score", "mme", "mme_perception_score", 1),
    "mme-c": ("score", "mme", "mme_cognition_score", 1),
    "pope": ("accuracy", "pope", "pope_accuracy", 100),
    "mmbench": ("circular", "mmbench_en_dev_static", "gpt_eval_score", 1),
    "realworldqa": ("accuracy", "realworldqa", "exact_match", 100),
    "cv-bench-2d": ("plain accuracy", "cv_bench_2d", "cv_bench_acc", 100),
    "cv-bench-3d": ("plain accuracy", "cv_bench_3d", "cv_bench_acc", 100),
}
"""Our benchmark -> its score, and the task, score and factor of lmms-eval."""


def write_data(data: Path) -> Path:
    """Tiny files in the official Parquet formats, as `datasets` writes them."""
    yes_no = " Please answer yes or no."
    parquet(data / "mme/test.parquet", [
        {"question_id": f"{kind}/{n // 2}.png", "image": cell(n // 2 + len(kind)), "category": kind,
         "question": f"Is {n} of {kind} there?{yes_no}", "answer": "Yes" if n % 2 == 0 else "No"}
        for kind in (*PERCEPTION, *COGNITION) for n in range(4)
    ])  # fmt: skip
    parquet(data / "pope/test.parquet", [
        {"id": str(n), "question_id": str(n), "question": f"Is there a {['cat', 'dog', 'bus', 'car'][n % 4]} in {n}?",
         "answer": "yes" if n % 2 else "no", "image_source": f"{n}", "image": cell(n % 3),
         "category": ("random", "popular", "adversarial")[n // 4]}
        for n in range(12)
    ])  # fmt: skip
    options = ["cat", "dog", "bus"]
    parquet(data / "mmbench/dev.parquet", [
        {"index": number + turn * 1_000_000, "question": f"What is {number}?", "hint": "", "image": cell(number),
         **dict(zip("ABC", options[turn:] + options[:turn], strict=True)), "D": "nan",
         "answer": "ABC"[(options[turn:] + options[:turn]).index("cat")], "category": "identity",
         "L2-category": "finegrained", "source": "made", "split": "dev"}
        for number in range(6) for turn in range(2 if number else 1)
    ])  # fmt: skip
    write_realworldqa(data)
    write_cv_bench(data)
    for path in data.rglob("*.parquet"):
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(data / "cache"))
        rows.cast_column("image", datasets.Image()).to_parquet(path)
    return data


def local_tasks(package: Path, data: Path, folder: Path) -> Path:
    """Copy the official tasks, code and scorers included, and point them at local files."""
    for task, (name, file) in TASKS.items():
        code = folder / task
        shutil.copytree(package / "tasks" / name, code, ignore=shutil.ignore_patterns("reasoning", "__pycache__"))
        for other in code.glob("*.yaml"):
            if other.stem not in (task, "mmbench"):  # the code of MMBench reads mmbench.yaml
                other.unlink()
        split = "dev" if name == "mmbench" else "test"
        where = ["dataset_path: parquet", f"dataset_kwargs: {{data_files: {{{split}: {data / file}}}}}"]
        for path in [code / f"{task}.yaml", *code.glob("_default*_yaml")]:
            lines = path.read_text().splitlines()
            strange = ("dataset_", "task:", "tag:", "  - public_eval", "  token:")
            kept = [line for line in lines if not line.startswith(strange)]
            own = [*where, f"task: local_{task}"] if path.stem == task else []
            path.write_text("\n".join([*kept, *own]) + "\n")
    return folder


def metadata(folder: Path) -> Path:
    """The project's installed metadata, with its entry points, as setup.py declares them."""
    folder.mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    return folder


def lmms_eval(tmp: Path, export_folder: Path, data: Path) -> dict[str, dict[str, float]]:
    """Run real lmms-eval; return its results by task."""
    found = subprocess.run(
        [str(PYTHON), "-c", "import lmms_eval; print(lmms_eval.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    tasks = local_tasks(Path(found.stdout.split()[-1]), data, tmp / "tasks")
    offline = {f"{name}_OFFLINE": "1" for name in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
    paths = f"{ROOT}:{metadata(tmp / 'metadata')}"
    environment = {**os.environ, **offline, "PYTHONPATH": paths, "HF_HOME": str(tmp / "hf"), "OMP_NUM_THREADS": "1"}
    names = ",".join(f"local_{task}" for task in TASKS)
    flags = ["--model", "mma", "--model_args", f"pretrained={export_folder}", "--tasks", names, "--batch_size", "3"]
    more = ["--include_path", str(tasks), "--output_path", str(tmp / "out"), "--log_samples", "--device", "cpu"]
    command = [str(PYTHON), "-m", "tests.pipeline.serving.lmms_eval_worker", *flags, *more]
    done = subprocess.run(command, cwd=tmp, env=environment, capture_output=True, text=True, timeout=500)
    found = {path.name: json.loads(path.read_text()) for path in (tmp / "out").rglob("*_results.json")}
    results = next((content["results"] for content in found.values() if "results" in content), {})
    assert done.returncode == 0 and results, done.stdout[-3000:] + done.stderr[-3000:]
    return {task: {key.split(",")[0]: value for key, value in results[f"local_{task}"].items()} for task in TASKS}


def by_hand(name: str, path: Path) -> float:
    """The score of answers that are all plain: yes, no, a number or a letter."""
    mme, right, whole = name.startswith("mme"), dict[str, list[bool]](), dict[tuple[str, str], list[bool]]()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        hit = row["answer"].lower() == row["facts"]["answer"].strip("()").lower()
        kind = row["facts"]["category"] if mme else ""
        pair = row["id"].split(":")[0] if mme else row["id"][-1] if name == "mmbench" else row["id"]
        right.setdefault(kind, []).append(hit)
        whole.setdefault((kind, pair), []).append(hit)
    if mme:  # accuracy, and accuracy+: both questions about an image
        pairs = {kind: [all(hits) for (own, _), hits in whole.items() if own == kind] for kind in right}
        return sum(100 * sum(x) / len(x) for table in (right, pairs) for x in table.values())
    return 100 * sum(all(hits) for hits in whole.values()) / len(whole)


@needs_lmms_eval
@pytest.mark.slow
def test_scores_equal_those_of_mma_bench(tmp_path: Path) -> None:
    folder = export(make_saved(tmp_path, max_position_embeddings=4096), tmp_path / "export")
    data = write_data(tmp_path / "data")
    theirs = lmms_eval(tmp_path, folder, data)
    model = Scripted.load(folder)
    run(
        chosen(",".join(SCORES)), [Candidate(folder, tmp_path / "bench", lambda: model)], Settings(data, batch=4), print
    )
    for name, (score, task, metric, factor) in SCORES.items():
        ours = json.loads((tmp_path / "bench" / name / "result.json").read_text())["scores"][score]
        assert ours == pytest.approx(factor * theirs[task][metric]), name
        assert ours == pytest.approx(by_hand(name, tmp_path / "bench" / name / "graded.jsonl")), name
        assert ours > 0, name


@needs_lmms_eval
@pytest.mark.slow
def test_the_entry_point_is_found_and_wrong_requests_are_refused(tmp_path: Path) -> None:
    code = (
        "import lmms_eval.models as m; from pipeline.serving.lmms_eval import MmaChat; "
        "print(m.get_model('mma') is MmaChat, MmaChat.is_simple)\n"
        "try: MmaChat('x', colour='red')\nexcept ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{metadata(tmp_path / 'metadata')}"}
    done = subprocess.run([str(PYTHON), "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert "True False" in done.stdout, done.stderr[-2000:]
    assert "--model_args colour: unknown for the model mma" in done.stdout


def test_the_package_declares_its_plug_in(tmp_path: Path) -> None:
    (found,) = importlib.metadata.distributions(path=[str(metadata(tmp_path / "metadata"))])
    assert [(point.name, point.value) for point in found.entry_points if point.group == "lmms_eval.models"] == [
        ("mma", "pipeline.serving.lmms_eval_models:manifests")
    ]
