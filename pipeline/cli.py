"""``mma``: the command line for training, masks and trained models.

Commands import heavy libraries lazily, so ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from data_prep.common.command_line import OneLineParser
from data_prep.common.errors import UserError
from pipeline.commands.bench import add_bench
from pipeline.commands.model import add_evaluate, add_export, add_generate

if TYPE_CHECKING:
    pass

_OVERVIEW = """\
Train, inspect and serve multimodal LLMs with Modality-Mutual Attention.

  run folder --export--> model folder --generate, evaluate--> answers

Training itself is `deepspeed pipeline/train.py`, data preparation `mma-prep`.
"""
_EXAMPLES = """\
examples:
  mma demo                                          corpora -> packs -> PT -> SFT -> model -> accuracy
  mma doctor --checkpoint runs/demo_sft             check for problems and print their fixes
  mma status                                        state of all runs in runs/
  mma estimate aki_4b_sft --ranks 8 16 64           memory and compute of each rank
  mma inspect data/demo/packs/sft --html rows.html  browse packed rows and their masks
  mma mask --help                                   draw a mask policy
  mma prove --help                                  prove that a mask leaks no answer
  mma schedule --pp 4 --micro-batches 8             draw one pipeline step
  mma export runs/demo_sft models/demo              newest checkpoint -> safetensors, config, tokenizer
  mma generate scene.png "How many circles are there?" --model models/demo
  mma generate left.png right.png "Are they alike?" --model models/demo
  mma evaluate --model models/demo --packs data/demo/packs/eval
  mma evaluate --model models/mma --compare models/causal --packs data/demo/packs/eval
  mma bench all --model models/mma --data benchmark_data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 2, with one line on stderr, for user errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()  # report a closed pipe here, not at interpreter exit
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
    from pipeline.commands.masks import mask_command

    return mask_command(words)


def _inspect(words: Sequence[str]) -> int:
    from pipeline.commands.inspect import inspect_command

    return inspect_command(words)


def _prove(words: Sequence[str]) -> int:
    from pipeline.commands.masks import prove_command

    return prove_command(words)


def _demo(words: Sequence[str]) -> int:
    from pipeline.commands.demo import demo_command

    return demo_command(words)


def _estimate(words: Sequence[str]) -> int:
    from pipeline.commands.estimate import estimate_command

    return estimate_command(words)


def _doctor(words: Sequence[str]) -> int:
    from pipeline.commands.doctor import doctor_command

    return doctor_command(words)


def _status(words: Sequence[str]) -> int:
    from pipeline.commands.status import status_command

    return status_command(words)


def _schedule(words: Sequence[str]) -> int:
    from pipeline.commands.schedule import schedule_command

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


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="mma", description=_OVERVIEW, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = OneLineParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="print a traceback for errors")
    for name, words in (
        ("demo", "run every step once on a small drawn world"),
        ("doctor", "check for problems before a run"),
        ("status", "show state, step, loss and checkpoint of runs"),
        ("estimate", "estimate memory and compute of a recipe on any number of ranks"),
        ("inspect", "browse packed rows and their masks in an HTML page"),
        ("mask", "draw a mask policy"),
        ("prove", "prove that a mask leaks no answer"),
        ("schedule", "draw one step of a pipeline schedule"),
    ):
        commands.add_parser(name, help=words, add_help=False)
    add_export(commands.add_parser("export", parents=[common], help="export a trained run as a model folder"))
    device = OneLineParser(add_help=False, parents=[common])
    device.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add_generate(commands.add_parser("generate", parents=[device], help="ask a model a question about images"))
    add_evaluate(commands.add_parser("evaluate", parents=[device], help="measure accuracy on held-out packs"))
    add_bench(commands.add_parser("bench", parents=[device], help="run the paper's benchmarks"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
