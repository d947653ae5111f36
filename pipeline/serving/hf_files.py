"""The files of an export in Hugging Face layout, besides the weights: configs, code, tokenizer and processor.

``AutoModelForImageTextToText`` and ``AutoProcessor`` load the folder; its code is made from this package's own
(`pipeline.serving.remote`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.text.template import Special, Template, Text
from data_prep.text.tokenizer import Tokenizer
from pipeline.model.spec import ModelSpec
from pipeline.serving.chat_template import chat_template
from pipeline.serving.export_config import CONFIG, ExportConfig
from pipeline.serving.hf_tokenizer import save_hf_tokenizer
from pipeline.serving.remote.bundle import SIBLINGS, bundle

CODE = ("configuration_mma", "modeling_mma", "processing_mma")
MODEL_CLASS = "MmaForConditionalGeneration"
"""The class of the exported code."""
_AUTO = {
    "AutoConfig": "configuration_mma.MmaConfig",
    "AutoModel": "modeling_mma.MmaModel",
    "AutoModelForImageTextToText": f"modeling_mma.{MODEL_CLASS}",
}


def write_hf_files(export_config: ExportConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write everything but weights into an export folder. Raises UserError for a tokenizer that cannot be exported.

    The code does not know gates (``model.gate``): with them no code is written, and transformers refuses the folder.
    """
    spec = export_config.spec
    for name, source in code_files(spec).items() if spec.gate.kind == "none" else ():
        (folder / name).write_text(source, encoding="utf-8")
    write_json(folder / CONFIG, hf_config(export_config, tokenizer))
    write_tokenizer(export_config, tokenizer, folder)
    preprocess = spec.preprocess
    image = {
        "auto_map": {"AutoImageProcessor": "processing_mma.MmaImageProcessor"},
        "image_processor_type": "MmaImageProcessor",
        "processor_class": "MmaProcessor",
        "size": {"height": preprocess.size_px, "width": preprocess.size_px},
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        **({} if preprocess.resample == "bicubic" else {"filter_name": preprocess.resample}),
    }
    write_json(folder / "preprocessor_config.json", image)
    processor = {
        "auto_map": {"AutoProcessor": "processing_mma.MmaProcessor"},
        "processor_class": "MmaProcessor",
        "mma": {
            "template": asdict(export_config.template),
            "markers": asdict(tokenizer.markers),
            "image_tokens": export_config.spec.image_tokens,
        },
    }
    write_json(folder / "processor_config.json", processor)


def write_own_files(export_config: ExportConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of an export that only this project loads, as it has several vision towers."""
    write_json(folder / CONFIG, export_config.to_config())
    tokenizer.save(folder / export_config.tokenizer)


def code_files(spec: ModelSpec) -> dict[str, str]:
    """Return the content of the code files, by name.

    The file of the config names the hash of the model's. Transformers keys a model's class by its config's class, and
    that by the content of its file, so without it a process that loads two exports would run the first one's code.
    """
    parts = {
        "ConnectorModule": spec.connector.module,
        "DecoderFamily": type(spec.llm_family),
        "TowerFamily": type(spec.vision_family),
    }
    files = {f"{name}.py": bundle(f"{SIBLINGS}.{name}", parts) for name in CODE}
    digest = hashlib.sha256(files["modeling_mma.py"].encode()).hexdigest()
    files["configuration_mma.py"] += f'\nMODELING_SHA256 = "{digest}"\n'
    return files


def write_tokenizer(export_config: ExportConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer for Hugging Face tools, its chat template and the generation config, and our own tokenizer.

    Raises UserError for a tokenizer that cannot be exported.
    """
    markers = tokenizer.markers
    template = chat_template(
        export_config.template, lambda name: markers.reserved[markers.tokens[name]], markers.reserved[markers.image_id]
    )
    save_hf_tokenizer(tokenizer, folder, chat_template=template, longest=export_config.spec.longest_segment)
    tokenizer.save(folder / export_config.tokenizer)
    ends = {"eos_token_id": list(export_config.eos_ids), "pad_token_id": export_config.pad_id, "do_sample": False}
    write_json(folder / "generation_config.json", ends)


def hf_config(export_config: ExportConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    raw, spec = export_config.to_config(), export_config.spec
    spans = assistant_spans(export_config.template, tokenizer)
    own = {**raw["mma"], "mask_grid": spec.mask_grid, "assistant_spans": spans}
    own["connector_arguments"] = spec.connector.arguments(spec.features, spec.width)
    own["connector_norm"] = spec.connector.norm
    own["tower_layers"] = list(spec.connector.tower_layers)
    code = {"auto_map": _AUTO} if spec.gate.kind == "none" else {}
    return {
        **raw,
        **code,
        "model_type": "mma",
        "architectures": [MODEL_CLASS],
        "dtype": export_config.dtype,
        "image_token_id": export_config.image_id,
        "pad_token_id": export_config.pad_id,
        "eos_token_id": list(export_config.eos_ids),
        "tie_word_embeddings": spec.tied,
        "mma": own,
    }


def assistant_spans(template: Template, tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Return the ids that open an answer, and those that end it.

    None where a prompt holds no generated token: documents have no turns, and with ``turns="expand"`` earlier answers
    count as given.
    """
    chat = template.chat_format
    if chat is None or template.turns == "expand":
        return None
    closing = chat.footers.get("user", (Special(chat.end),))
    before = [Text(chat.turn_separator)] if chat.turn_separator else []
    start = tokenizer.encode([*closing, *before, *chat.headers["assistant"]], 1).ids.tolist()
    return start, [tokenizer.id_of(chat.end)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
