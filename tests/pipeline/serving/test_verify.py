"""Golden logits: every loader of an export is checked, and one that runs another mask fails loudly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from data_prep.common.errors import UserError
from pipeline.cli import main
from pipeline.model.export_files import CARD, write_file_hashes
from pipeline.serving.card import add_accuracy
from pipeline.serving.export import export, verify_export
from pipeline.serving.golden import GOLDEN, read_golden
from pipeline.serving.model import load_model
from pipeline.serving.verify import Api, check_logits, check_served, own_logits, transformers_logits
from tests.pipeline.server.helpers import served
from tests.pipeline.serving.helpers import make_export, make_saved, picture, user


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def set_policy(folder: Path, policy: str) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["mma"]["policy"] = policy
    (folder / "config.json").write_text(json.dumps(raw))


def verify(folder: Path, *flags: str) -> int:
    return main(["verify-export", str(folder), "--device", "cpu", *flags])


def test_both_loaders_compute_the_golden_logits(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not verify(whole, "--remote-code")
    printed = capsys.readouterr().out
    assert "files: all" in printed
    for loader in ("mma", "transformers"):
        assert f"{loader}: 3 golden prompts, largest difference" in printed
    assert "a causal mask would give the same" not in printed


@pytest.mark.parametrize(
    ("policy", "words"), [("causal", "It runs a causal mask"), ("mma_aki", "golden prompt 2 differ")]
)
def test_a_changed_mask_is_caught(policy: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_policy(folder, policy)
    assert verify(folder) == 2
    assert "config.json is damaged" in capsys.readouterr().err
    write_file_hashes(folder)  # whoever changes the mask can also write the hashes again
    assert verify(folder) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="transformers does not compute this model"):
        check_logits(read_golden(folder), transformers_logits(folder), "transformers")


def test_changed_code_of_an_export_is_caught(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = folder / "modeling_mma.py"
    source = code.read_text()
    assert source.count("return torch.from_numpy((same & allowed)") == 1
    code.write_text(source.replace("(same & allowed)", "(same & (index[None, :] <= index[:, None]))"))
    write_file_hashes(folder)
    assert verify(folder, "--remote-code") == 2
    printed = capsys.readouterr()
    assert "mma: 3 golden prompts" in printed.out and "It runs a causal mask" in printed.err


def test_changed_weights_are_caught(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(folder.glob("model-*.safetensors"))
    tensors = load_file(path)
    tensors["model.connector.projection.bias"] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    write_file_hashes(folder)
    assert verify(folder) == 2
    assert "this release does not compute this model" in capsys.readouterr().err


def no_golden(folder: Path) -> None:
    (folder / GOLDEN).unlink()


def other_version(folder: Path) -> None:
    save_file(
        {}, folder / GOLDEN, metadata={"golden": json.dumps({"format": "mma-golden", "version": 9, "prompts": []})}
    )


def broken(folder: Path) -> None:
    (folder / GOLDEN).write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(no_golden, "is missing"), (other_version, "version 9"), (broken, "is damaged")],
    ids=["missing", "version", "broken"],
)
def test_golden_files_that_cannot_be_used(spoil: Callable[[Path], None], words: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=words):
        read_golden(folder)


@pytest.mark.slow
def test_servers_are_checked(whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(whole) as server:
        assert not verify(whole, "--url", f"{server.url}/v1")
        assert f"{server.url}/v1: 3 golden prompts" in capsys.readouterr().out
    set_policy(folder, "causal")
    write_file_hashes(folder)
    model = load_model(whole)
    with served(folder) as server, pytest.raises(UserError, match="does not serve this model"):
        check_served(read_golden(whole), Api(f"{server.url}/v1"), lambda index: model.answer_text([index]))
    with pytest.raises(UserError, match="does not answer"):
        check_served(read_golden(whole), Api(f"{server.url}/v1"), str)


def llava(folder: Path, *, policy: str = "causal", causal: bool = False, **options: Any) -> Path:
    saved = make_saved(folder, policy=policy, patch_tokens=True, **options)
    return export(saved, folder / "llava", layout="llava", prefill_causal=causal)


@pytest.mark.parametrize("vision", ["siglip_vision_model", "clip_vision_model"])
def test_the_stock_llava_class_computes_the_same(vision: str, tmp_path: Path) -> None:
    folder = llava(tmp_path, vision=vision)
    golden, own = read_golden(folder), load_model(folder, dtype=torch.float32)
    assert check_logits(golden, own_logits(own), "own").worst <= 1e-6
    assert check_logits(golden, transformers_logits(folder), "stock").worst <= 1e-5
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    turns = (user(picture(3), "what colour"),)
    content = [{"type": "image", "image": own.prompt(turns).images[0]}, {"type": "text", "text": "what colour"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    ids = model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    assert ids.tolist() == own.generate_ids([own.prompt(turns)], max_new_tokens=5).tolist()


def test_the_stock_class_is_told_apart_where_it_prefills_causally(tmp_path: Path) -> None:
    folder = llava(tmp_path, policy="mma", causal=True)
    assert "but this model was trained under `mma`" in (folder / CARD).read_text()
    check_logits(read_golden(folder), own_logits(load_model(folder)), "own")
    with pytest.raises(UserError, match="It runs a causal mask"):
        check_logits(read_golden(folder), transformers_logits(folder), "stock")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "mma"}, "prefills causally, so its answers would differ.*--prefill-causal"),
        ({"policy": "cca", "causal": True}, "has no positions of policy 'cca'"),
        ({"family": "gemma2"}, "scaled or capped logits of gemma2"),
        ({"family": "granite"}, "scaled or capped logits of granite"),
    ],
    ids=["mask", "positions", "capped", "scaled"],
)
def test_what_the_stock_class_cannot_express_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        llava(tmp_path, **options)
    assert not (tmp_path / "llava").exists()


def test_other_connectors_have_no_stock_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="connector of kind perceiver"):
        export(make_saved(tmp_path, policy="causal"), tmp_path / "llava", layout="llava")


def test_the_card_states_the_model_and_takes_its_accuracy(folder: Path) -> None:
    card = (folder / CARD).read_text()
    for words in ("`mma`: media also see", "Not evaluated", "trust_remote_code=True", "perceiver, 5 tokens"):
        assert words in card
    for accuracy in (0.25, 0.75):  # the second evaluation replaces the first
        add_accuracy(folder, "eval", {"all": (8, accuracy, 0.5)})
    assert "| all | 8 | 75.0 % | 50.0 % |" in (folder / CARD).read_text()
    assert "25.0 %" not in (folder / CARD).read_text() and "## Loading" in (folder / CARD).read_text()
    verify_export(folder)  # cards are edited by people
