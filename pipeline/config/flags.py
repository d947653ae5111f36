"""Command-line flags of the trainer, generated from the configuration tree."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.events import parse_strict
from data_prep.common.yaml_files import read_yaml
from pipeline.config.recipes import DEFAULT_RECIPE, load_config
from pipeline.config.schema import RunConfig, Section, known_keys
from pipeline.config.shipped import ds_config_names

DESCRIPTION = """\
Train a multimodal LLM with Modality-Mutual Attention under ZeRO-3 (and pipeline parallelism).

  mma train                                                        SFT with MMA on the built-in demo
  mma train --recipe demo_pt --ranks 2                             pre-training on the demo, on 2 ranks
  mma train --recipe my.yaml --run-dir runs/x --train.lr 1e-5      your own recipe, one key changed
  mma train --recipe aki_4b_sft --dry-run 64                       check everything, print the plan of 64 ranks

The same, under a launcher of your choice:

  deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json --recipe demo_pt
  srun --ntasks-per-node=8 mma train --deepspeed zero3 --recipe demo_pt

The same command resumes a run. To save and stop after the current step, create a file named STOP in the run folder."""

USAGE = "pipeline/train.py [--recipe NAME] [--deepspeed NAME] [--run-dir DIR] [--section.key VALUE ...]"
DEFAULT_DS_CONFIG = "zero3"
# Followed by any key of a Hugging Face config, or any option of a connector; checked when the model is resolved.
_FREE = ("--model.llm.config.", "--model.vision.config.", "--model.connector.")


@dataclass(frozen=True)
class Invocation:
    """One parsed trainer command: the resolved configuration and the requested action."""

    config: RunConfig
    recipe: str
    deepspeed: str
    dry_run: bool
    ranks: int
    """Ranks a dry run plans for; 0 = the ranks of this launch."""
    print_config: bool
    strict: frozenset[str] = frozenset()
    """Codes of events that end the run."""
    allowed_changes: tuple[str, ...] = ()
    """Keys or sections that may change on resume although they change the result."""
    notes: tuple[str, ...] = ()
    """What the user should know about the recipe; one line each."""


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def flag_name(key: str) -> str:
    """Return the flag of a dotted key: ``parallel.micro_batches`` -> ``--parallel.micro-batches``."""
    return "--" + key.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with one flag for each key of `RunConfig`; the text under a key is its help."""
    parser = _Parser(
        "pipeline/train.py", usage=USAGE, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument(
        "--recipe", default=DEFAULT_RECIPE, metavar="NAME", help=f"shipped recipe or YAML file ({DEFAULT_RECIPE})"
    )
    parser.add_argument(
        "--deepspeed", default=DEFAULT_DS_CONFIG, metavar="NAME",
        help=f"DeepSpeed file: a path, or a shipped one of {', '.join(ds_config_names())} ({DEFAULT_DS_CONFIG})",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", nargs="?", type=int, const=0, default=None, metavar="RANKS",
        help="check everything and print the plan (for RANKS ranks) without training",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", default=False, help="print the resolved configuration and exit"
    )
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY",
        help="resume although KEY (train.lr, mask, ...) differs from the checkpoint and changes the result; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--strict", default=None, metavar="CODE[,CODE]",
        help="end the run with an error when an event of these codes is recorded (events.jsonl); all = every code",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", default=False, help="print a traceback for user errors too")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    _add_section(parser, parser, RunConfig, "")
    return parser


def _add_section(parser: argparse.ArgumentParser, group: Any, kind: type[Section], prefix: str) -> None:
    for name, info in kind.model_fields.items():
        key, section = prefix + name, known_keys(kind)[name]
        if section is not None:
            title = " ".join((section.__doc__ or "").split()).rstrip(".")
            _add_section(parser, parser.add_argument_group(key, title), section, f"{key}.")
        elif name != "config":  # Hugging Face configs are free-form: --model.llm.config.KEY, see parse
            text = f"{info.description} (default: {info.default!r})".replace("%", "%%")
            group.add_argument(flag_name(key), dest=key, help=text, **_type_of(info.annotation))


def _type_of(annotation: Any) -> dict[str, Any]:
    """Return how argparse shows a value; pydantic checks it, so only closed choices are checked here."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    kinds = set(get_args(annotation)) or {annotation}
    names = {bool: "{true,false}", int: "INT", float: "FLOAT"}
    return {"metavar": next((name for kind, name in names.items() if kind in kinds), "TEXT")}


def parse(argv: Sequence[str], known: Iterable[str] = ()) -> Invocation:
    """Parse the trainer's command line.

    Args:
        argv: flags of the trainer.
        known: flags of the command around it, to suggest for a misspelt one.

    Raises:
        UserError: an unknown flag, recipe or key, or an invalid value.
    """
    options, rest = build_parser().parse_known_args([_dashed(word) for word in argv])
    overrides = [(key, value) for key, value in vars(options).items() if key in known_keys()]
    overrides += _free_overrides(rest, known)
    notes: list[str] = []
    config = load_config(options.recipe, overrides, notes)
    dry_run, ranks = options.dry_run is not None, options.dry_run or 0
    if ranks < 0:
        raise UserError(f"--dry-run {ranks}: give a positive number of ranks")
    return Invocation(
        config, options.recipe, options.deepspeed, dry_run, ranks, options.print_config,
        strict=parse_strict(options.strict),
        allowed_changes=tuple(key.removeprefix("--").replace("-", "_") for key in options.allow_change),
        notes=tuple(notes),
    )  # fmt: skip


def _dashed(word: str) -> str:
    """Return a flag with dashes for underscores: recipes and messages spell keys with underscores."""
    flag, given, value = word.partition("=")
    return flag.replace("_", "-") + given + value if flag.startswith("--") and not flag.startswith(_FREE) else word


def _free_overrides(rest: Sequence[str], known: Iterable[str]) -> list[tuple[str, Any]]:
    """Collect ``--model.llm.config.KEY VALUE`` flags and their like. Raises UserError for any other leftover word."""
    pairs = []
    words = iter(rest)
    for word in words:
        flag, given, value = word.partition("=")
        if not flag.startswith(_FREE):
            if not flag.startswith("-"):
                raise UserError(f"unexpected word '{flag}': values follow a flag, such as --train.lr 1e-4")
            flags = [*known, *build_parser()._option_string_actions]
            raise UserError(f"unknown flag '{flag}'{did_you_mean(flag, flags)}; --help lists all")
        value = value if given else next(words, "")
        if not value:
            raise UserError(f"argument {flag}: expected a value")
        pairs.append((flag[2:].replace("-", "_"), read_yaml(value, flag)))
    return pairs
