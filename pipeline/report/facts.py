"""What a run was made from, on the page: data, mask, events, environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS
from data_prep.packs import PackReader
from data_prep.show.web_page import Html, el, embedded, table
from pipeline.masks.picture import thumbnail
from pipeline.masks.policies import get_policy
from pipeline.masks.sidecars import Sidecars
from pipeline.report.history import History

_MASK_PX = 480


def data(run: History) -> Iterator[Html]:
    """Yield the corpora of a run and the mask of its first row."""
    packs = run.config.data.packs
    try:
        reader = PackReader(packs)
    except UserError as error:
        yield el("p", f"The data of {run.name} is not shown: {error}", class_="quiet")
        return
    manifest = reader.manifest
    yield el("h2", f"Data of {run.name}")
    filled = manifest.tokens / (manifest.rows * manifest.seq_len)
    about = f"{packs}: {manifest.rows:,} rows of {manifest.seq_len:,} tokens, {filled:.1%} full, "
    yield el("p", about, f"{manifest.targets:,} supervised tokens, {manifest.images:,} images", class_="quiet")
    rows = [[name, f"{each.samples:,}", f"{each.draws:,}", f"{each.epochs:.2f}"]
            for name, each in sorted(manifest.corpora.items())]  # fmt: skip
    beside = el("div", table(["corpus", "samples", "draws", "epochs"], rows))
    yield el("div", beside, _mask(run, reader), class_="columns")


def _mask(run: History, reader: PackReader) -> Html:
    name = run.config.mask.policy
    try:
        mask = thumbnail(get_policy(name, allow_leak=True), Sidecars.from_row(reader[0]), _MASK_PX)
    except UserError as error:
        return el("p", f"The mask is not drawn: {error}", class_="quiet")
    caption = f"{name} on row 0: each row of pixels is a token and the tokens it sees; orange: beyond causal"
    return el("figure", embedded(mask, "png"), el("figcaption", caption), class_="mask")


def events(run: History) -> Iterator[Html]:
    """Yield the events of a run by code."""
    yield el("h2", f"Events of {run.name}")
    rows = [[code, f"{count:,}", EVENTS.get(code, "")] for code, count in run.state.events.items()]
    if run.state.error:
        yield el("p", f"failed: {run.state.error}", class_="quiet")
    yield table(["event", "count", "meaning"], rows, texts=3) if rows else el("p", "none", class_="quiet")


def environment(runs: Sequence[History]) -> Iterator[Html]:
    """Yield versions, command and settings, one column per run."""
    yield el("h2", "Environment")
    rows = [[what, *(values)] for what, values in _facts(runs).items()]
    yield table(["", *(run.name for run in runs)], rows, texts=1 + len(runs))


def _facts(runs: Sequence[History]) -> dict[str, list[str]]:
    facts: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        env, config = run.environment, run.config
        own = {
            "recipe": str(env.get("command", "")) if isinstance(env.get("command"), str) else " ".join(env["command"]),
            "ranks": f"{env.get('ranks')} ({config.parallel.pp} stages, {config.parallel.schedule})",
            "mask policy": config.mask.policy,
            "seed": str(config.train.seed),
            "host": str(env.get("host")),
            "python": str(env.get("python")),
            **{name: str(found) for name, found in (env.get("packages") or {}).items()},
            "git": _git(env.get("git")),
        }
        for what, value in own.items():
            facts.setdefault(what, [""] * len(runs))[number] = value
    return facts


def _git(state: object) -> str:
    if not isinstance(state, dict):
        return "not in git"
    return f"{str(state.get('commit'))[:12]}{' with changes' if state.get('dirty') else ''}"
