"""The model card of an export: ``README.md`` with data, mask policy, accuracy and how to load the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.masks import get_policy
from pipeline.model.export_files import CARD
from pipeline.model.export_names import Layout
from pipeline.serving.export_config import ExportConfig

_START, _END = "<!-- accuracy: written by mma evaluate -->", "<!-- end of accuracy -->"
_LOAD = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
message = {"role": "user", "content": [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is it?"}]}
batch = processor.apply_chat_template([message], tokenize=True, add_generation_prompt=True, return_dict=True)
ids = model.generate(**batch, max_new_tokens=64)[:, batch["input_ids"].shape[1] :]
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```

The code of this folder builds the mask of the prompt as in training. `flash_attention_2` raises instead
of running causal."""
_LOAD_OWN = """\
Models with gates or with several vision towers are loaded by the commands of the MMA pipeline only (`mma generate`)."""
_LOAD_LLAVA = """\
`LlavaForConditionalGeneration` and `LlavaProcessor` load this folder without code of its own."""
_LOAD_VLM = """\
`{model_class}` and `AutoProcessor` load this folder without code of their own. The processor squashes every image to
one square, as training did."""
_CAUSAL = """\
**The stock class runs prompts under the policy `{stock}`, but this model was trained under `{policy}`.** Answers differ
from those of `mma generate` on this folder, which uses the training mask."""
_POST_NORM = """\
The connector reads the vision tower after its last norm. The stock class does so because of `tie_last_hidden_states` in
`vision_config`, a key of recent transformers releases; other loaders may read before the norm."""


def write_card(
    export_config: ExportConfig, folder: Path, facts: Mapping[str, str], layout: Layout, *, post_norm: bool
) -> None:
    """Write the card.

    Args:
        export_config: the model.
        folder: the export.
        facts: lines about its data and training.
        layout: of the folder.
        post_norm: the stock LLaVA class must read the tower after its last norm.
    """
    spec, policy = (
        export_config.spec,
        get_policy(export_config.policy, allow_leak=True, grid=export_config.spec.mask_grid),
    )
    lines = {
        "language model": f"{spec.llm.model_type}, {spec.layers} layers, width {spec.width}",
        "vision tower": f"{spec.vision.model_type}, {spec.preprocess.size_px} px",
        "connector": f"{spec.connector.kind}, {spec.media_spec.image.describe()}",
        "mask policy": f"`{policy.name}`: {policy.summary}",
        "chat template": export_config.template.name,
        "weights": f"{export_config.dtype}, optimizer step {export_config.step:,}",
        **facts,
    }
    stock, own = layout in ("llava", "vlm"), layout == "flat" or spec.gate.kind != "none"
    stock_policy = "causal"
    notes = [_LOAD_LLAVA if stock else _LOAD_OWN if own else _LOAD]
    if layout == "vlm" and spec.start is not None:
        stock_policy, post_norm = spec.start.family.stock_policy, False
        notes = [_LOAD_VLM.format(model_class=spec.start.family.model_class)]
    if stock and policy.name != stock_policy:
        notes.append(_CAUSAL.format(policy=policy.name, stock=stock_policy))
    notes += [_POST_NORM] if stock and post_norm else []
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [mma]\n---",
        "# Model card",
        "\n".join(f"- {name}: {value}" for name, value in lines.items()),
        "## Accuracy",
        f"{_START}\nNot evaluated. `mma evaluate` writes the accuracy here.\n{_END}",
        "## Loading",
        *notes,
        "`mma verify-export FOLDER` compares any loader with `golden.safetensors`: prompts, pictures and logits.",
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def add_accuracy(folder: Path, packs: str, accuracy: Mapping[str, tuple[int, float, float]]) -> None:
    """Write accuracy into a card; without effect where there is no card, or its author removed the place.

    Args:
        folder: the export.
        packs: name of the held-out packs.
        accuracy: by question family: questions, accuracy and the best constant guess, both 0..1.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if not start or not end:
        return
    rows = [
        f"| {name} | {count} | {100 * own:.1f} % | {100 * guess:.1f} % |"
        for name, (count, own, guess) in accuracy.items()
    ]
    table = "\n".join(
        [f"Exact match on `{packs}`:\n", "| family | questions | accuracy | best guess |", "|---|---|---|---|", *rows]
    )
    path.write_text(f"{before}{_START}\n{table}\n{_END}{after}", encoding="utf-8")
