"""The report of a study: JSON, CSV and one self-contained page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_prep.common.files import write_atomic
from data_prep.show.web_page import Html, el, page, table, tiles
from pipeline.report.chart import COLOURS, Line, chart
from pipeline.study.folder import StudyFolder
from pipeline.study.results import ALPHA, costs, results

_WIDTH, _LEFT, _ROW = 700, 190, 24
_CURVES = {"teacher_forced": "teacher-forced accuracy", "loss": "loss, nats per supervised token"}


def write_report(folder: StudyFolder) -> list[str]:
    """Write results.json, results.csv, costs.json and report.html; return the lines of its conclusions and their paths.

    results.json and results.csv depend on answers and evaluations, not on times: they are the same after any kills, and
    on any machine that gives the same answers and evaluations. Times are in costs.json and report.html.
    """
    found, cost = results(folder), costs(folder)
    files = {
        "results.json": json.dumps(found, indent=1).encode() + b"\n",
        "results.csv": _csv(found).encode(),
        "costs.json": json.dumps(cost, indent=1).encode() + b"\n",
        "report.html": study_page(folder.path.name, found, cost),
    }
    folder.path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(folder.path / name, data)
    return [*conclusions(found), *(str(folder.path / name) for name in files)]


def conclusions(found: Mapping[str, Any]) -> list[str]:
    """Return what is missing, then one line for each comparison: a null is stated as plainly as a gain."""
    lines = _unfinished(found)
    for entry in found["comparisons"]:
        gap = f"{100 * entry['mean']:+.1f} points [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
        p_value = f"p={entry['p']:.4f}, with Holm's correction {entry['p_holm']:.4f}, {len(entry['seeds'])} seeds"
        outcome = _outcome(entry)
        lines.append(f"{entry['arm']} - {found['baseline']}: {outcome}: {gap}, {p_value}")
    return lines


def _unfinished(found: Mapping[str, Any]) -> list[str]:
    """Return a line that names the missing runs; none where all are finished."""
    arms = found["arms"].items()
    missing = [f"{name} (seeds {', '.join(map(str, arm['missing']))})" for name, arm in arms if arm["missing"]]
    return [f"NOT FINISHED, numbers will change: {'; '.join(missing)}"] if missing else []


def _outcome(entry: Mapping[str, Any]) -> str:
    if entry["separated"]:
        return "BETTER" if entry["mean"] > 0 else "WORSE"
    if entry["smallest_p_holm"] > ALPHA:
        return "NOT DECIDABLE with so few seeds"
    return "NO DIFFERENCE SHOWN"


def _csv(found: Mapping[str, Any]) -> str:
    """Return one line per arm, way and family."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "way", "family", "seeds", "mean", "sd", "low", "high", "constant_guess", "question_guess"])
    for arm, entry in found["arms"].items():
        for way, families in entry["ways"].items():
            for family in found["questions"]:
                score = families[family]
                guesses = [found["guesses"][name][family] for name in ("constant", "question_only")]
                values = [score["mean"], score["sd"], score["low"], score["high"], *guesses]
                writer.writerow(
                    [arm, way, family, len(entry["seeds"]), *("" if v is None else f"{v:.6f}" for v in values)]
                )
    return stream.getvalue()


def study_page(name: str, found: Mapping[str, Any], cost: Mapping[str, Any]) -> bytes:
    """Return the page."""
    body = [el("h1", f"Study: {name}"), el("p", found["about"], class_="quiet"), *_overview(found)]
    body += [*_differences(found), *_accuracies(found), *_learning(found), *_rates(found), *_costs(cost)]
    return page(f"Study: {name}", body)


def _overview(found: Mapping[str, Any]) -> Iterator[Html]:
    arms = found["arms"]
    done = sum(len(arm["seeds"]) for arm in arms.values())
    entries = found["comparisons"]
    separated = sum(entry["separated"] for entry in entries)
    yield tiles(
        [
            (f"{done} of {len(arms) * len(found['seeds'])}", "reported runs finished"),
            (f"{found.get('questions', {}).get('all', 0):,}", "held-out questions"),
            (f"{separated}", f"arms separated from {found['baseline']}"),
            (f"{len(entries) - separated}", "arms not separated from it"),
        ]
    )
    yield from (el("p", line, class_="quiet") for line in _unfinished(found))


def _differences(found: Mapping[str, Any]) -> Iterator[Html]:
    yield el("h2", f"Differences from {found['baseline']}, in points of accuracy")
    entries = found["comparisons"]
    if not entries:
        yield el("p", "Nothing to compare yet.", class_="quiet")
        return
    yield _forest([(entry["arm"], entry["mean"], entry["low"], entry["high"]) for entry in entries])
    rows = []
    for entry in entries:
        numbers = [f"{100 * entry['mean']:+.1f}", f"[{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"]
        numbers += [str(len(entry["seeds"])), f"{entry['p']:.4f}", f"{entry['p_holm']:.4f}"]
        rows.append([entry["arm"], _outcome(entry), *numbers])
    yield table(["arm", "outcome", "difference", "95 % interval", "seeds", "p", "p, Holm"], rows, texts=2)
    yield el(
        "p",
        "p: paired permutation test over seeds, two-sided; Holm's correction over all comparisons of the study, a "
        "missing one counts with p = 1. The interval is a bootstrap over seeds and questions. NOT DECIDABLE: even if "
        f"all seeds had agreed, the corrected p would be above {ALPHA:g}.",
        class_="quiet",
    )


def _forest(rows: list[tuple[str, float, float, float]]) -> Html:
    """Return intervals on a common axis around 0, one line per arm; values are shares."""
    edge = 1.05 * max(1e-3, *(abs(value) for _, *values in rows for value in values))
    middle, scale = (_WIDTH + _LEFT) / 2, (_WIDTH - _LEFT - 20) / 2 / edge
    height = _ROW * (len(rows) + 1)
    parts = [el("path", d=f"M{middle:.1f} 0V{height - _ROW}", class_="grid")]
    for at, (name, mean, low, high) in enumerate(rows):
        y = _ROW * at + _ROW / 2
        left, centre, right = (f"{middle + scale * value:.1f}" for value in (low, mean, high))
        parts += [
            el("text", name, x=_LEFT - 10, y=f"{y:.1f}", dy="0.35em", text_anchor="end"),
            el("path", d=f"M{left} {y:.1f}H{right}", class_="line c0"),
            el("circle", cx=centre, cy=f"{y:.1f}", r="4", fill="var(--c0)"),
        ]
    for value in (-edge, 0.0, edge):
        x = f"{middle + scale * value:.1f}"
        side = "start" if value < 0 else "end" if value > 0 else "middle"
        parts.append(el("text", f"{100 * value:+.1f}" if value else "0", x=x, y=height - 8, text_anchor=side))
    return el("svg", *parts, viewBox=f"0 0 {_WIDTH} {height}", role="img")


def _accuracies(found: Mapping[str, Any]) -> Iterator[Html]:
    if not found["guesses"]:
        return
    yield el("h2", "Accuracy on held-out questions")
    families = list(found["questions"])
    rows = [
        [name.replace("_", " ") + " guess", "no picture", "", "", *(f"{100 * scores[f]:.1f}" for f in families)]
        for name, scores in found["guesses"].items()
    ]
    for name, arm in found["arms"].items():
        for way, scores in arm["ways"].items():
            score = scores["all"]
            sd = "" if score["sd"] is None else f"{100 * score['sd']:.1f}"
            interval = f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
            rows.append([name, way, sd, interval, *(f"{100 * scores[family]['mean']:.1f}" for family in families)])
    yield table(["arm", "asked", "sd of seeds", "95 % interval", *families], rows, texts=2)
    counts = ", ".join(f"{family} {count:,}" for family, count in found["questions"].items())
    yield el(
        "p",
        f"Per cent, means over seeds. Questions: {counts}. The guesses are learned from the training rows: the most "
        "frequent answer of the family, and the most frequent answer to the same question.",
        class_="quiet",
    )


def _learning(found: Mapping[str, Any]) -> Iterator[Html]:
    arms = {name: arm for name, arm in found["arms"].items() if arm["curve"] and arm["curve"][0]["tokens"]}
    if not arms:
        return
    yield el("h2", "Learning curves on the validation rows")
    base = [found["baseline"]] if found["baseline"] in arms else []
    others = [name for name in arms if name not in base]
    figures = []
    for first in range(0, max(1, len(others)), COLOURS - 1):  # as many lines as there are colours
        shown = {name: arms[name]["curve"] for name in [*base, *others[first : first + COLOURS - 1]]}
        figures += [_curves(shown, metric, title) for metric, title in _CURVES.items()]
    yield el("div", *figures, class_="charts")
    rows = [[name, _percent(arm["teacher_forced"]), _percent(_plain(arm))] for name, arm in arms.items()]
    yield table(["arm", "teacher-forced, training mask", "answered by itself"], rows)
    yield el(
        "p",
        "An arm whose mask leaks answers is far better teacher-forced than by itself: the difference is its leak. The "
        "first number is of validation rows, the second of test questions.",
        class_="quiet",
    )


def _curves(curves: Mapping[str, list[dict[str, Any]]], metric: str, title: str) -> Html:
    keys = (el("span", name, class_=f"key k{at}") for at, name in enumerate(curves))
    lines = [_line(name, curve, metric, at) for at, (name, curve) in enumerate(curves.items())]
    return el("div", el("p", title, " ", *keys, class_="quiet"), chart(lines, x_label="thousand tokens"))


def _plain(arm: Mapping[str, Any]) -> float | None:
    first = next(iter(arm["ways"].values()), None)
    return None if first is None else first["all"]["mean"]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _line(name: str, curve: list[dict[str, Any]], metric: str, colour: int) -> Line:
    x = np.array([point["tokens"] / 1000 for point in curve])
    y = np.array([np.nan if point[metric] is None else point[metric] for point in curve])
    return Line(name, x, y, colour=colour)


def _rates(found: Mapping[str, Any]) -> Iterator[Html]:
    arms = {name: arm for name, arm in found["arms"].items() if arm["trials"]}
    if not arms:
        return
    yield el("h2", "Learning rates, chosen on the validation rows")
    rates = list(next(iter(arms.values()))["trials"])
    rows = []
    for name, arm in arms.items():
        shown = (_trial(values) for values in arm["trials"].values())
        rows.append([name, "not yet" if arm["lr"] is None else f"{arm['lr']:g}", *shown])
    yield table(["arm", "chosen", *rates], rows)


def _trial(values: list[float | None]) -> str:
    return " ".join("diverged" if value is None else f"{value:.3f}" for value in values)


def _costs(cost: Mapping[str, Any]) -> Iterator[Html]:
    if not cost:
        return
    yield el("h2", "Cost of a run: its last stage, mean over seeds; the largest memory of all seeds")
    rows = []
    for name, entry in cost.items():
        memory = "" if entry["memory_gib"] is None else f"{entry['memory_gib']:.1f}"
        numbers = [f"{entry['tokens']:,}", f"{entry['flops']:.2e}", f"{60 * entry['step_hours']:.1f}", memory]
        rows.append([name, *numbers])
    yield table(["arm", "tokens", "FLOPs", "minutes of steps", "GPU memory, GiB"], rows)
