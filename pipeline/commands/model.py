"""``mma export``, ``mma generate`` and ``mma evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import positive_int
from data_prep.common.errors import UserError

if TYPE_CHECKING:
    from pipeline.serving.evaluate import Answer
    from pipeline.serving.model import MultimodalModel


def _export(arguments: argparse.Namespace) -> None:
    from pipeline.serving.export import export_run

    print(f"exported to {export_run(arguments.run, arguments.out, dtype=arguments.dtype)}")


def _generate(arguments: argparse.Namespace) -> None:
    from data_prep.example import ImageRef, Turn

    model = _load(arguments.model, arguments.device)
    images = [ImageRef(name, path=Path(name)) for name in arguments.images]
    turns = [Turn("user", (*images, arguments.question))]
    if arguments.system:
        turns.insert(0, Turn("system", (arguments.system,)))
    answers = model.generate([model.prompt(turns)], max_new_tokens=arguments.max_new_tokens, num_beams=arguments.beams)
    print(answers[0])


def _evaluate(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from data_prep.packs import PackReader
    from pipeline.serving.evaluate import evaluate, save, show

    if arguments.compare and Path(arguments.compare).resolve() == Path(arguments.model).resolve():
        raise UserError(f"--compare {arguments.compare} is the model itself: name another export")
    packs = PackReader(arguments.packs)
    results: dict[str, list[Answer]] = {}
    for folder in filter(None, (arguments.model, arguments.compare)):
        model = _load(folder, arguments.device)
        results[folder] = evaluate(model, packs, limit=arguments.limit, batch=arguments.batch)
    show(results, Console())
    path = Path(arguments.json or Path(arguments.model) / "evaluation.json")
    save(results, path)
    print(f"scores and answers: {path}")


def _load(folder: str, device: str) -> MultimodalModel:
    import torch

    from pipeline.serving.model import load_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU here; use --device cpu")
    return load_model(folder, device=device)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma export``."""
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint), or one checkpoint folder")
    parser.add_argument("out", metavar="OUT", help="model folder to make; must not exist")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="type of the weights; auto: as trained"
    )
    parser.set_defaults(command=_export)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma generate``."""
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image files, in reading order; none for text only")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder made by mma export")
    parser.add_argument("--system", default="", metavar="TEXT", help="system turn; default: the template's")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, metavar="N")
    parser.add_argument("--beams", type=positive_int, default=1, metavar="N", help="beam search; 1: greedy")
    parser.set_defaults(command=_generate)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma evaluate``."""
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder made by mma export")
    parser.add_argument("--packs", required=True, metavar="DIR", help="held-out pack folder")
    parser.add_argument("--compare", metavar="DIR", help="second model folder, shown beside the first")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="ask only the first N questions")
    parser.add_argument("--batch", type=positive_int, default=16, metavar="N", help="questions asked together")
    parser.add_argument("--json", metavar="FILE", help="where scores and answers go; default: DIR/evaluation.json")
    parser.set_defaults(command=_evaluate)
