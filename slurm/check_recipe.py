"""Refuses a data recipe that is wrong, with exit code 2 and one line: check_recipe.py RECIPE [FLAGS OF mma-prep]."""

from __future__ import annotations

import argparse
import sys

from data_prep.common.errors import UserError
from data_prep.recipe import load_recipe


def main() -> int:
    """Read the recipe as mma-prep will; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    for key in ("--out", "--root"):
        parser.add_argument(key)
    arguments, _ = parser.parse_known_args()  # what else there is, such as --workers, changes no recipe
    overrides = {key: value for key in ("out", "root") if (value := getattr(arguments, key)) is not None}
    try:
        load_recipe(arguments.recipe, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
