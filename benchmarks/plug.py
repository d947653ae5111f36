"""Cost of MMA on a stock LLaVA against its own causal attention, on the same packed batch.

Run from the repository root: ``python -m benchmarks.plug [--tokens ...]``. Forward and backward on one CPU thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.rows import IMAGE_TOKENS, KINDS, make_row
from pipeline.hf import disable_mma, enable_mma
from pipeline.hf.mask import BACKENDS
from pipeline.masks import dense_mask, position_ids

IMAGE_ID, VOCAB, SIDE = 3, 512, 96
WAYS = ("stock causal", "mma sdpa", "mma runsplit")


def make_model(width: int, layers: int) -> Any:
    """Return a LLaVA with random weights whose images take 144 tokens."""
    torch.manual_seed(0)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
        "max_position_embeddings": 1 << 16, "use_cache": False,
    }  # fmt: skip
    options = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "image_seq_length": IMAGE_TOKENS}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID, **options)
    return transformers.LlavaForConditionalGeneration(config).train()


def make_batch(kind: str, tokens: int) -> dict[str, torch.Tensor]:
    """Return one packed row as a training batch."""
    row = make_row(kind, tokens)
    ids = torch.randint(4, VOCAB, (tokens,), generator=torch.Generator().manual_seed(0))
    ids[row.instance >= 0] = IMAGE_ID
    pixels = torch.randn(int(row.instance.max()) + 1, 3, SIDE, SIDE)
    labels = torch.where(row.generated == 1, ids, -100)
    columns = {"input_ids": ids, "labels": labels, "position_ids": position_ids(row)}
    return {**{key: value[None] for key, value in columns.items()}, "pixel_values": pixels}


def check(width: int, layers: int) -> None:
    """Compare both backends with a dense mask in float64."""
    model, batch = make_model(width, layers).double(), make_batch("short VQA", 512)
    batch["pixel_values"] = batch["pixel_values"].double()
    mask = dense_mask("mma", make_row("short VQA", 512))[None, None]
    exact = model(**batch, attention_mask=mask).loss
    for backend in BACKENDS:
        loss = enable_mma(model, backend=backend)(**batch).loss
        assert abs(loss.item() - exact.item()) < 1e-6, f"{backend}: {loss.item()} instead of {exact.item()}"


def step(model: Any, batch: dict[str, torch.Tensor], way: str) -> float:
    """Return the milliseconds of processor time of one forward and backward pass."""
    if way == WAYS[0]:
        disable_mma(model)
    else:
        enable_mma(model, backend=way.split()[1])
    model.zero_grad()
    start = time.process_time()
    model(**batch).loss.backward()
    return 1000 * (time.process_time() - start)


def lines(kinds: list[str], sizes: list[int], rounds: int, model: Any) -> Iterator[str]:
    """Yield the table, line by line; the ways take turns, so that a busy machine slows them alike."""
    yield f"| row | tokens | {' ms | '.join(WAYS)} ms | sdpa / stock | runsplit / stock |"
    yield f"|---|{'---:|' * 6}"
    for kind in kinds:
        for tokens in sizes:
            batch = make_batch(kind, tokens)
            times = [[step(model, batch, way) for way in WAYS] for _ in range(rounds + 1)][1:]
            stock, dense, runs = (statistics.median(column) for column in zip(*times, strict=True))
            ratios = f"{dense / stock:.2f} | {runs / stock:.2f}"
            yield f"| {kind} | {tokens:,} | {stock:,.0f} | {dense:,.0f} | {runs:,.0f} | {ratios} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plug", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["short VQA", "chats"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    check(options.width, options.layers)
    model = make_model(options.width, options.layers)
    for line in lines(options.kinds, options.tokens, options.rounds, model):
        print(line, flush=True)


if __name__ == "__main__":
    main()
