"""``mma look``: how the states of image tokens move with the question."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.common.errors import UserError
from data_prep.example import ImageRef, Turn
from pipeline.commands.arguments import check_output_file
from pipeline.commands.model import load
from pipeline.report.look import Look, write_look
from pipeline.report.movement import movements
from pipeline.serving.model import read_image


def look(options: argparse.Namespace) -> int:
    """Write the page or picture and print its path; return 0. Raises UserError for wrong arguments."""
    out = check_output_file("--out", str(options.out))
    first, second = options.questions
    if first.strip() == second.strip():
        raise UserError("both questions are the same, so nothing could move: ask two different ones")
    image = ImageRef(options.image, path=Path(options.image))
    picture = read_image(image)
    model = load(options.model, options)
    prompts = [model.prompt([Turn("user", (image, question))]) for question in (first, second)]
    found = Look(options.model, picture, (first, second), movements(model, *prompts), model.spec.mask_grid)
    size = write_look(found, out)
    for movement in found.movements:
        last = movement.values_LN[-1]
        print(f"{movement.policy}: 1 - cosine after the last layer: mean {last.mean():.3g}, largest {last.max():.3g}")
    print(f"{out}: {size / 1000:,.0f} kB")
    return 0
