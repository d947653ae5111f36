"""``mma generate``, ``mma look`` and ``mma evaluate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import positive_int
from data_prep.common.errors import UserError, short_repr
from pipeline.commands.arguments import check_output_file, existing_device

if TYPE_CHECKING:
    from pipeline.serving.evaluate import Answer
    from pipeline.serving.flow import AdaptiveFlow
    from pipeline.serving.model import MultimodalModel


LOOK = """\
Show how far the states of a picture's tokens move when the question changes: 1 - cosine per layer, as heat maps over
the picture, under the model's own mask and under a causal one. Under a causal mask the movement is exactly 0.

  mma look scene.png "How many circles are there?" "What colour is the square?" --model models/demo
  mma look scene.png "How many?" "What colour?" --model runs/demo_sft --out heat.png"""


def _generate(arguments: argparse.Namespace) -> None:
    from data_prep.example import ImageRef, Turn

    _check_question(arguments)
    model = load(arguments.model, arguments)
    images = [ImageRef(name, path=Path(name)) for name in arguments.images]
    turns = [Turn("user", (*images, arguments.question))]
    if arguments.system:
        turns.insert(0, Turn("system", (arguments.system,)))
    options = {"max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.beams}
    print(model.generate([model.prompt(turns)], flow=_flow(arguments), **options)[0])


def _flow(arguments: argparse.Namespace) -> AdaptiveFlow | None:
    """Return what ``--adaptive-flow`` and its options ask for. Raises UserError for options without it."""
    from pipeline.serving.flow import AdaptiveFlow

    given = {"heads": arguments.flow_heads, "rounding": arguments.flow_rounding}
    options = {name: value for name, value in given.items() if value is not None}
    if options and not arguments.adaptive_flow:
        raise UserError(f"--flow-{next(iter(options))} does nothing without --adaptive-flow: add it")
    return AdaptiveFlow(**options) if arguments.adaptive_flow else None


def _check_question(arguments: argparse.Namespace) -> None:
    """Refuse, before a model is loaded, a question that cannot be asked, and images that do not exist."""
    from PIL import Image

    question = arguments.question
    if not question.strip():
        raise UserError("QUESTION is empty: write what to ask, in quotes")
    is_image = " " not in question and Path(question).suffix.lower() in Image.registered_extensions()
    if is_image or _is_file(question):
        raise UserError(
            f"the last argument, {question}, is the question, but it names a file: add the question, "
            f'such as mma generate {question} "What is shown?" --model DIR'
        )
    for name, text in (("QUESTION", question), ("--system", arguments.system)):
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{name} is not valid UTF-8: write it in the terminal's encoding")
    for name in arguments.images:
        if not _is_file(name):
            raise UserError(f"image {short_repr(name)} is not a file: give image files before the question")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a file name
        return False


def _look(options: argparse.Namespace) -> int:
    from pipeline.commands.look import look

    return look(options)


def _evaluate(arguments: argparse.Namespace) -> None:
    from data_prep.common.console import PipeConsole
    from data_prep.packs import PackReader
    from pipeline.serving.card import add_accuracy
    from pipeline.serving.evaluate import evaluate, save, scores, show

    if arguments.compare and Path(arguments.compare).resolve() == Path(arguments.model).resolve():
        raise UserError(f"--compare {arguments.compare} is the model itself: name another export")
    flow = _flow(arguments)
    path = Path(arguments.model) / "evaluation.json" if arguments.json is None else Path(arguments.json)
    check_output_file("--json", arguments.json if arguments.json is not None else str(path))
    packs = PackReader(arguments.packs)
    results: dict[str, list[Answer]] = {}
    for folder in filter(None, (arguments.model, arguments.compare)):
        model = load(folder, arguments)
        results[folder] = evaluate(model, packs, limit=arguments.limit, batch=arguments.batch)
        if flow is not None:
            name = f"{folder} with adaptive flow ({flow.heads}, {flow.rounding})"
            results[name] = evaluate(model, packs, limit=arguments.limit, batch=arguments.batch, flow=flow)
    show(results, PipeConsole())
    save(results, path)
    if arguments.json is None:
        rows = {name: (one.asked, one.accuracy, one.chance) for name, one in scores(results[arguments.model]).items()}
        add_accuracy(Path(arguments.model), packs.directory.name, rows)
    print(f"scores and answers: {path}")


def load(folder: str, arguments: argparse.Namespace) -> MultimodalModel:
    """Load an export, or the export of a run, as ``--device`` and ``--verify`` say. Raises UserError."""
    from pipeline.serving.export import model_folder
    from pipeline.serving.model import load_model

    model = load_model(model_folder(folder), device=existing_device(arguments.device), verify=arguments.verify)
    if model.coverage is not None and not model.coverage.complete:
        print(f"{folder}: {model.coverage}; --verify full checks every byte", file=sys.stderr)
    return model


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma generate``."""
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image files, in reading order; none for text only")
    parser.add_argument("question", metavar="QUESTION", help="what to ask, in quotes")
    add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system turn (default: the template's)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=64, metavar="N", help="limit of the answer (default: 64)"
    )
    parser.add_argument("--beams", type=positive_int, default=1, metavar="N", help="beams; 1: greedy (default: 1)")
    _add_flow(parser, "answer with")
    parser.set_defaults(command=_generate)


def add_look(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma look``."""
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("questions", metavar="QUESTION", nargs=2, help="two questions about it, each in quotes")
    add_model(parser)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("look.html"), help=".html or .png (default: look.html)"
    )
    parser.set_defaults(command=_look)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mma evaluate``."""
    add_model(parser)
    parser.add_argument("--packs", required=True, metavar="DIR", help="held-out pack folder")
    parser.add_argument("--compare", metavar="DIR", help="second model folder, shown beside the first")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="ask only the first N questions")
    parser.add_argument("--batch", type=positive_int, default=16, metavar="N", help="questions per batch (default: 16)")
    parser.add_argument("--json", metavar="FILE", help="file for scores and answers (default: DIR/evaluation.json)")
    _add_flow(parser, "also answer with")
    parser.set_defaults(command=_evaluate)


def _add_flow(parser: argparse.ArgumentParser, does: str) -> None:
    """Declare ``--adaptive-flow`` and its options."""
    parser.add_argument(
        "--adaptive-flow",
        action="store_true",
        help=f"{does} adaptive information flow: text stops reading background image tokens (see docs/masks.md)",
    )
    parser.add_argument(
        "--flow-heads", choices=("mean", "max"), help="how the heads' attention is combined (default: mean)"
    )
    parser.add_argument(
        "--flow-rounding", choices=("down", "up"), help="rounding of the number of tokens cut (default: down)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model`` and ``--verify``."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="model folder written by mma export, or a run folder (its newest checkpoint)",
    )
    add_verify(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Declare ``--verify``."""
    parser.add_argument(
        "--verify",
        choices=("quick", "full"),
        default="quick",
        help="check the model's files first; quick: sizes, small files, headers and a sample of the weights; "
        "full: every byte, and that all weights are finite (default: quick)",
    )
