"""Runs with LoRA: merged and unmerged weights, peft, resume, grids, and what checkpoints hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.cli import main
from pipeline.model.build import build_stage
from pipeline.model.lora import is_adapter
from pipeline.model.spec import ModelSpec
from pipeline.serving.export import export_run
from tests.pipeline.training.runs import curve, furthest, metrics, same_bits, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = ["--train.steps", "4", "--model.lora.rank", "4", "--model.lora.alpha", "8", "--train.lr", "1e-2"]
TOWER = ["--model.vision.config.num_hidden_layers", "1"]
TARGETS = ["--model.lora.targets", "model.layers.*,vision.*.q_proj,vision.*.fc1", *TOWER]
GRID = ["--parallel.pp", "2"]


@pytest.fixture(scope="module")
def base(small_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains everything."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    train(small_demo, run_dir, *TOWER, "--train.steps", "2", ranks=1).check()
    return run_dir


@pytest.fixture(scope="module")
def adapted(small_demo: Path, base: Path) -> Path:
    """A run with LoRA on decoder and tower that starts from it, uninterrupted in one process."""
    run_dir = base.with_name("adapted")
    train(small_demo, run_dir, *STEPS, *TARGETS, "--init-from", str(base), ranks=1).check()
    return run_dir


def lora_keys(run_dir: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in open_checkpoint(run_dir).trained_parameters() if is_adapter(name)}


def test_checkpoints_hold_adapters_and_connector_alone(base: Path, adapted: Path) -> None:
    full, small = (next(run.rglob("rank-00000.safetensors")).stat().st_size for run in (base, adapted))
    checkpoint = open_checkpoint(adapted)
    stored = {name for name, entry in checkpoint.manifest.params.items() if entry.stored}
    assert all(is_adapter(name) or name.startswith("connector.") for name in stored)
    assert {"vision" in name for name in stored if is_adapter(name)} == {True, False}
    trained = sum(value.numel() for _, value in checkpoint.trained_parameters())
    assert 12 * trained <= small <= 12 * trained + 64_000, "three fp32 values a trained parameter, and a header"
    print(f"checkpoint with LoRA: {small / full:.1%} of the full one's bytes")
    assert small < full / 2


def test_the_base_is_unchanged_and_the_merged_weights_are_not(base: Path, adapted: Path) -> None:
    before, after = weights(base), weights(adapted)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name.removesuffix(".lora_A.weight") + ".weight" for name in lora_keys(adapted) if "lora_A" in name}
    assert changed == adapters | {name for name in before if name.startswith("connector.")}
    assert metrics(adapted)[-1]["loss"] < metrics(adapted)[0]["loss"]


def test_a_grid_of_two_by_two_equals_one_process(small_demo: Path, base: Path, adapted: Path, tmp_path: Path) -> None:
    train(small_demo, tmp_path, *STEPS, *TARGETS, *GRID, "--init-from", str(base), ranks=4).check()
    ours, theirs = metrics(tmp_path), metrics(adapted)
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=tolerance)
    assert furthest(weights(tmp_path), weights(adapted)) <= 1e-5
    assert furthest(lora_keys(tmp_path), lora_keys(adapted)) <= 1e-5


def test_a_run_resumes_to_the_bit(small_demo: Path, base: Path, adapted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(adapted, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-00000004")  # as if it had been killed after step 2
    other = ["--init-from", str(tmp_path / "removed")]  # no longer read: the checkpoint names its base
    train(small_demo, run_dir, *STEPS, *TARGETS, *other, ranks=1).check()
    assert curve(run_dir) == curve(adapted)
    assert same_bits(weights(run_dir), weights(adapted)) and same_bits(lora_keys(run_dir), lora_keys(adapted))
    refused = train(small_demo, run_dir, *STEPS, *TARGETS, "--model.lora.rank", "8", ranks=1)
    assert refused.code == 2 and "model.lora.rank: 4 -> 8" in refused.output


def test_the_export_is_merged_and_peft_reads_the_adapter(
    base: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged weights, and peft on the stock decoder and on the stock tower, are the same."""
    peft = pytest.importorskip("peft")
    assert main(["export", str(adapted), str(tmp_path / "merged")]) == 0
    assert main(["export", str(adapted), str(tmp_path / "adapter"), "--adapter"]) == 0
    spec, merged_weights = ModelSpec.from_dict(open_checkpoint(base).meta["spec"]), weights(adapted)
    stock, merged = (stock_decoder(spec, values) for values in (weights(base), merged_weights))
    by_peft = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = merged(ids).logits, by_peft(ids).logits
        with by_peft.disable_adapter():
            before = by_peft(ids).logits
    assert float((ours - theirs).abs().max()) <= 1e-5
    assert float((ours - before).abs().max()) > 1e-3, "the adapter does something"
    tower = MODEL_MAPPING[type(spec.vision)](spec.vision)
    tower.load_state_dict({name[7:]: value for name, value in weights(base).items() if name.startswith("vision.")})
    both = peft.PeftModel.from_pretrained(tower, tmp_path / "adapter/vision").merge_and_unload().state_dict()
    assert furthest(both, {name: merged_weights[f"vision.{name}"] for name in both}) <= 1e-6
    connector = load_file(tmp_path / "adapter/connector.safetensors")
    assert connector.keys() == {name for name in weights(adapted) if name.startswith("connector.")}
    assert main(["export", str(base), str(tmp_path / "none"), "--adapter"]) == 2
    assert "was trained without LoRA" in capsys.readouterr().err


def stock_decoder(spec: ModelSpec, values: dict[str, torch.Tensor]) -> Any:
    decoder = MODEL_FOR_CAUSAL_LM_MAPPING[type(spec.llm)](spec.llm)
    decoder.load_state_dict({name: value for name, value in values.items() if name.startswith(("model.", "lm_head."))})
    return decoder.eval()


def test_merged_equals_unmerged(adapted: Path, small_demo: Path, tmp_path: Path) -> None:
    """One forward pass of the whole model, with images."""
    checkpoint = open_checkpoint(adapted)
    spec = ModelSpec.from_dict(checkpoint.manifest.model["spec"])
    unmerged = dict(checkpoint.trained_parameters())
    stages = [_stage(ModelSpec.from_dict(checkpoint.meta["spec"])), _stage(spec)]
    merged = dict(checkpoint.parameters())
    origin = dict(Checkpoint(checkpoint.manifest.base[0].path).parameters())
    losses = []
    for stage, values in zip(stages, (merged, {**origin, **unmerged}), strict=True):
        stage.load_state_dict(values, strict=True)
        losses.append(stage.eval()(None, _inputs(small_demo, spec)))
    assert float((losses[0] - losses[1]).detach().abs()) <= 1e-5 * float(losses[0].detach())


def _stage(spec: ModelSpec) -> Any:
    layers = range(spec.layers)
    return build_stage(spec, layers=layers, first=True, last=True, dtype=torch.float32, device="cpu", seed=0)


def _inputs(demo: Path, spec: ModelSpec) -> Any:
    from pipeline.data.batches import BatchSource
    from pipeline.data.order import BatchOrder
    from pipeline.masks import get_policy

    source = BatchSource(
        PackReader(demo / "packs/sft"), order=BatchOrder(1, 1, 1), dp_rank=0, policy=get_policy("mma"),
        preprocess=[tower.preprocess for tower in spec.towers.values()], threads=0, ahead=1,
    )  # fmt: skip
    return source.read(0).microbatches[0]


def test_another_run_starts_from_the_merged_weights(small_demo: Path, adapted: Path, tmp_path: Path) -> None:
    """Without LoRA, and with adapters of its own on top; and the base must still be there, unchanged."""
    frozen = [*TOWER, "--train.steps", "1", "--init-from", str(adapted)]
    train(small_demo, tmp_path / "plain", *frozen, "--train.lr", "1e-9", "--train.min-lr", "0", ranks=1).check()
    assert furthest(weights(tmp_path / "plain"), weights(adapted)) <= 1e-6
    tiny = ["--train.lr", "1e-9", "--train.min-lr", "0", "--model.lora.rank", "2"]
    train(small_demo, tmp_path / "again", *frozen, *tiny, ranks=1).check()
    assert furthest(weights(tmp_path / "again"), weights(adapted)) <= 1e-6
    moved = shutil.copytree(tmp_path / "again", tmp_path / "moved")
    path = next((adapted / "checkpoints").glob("step-00000004/rank-*"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=r"rank-00000.safetensors is damaged"):
            export_run(moved, tmp_path / "never")
    finally:
        path.write_bytes(content)
