"""Command-line flags of the trainer, made from the configuration tree so that they cannot drift from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.yaml_files import read_yaml
from pipeline.config.recipes import DEFAULT_RECIPE, load_config
from pipeline.config.schema import RunConfig, Section, known_keys

DESCRIPTION = """\
Train a multimodal LLM with Modality-Mutual Attention under ZeRO-3 (and pipeline parallelism).

  deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json                     the built-in demo, SFT with MMA
  deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json --recipe demo_pt    its pre-training stage
  deepspeed pipeline/train.py --deepspeed ds_configs/zero3.json --recipe my.yaml --run-dir runs/x --train.lr 1e-5

The same command resumes a run. A file named STOP in the run folder ends it after the current step, saved."""

_FREE = ("--model.llm.config.", "--model.vision.config.")  # any key of a Hugging Face config may follow


@dataclass(frozen=True)
class Invocation:
    """One call of the trainer: the resolved configuration and what to do with it."""

    config: RunConfig
    recipe: str
    deepspeed: str
    dry_run: bool
    ranks: int
    """Of a dry run: as if so many had been started; 0 stands for those that are."""
    print_config: bool


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def flag_name(key: str) -> str:
    """Return the flag of a dotted key: ``parallel.micro_batches`` -> ``--parallel.micro-batches``."""
    return "--" + key.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with one flag for each key of `RunConfig`, helped by the text under the key."""
    parser = _Parser(
        "pipeline/train.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"shipped recipe or YAML file ({DEFAULT_RECIPE})")
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json", help="DeepSpeed configuration file")
    parser.add_argument(
        "--dry-run", nargs="?", type=int, const=0, default=None, metavar="RANKS",
        help="check everything, print the plan (as if RANKS ranks were started), train nothing",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", default=False, help="print the resolved configuration and exit"
    )
    parser.add_argument("--debug", action="store_true", default=False, help="show a traceback for user errors too")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    _add_section(parser, parser, RunConfig, "")
    return parser


def _add_section(parser: argparse.ArgumentParser, group: Any, kind: type[Section], prefix: str) -> None:
    for name, info in kind.model_fields.items():
        key, section = prefix + name, known_keys(kind)[name]
        if section is not None:
            title = " ".join((section.__doc__ or "").split()).rstrip(".")
            _add_section(parser, parser.add_argument_group(key, title), section, f"{key}.")
        elif name != "config":  # Hugging Face configs are free dictionaries: --model.llm.config.KEY, see parse
            text = f"{info.description} (default: {info.default!r})".replace("%", "%%")
            group.add_argument(flag_name(key), dest=key, metavar="VALUE", help=text)


def parse(argv: Sequence[str]) -> Invocation:
    """Parse the trainer's command line. Raises UserError (unknown flag, recipe or key, wrong value)."""
    options, rest = build_parser().parse_known_args([_dashed(word) for word in argv])
    overrides = [(key, value) for key, value in vars(options).items() if key in known_keys()]
    overrides += _free_overrides(rest)
    config = load_config(options.recipe, overrides)
    dry_run, ranks = options.dry_run is not None, options.dry_run or 0
    if ranks < 0:
        raise UserError(f"--dry-run {ranks}: a number of ranks is positive")
    return Invocation(config, options.recipe, options.deepspeed, dry_run, ranks, options.print_config)


def _dashed(word: str) -> str:
    """Return a flag with dashes for underscores, for keys are written with them in recipes and messages."""
    flag, given, value = word.partition("=")
    return flag.replace("_", "-") + given + value if flag.startswith("--") and not flag.startswith(_FREE) else word


def _free_overrides(rest: Sequence[str]) -> list[tuple[str, Any]]:
    """Pair up ``--model.llm.config.KEY VALUE`` flags; anything else left over is unknown."""
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
