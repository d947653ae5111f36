"""Checks a data recipe: exit code 2 and one line if it is invalid. check_recipe.py RECIPE [FLAGS OF mma-prep]."""

from __future__ import annotations

import argparse
import sys

from data_prep.common.errors import UserError
from data_prep.recipe import load_recipe


def main() -> int:
    """Load the recipe as mma-prep does; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    for key in ("--out", "--root"):
        parser.add_argument(key)
    arguments, _ = parser.parse_known_args()  # other flags, such as --workers, do not change the recipe
    overrides = {key: value for key in ("out", "root") if (value := getattr(arguments, key)) is not None}
    try:
        load_recipe(arguments.recipe, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
