"""Curves of the held-out metrics that a run measured while it trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_prep.show.web_page import Html, el
from pipeline.report.chart import COLOURS, Line, chart
from pipeline.report.history import History


def held_out(runs: Sequence[History]) -> Iterator[Html]:
    """Yield a chart of each metric: the lines are runs, or for a single run its corpora or families."""
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.held_out_metrics))
    if not metrics:
        return
    yield el("h2", "Held-out rows, during training")
    charts = []
    for name in dict.fromkeys("/".join(metric.split("/")[:2]) for metric in metrics):
        parts = [metric for metric in metrics if metric.startswith(f"{name}/")] if len(runs) == 1 else []
        asked = [(run, metric) for run in runs for metric in (name, *parts)]
        lines = [_line(run, metric, name, single=len(runs) == 1) for run, metric in asked]
        charts.append(_figure(name, [Line(line.name, line.x, line.y, colour=at) for at, line in enumerate(lines)]))
    yield el("div", *charts, class_="charts")
    yield el(
        "p",
        "Loss: nats per supervised token. Teacher-forced accuracy: share of answers all of whose tokens are the most "
        "likely ones, each given the true tokens before it.",
        class_="quiet",
    )


def _line(run: History, metric: str, name: str, *, single: bool) -> Line:
    x, y = run.held_out(metric)
    return Line((metric.removeprefix(f"{name}/") if metric != name else "all") if single else run.name, x, y)


def _figure(name: str, lines: Sequence[Line]) -> Html:
    keys = [el("span", line.name, class_=f"key k{line.colour % COLOURS}") for line in lines]
    title = name.replace("_", " ").replace("/", ": ")
    return el("div", el("p", title, " ", *keys, class_="quiet"), chart([line for line in lines if len(line.x)]))
