"""The page of ``mma report``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.common.errors import UserError
from data_prep.show.inspect import PackFolder
from data_prep.show.web_page import Html, el, page, table, tiles
from pipeline.report.accuracy import accuracy, answers
from pipeline.report.chart import COLOURS, Line, chart, smoothed
from pipeline.report.facts import data, environment, events
from pipeline.report.held_out import held_out
from pipeline.report.history import History
from pipeline.report.look import looks, section
from pipeline.serving.export import model_folder
from pipeline.serving.model import load_model
from pipeline.training.run.state import format_duration


def report(runs: Sequence[History], packs: Path | None = None, *, pictures: int = 0) -> bytes:
    """Return the page about one run, or several side by side.

    Args:
        runs: at least one, with different names.
        packs: the held-out pack folder of the evaluations, whose pictures are shown with the answers.
        pictures: how many of them are shown with the movement of their states; each run is exported for that.

    Raises:
        UserError: ``packs`` is not a pack folder, or missing with ``pictures``, or a run cannot be exported.
    """
    title = f"Report: {', '.join(run.name for run in runs)}"
    folder = None if packs is None else PackFolder(packs)
    body = [el("h1", title), _legend(runs), *_overview(runs), *_curves(runs), *held_out(runs), *accuracy(runs)]
    for run in runs:
        body += [*answers(run, folder), *_inside(run, folder, pictures), *data(run), *events(run)]
    return page(title, [*body, *environment(runs)])


def _legend(runs: Sequence[History]) -> Html:
    if len(runs) == 1:
        return el("p", runs[0].state.path.as_posix(), class_="quiet")
    return el(
        "p",
        *(el("span", run.name, class_=f"key k{number % COLOURS}") for number, run in enumerate(runs)),
        class_="quiet",
    )


def _overview(runs: Sequence[History]) -> Iterator[Html]:
    if len(runs) == 1:
        yield tiles([(number, what) for what, number in _figures(runs[0]).items()])
        return
    keys = list(dict.fromkeys(key for run in runs for key in _figures(run)))
    yield table(["run", *keys], [[run.name, *(_figures(run).get(key, "") for key in keys)] for run in runs])


def _figures(run: History) -> dict[str, str]:
    """Return the key figures of a run: description -> number."""
    state, loss = run.state, run.series("loss")
    last = loss[np.isfinite(loss)][-max(1, len(loss) // 50) :]
    figures = {
        "state": state.state,
        "step": f"{state.step:,}" + (f" of {state.steps:,}" if state.steps else ""),
        "loss, mean of the last 2 %": f"{last.mean():.4f}" if len(last) else "not finite",
        "tokens trained on": f"{np.nansum(run.series('tokens')):,.0f}",
        "time of its steps": format_duration(run.seconds),
        "tokens/s, median": f"{np.nanmedian(run.series('tokens_per_s')):,.0f}",
    }
    mfu = run.series("mfu")
    if np.isfinite(mfu).any():
        figures["MFU, median"] = f"{np.nanmedian(mfu):.1%}"
    if run.evaluation is not None:
        score = run.evaluation.scores["all"]
        figures["held-out accuracy"] = f"{score.right / score.asked:.1%}"
    return figures


def _inside(run: History, folder: PackFolder | None, pictures: int) -> Iterator[Html]:
    """Yield how image states move with the question, for the first pictures of a folder."""
    if not pictures:
        return
    if folder is None:
        raise UserError("--look needs pictures: add --packs with a held-out pack folder")
    model = load_model(model_folder(run.state.path))
    yield el("h2", f"Image states of {run.name} under two questions")
    found = list(looks(model, run.name, folder.reader, pictures))
    for look in found:
        yield from section(look)
    if not found:
        yield el("p", f"{folder.reader.directory} has no picture with two questions.", class_="quiet")


def _curves(runs: Sequence[History]) -> Iterator[Html]:
    yield el("h2", "Training")
    figures = [
        ("loss per supervised token, nats (smoothed; raw values faint)", _smooth(runs, "loss"), False),
        ("gradient norm before clipping", _smooth(runs, "grad_norm"), True),
        ("learning rate", _rates(runs), False),
        ("tokens/s, all ranks", _smooth(runs, "tokens_per_s"), False),
        ("share of a step that waits for data, %", _waits(runs), False),
    ]
    charts = (el("div", el("p", name, class_="quiet"), chart(lines, log=log)) for name, lines, log in figures)
    yield el("div", *charts, class_="charts")
    if damaged := sum(run.damaged_lines for run in runs):
        yield el("p", f"{damaged} lines of metrics.jsonl cannot be read and are not shown.", class_="quiet")


def _smooth(runs: Sequence[History], key: str) -> list[Line]:
    lines = []
    for colour, run in enumerate(runs):
        steps, values = run.series("step"), run.series(key)
        lines += [
            Line(run.name, steps, values, faint=True, colour=colour),
            Line(run.name, steps, smoothed(values, max(1, len(values) // 40)), colour=colour),
        ]
    return lines


def _rates(runs: Sequence[History]) -> list[Line]:
    return [Line(run.name, run.series("step"), run.series("lr"), colour=colour) for colour, run in enumerate(runs)]


def _waits(runs: Sequence[History]) -> list[Line]:
    def share(run: History) -> Line:
        waited = 100 * run.series("data_s") / run.series("step_s")
        return Line(run.name, run.series("step"), smoothed(waited, max(1, len(waited) // 40)))

    return [Line(line.name, line.x, line.y, colour=colour) for colour, line in enumerate(map(share, runs))]


def write_report(folders: Sequence[Path], out: Path, packs: Path | None = None, *, pictures: int = 0) -> int:
    """Write the page; return its bytes. Raises UserError for a folder that is no run, or two of the same name."""
    runs = History.read_all(folders)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called {max(names, key=names.count)}: their lines could not be told apart")
    content = report(runs, packs, pictures=pictures)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from error
    return len(content)
