"""``mma``: what is done with masks and trained models.

Heavy libraries are imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.command_line import OneLineParser
from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.serving.evaluate import Answer
    from pipeline.serving.model import MultimodalModel

_OVERVIEW = """\
Look at attention masks, and put trained models to work.

  run folder --export--> model folder --generate, evaluate--> answers

Training itself is `deepspeed pipeline/train.py`, data preparation `mma-prep`.
"""
_EXAMPLES = """\
examples:
  mma demo                                          corpora -> packs -> PT -> SFT -> model -> accuracy
  mma doctor --checkpoint runs/demo_sft             what is wrong here, and how to mend it
  mma status                                        how all runs in runs/ stand
  mma estimate aki_4b_sft --ranks 8 16 64           what each rank will need
  mma inspect data/demo/packs/sft --html rows.html  browse packed rows and their masks
  mma mask --help                                   draw a mask policy
  mma prove --help                                  prove that a mask leaks no answer
  mma schedule --pp 4 --micro-batches 8             draw a pipeline's step
  mma export runs/demo_sft models/demo              newest checkpoint -> safetensors, config, tokenizer
  mma generate scene.png "How many circles are there?" --model models/demo
  mma generate left.png right.png "Are they alike?" --model models/demo
  mma evaluate --model models/demo --packs data/demo/packs/eval
  mma evaluate --model models/mma --compare models/causal --packs data/demo/packs/eval
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (2 and one line for what the user can mend)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()  # a reader that is gone is noticed here, not when the interpreter ends
        return code
    except BrokenPipeError:  # `mma status | head`
        sys.stderr.close()
        return 0
    except (UserError, OSError) as error:  # OSError: no permission, disk full, file gone
        if "--debug" in words:
            traceback.print_exc()
        print(f"mma: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    if words and words[0] in _OWN_PARSERS:
        return _OWN_PARSERS[words[0]](words[1:])
    arguments = _parser().parse_args(words)
    command: Callable[[argparse.Namespace], None] = arguments.command
    command(arguments)
    return 0


def _mask(words: Sequence[str]) -> int:
    from pipeline.masks.commands import mask_command

    return mask_command(words)


def _inspect(words: Sequence[str]) -> int:
    from pipeline.masks.inspect_command import inspect_command

    return inspect_command(words)


def _prove(words: Sequence[str]) -> int:
    from pipeline.masks.commands import prove_command

    return prove_command(words)


def _demo(words: Sequence[str]) -> int:
    from pipeline.demo import demo_command

    return demo_command(words)


def _estimate(words: Sequence[str]) -> int:
    from pipeline.estimate_command import estimate_command

    return estimate_command(words)


def _doctor(words: Sequence[str]) -> int:
    from pipeline.doctor import doctor_command

    return doctor_command(words)


def _status(words: Sequence[str]) -> int:
    from pipeline.status_command import status_command

    return status_command(words)


def _schedule(words: Sequence[str]) -> int:
    from pipeline.schedule_command import schedule_command

    return schedule_command(words)


_OWN_PARSERS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "demo": _demo,
    "doctor": _doctor,
    "estimate": _estimate,
    "inspect": _inspect,
    "mask": _mask,
    "prove": _prove,
    "schedule": _schedule,
    "status": _status,
}


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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="mma", description=_OVERVIEW, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = OneLineParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show a traceback for errors")
    for name, words in (
        ("demo", "the whole way once, on a small drawn world"),
        ("doctor", "look for what would keep a run from going well"),
        ("status", "one line a run: state, step, loss, checkpoint"),
        ("estimate", "memory and work of a recipe on any number of ranks"),
        ("inspect", "packed rows with their masks, as a page to browse"),
        ("mask", "draw a mask policy"),
        ("prove", "prove that a mask leaks no answer"),
        ("schedule", "draw what the stages of a pipeline do in a step"),
    ):
        commands.add_parser(name, help=words, add_help=False)
    _add_export(commands.add_parser("export", parents=[common], help="turn a trained run into a model folder"))
    device = OneLineParser(add_help=False, parents=[common])
    device.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU where there is one")
    _add_generate(commands.add_parser("generate", parents=[device], help="ask a model about images"))
    _add_evaluate(commands.add_parser("evaluate", parents=[device], help="measure accuracy on held-out packs"))
    return parser


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder (its newest checkpoint), or one checkpoint folder")
    parser.add_argument("out", metavar="OUT", help="model folder to make; must not exist")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="type of the weights; auto: as trained"
    )
    parser.set_defaults(command=_export)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image files, in reading order; none for text only")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder made by mma export")
    parser.add_argument("--system", default="", metavar="TEXT", help="system turn; default: the template's")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    parser.add_argument("--beams", type=_positive, default=1, metavar="N", help="beam search; 1: greedy")
    parser.set_defaults(command=_generate)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder made by mma export")
    parser.add_argument("--packs", required=True, metavar="DIR", help="held-out pack folder")
    parser.add_argument("--compare", metavar="DIR", help="second model folder, shown beside the first")
    parser.add_argument("--limit", type=_positive, metavar="N", help="ask only the first N questions")
    parser.add_argument("--batch", type=_positive, default=16, metavar="N", help="questions asked together")
    parser.add_argument("--json", metavar="FILE", help="where scores and answers go; default: DIR/evaluation.json")
    parser.set_defaults(command=_evaluate)


if __name__ == "__main__":
    sys.exit(main())
