"""From an existing model's folder to packs, a proof, a step of two pipeline stages, and back to the stock class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
import yaml
from PIL import Image

from data_prep.cli import main as mma_prep
from data_prep.common.errors import UserError
from data_prep.packs import PackReader
from pipeline.cli import main as mma
from pipeline.serving.export import export_run
from pipeline.serving.model import load_model
from tests.launch import ROOT, run
from tests.pipeline.model.vlms import TINY, TinyVlm
from tests.pipeline.training.runs import metrics, weights

pytestmark = pytest.mark.slow
ASKED = (("<image>what colour is the circle", 1), ("<image><image>how many squares", 2), ("how many are there", 0))


def write_raw(folder: Path) -> None:
    """Conversations with no, one and two drawn images."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(draw.integers(0, 256, (20 + number, 31, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    rows = []
    for number in range(24):
        text, count = ASKED[number % 3]
        messages = [
            {"role": "user", "content": text}, {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "how many"}, {"role": "assistant", "content": "Two."},
        ]  # fmt: skip
        rows.append({"messages": messages, "images": [f"{(number + k) % 6}.png" for k in range(count)]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipes(folder: Path, model: Path) -> tuple[Path, Path]:
    prep = {
        "root": str(folder / "raw"), "out": str(folder / "data"), "model": str(model),
        "corpora": {"chat": {"type": "chat", "data": "rows.jsonl"}},
        "packs": {"sft": {"corpora": ["chat"], "seq_len": 128, "epochs": 1}},
    }  # fmt: skip
    run_recipe = {
        "model": {"source": str(model)}, "mask": {"policy": "mma"}, "data": {"packs": str(folder / "data/packs/sft")},
        "train": {"steps": 1, "warmup_steps": 0, "global_batch_size": 4, "lr": 1e-3}, "parallel": {"pp": 2},
        "log": {"tensorboard": False},
    }  # fmt: skip
    files = folder / "prep.yaml", folder / "sft.yaml"
    for file, content in zip(files, (prep, run_recipe), strict=True):
        file.write_text(yaml.safe_dump(content))
    return files


def stock_prompt(tiny: TinyVlm, folder: Path) -> list[int]:
    """The first question with one image as the stock processor writes it."""
    content = [{"type": "image"}, {"type": "text", "text": "what colour is the circle"}]
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tiny.template
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    if tiny.name == "internvl":  # its processor needs torchvision
        text = text.replace(tiny.image, f"<img>{tiny.image * tiny.tokens}</img>")
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    processor = hf.AutoProcessor.from_pretrained(folder)
    adds = not text.startswith(tokenizer.bos_token)
    batch = processor(text=text, images=[Image.new("RGB", (31, 20))], add_special_tokens=adds)
    return list(np.asarray(batch["input_ids"]).reshape(-1))


@pytest.mark.parametrize("name", TINY)
def test_from_its_folder_and_back(name: str, tmp_path: Path) -> None:
    tiny, model = TINY[name], tmp_path / "model"
    tiny.save(model)
    write_raw(tmp_path / "raw")
    prep, recipe = write_recipes(tmp_path, model)
    assert mma_prep(["run", str(prep), "--workers", "1"]) == 0

    packs = PackReader(tmp_path / "data/packs/sft")
    prompt = stock_prompt(tiny, model)
    written = [row.input_ids.tolist() for row in packs]
    assert any(ids[at : at + len(prompt)] == prompt for ids in written for at in range(len(ids)))
    assert packs.manifest.image_tokens == tiny.tokens
    assert mma(["prove", str(packs.directory), "--policy", "mma"]) == 0

    words = ["--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--recipe", str(recipe), "--run-dir"]
    run(2, ROOT / "pipeline/train.py", *words, str(tmp_path / "run"), timeout_s=300, launcher="srun").check()
    assert np.isfinite(metrics(tmp_path / "run")[-1]["loss"])

    with pytest.raises(UserError, match="add --prefill-causal"):
        export_run(tmp_path / "run", tmp_path / "refused", layout="vlm")
    out = export_run(tmp_path / "run", tmp_path / "out", layout="vlm", prefill_causal=True, dtype="float32")
    check_export(tiny, model, out, weights(tmp_path / "run"))


def check_export(tiny: TinyVlm, model: Path, out: Path, trained: dict[str, torch.Tensor]) -> None:
    """The stock class loads every weight of the last checkpoint; the frozen tower is the original's."""
    loaded, report = hf.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(loaded).__name__ == TINY[tiny.name].model().__class__.__name__
    assert not any(report.values()), report
    theirs = {value.double().sum().item(): name for name, value in loaded.named_parameters()}
    assert {value.double().sum().item() for value in trained.values()} == theirs.keys()
    before = hf.AutoModelForImageTextToText.from_pretrained(model).state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name]) == ("vision" in name), name
    own = load_model(out)
    assert own.spec.start is not None and own.tokenizer.image_id == loaded.config.image_token_id
    if tiny.name != "internvl":
        image = Image.effect_noise((40, 24), 90).convert("RGB")
        pixels = hf.AutoProcessor.from_pretrained(out).image_processor(images=image, return_tensors="pt")[
            "pixel_values"
        ]
        torch.testing.assert_close(pixels.reshape(1, 3, 16, 16), own.spec.preprocess.batch([image]), rtol=0, atol=1e-5)
