"""Command-line flags of the trainer, generated from the configuration tree."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.events import parse_strict
from data_prep.common.yaml_files import read_yaml
from pipeline.config.recipes import DEFAULT_RECIPE, load_config
from pipeline.config.schema import RunConfig, Section, known_keys

DESCRIPTION = """\
Train a multimodal LLM with Modality-Mutual Attention under ZeRO-3 (and pipeline parallelism).

  deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json                     SFT with MMA on the built-in demo
  deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json --recipe demo_pt    pre-training on the demo
  deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json --recipe my.yaml --run-dir runs/x --train.lr 1e-5

The same command resumes a run. To save and stop after the current step, create a file named STOP in the run folder."""

_FREE = ("--model.llm.config.", "--model.vision.config.")  # followed by any key of a Hugging Face config


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
        "pipeline/train.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"shipped recipe or YAML file ({DEFAULT_RECIPE})")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json", help="DeepSpeed configuration file")
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
            group.add_argument(flag_name(key), dest=key, metavar="VALUE", help=text)


def parse(argv: Sequence[str]) -> Invocation:
    """Parse the trainer's command line. Raises UserError for an unknown flag, recipe or key, or a bad value."""
    options, rest = build_parser().parse_known_args([_dashed(word) for word in argv])
    overrides = [(key, value) for key, value in vars(options).items() if key in known_keys()]
    overrides += _free_overrides(rest)
    config = load_config(options.recipe, overrides)
    dry_run, ranks = options.dry_run is not None, options.dry_run or 0
    if ranks < 0:
        raise UserError(f"--dry-run {ranks}: give a positive number of ranks")
    return Invocation(
        config, options.recipe, options.deepspeed, dry_run, ranks, options.print_config,
        strict=parse_strict(options.strict),
        allowed_changes=tuple(key.removeprefix("--").replace("-", "_") for key in options.allow_change),
    )  # fmt: skip


def _dashed(word: str) -> str:
    """Return a flag with dashes for underscores: recipes and messages spell keys with underscores."""
    flag, given, value = word.partition("=")
    return flag.replace("_", "-") + given + value if flag.startswith("--") and not flag.startswith(_FREE) else word


def _free_overrides(rest: Sequence[str]) -> list[tuple[str, Any]]:
    """Collect ``--model.llm.config.KEY VALUE`` flags. Raises UserError for any other leftover word."""
    pairs = []
    words = iter(rest)
    for word in words:
        flag, given, value = word.partition("=")
        if not flag.startswith(_FREE):
            flags = [flag_name(key) for key, section in known_keys().items() if section is None]
            raise UserError(f"unknown flag '{flag}'{did_you_mean(flag, flags)}; --help lists all")
        value = value if given else next(words, "")
        if not value:
            raise UserError(f"argument {flag}: expected a value")
        pairs.append((flag[2:].replace("-", "_"), read_yaml(value, flag)))
    return pairs
