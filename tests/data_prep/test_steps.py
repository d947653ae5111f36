"""The three steps together, on small raw corpora with real readers, tokenizers and processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.common.errors import UserError
from data_prep.common.workers import ALONE, LocalTeam, Team
from data_prep.corpora import build_corpus
from data_prep.corpora.base import Corpus
from data_prep.corpora.llava import LLaVA
from data_prep.example import ImageRef
from data_prep.images.store import ImageStore
from data_prep.ingest import shard_writer as outputs
from data_prep.ingest.shard_writer import check_annotated_size
from data_prep.ingest.step import ingest
from data_prep.ingest.workspace import Workspace
from data_prep.materialize import materialize
from data_prep.packs import Manifest, PackReader
from data_prep.planning.step import plan
from data_prep.progress import Reporter
from data_prep.quarantine import BadSample
from data_prep.text.template import template_of
from data_prep.text.tokenizer import Tokenizer, train_sentencepiece
from data_prep.verify import verify
from tests.data_prep.raw import (
    make_recipe,
    png,
    prepare,
    recipe_dict,
    tree_hashes,
    write_llava,
    write_recipe,
    write_tar,
    write_world,
)
from tests.kills import DATA_PREP_KILLS, SEED

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with its packs, made by one process; tests must not change it."""
    folder = tmp_path_factory.mktemp("made")
    write_world(folder / "raw")
    prepare(make_recipe(folder))
    return folder


def drawn(out: Path, name: str) -> list[tuple[str, str]]:
    return [(source.dataset, source.sample) for row in PackReader(out / "packs" / name) for source in row.source]


def test_each_pack_set_draws_what_the_recipe_says(made: Path) -> None:
    out = made / "out"
    captions = drawn(out, "pt")
    assert len(captions) == 120 and {captions.count(one) for one in captions} == {2}
    sft = [dataset for dataset, _ in drawn(out, "sft")]
    assert (sft.count("talk"), sft.count("captions")) == (76, 25)
    held_out = [sample.partition("-")[0] for _, sample in drawn(out, "eval")]
    assert held_out == [f"talk{n}" for n in range(30)]


def test_rows_hold_the_contract(made: Path) -> None:
    for name in ("pt", "sft", "eval"):
        reader = PackReader(made / "out" / "packs" / name, verify=True)
        manifest, store = reader.manifest, ImageStore(reader.directory / reader.manifest.image_store)
        assert sum(row.n_target for row in reader) == manifest.targets
        for row in reader:
            used = np.count_nonzero(row.segment)
            assert (row.segment[:used] > 0).all() and set(row.segment[:used]) == set(range(1, len(row.source) + 1))
            assert (row.input_ids[used:] == manifest.pad_id).all() and not row.generated[used:].any()
            assert ((row.modality == 1) == (row.instance >= 0)).all()
            assert ((row.modality == 1) == (row.input_ids == manifest.image_id)).all()
            assert np.bincount(row.instance[row.instance >= 0], minlength=0).tolist() == [4] * len(row.image_row)
            assert all(0 <= image < len(store) for image in row.image_row)
            ends = [np.flatnonzero(row.segment == one)[-1] for one in range(1, len(row.source) + 1)]
            assert all(row.generated[end] and row.input_ids[end] in manifest.eos_ids for end in ends)


def test_a_segment_decodes_to_its_sample_and_its_image(made: Path) -> None:
    reader = PackReader(made / "out" / "packs" / "pt")
    tokenizer = Tokenizer.load(reader.directory / reader.manifest.tokenizer)
    store = ImageStore(reader.directory / reader.manifest.image_store)
    for row in reader:
        for segment, source in enumerate(row.source, start=1):
            number = int(source.sample[-9:])
            at = row.segment == segment
            assert tokenizer.decode(row.input_ids[at & (row.modality == 0)]) == f"a caption about {number} things"
            (instance,) = set(row.instance[at & (row.modality == 1)])
            assert store.read(int(row.image_row[instance])) == png(7 if number % 10 == 0 else number)


def test_inference_finds_the_template_of_its_packs(made: Path) -> None:
    assert template_of(Manifest.load(made / "out" / "packs" / "sft")).name == "plain"


def test_the_bytes_do_not_depend_on_the_number_of_workers(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "raw", tmp_path / "raw")
    prepare(make_recipe(tmp_path), workers=3)
    assert tree_hashes(tmp_path / "out") == tree_hashes(made / "out")


def test_shares_of_an_array_make_the_same_bytes_and_say_what_is_missing(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "raw", tmp_path / "raw")
    recipe = make_recipe(tmp_path)
    shares: list[Team] = [LocalTeam(1, index, 2) for index in range(2)]
    ingest(recipe, shares[1], QUIET)
    with pytest.raises(
        UserError, match=r"ingest is incomplete: 4 shards are missing, the first is captions/.*; run `mma-prep ingest`"
    ):
        plan(recipe, QUIET)
    ingest(recipe, shares[0], QUIET)
    plan(recipe, QUIET)
    for share in shares:
        materialize(recipe, share, QUIET)
    assert tree_hashes(tmp_path / "out") == tree_hashes(made / "out")


def test_a_rerun_does_nothing_and_a_change_redoes_only_what_it_touches(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    prepare(make_recipe(tmp_path, tokenizer={"train": {"vocab_size": 400, "samples": 1000}}))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    said = prepare(make_recipe(tmp_path))
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    unchanged = {path for path in times if path.name != "rejects.jsonl" and ".work" not in path.parts}
    assert all(again[path] == times[path] for path in unchanged)
    assert not any("/4" in line or "materialize" in line for line in said)

    reweighted = recipe_dict(tmp_path / "raw", tmp_path / "out")["packs"]
    reweighted["sft"]["corpora"] = {"talk": 1.0, "captions": 1.0}
    said = prepare(make_recipe(tmp_path, packs=reweighted))
    assert [line.split()[1] for line in said if line.startswith("materialize")] == ["sft"]
    assert not any(line.startswith(("ingest (", "tokenizer")) for line in said)


@pytest.mark.parametrize("change", ["seq_len", "system", "epochs", "corpora", "seed", "fewer samples"])
def test_rows_are_not_made_by_a_plan_of_other_settings_or_samples(tmp_path: Path, change: str) -> None:
    write_world(tmp_path / "raw", tars=1, captions=8, talks=8)
    tokenizer = str(own_tokenizer(tmp_path))
    pack = {"corpora": ["talk", "captions"], "template": "plain", "seq_len": 96, "epochs": 2}
    prepare(make_recipe(tmp_path, tokenizer=tokenizer, packs={"sft": pack}))
    before = tree_hashes(tmp_path / "out")
    changes = {"seq_len": 128, "system": "be brief", "epochs": 1, "corpora": ["captions", "talk"]}
    if change == "fewer samples":
        write_llava(tmp_path / "raw", [("talk1", 1, ("what is it?", "it is 1."))])
    changed = {**pack, **({change: changes[change]} if change in changes else {})}
    recipe = make_recipe(tmp_path, tokenizer=tokenizer, packs={"sft": changed}, seed=4 if change == "seed" else 3)
    ingest(recipe, ALONE, QUIET)
    with pytest.raises(
        UserError, match=r"^packs.sft: its plan was made with other settings or samples; run `mma-prep plan`"
    ):
        materialize(recipe, ALONE, QUIET)
    packs = {path: sha256 for path, sha256 in before.items() if path.startswith("packs")}
    assert packs.items() <= tree_hashes(tmp_path / "out").items()
    plan(recipe, QUIET)
    materialize(recipe, ALONE, QUIET)
    assert list(verify(tmp_path / "out"))


def test_changed_raw_files_are_read_again_and_old_stores_go(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    prepare(make_recipe(tmp_path))
    (old,) = (tmp_path / "out" / "images").iterdir()
    write_tar(tmp_path / "raw" / "captions" / "00001.tar", {"000000099": (png(200), "something new")})
    prepare(make_recipe(tmp_path))
    (new,) = (tmp_path / "out" / "images").iterdir()
    assert new != old
    assert "captions/00001/000000099" in {sample.replace("%2F", "/") for _, sample in drawn(tmp_path / "out", "pt")}
    assert list(verify(tmp_path / "out"))
    fresh = tmp_path / "fresh"
    shutil.copytree(tmp_path / "raw", fresh / "raw")
    prepare(make_recipe(fresh))
    assert tree_hashes(fresh / "out") == tree_hashes(tmp_path / "out")


def test_without_text_to_train_a_tokenizer_the_first_reject_is_the_reason(tmp_path: Path) -> None:
    write_llava(tmp_path / "raw", [("t0", 0, ("what?", "")), ("t1", 1, ("what?", ""))])
    corpora = {"talk": recipe_dict(tmp_path / "raw", tmp_path / "out")["corpora"]["talk"]}
    packs = {"sft": {"corpora": ["talk"], "template": "plain", "seq_len": 96, "epochs": 1}}
    with pytest.raises(UserError, match=r"no text to train on: corpora.talk: t0-\w+ is rejected for no-answer \(.+\)$"):
        prepare(make_recipe(tmp_path, corpora=corpora, packs=packs))


def own_tokenizer(folder: Path) -> Path:
    """A tokenizer that does not depend on the raw data."""
    train_sentencepiece(["a caption about 123 things", "what is it?"], 400, (), folder / "tokenizer/tokenizer.model")
    return folder / "tokenizer"


def test_only_changed_shards_are_read_again(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    tokenizer = own_tokenizer(tmp_path)
    prepare(make_recipe(tmp_path, tokenizer=str(tokenizer)))
    write_tar(tmp_path / "raw" / "captions" / "00001.tar", {"000000099": (png(7), "something new")})
    write_tar(tmp_path / "raw" / "captions" / "00003.tar", {"000000100": (png(201), "something more")})
    said = prepare(make_recipe(tmp_path, tokenizer=str(tokenizer)))
    assert [line.split("  ")[0] for line in said if line.startswith("ingest (")] == ["ingest (1 process): 4/4"]
    assert len(drawn(tmp_path / "out", "pt")) == 2 * 42

    fresh = tmp_path / "fresh"
    shutil.copytree(tmp_path / "raw", fresh / "raw")
    prepare(make_recipe(fresh, tokenizer=str(tokenizer)))
    assert tree_hashes(fresh / "out") == tree_hashes(tmp_path / "out")


def test_a_process_lists_the_raw_files_once_for_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path / "raw", tars=9, captions=1)
    built = Counter[str]()

    def count(kind: str, options: Mapping[str, Any], root: Path) -> Corpus:
        built[kind] += 1
        return build_corpus(kind, options, root)

    monkeypatch.setattr(outputs, "build_corpus", count)
    outputs._reader.cache_clear()
    ingest(make_recipe(tmp_path), ALONE, QUIET)
    assert built == {"webdataset": 1, "llava": 1}  # of either writing
    write_tar(tmp_path / "raw" / "captions" / "00099.tar", {"000000099": (png(99), "something new")})
    ingest(make_recipe(tmp_path), ALONE, QUIET)
    assert built["webdataset"] == 2


def test_shards_are_listed_once_and_a_damaged_list_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path / "raw")
    recipe = make_recipe(tmp_path)
    listed = Workspace(recipe).shards
    assert list(listed["talk"]) == ["rows-00000000"] and len(listed["captions"]) == 3
    with monkeypatch.context() as patch:
        patch.setattr(LLaVA, "read_rows", lambda self: pytest.fail("rows were counted again"))
        assert Workspace(recipe).shards == listed
    (path,) = (tmp_path / "out").glob("ingest/talk/shards-*.json")
    path.write_bytes(path.read_bytes().replace(b"rows-00000000", b"rows-00000001"))
    assert Workspace(recipe).shards == listed
    monkeypatch.setattr(LLaVA, "rows_per_shard", 4)
    write_llava(tmp_path / "raw", [(f"t{n}", n, ("what?", "a ring.")) for n in range(9)])
    assert len(Workspace(recipe).shards["talk"]) == 3


def test_rejects_are_counted_listed_and_limited(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    bad = {
        "a": (b"<html>", "no image"),
        "b": (png(1)[:-30], "cut"),
        "c": (png(1), "nul \0 here"),
        "d": (png(2), "long " * 100),
        "e": (png(3), "fine"),
    }
    write_tar(tmp_path / "raw" / "captions" / "00009.tar", bad)
    with pytest.raises(
        UserError, match=r"corpora.captions \(in packs.pt\): 4 of 65 .*bad_fraction=0: .*mma-prep rejects"
    ):
        prepare(make_recipe(tmp_path))
    prepare(make_recipe(tmp_path, max_bad_fraction=0.1))
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    codes = {entry["sample"][-1]: entry["code"] for entry in listed}
    assert codes == {"a": "not-an-image", "b": "broken-image", "c": "bad-encoding", "d": "too-long"}
    assert len(drawn(tmp_path / "out", "pt")) == 2 * 61


def test_a_writing_that_loses_most_of_a_corpus_is_not_hidden_by_others(tmp_path: Path) -> None:
    write_llava(tmp_path / "raw", [(f"t{n}", n, ("what is this?", "a ring " * (1 + 30 * (n > 0)))) for n in range(8)])
    corpora = {"talk": recipe_dict(tmp_path / "raw", tmp_path / "out")["corpora"]["talk"]}
    whole = {"corpora": ["talk"], "template": "plain", "seq_len": 512, "epochs": 1}
    packs = {"a": whole, "b": {**whole, "system": "be kind"}, "short": {**whole, "seq_len": 64}}
    message = r"^corpora.talk \(in packs.short\): 7 of 8 samples \(87.5%\) were rejected, above max_bad_fraction=0.5"
    with pytest.raises(UserError, match=message):
        prepare(make_recipe(tmp_path, corpora=corpora, packs=packs, max_bad_fraction=0.5))


def test_damaged_tars_are_limited_as_tars_whatever_they_held(tmp_path: Path) -> None:
    write_world(tmp_path / "raw", talks=1)
    tar = tmp_path / "raw" / "captions" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:700])  # 20 samples are gone, and one reject says so
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    packs, corpora = {"pt": content["packs"]["pt"]}, {"captions": content["corpora"]["captions"]}
    changes = {"packs": packs, "corpora": corpora, "tokenizer": str(own_tokenizer(tmp_path))}
    with pytest.raises(UserError, match=r"^corpora.captions: 1 of 3 tars are damaged, above max_bad_fraction=0.3; "):
        prepare(make_recipe(tmp_path, **changes, max_bad_fraction=0.3))
    prepare(make_recipe(tmp_path, **changes, max_bad_fraction=0.34))


@pytest.mark.parametrize(
    ("annotated", "code"),
    [(None, ""), ((8, 6), ""), ((800, 600), ""), ((640, 481), ""), ((6, 8), "bad-box"), ((8, 8), "bad-box")],
)
def test_boxes_drawn_on_another_shape_are_rejected(annotated: tuple[float, float] | None, code: str) -> None:
    image = ImageRef("p.jpg", data=b"", annotated_size=annotated)
    if not code:
        check_annotated_size(image, (8, 6))
        return
    with pytest.raises(BadSample, match=r"annotated as .* pixels, the upright image has 8 x 6") as caught:
        check_annotated_size(image, (8, 6))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        ({"template": "caption", "corpora": ["talk"]}, "wrong-template"),
        ({"max_text_tokens": 3}, "too-long"),
        ({"max_text_tokens": 24, "too_long": "truncate"}, "no draw supervises its end of turn"),
    ],
)
def test_packs_that_would_teach_nothing_are_refused(tmp_path: Path, pack: dict[str, Any], message: str) -> None:
    write_llava(tmp_path / "raw", [(f"t{n}", n, ("what is this?", "a long and winding answer " * 4)) for n in range(9)])
    content = recipe_dict(tmp_path / "raw", tmp_path / "out")
    del content["corpora"]["captions"]
    whole = {"corpora": ["talk"], "template": "plain", "seq_len": 96, "epochs": 1, **pack}
    with pytest.raises(UserError, match=message):
        prepare(make_recipe(tmp_path, corpora=content["corpora"], packs={"sft": whole}))


def test_truncated_answers_are_kept_without_an_end_and_reported(tmp_path: Path) -> None:
    talks = [("short", 1, ("what?", "a ring.")), ("long", 2, ("what?", "a ring and a circle " * 9))]
    write_llava(tmp_path / "raw", talks)
    corpora = {"talk": {"type": "llava", "conversations": "llava.json", "images": "images"}}
    packs = {
        "sft": {"corpora": ["talk"], "template": "plain", "seq_len": 64, "epochs": 1, "shuffle": False,
                "max_text_tokens": 40, "too_long": "truncate"}
    }  # fmt: skip
    said = prepare(make_recipe(tmp_path, corpora=corpora, packs=packs))
    assert "note: packs.sft.corpora.talk: 1 of 2 draws have truncated answers" in said
    segments = [(row, n) for row in PackReader(tmp_path / "out" / "packs" / "sft") for n in range(len(row.source))]
    row, number = segments[1]
    at = np.flatnonzero(row.segment == number + 1)
    manifest = Manifest.load(tmp_path / "out" / "packs" / "sft")
    assert row.input_ids[at[-1]] not in manifest.eos_ids and row.generated[at[-1]] and len(at) == 44


def test_changed_and_missing_images_are_noticed(tmp_path: Path) -> None:
    write_world(tmp_path / "raw", talks=30)
    images, changes = tmp_path / "raw" / "images", {"max_bad_fraction": 0.5, "tokenizer": str(own_tokenizer(tmp_path))}
    (images / "7.png").rename(tmp_path / "7.png")
    prepare(make_recipe(tmp_path, **changes))
    assert not any(line.startswith("ingest (") for line in prepare(make_recipe(tmp_path, **changes)))
    (images / "8.png").write_bytes(png(208))  # in place: the folder's time stays
    assert "ingest (1 process): 1/1" in " ".join(prepare(make_recipe(tmp_path, **changes)))
    (tmp_path / "7.png").rename(images / "7.png")
    assert "30 samples, 0 rejected" in " ".join(prepare(make_recipe(tmp_path, **changes)))
    (images / "never asked for.png").write_bytes(png(1))
    assert not any(line.startswith("ingest (") for line in prepare(make_recipe(tmp_path, **changes)))

    fresh = tmp_path / "fresh"
    shutil.copytree(tmp_path / "raw", fresh / "raw")
    prepare(make_recipe(fresh, **changes))
    assert tree_hashes(fresh / "out") == tree_hashes(tmp_path / "out")


def test_an_image_that_arrives_later_is_noticed_at_any_depth(tmp_path: Path) -> None:
    names = ["a/b/1.png", "a/b/c/2.png", "not yet/3.png", "odd\nname.png"]
    rows = [
        {
            "id": name,
            "image": name,
            "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "it."}],
        }
        for name in names
    ]
    write_llava(tmp_path / "raw", [])
    (tmp_path / "raw" / "llava.json").write_text(json.dumps(rows))
    images = tmp_path / "raw" / "images"
    (images / "a" / "b").mkdir(parents=True)
    (images / "a" / "b" / "1.png").write_bytes(png(1))
    corpora = {"talk": recipe_dict(tmp_path / "raw", tmp_path / "out")["corpora"]["talk"]}
    packs = {"sft": {"corpora": ["talk"], "template": "plain", "seq_len": 96, "epochs": 1}}
    tokenizer = str(own_tokenizer(tmp_path))
    recipe = make_recipe(tmp_path, corpora=corpora, packs=packs, tokenizer=tokenizer, max_bad_fraction=1.0)
    assert "4 samples, 3 rejected" in " ".join(prepare(recipe))
    assert not any(line.startswith("ingest (") for line in prepare(recipe))
    for left, name in ((2, names[1]), (1, names[2])):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(png(2))
        assert f"4 samples, {left} rejected" in " ".join(prepare(recipe))


def test_a_deleted_store_is_made_again(tmp_path: Path) -> None:
    write_world(tmp_path / "raw")
    prepare(make_recipe(tmp_path))
    before = tree_hashes(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "images")
    prepare(make_recipe(tmp_path))
    assert tree_hashes(tmp_path / "out") == before


def command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "data_prep", *words, str(recipe)]


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_world(tmp_path / "raw", tars=12, captions=60)
    prepare(make_recipe(tmp_path))
    rng, left, rounds = random.Random(SEED), DATA_PREP_KILLS, 0
    while left:  # a job that is done before all kills are used up is compared, and another is begun
        again = tmp_path / f"again-{rounds}"
        recipe = write_recipe(tmp_path / f"killed-{rounds}.yaml", recipe_dict(tmp_path / "raw", again))
        while left and kill_once(recipe, again, rng):
            left -= 1
        subprocess.run(command(recipe, "run", "--workers", "2"), env=environment(), check=True, capture_output=True)
        assert tree_hashes(again) == tree_hashes(tmp_path / "out"), f"{left} kills are left of seed {SEED}"
        rounds += 1


def kill_once(recipe: Path, out: Path, rng: random.Random) -> bool:
    """Start a job and kill all of its processes after a few more files, or some time; False if it ends before."""
    pattern = rng.choice(["ingest/*/*/*.json", "ingest/*/*/*.json", "**/.*", "packs/*/rows-*", ""])
    count = len(list(out.glob(pattern))) + rng.randint(1, 4) if pattern else 0
    job = subprocess.Popen(
        command(recipe, "run", "--workers", "2"), env=environment(), start_new_session=True, stdout=subprocess.PIPE
    )
    while pattern and len(list(out.glob(pattern))) < count and job.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05) if pattern else rng.uniform(0.2, 4.0))
    killed = job.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return killed


def mpiexec() -> str:
    launcher = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if launcher is None:
        pytest.skip("mpiexec is not installed: pip install mpich")
    return launcher


@pytest.mark.slow
def test_mpi_ranks_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    launcher = mpiexec()
    shutil.copytree(made / "raw", tmp_path / "raw")
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_dict(tmp_path / "raw", tmp_path / "out"))
    ranks = [launcher, "-n", "3", sys.executable, "-m", "mpi4py", "-m", "data_prep"]
    done = subprocess.run([*ranks, "run", str(recipe)], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 MPI ranks" in done.stdout
    assert tree_hashes(tmp_path / "out") == tree_hashes(made / "out")

    (tmp_path / "raw" / "llava.json").write_text("{")
    failed = subprocess.run(
        [*ranks, "run", str(recipe)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert failed.returncode != 0 and "llava.json" in failed.stderr


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_with_it(tmp_path: Path) -> None:
    launcher = mpiexec()
    script = tmp_path / "crash.py"
    script.write_text(
        "from data_prep.common.workers import form_team\n"
        "team = form_team(None, None, print)\n"
        "team.map(lambda n: 1 // (1 - n), team.share([0, 1]), print)\n"
    )
    words = [launcher, "-n", "2", sys.executable, str(script)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0  # and it ended: without the abort, rank 0 would wait for ever


def rank_pids(recipe: Path, rank: int) -> list[int]:
    """Processes of one rank of an mpiexec launch on this recipe; empty once they are gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended, or is not ours
            continue
        if str(recipe).encode() in words and f"PMI_RANK={rank}".encode() in variables:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_a_killed_mpi_rank_ends_the_job_with_a_message_and_the_rerun_completes_it(tmp_path: Path) -> None:
    launcher = mpiexec()
    write_world(tmp_path / "raw", tars=30, captions=60)
    prepare(make_recipe(tmp_path))
    killed = write_recipe(tmp_path / "killed.yaml", recipe_dict(tmp_path / "raw", tmp_path / "killed"))
    ranks = [launcher, "-n", "3", sys.executable, "-m", "mpi4py", "-m", "data_prep", "run", str(killed)]
    job = subprocess.Popen(
        ranks, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not list((tmp_path / "killed").glob("ingest/*/*/*.json")):  # ingest has begun
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    (victim,) = rank_pids(killed, 1)
    os.kill(victim, signal.SIGKILL)
    said, _ = job.communicate(timeout=10)  # the launcher kills the others: nothing has to be computed for that
    assert job.returncode != 0 and "Killed (signal 9)" in said
    assert not [pid for rank in range(3) for pid in rank_pids(killed, rank)]
    assert not list((tmp_path / "killed").glob("packs/*/manifest.json")), "it was over before the kill"

    subprocess.run(ranks, env=environment(), check=True, capture_output=True, timeout=300)
    assert tree_hashes(tmp_path / "killed") == tree_hashes(tmp_path / "out")
