"""Command-line flags of ``mma-prep init`` and ``mma-prep types``; heavy libraries are imported when a command runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from data_prep.common.command_line import positive_int
from data_prep.common.errors import UserError

_INIT = """\
Look at your own data, show three samples of it, and write a commented recipe that runs.

Understands LLaVA and ShareGPT JSON or JSON lines, OpenAI messages, tables of images with questions and answers or
with captions (JSON, JSON lines, Parquet; image files or bytes), folders written by save_to_disk, webdataset tars, and
folders of images with caption files. What is ambiguous is printed with the flag that decides it.
"""
ROLES = ("system", "user", "assistant")


def add_commands(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Add both commands to the parser of ``mma-prep``."""
    raw = argparse.RawDescriptionHelpFormatter
    text = "look at your own data and write a recipe for it"
    init = commands.add_parser("init", parents=[debug], help=text, description=_INIT, formatter_class=raw)
    init.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_FOLDER", help="your data")
    init.add_argument("--recipe", type=Path, metavar="FILE", help="recipe to write (default: named after the data)")
    init.add_argument("--out", metavar="DIR", help="output folder of the recipe (default: prepared/NAME)")
    init.add_argument("--run", action="store_true", help="run the recipe at once: all steps, to packs")
    init.add_argument("--force", action="store_true", help="overwrite the recipe")
    init.add_argument("--tokenizer", type=Path, metavar="PATH", help="use this tokenizer (default: train one)")
    init.add_argument("--held-out", type=_share, metavar="SHARE", help="hold out a share of the images, e.g. 5%%")
    help_of_tokens = "tokens per image, as the model's connector produces (default: %(default)s)"
    init.add_argument("--image-tokens", type=positive_int, default=144, metavar="N", help=help_of_tokens)
    init.add_argument("--images", type=Path, metavar="DIR", help="folder of the images that the data names")
    for name in ("image", "question", "answer", "caption"):
        init.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {name}")
    help_of_roles = "what a role in the data means: user, assistant or system; repeatable"
    init.add_argument("--role", type=_role, action="append", default=[], metavar="NAME=ROLE", help=help_of_roles)
    init.set_defaults(command=write_recipe)
    text = "list the corpus types, or the options of one"
    types = commands.add_parser("types", parents=[debug], help=text, description=text)
    types.add_argument("type", nargs="?", metavar="TYPE", help="a corpus type")
    types.set_defaults(command=_types)


def _share(text: str) -> float:
    """Parse ``0.05`` or ``5%``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1, such as 5%")
    return value


def _role(text: str) -> tuple[str, str]:
    name, _, role = text.partition("=")
    if not name or role not in ROLES:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=ROLE with a role of {', '.join(ROLES)}")
    return name, role


def write_recipe(arguments: argparse.Namespace) -> Path:
    """Run ``mma-prep init``; return the recipe it wrote. Raises UserError."""
    from data_prep.init.command import Request, init
    from data_prep.init.look import Wishes
    from data_prep.init.sniff import Columns

    if arguments.images is not None and not arguments.images.is_dir():
        raise UserError(f"--images {arguments.images}: not a folder")
    if arguments.tokenizer is not None and not arguments.tokenizer.exists():
        raise UserError(f"--tokenizer {arguments.tokenizer}: does not exist")
    columns = Columns(
        question=arguments.question_column,
        answer=arguments.answer_column,
        caption=arguments.caption_column,
        image=arguments.image_column,
    )
    request = Request(
        paths=arguments.paths,
        recipe=arguments.recipe,
        out=arguments.out,
        tokenizer=arguments.tokenizer,
        held_out=arguments.held_out,
        image_tokens=arguments.image_tokens,
        force=arguments.force,
        wishes=Wishes(columns, arguments.images, dict(arguments.role)),
        words=sys.argv[1:] if sys.argv[1:2] == ["init"] else ["init", *map(str, arguments.paths)],
    )
    return init(request, lambda line: print(line, flush=True))


def _types(arguments: argparse.Namespace) -> None:
    from data_prep.init.types import describe_type, describe_types

    print(describe_type(arguments.type) if arguments.type else describe_types())
