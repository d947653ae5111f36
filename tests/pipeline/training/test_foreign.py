"""A checkpoint or a run folder from someone else: it runs no code, and leads nowhere outside of itself."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from data_prep.common import yaml_files
from data_prep.common.errors import UserError
from pipeline.checkpoints.base import hash_file
from pipeline.checkpoints.checkpoint import Checkpoint, newest_intact
from pipeline.checkpoints.manifest import CheckpointManifest, ParamEntry, hashed_json, rank_file
from pipeline.checkpoints.writing import Target, save_phases
from pipeline.train import main
from pipeline.training.run.folder import RunFolder
from tests.launch import ROOT
from tests.pipeline.training.runs import flags

RANK = rank_file(0)
KINDS = ("master", "exp_avg", "exp_avg_sq")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of one parameter, made as a run of one rank makes it."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(b"pieces")
    target = Target(tmp_path / "run/checkpoints/step-00000003", "token")
    manifest = CheckpointManifest(
        step=3, optimizer_steps=3, consumed_packs=12, plan_sha256="0", global_batch_size=4, pp=1, dp=1, config={},
        model={"spec": {"llm": {}}, "tokenizer_sha256": "0"}, params={"w": ParamEntry((2, 3), 0, True)},
    )  # fmt: skip
    own = {f"{kind}|w": torch.arange(6.0) for kind in KINDS}
    parts = save_phases(own, target, manifest, rank=0, tokenizer=tokenizer)
    parts.send([next(parts)()])()
    return target.final


def edit(folder: Path, *keys: str, value: Any) -> None:
    """Set one value of the manifest; the last key may be new."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    place = raw
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    del raw["xxh3"]
    path.write_text(hashed_json(raw))


def complaint(folder: Path) -> str:
    """What is said of a checkpoint, by the way a start looks at it: never an exception, always one line."""
    found, complaints = newest_intact(folder.parents[1], rank=0, world=1)
    assert found is None and len(complaints) == 1 and "\n" not in complaints[0]
    return complaints[0]


def test_the_unaltered_checkpoint_is_whole(folder: Path) -> None:
    assert newest_intact(folder.parents[1], rank=0, world=1)[1] == []
    [(name, tensor)] = Checkpoint(folder).parameters()
    assert name == "w" and tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


ENTRY = {"bytes": 6, "xxh3": "0" * 32}
BASE = {"kind": "llm", "path": "/models/llm", "files": {"model.safetensors": ENTRY}}


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        pytest.param(("files", "../secret"), ENTRY, "no file named '../secret'", id="a name that leads up"),
        pytest.param(("files", "/etc/passwd"), ENTRY, "no file named", id="an absolute name"),
        pytest.param(("files", "tokenizer/../../secret"), ENTRY, "no file named", id="up, from the tokenizer"),
        pytest.param(("files", "tokenizer/.."), ENTRY, "no file named", id="the folder itself"),
        pytest.param(("files", f"{RANK}/../x"), ENTRY, "no file named", id="a file as a folder"),
        pytest.param(("files", "code.py"), ENTRY, "no file named", id="another file"),
        pytest.param(("files", "rank-00001.safetensors"), ENTRY, "2 rank files", id="more ranks than the grid"),
        pytest.param(("files", RANK, "bytes"), -1, "greater than or equal to 0", id="a negative size"),
        pytest.param(("files", RANK, "bytes"), float("nan"), "valid integer", id="a size that is not a number"),
        pytest.param(("files", RANK, "bytes"), 1 << 70, "less than", id="a size beyond any disk"),
        pytest.param(("files", RANK, "bytes"), True, "valid integer", id="a size that is true"),
        pytest.param(("files", RANK, "xxh3"), "../x", "match pattern", id="a hash that is none"),
        pytest.param(("files", RANK, "more"), 1, "more", id="a key too many in a file"),
        pytest.param(("dp",), 1 << 40, "dp", id="too many dp ranks"),
        pytest.param(("dp",), 3, "1 rank files", id="dp ranks without files"),
        pytest.param(("pp",), 0, "greater than 0", id="no stages"),
        pytest.param(("step",), 3.5, "valid integer", id="half a step"),
        pytest.param(("step",), None, "valid integer", id="no step"),
        pytest.param(("params", "w", "shape"), [-1, 6], "greater than or equal", id="a negative dimension"),
        pytest.param(("params", "w", "shape"), [1 << 60], "less than", id="a dimension beyond any memory"),
        pytest.param(("params", "w", "shape"), [1] * 99, "at most 8", id="99 dimensions"),
        pytest.param(("params", "w", "shape"), "6", "valid array", id="a shape of letters"),
        pytest.param(("params", "w", "stage"), 5, "on stage 5", id="a stage that is not there"),
        pytest.param(("params", "w", "trained"), "yes", "valid boolean", id="yes is not true"),
        pytest.param(("model",), {}, "description of the language model is missing", id="no model"),
        pytest.param(
            ("model", "spec"), [], "description of the language model is missing", id="a model of another kind"
        ),
        pytest.param(("format",), "pickle", "mma-checkpoint", id="another format"),
        pytest.param(("version",), 1, "mma-checkpoint version 1, this release reads version 4", id="another version"),
        pytest.param(("more",), 1, "more", id="a key too many"),
        pytest.param(("base",), [{**BASE, "files": {"../x": ENTRY}}], "match pattern", id="base weights that lead up"),
        pytest.param(("base",), [{**BASE, "kind": "pickle"}], "match pattern", id="base weights of another kind"),
        pytest.param(("params", "w", "stored"), 0, "valid boolean", id="0 is not false"),
    ],
)
def test_a_manifest_is_validated(keys: tuple[str, ...], value: object, words: str, folder: Path) -> None:
    edit(folder, *keys, value=value)
    assert words in complaint(folder), complaint(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '"manifest"', "{", '{"step": 1}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\0"],
    ids=["empty", "a list", "null", "a word", "half", "little", "deep", "long number", "binary"],
)  # fmt: skip
def test_what_is_no_manifest_is_said_so(text: str, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    assert "is not an intact checkpoint" in complaint(folder)


def replace_by_link(path: Path) -> None:
    kept = path.rename(path.parents[3] / f"outside-{path.name}")
    path.symlink_to(kept)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def grow(path: Path) -> None:
    os.truncate(path, 1 << 34)  # takes no room on the disk


@pytest.mark.parametrize("change", [replace_by_link, replace_by_pipe, grow, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", RANK, "tokenizer/tokenizer.model"])
def test_only_plain_files_of_the_folder_are_read(name: str, change: Callable[[Path], None], folder: Path) -> None:
    change(folder / name)
    assert name.split("/")[-1] in complaint(folder)


def test_a_tokenizer_folder_that_is_a_link_is_not_followed(folder: Path) -> None:
    replace_by_link(folder / "tokenizer")
    assert "tokenizer.model is missing or not a regular file" in complaint(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        pytest.param({"master|w": torch.arange(6)}, "I64", id="whole numbers"),
        pytest.param({"master|w": torch.ones(6, dtype=torch.float64)}, "F64", id="doubles"),
        pytest.param({"master|w": torch.ones(2, 3)}, r"F32\[2, 3\]", id="not flat"),
        pytest.param({"master|w": torch.ones(5)}, r"has 5 elements, .* of shape \[2, 3\]", id="too few"),
        pytest.param({"master|w": torch.ones(7)}, r"has 7 elements, .* of shape \[2, 3\]", id="too many"),
        pytest.param({"master|v": torch.ones(6)}, r"has no master\|w", id="another name"),
    ],
)
def test_shards_that_contradict_the_manifest_are_refused(
    tensors: dict[str, torch.Tensor], words: str, folder: Path
) -> None:
    path = folder / RANK
    save_file(tensors, path)
    edit(folder, "files", RANK, value={"bytes": path.stat().st_size, "xxh3": hash_file(path)})
    assert Checkpoint(folder).faults() == [], "the hashes agree: they are as foreign as the rest"
    with pytest.raises(UserError, match=words):
        list(Checkpoint(folder).parameters())


def test_a_pickle_in_the_place_of_shards_is_not_opened(folder: Path) -> None:
    path = folder / RANK
    torch.save({"master|w": torch.ones(6)}, path)
    edit(folder, "files", RANK, value={"bytes": path.stat().st_size, "xxh3": hash_file(path)})
    with pytest.raises(UserError, match="cannot be read"):
        list(Checkpoint(folder).parameters())


def test_a_run_is_not_started_from_a_foreign_checkpoint_that_lies(
    folder: Path, small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, "files", "../secret", value=ENTRY)
    assert main([*flags(small_demo, tmp_path / "new"), "--init-from", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "no file named '../secret'" in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_second_start_is_refused_in_one_line(
    small_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.common.folder_lock.HERE_S", 0.1)
    first = RunFolder(str(tmp_path / "run"))
    first.create()
    first.claim()
    assert main(flags(small_demo, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert f"is being trained by process {os.getpid()} on " in said and said.count("\n") == 1
    assert first.status() == {}, "the first one's status is left alone"


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "status.json"])
def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        RunFolder(str(tmp_path / "run")).create()
    assert not (tmp_path / "elsewhere").exists()


PLACES_OF_PICKLE = {
    # collectives between the ranks of one job, which trust each other; nothing of it is ever a file
    ("pipeline/checkpoints/writing.py", "all_gather_object"),
    ("pipeline/training/checkpoint_manager.py", "all_gather_object"),
    ("pipeline/training/trainer.py", "broadcast_object_list"),
    ("pipeline/training/origin.py", "all_gather_object"),
    ("pipeline/commands/doctor.py", "all_gather_object"),
    ("pipeline/training/tracing.py", "all_gather_object"),
    ("pipeline/training/supervise.py", "all_gather_object"),
    ("pipeline/training/supervise.py", "broadcast_object_list"),
    ("pipeline/checkpoints/checkpoint.py", "all_gather_object"),
    ("pipeline/checkpoints/checkpoint.py", "broadcast_object_list"),
    ("pipeline/parallel/launch.py", "all_gather_object"),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "np.load", "numpy.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
}  # fmt: skip
OBJECT_COLLECTIVES = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


def test_nothing_is_unpickled_and_no_code_is_run_from_data() -> None:
    found = set()
    for path in [path for room in ("pipeline", "data_prep", "slurm") for path in sorted((ROOT / room).rglob("*.py"))]:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & FORBIDDEN_MODULES, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in FORBIDDEN_CALLS, (name, called)
                assert "trust_remote_code" not in {keyword.arg for keyword in node.keywords}, name
                assert called != "yaml.load" or ast.unparse(node.keywords[0].value) == "_Loader", name
                found |= {(name, word) for word in OBJECT_COLLECTIVES if called.endswith(f".{word}")}
    assert issubclass(yaml_files._Loader, yaml.SafeLoader)
    assert found == PLACES_OF_PICKLE
