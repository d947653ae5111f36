"""What keeps a run from starting: another model's weights, a folder that is not everyone's, a damaged description."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_prep.common.errors import UserError
from pipeline.config.flags import parse
from pipeline.config.schema import ModelConfig
from pipeline.model.spec import ModelSpec
from pipeline.planning.compatibility import check_same_model
from pipeline.planning.run_plan import RunPlan
from pipeline.training import start_events, supervise
from pipeline.training.run.folder import RunFolder


def spec_of(*flags: str) -> ModelSpec:
    return ModelSpec.resolve(parse(list(flags)).config.model, vocab_size=512, image_tokens=16)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--model.llm.config.num_hidden_layers", "3", r"llm.layer_types=\[.*\], but it is"),
        ("--model.llm.config.rope_theta", "5e5", "rope_theta"),
        ("--model.llm.config.head_dim", "64", "llm.head_dim=32, but it is 64"),
        ("--model.llm.config.hidden_act", "gelu", "llm.hidden_act='silu', but it is 'gelu'"),
    ],
)
def test_weights_of_a_model_that_computes_something_else_are_refused(flag: str, value: str, words: str) -> None:
    """Also where all shapes agree."""
    saved = spec_of().to_dict()
    check_same_model("here", saved, spec_of("--model.vision.frozen", "false"))
    with pytest.raises(UserError, match=f"here was trained with .*{words}"):
        check_same_model("here", saved, spec_of(flag, value))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"image_mean": 3}', '{"image_std": ["a", "b", "c"]}', '{"image_std": [1]}']
)
def test_a_damaged_description_of_pixels_is_named(text: str, tmp_path: Path) -> None:
    vision = spec_of().vision
    vision.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    model = parse([]).config.model.model_dump()
    config = ModelConfig.model_validate({**model, "vision": {"source": str(tmp_path)}})
    with pytest.raises(
        UserError,
        match=r"preprocessor_config.json(: the .* is damaged| is not ).*copy .* again",
    ):
        ModelSpec.resolve(config, vocab_size=512, image_tokens=16)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = RunFolder(str(tmp_path / "run"))
    folder.create()
    folder.claim()
    yield folder
    dist.destroy_process_group()


def test_a_run_folder_of_one_rank_alone_is_refused(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert supervise.all_ranks_share(folder)

    def of_another(holder: list[Any], source: int) -> None:
        holder[0] = {"host": "node-1", "pid": 1}

    monkeypatch.setattr(supervise, "SHOWN_S", 0.0)
    monkeypatch.setattr(dist, "broadcast_object_list", of_another)
    assert not supervise.all_ranks_share(folder)
    assert "is not rank 0's run folder: give --run-dir a path on a disk shared by all nodes" in capsys.readouterr().err


def test_attention_without_flash_kernels_is_recorded(
    small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU would have it; only the device is made up."""
    packs = str(small_demo / "packs/sft")
    plan = RunPlan.build(parse(["--recipe", "demo_sft", "--data.packs", packs]), rank=0, world=1)
    for device, events in (("cpu", 0), ("cuda", 1)):
        monkeypatch.setattr(start_events, "device_of_rank", lambda device=device: torch.device(device))
        folder = RunFolder(str(tmp_path / device))
        start_events.record_start_events(plan, folder, watched=True, oversubscribed=[])
        assert folder.events.summary().get("attention-fallback", 0) == events
    assert "not float32" in folder.events.path.read_text()
