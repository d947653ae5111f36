"""The prober finds five historic faults and none in their fixed forms, and agrees with the proofs of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data_prep.common.errors import UserError
from pipeline.cli import main
from pipeline.config.schema import ConnectorConfig
from pipeline.masks import POLICIES, dense_mask, get_policy, parse_layout, prove
from pipeline.model.spec import ModelSpec
from pipeline.prober import assert_no_leak, probe
from pipeline.prober.own import StageSubject
from tests.pipeline.model.helpers import SIDE, VOCAB, model_config, whole_stage
from tests.pipeline.prober import faults

FAULTS_FOUND = {
    "padding_mask": ("answer leak", "the padding mask replaces the causal mask"),
    "packed_samples": ("cross-sample leak", ""),
    "flat_positions": ("cross-sample leak", "2-D position_ids do not separate samples under mRoPE"),
    "document_loss": ("loss", "set the label of each sample's first token to -100"),
    "float_mask": ("answer leak", "a 0/1 float mask is added to the logits"),
}


@pytest.mark.parametrize("name", faults.FAULTS)
def test_each_fault_is_found_with_its_cause(name: str) -> None:
    check, cause = FAULTS_FOUND[name]
    model, batches = getattr(faults, name)(), getattr(faults, f"{name}_batches")()
    first = probe(model, batches).findings[0]
    assert first.check == check
    assert cause in first.cause
    if check != "loss":
        assert first.layer == 1
        assert len(first.path) == 2


@pytest.mark.parametrize("name", faults.FAULTS)
def test_no_fixed_form_is_reported(name: str) -> None:
    for batch in getattr(faults, f"{name}_batches")(fixed=True):
        assert_no_leak(getattr(faults, name)(fixed=True), batch)


@pytest.fixture(scope="module")
def stage() -> Any:
    return own_stage()


def own_stage() -> Any:
    config = model_config("llama").model_copy(update={"connector": ConnectorConfig(kind="mlp")})
    return whole_stage(ModelSpec.resolve(config, vocab_size=VOCAB, image_tokens=4)).eval()


ROW = parse_layout("S2 V4 Q3 A4 Q2 V4 V4 A3 | V4 Q3 A3 | Q3 A2 P3")
IMAGE_ID, GRID = 2, (2, 2)


def own_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (len(ROW),), generator=generator)
    ids[ROW.instance >= 0] = IMAGE_ID
    columns = {name: getattr(ROW, name)[None] for name in ("segment", "modality", "instance", "generated")}
    pixels = torch.randn(int(ROW.instance.max()) + 1, 3, SIDE, SIDE, generator=generator)
    return {"input_ids": ids[None], "pixel_values": pixels, **columns}


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.leaks])
def test_this_projects_model_is_clean_under_every_safe_policy(name: str, stage: Any) -> None:
    report = probe(StageSubject(stage, get_policy(name, grid=GRID), IMAGE_ID), [own_batch()])
    assert not report.findings
    for check in ("answer leak", "cross-sample leak", "padding", "packing", "training and generation"):
        assert report.checked[check] > 0


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.leaks])
def test_the_leaking_ablations_are_found_along_a_path_of_the_mask(name: str, stage: Any) -> None:
    policy = get_policy(name, allow_leak=True)
    first = probe(StageSubject(stage, policy, IMAGE_ID), [own_batch()]).findings[0]
    assert first.check == "answer leak"
    proof = prove(policy, ROW, layers=3)
    assert proof.leak is not None and proof.inexact is not None
    # The prober counts every later token that a prediction reads, also a given one of a later turn.
    assert proof.inexact.layer <= (first.layer or 0) == len(first.path) - 1
    mask = dense_mask(policy, ROW)
    assert all(mask[i, j] for i, j in zip(first.path, first.path[1:], strict=False))
    assert first.path[-1] > first.path[0]


def test_a_callable_without_layers_is_probed_by_its_ids() -> None:
    model = faults.SmallLM(isolates=False)
    first = probe(lambda batch: model(**batch).logits, faults.packed_samples_batches()).findings[0]
    assert first.check == "cross-sample leak"
    assert "layer unknown" in first.message


class ForgetsPosition(transformers.LlamaForCausalLM):
    """Decodes every cached token at position 0."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            kwargs["position_ids"] = torch.zeros_like(input_ids)
        return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


def test_cached_decoding_and_generate_are_compared_with_the_full_forward() -> None:
    model = ForgetsPosition(faults.llama().config)
    row = faults.packed_row()
    batch = {**row, "position_ids": faults.positions_of(row.pop("segment")[0])}
    del batch["segment"]
    assert [finding.check for finding in probe(model, [batch]).findings[:2]] == ["cached decoding", "generate"]


class SeesPromptOnlyInTraining(faults.SmallLM):
    """The mask of training is bidirectional, that of evaluation causal."""

    def _mask(self, ids: torch.Tensor, segment: torch.Tensor, padding: Any) -> torch.Tensor:
        mask = super()._mask(ids, segment, padding)
        mask[:, :, :4, :4] |= self.training
        return mask


def test_a_mask_that_differs_in_training_is_found() -> None:
    report = probe(SeesPromptOnlyInTraining().train(), faults.packed_samples_batches())
    assert {finding.check for finding in report.findings} >= {"training and generation"}
    assert report.result("answer leak") == report.result("cross-sample leak") == "ok"


def test_mistakes_of_the_user_are_named() -> None:
    row = faults.packed_row()
    with pytest.raises(UserError, match=r"needs labels"):
        probe(faults.SmallLM(), [{"input_ids": row["input_ids"]}])
    for batches in ([], [{**row, "labels": torch.full_like(row["labels"], -100)}]):
        with pytest.raises(UserError, match=r"no batch holds an answer token"):
            probe(faults.SmallLM(), batches)
    with pytest.raises(UserError, match=r"on the CPU"):
        probe(faults.SmallLM(), [{key: value.to("meta") for key, value in row.items()}])
    with pytest.raises(UserError, match=r"call float\(\)"):
        probe(faults.SmallLM().bfloat16(), [row])
    model = faults.SmallLM()
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.5), model.head)
    with pytest.raises(UserError, match=r"two runs on one batch differ"):
        probe(model, [row])


def test_the_command_prints_a_table_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = "tests.pipeline.prober.faults:float_mask"
    assert main(["prove", "--model", place, "--batches", f"{place}_batches"]) == 1
    assert "FOUND" in capsys.readouterr().out
    faults.llama().save_pretrained(tmp_path)
    assert main(["prove", f"--model={tmp_path}"]) == 0
    assert main(["prove", "--model", str(tmp_path), "--batches", "V3 A2"]) == 2
    assert main(["prove", "--model", "nowhere"]) == 2
    assert main(["prove", "--model", "nowhere:thing", "--batches", "x:y"]) == 2
    assert "No module named 'nowhere'" in capsys.readouterr().err
