"""The same weights in a stock LLaVA under ``enable_mma`` and in this project's model: the same losses, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from pipeline.config.schema import ConnectorConfig
from pipeline.hf import enable_mma
from pipeline.masks import parse_layout, position_ids
from pipeline.model.spec import ModelSpec
from pipeline.model.stage import Stage
from tests.pipeline.model.helpers import SIDE, VISION, VOCAB, model_config, stage_inputs, whole_stage

IMAGE_ID, STEPS = VOCAB - 1, 20
ROW = parse_layout("S2 V4 Q3 A4 Q2 V4 A3 | V4 V4 Q3 A3 | Q3 A2 P3")


def own_model() -> Stage:
    config = model_config("llama").model_copy(update={"connector": ConnectorConfig(kind="mlp")})
    stage = whole_stage(ModelSpec.resolve(config, vocab_size=VOCAB, image_tokens=4))
    stage.vision.post_layernorm = nn.Identity()  # LLaVA reads the tower before this norm, this project after it
    return stage


def stock_twin(stage: Stage) -> Any:
    """A stock LLaVA with the stage's weights; its tower is frozen, too."""
    config = transformers.LlavaConfig(
        text_config=stage.spec.llm.to_dict(), vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=IMAGE_ID, vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    names = {"vision.": "model.vision_tower.", "model.": "model.language_model.", "lm_head.": "lm_head."}
    names |= {f"connector.{2 * n - 2}.": f"model.multi_modal_projector.linear_{n}." for n in (1, 2)}
    weights = {
        stock + name.removeprefix(own): value
        for name, value in stage.state_dict().items()
        for own, stock in names.items()
        if name.startswith(own)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".head." in name or "post_layernorm" in name for name in missing)  # LLaVA uses neither
    model.model.vision_tower.requires_grad_(False)
    return model


def test_twenty_steps_have_the_same_losses() -> None:
    stage = own_model()
    model = enable_mma(stock_twin(stage)).train()
    inputs = stage_inputs(ROW, dtype=torch.float32)
    ids = torch.where(ROW.instance >= 0, IMAGE_ID, inputs.input_ids.clamp_max(IMAGE_ID - 1))
    inputs.labels[inputs.labels == IMAGE_ID] = IMAGE_ID - 1
    batch = {
        "input_ids": ids[None],
        "labels": torch.where(ROW.generated == 1, ids, -100)[None],
        "segment": ROW.segment[None],
        "position_ids": position_ids(ROW)[None],
        "pixel_values": inputs.pixels.reshape(-1, 3, SIDE, SIDE) if inputs.pixels is not None else None,
    }
    own = replace(inputs, input_ids=ids)
    targets = int((inputs.labels != -100).sum())
    optimizers = [
        torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-3) for part in (stage, model)
    ]
    losses = []
    for _ in range(STEPS):
        pair = (stage(None, own) / targets, model(**batch).loss)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    mine, stock = zip(*losses, strict=True)
    torch.testing.assert_close(mine, stock, rtol=0, atol=1e-5)
    assert mine[-1] < mine[0] / 1.5
