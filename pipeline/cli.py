"""``mma``: the command line for training, masks and trained models.

Commands import heavy libraries lazily, so ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from data_prep.common.command_line import OneLineParser, add_version, print_completion, run_command
from pipeline.commands import parsers
from pipeline.commands.bench import BENCH, add_bench
from pipeline.commands.export import EXPORT, VERIFY, add_export, add_verify
from pipeline.commands.model import LOOK, add_evaluate, add_generate, add_look
from pipeline.commands.serve import CHAT, SERVE, add_chat, add_serve

_OVERVIEW = """\
Train, inspect and serve multimodal LLMs with Modality-Mutual Attention.

  packs --train--> run folder --export--> model folder --generate, serve, evaluate--> answers

Data preparation is `mma-prep`.
"""
_EXAMPLES = """\
examples:
  mma demo                                          corpora -> packs -> PT -> SFT -> model -> accuracy
  mma train --recipe demo_sft --ranks 2             train; the same command resumes
  mma doctor --checkpoint runs/demo_sft             check for problems and print their fixes
  mma status                                        state of all runs in runs/
  mma estimate aki_4b_sft --ranks 8 16 64           memory and compute of each rank
  mma inspect data/demo/packs/sft --html rows.html  browse packed rows and their masks
  mma mask --help                                   draw a mask policy
  mma prove --help                                  prove that a mask leaks no answer
  mma prove --model models/demo --batches data/demo/packs/sft    probe a model for leaks
  mma schedule --pp 4 --micro-batches 8             draw one pipeline step
  mma report runs/demo_sft                          one page: curves, accuracy, data, events
  mma study run masks_demo                          arms x seeds of runs, compared
  mma slurm init                                    copy the Slurm scripts into ./slurm
  mma export runs/demo_sft models/demo              newest checkpoint -> safetensors, config, tokenizer
  mma generate scene.png "How many circles are there?" --model models/demo
  mma generate left.png right.png "Are they alike?" --model models/demo
  mma chat models/demo                              talk to a model in the terminal
  mma serve models/demo                             OpenAI-compatible API, and a web page
  mma evaluate --model models/demo --packs data/demo/packs/eval
  mma evaluate --model models/mma --compare models/causal --packs data/demo/packs/eval
  mma bench all --model models/mma --data bench_data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 2, with one line on stderr, for user errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command("mma", lambda: _code_of(words), debug="--debug" in words)


def _code_of(words: list[str]) -> int:
    try:
        return _run(words)
    except SystemExit as end:  # of argparse, after help or a usage error
        return end.code if isinstance(end.code, int) else 0


def _run(words: list[str]) -> int:
    name = words[0] if words else ""
    if name in _OWN_PARSERS:
        return _OWN_PARSERS[name](words[1:])
    parser = build_parser(name)
    if name == "train" and not {"-h", "--help"} & set(words):
        return _train(words[1:])
    options, flags = parser.parse_known_args(words)
    if flags and not getattr(options, "trainer_flags", False):
        options.parser.error(f"unrecognized arguments: {' '.join(flags)}")
    options.flags = flags
    command: Callable[[argparse.Namespace], int | None] = options.command
    return command(options) or 0


def _train(words: Sequence[str]) -> int:
    from pipeline.commands.train import TrainCommand, start_ranks

    command = TrainCommand.parse(words)
    if command.ranks:
        start_ranks(command)
    from pipeline.train import leave, main

    leave(main(command.words))


def _completion(options: argparse.Namespace) -> None:
    print_completion(build_parser(), options.shell)


def _mask(words: Sequence[str]) -> int:
    from pipeline.commands.masks import mask_command

    return mask_command(words)


def _inspect(words: Sequence[str]) -> int:
    from pipeline.commands.inspect import inspect_command

    return inspect_command(words)


def _prove(words: Sequence[str]) -> int:
    if any(word.split("=")[0] == "--model" for word in words):
        from pipeline.commands.probe import probe_command

        return probe_command(words)
    from pipeline.commands.masks import prove_command

    return prove_command(words)


def _own_parser(name: str) -> OneLineParser:
    """Return the parser that a command of ``_OWN_PARSERS`` uses; its modules import torch."""
    from pipeline.commands.inspect import inspect_parser
    from pipeline.commands.masks import mask_parser, prove_parser

    return {"inspect": inspect_parser, "mask": mask_parser, "prove": prove_parser}[name]()


_OWN_PARSERS: Mapping[str, Callable[[Sequence[str]], int]] = {"inspect": _inspect, "mask": _mask, "prove": _prove}
_COMMANDS: Mapping[str, tuple[str, Callable[[OneLineParser], None] | None]] = {
    "demo": ("run every step once on a small drawn world", parsers.add_demo),
    "train": ("train a recipe, or resume its run", None),
    "doctor": ("check for problems before a run", parsers.add_doctor),
    "status": ("show state, step, loss and checkpoint of runs", parsers.add_status),
    "estimate": ("estimate memory and compute of a recipe on any number of ranks", parsers.add_estimate),
    "inspect": ("browse packed rows and their masks in an HTML page", None),
    "mask": ("draw a mask policy", None),
    "prove": ("prove that a mask leaks no answer; with --model, probe a model", None),
    "schedule": ("draw one step of a pipeline schedule", parsers.add_schedule),
    "report": ("write one page about runs: curves, accuracy, data, events", parsers.add_report),
    "study": ("train arms with several seeds and compare them", parsers.add_study),
    "slurm": ("copy the Slurm scripts", parsers.add_slurm),
    "smollm2": ("write a small language model with real weights", parsers.add_smollm2),
    "export": ("export a trained run as a model folder", add_export),
    "verify-export": ("check that a loader computes what training computed", add_verify),
    "generate": ("ask a model a question about images", add_generate),
    "look": ("show how the states of a picture move with the question", add_look),
    "chat": ("talk to a model in the terminal", add_chat),
    "serve": ("serve a model over HTTP: OpenAI's API and a web page", add_serve),
    "evaluate": ("measure accuracy on held-out packs", add_evaluate),
    "bench": ("run the paper's benchmarks on a model", add_bench),
    "completion": ("print a shell completion script", parsers.add_completion),
}
"""Help line of each command, and the function that declares its arguments."""
_DESCRIPTIONS = {
    "demo": parsers.DEMO,
    "doctor": parsers.DOCTOR,
    "status": parsers.STATUS,
    "estimate": parsers.ESTIMATE,
    "schedule": parsers.SCHEDULE,
    "report": parsers.REPORT,
    "study": parsers.STUDY,
    "slurm": parsers.SLURM,
    "smollm2": parsers.SMOLLM2,
    "export": EXPORT,
    "verify-export": VERIFY,
    "chat": CHAT,
    "serve": SERVE,
    "bench": BENCH,
    "look": LOOK,
    "completion": parsers.COMPLETION,
}


def build_parser(only: str | None = None) -> OneLineParser:
    """Return the parser of ``mma``, with the arguments of the command ``only``; None = of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="mma", description=_OVERVIEW, epilog=_EXAMPLES, formatter_class=raw)
    add_version(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (text, add_arguments) in _COMMANDS.items():
        if name == "train" and only in (None, name):
            from pipeline.commands.train import add_train  # reads the whole configuration schema

            add_train(commands, text)
            continue
        if name in _OWN_PARSERS and only is None:
            commands.add_parser(name, help=text, parents=[_own_parser(name)], add_help=False)
            continue
        description = _DESCRIPTIONS.get(name, f"{text[0].upper()}{text[1:]}.")
        own = commands.add_parser(name, help=text, description=description, formatter_class=raw, allow_abbrev=False)
        own.add_argument("--debug", action="store_true", help="print a traceback for errors")
        own.set_defaults(parser=own)
        if add_arguments is not None and only in (None, name):
            add_arguments(own)
        if name in ("generate", "look", "chat", "serve", "evaluate", "bench"):
            own.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
        if name == "completion":
            own.set_defaults(command=_completion)
    return parser


if __name__ == "__main__":
    sys.exit(main())
