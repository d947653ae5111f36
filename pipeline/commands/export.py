"""``mma export`` and ``mma verify-export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.model.export_names import Layout

EXPORT = """\
Write a trained run as a model folder. Formats:

  hf     loads with AutoModelForImageTextToText and AutoProcessor; every connector and mask policy (default)
  llava  loads with the stock LlavaForConditionalGeneration, without code of its own; connector mlp and policy causal.
         The stock class prefills prompts causally. Another policy needs --prefill-causal, and its answers then differ
         from those of this project's commands on the same folder.
  hf-vlm the layout of the model that training started from (model.source), loaded by its stock class without code of
         its own. Stock classes run prompts under 'causal', Gemma 3 under 'mixed': a model trained under another policy
         needs --prefill-causal, too.

Every export holds golden logits, by which mma verify-export checks any loader."""
VERIFY = """\
Check an export: every hash, every weight, and the golden logits, with this project's loader. Then also

  --remote-code  with plain transformers, which runs the code files of the export
  --url URL      as a server with an OpenAI-compatible API answers: first tokens and their log-probabilities

  mma verify-export models/demo --remote-code
  mma verify-export models/demo --url http://localhost:8000/v1

The exit code is 2 for a loader that computes another model, such as one that runs another mask."""


def _export(arguments: argparse.Namespace) -> None:
    from data_prep.common.errors import UserError
    from pipeline.serving.export import export_run

    if arguments.adapter:
        from pipeline.serving.adapter import export_adapter

        if arguments.dtype != "auto" or arguments.format != "hf":
            raise UserError("--adapter: adapters are fp32, as trained, in peft's format: remove --dtype and --format")
        print(f"exported the adapter to {export_adapter(arguments.run, arguments.out)}")
        return
    layout: Layout = "vlm" if arguments.format == "hf-vlm" else arguments.format
    made = export_run(
        arguments.run, arguments.out, dtype=arguments.dtype, layout=layout,
        prefill_causal=arguments.prefill_causal,
    )  # fmt: skip
    print(f"exported to {made}")


def _verify(arguments: argparse.Namespace) -> None:
    import torch

    from pipeline.commands.arguments import existing_device
    from pipeline.serving.golden import read_golden
    from pipeline.serving.model import load_model
    from pipeline.serving.verify import Api, check_logits, check_served, own_logits, transformers_logits

    folder = Path(arguments.model)
    golden = None
    model = load_model(folder, dtype=torch.float32, device=existing_device(arguments.device), verify="full")
    print(f"files: {model.coverage}, all values are finite")
    golden = read_golden(folder)
    print(f"mma: {check_logits(golden, own_logits(model), 'this release')}")
    if arguments.remote_code:
        print(f"transformers: {check_logits(golden, transformers_logits(folder), 'transformers')}")
    if arguments.url:
        api = Api(arguments.url, arguments.model_name, arguments.key_env)
        print(f"{arguments.url}: {check_served(golden, api, lambda index: model.answer_text([index]))}")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma export``."""
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint), or one checkpoint folder")
    parser.add_argument("out", metavar="OUT", help="model folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="dtype of the weights (default: as trained)",
    )
    parser.add_argument("--format", choices=("hf", "llava", "hf-vlm"), default="hf", help="see above (default: hf)")
    parser.add_argument(
        "--prefill-causal",
        action="store_true",
        help="with llava and hf-vlm: accept that the stock class runs prompts under its own mask, although the model "
        "was trained under another",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with LoRA, write the adapter alone, as a folder of the peft library (default: merged weights)",
    )
    parser.set_defaults(command=_export)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma verify-export``."""
    parser.add_argument("model", metavar="DIR", help="model folder made by mma export")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--remote-code", action="store_true", help="also load it with plain transformers, running its own code files"
    )
    parser.add_argument("--url", metavar="URL", help="also ask a server, e.g. http://localhost:8000/v1")
    parser.add_argument(
        "--model-name", default="", metavar="NAME", help="name in the server's API (default: its first)"
    )
    parser.add_argument(
        "--key-env", default="MMA_API_KEY", metavar="VARIABLE", help="environment variable with the server's key"
    )
    parser.set_defaults(command=_verify)
