"""Step 2: assigns every sample of the run to a row. The order of rows is the order of training."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter

from data_prep.common.arrow_files import atomic_path
from data_prep.common.errors import UserError, one_line
from data_prep.common.events import EVENTS_FILE, EventLedger
from data_prep.common.files import check_sums, sha256_file, sha256_line, write_atomic
from data_prep.common.typed_json import STRICT, Text, check_typed, parse_object
from data_prep.ingest.step import require_ingested
from data_prep.ingest.workspace import CorpusVariant, ShardOutput, ShardReport, Workspace
from data_prep.planning.audit import CorpusAudit, warnings
from data_prep.planning.draws import BlendedDraws, DrawChunk, image_needs, image_slots, open_draws, prompt_lengths
from data_prep.planning.packing import (
    CHUNK_DRAWS,
    JUDGED_DRAWS,
    InOrder,
    Ints,
    InWindows,
    better_seq_len,
    efficiency_by_seq_len,
)
from data_prep.progress import Reporter
from data_prep.recipe import PackConfig, Recipe
from data_prep.text.tokenizer import Tokenizer

PLAN_VERSION = 9
_REPLAN = "run `mma-prep plan` with this recipe"
_NOTEWORTHY_WASTE = 0.06
_FEW_SAMPLES = 1000
_PLAN_KEYS = {"corpora", "seq_len", "draws", "epochs", "shuffle", "max_images", "max_image_tokens", "prompts"}
PLAN_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("corpus", pa.int16()),
        ("shard", pa.int32()),
        ("index", pa.int32()),
        ("draw", pa.int64()),
        ("prompt", pa.int16()),
    ]
)


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """One entry per draw, sorted by row; arrays of equal length, mapped from the file."""

    row: Ints
    corpus: npt.NDArray[np.int16]
    shard: npt.NDArray[np.int32]
    index: npt.NDArray[np.int32]
    draw: Ints
    """Number of the draw in the blended order."""
    prompt: npt.NDArray[np.int16]
    """Index of its prompt in the pack set, or -1."""
    names: tuple[str, ...]
    """Corpus names."""
    audits: dict[str, CorpusAudit]
    settings: dict[str, Any]
    """Everything the plan depends on, see ``_settings``."""
    sha256: str

    @property
    def rows(self) -> int:
        """Number of packed rows."""
        return int(self.row[-1]) + 1 if len(self.row) else 0

    @classmethod
    def load(cls, path: Path) -> PackingPlan:
        """Read a plan. Raises UserError if it is missing or damaged."""
        try:
            sha256 = sha256_file(path)
        except OSError as error:
            raise UserError(f"{path}: no plan ({error.strerror}); {_REPLAN}") from error
        check_sums(path, sha256, required=True)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: no readable plan ({one_line(error)}); {_REPLAN}") from error
        meta = (table.schema.metadata or {}).get(b"plan", b"")
        if table.schema.remove_metadata() != PLAN_SCHEMA:
            raise UserError(f"{path}: its columns are not those of a plan; {_REPLAN}")
        about = check_typed(_meta_type(), parse_object(meta, path, _REPLAN), path, _REPLAN)
        if set(about.corpora) != about.audits.keys():
            raise UserError(f"{path}: its corpora and audits do not match; {_REPLAN}")
        columns = {name: table.column(name).to_numpy() for name in PLAN_SCHEMA.names}
        audits = {name: about.audits[name] for name in about.corpora}
        return cls(**columns, names=about.corpora, audits=audits, settings=about.settings, sha256=sha256)


@dataclass(frozen=True, slots=True)
class _Meta:
    """What a plan file holds beside its columns."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    settings: dict[str, Any]
    corpora: tuple[Text, ...]
    audits: dict[Text, CorpusAudit]


@functools.cache
def _meta_type() -> TypeAdapter[_Meta]:
    return TypeAdapter(_Meta)


def plan_path(folder: Path) -> Path:
    """Return the plan of a pack folder."""
    return folder / "plan.arrow"


def pack_variants(space: Workspace, pack: PackConfig, tokenizer_sha256: str) -> list[CorpusVariant]:
    """Return the corpus variants of one pack set in recipe order."""
    return [space.variant(corpus, pack, tokenizer_sha256) for corpus in pack.corpora]


def plan(recipe: Recipe, reporter: Reporter) -> None:
    """Plan every pack set whose inputs changed.

    Raises:
        UserError: ingest is incomplete, or a pack set would supervise nothing.
    """
    space = Workspace(recipe)
    ready = require_ingested(space, reporter.events(space.out))
    for name, pack in recipe.packs.items():
        sources = _read_sources(pack_variants(space, pack, ready.tokenizer_sha256))
        path = plan_path(space.packs(name))
        settings = _settings(recipe, pack, sources)
        if not _is_current(path, settings):
            reporter.events(space.out).record("plan-rebuilt", int(path.exists()), packs=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            made = _make(name, pack, recipe.seed, sources, Tokenizer.load(space.tokenizer), path.parent)
            for line in made.advice:
                reporter.say(line)
            _write(path, made, settings)
        current = PackingPlan.load(path)
        _record(name, current.audits, reporter.events(space.out))
        reporter.say(describe(name, pack, current))


def _record(name: str, audits: Mapping[str, CorpusAudit], events: EventLedger) -> None:
    """Record what the draws of a pack set lose."""
    for corpus, audit in audits.items():
        events.record_once("answer-dropped", audit.left_out, packs=name, corpus=corpus)
        events.record_once("answer-truncated", audit.truncated, packs=name, corpus=corpus)
        events.record_once("audit-warning", audit.without_target, packs=name, corpus=corpus, problem="no target")


def require_plan(space: Workspace, name: str, tokenizer_sha256: str) -> PackingPlan:
    """Return the plan of a pack set. Raises UserError if it is missing or of other settings or samples."""
    pack, path = space.recipe.packs[name], plan_path(space.packs(name))
    made = PackingPlan.load(path)
    sources = _read_sources(pack_variants(space, pack, tokenizer_sha256))
    if made.settings != _settings(space.recipe, pack, sources):
        raise UserError(
            f"packs.{name}: its plan was made with other settings or samples; run `mma-prep plan` with this recipe"
        )
    return made


def describe(name: str, pack: PackConfig, made: PackingPlan) -> str:
    """Return one line: rows, packing efficiency and epochs per corpus."""
    tokens = sum(audit.tokens for audit in made.audits.values())
    epochs = ", ".join(f"{corpus} {audit.epochs:.2f}" for corpus, audit in made.audits.items())
    full = tokens / max(1, made.rows * pack.seq_len)
    rows = f"{len(made.row):,} draws in {made.rows:,} rows of {pack.seq_len}"
    return f"plan {name}: {rows}, {full:.1%} full; epochs: {epochs}"


@dataclass(frozen=True, slots=True)
class _Source:
    """A corpus that a pack set draws from: its shard outputs and their reports."""

    corpus: str
    outputs: list[ShardOutput]
    reports: list[ShardReport]

    @property
    def kept(self) -> list[int]:
        """Number of samples of each shard output."""
        return [report.tally.kept for report in self.reports]


def _read_sources(variants: Sequence[CorpusVariant]) -> list[_Source]:
    """Read each done-marker of a pack set once. Raises UserError for a damaged one."""
    return [
        _Source(variant.corpus, outputs := variant.outputs, [output.report() for output in outputs])
        for variant in variants
    ]


def _settings(recipe: Recipe, pack: PackConfig, sources: Sequence[_Source]) -> dict[str, Any]:
    """Return everything a plan depends on; plans with equal settings are equal."""
    augments = {corpus: augment.model_dump() for corpus, augment in recipe.augments(pack).items()}
    return {
        "version": PLAN_VERSION,
        "seed": recipe.seed,
        "pack": pack.model_dump(mode="json", include=_PLAN_KEYS),
        "shards": [
            [source.corpus, output.shard, report.sha256, report.stats_sha256]
            for source in sources
            for output, report in zip(source.outputs, source.reports, strict=True)
        ],
        **({"augments": augments} if augments else {}),  # a resumed run must not see other pixels either
    }


def _is_current(path: Path, settings: dict[str, Any]) -> bool:
    """Return whether an undamaged plan with these settings exists at ``path``."""
    try:
        return PackingPlan.load(path).settings == settings
    except UserError:
        return False


@dataclass(frozen=True, slots=True)
class _NewPlan:
    """A plan before it is written."""

    columns: dict[str, npt.NDArray[Any]]
    """Of `PLAN_SCHEMA`."""
    audits: dict[str, CorpusAudit]
    advice: list[str]


def seq_lens_by_efficiency(recipe: Recipe) -> dict[str, dict[int, float]]:
    """Return the packing efficiency of row lengths near that of each pack set; writes nothing.

    Raises:
        UserError: ingest is incomplete.
    """
    space = Workspace(recipe)
    ready = require_ingested(space, EventLedger(space.out / EVENTS_FILE))
    tokenizer, found = Tokenizer.load(space.tokenizer), {}
    for name, pack in recipe.packs.items():
        sources = _read_sources(pack_variants(space, pack, ready.tokenizer_sha256))
        drawn = open_draws(name, pack, recipe.seed, _kept(sources), prompt_lengths(tokenizer, pack))
        first = next(drawn.chunks(JUDGED_DRAWS), None)
        lengths, images = (first.tokens, first.images) if first else (np.empty(0, np.int32),) * 2
        found[name] = efficiency_by_seq_len(lengths, image_needs(pack, images), pack.seq_len, image_slots(pack))
    return found


def _kept(sources: Sequence[_Source]) -> dict[str, list[tuple[ShardOutput, int]]]:
    """Return the shard outputs of every corpus, and their numbers of samples."""
    return {source.corpus: list(zip(source.outputs, source.kept, strict=True)) for source in sources}


def _make(
    name: str, pack: PackConfig, seed: int, sources: Sequence[_Source], tokenizer: Tokenizer, folder: Path
) -> _NewPlan:
    """Plan chunk by chunk; the columns are mapped from files in ``folder`` that have no name."""
    drawn = open_draws(name, pack, seed, _kept(sources), prompt_lengths(tokenizer, pack))
    columns = {field.name: _mapped(folder, field, len(drawn)) for field in PLAN_SCHEMA}
    limits = pack.seq_len, image_slots(pack)
    packer = InWindows(*limits, seed) if pack.shuffle else InOrder(*limits)
    start, rows_made, judged = 0, 0, None
    for chunk in drawn.chunks(CHUNK_DRAWS):
        rows = packer.place(chunk.tokens, image_needs(pack, chunk.images))
        order = np.argsort(rows, kind="stable")
        values = {"row": rows, "draw": np.arange(start, start + len(rows)), **chunk.planned}
        for column, value in values.items():
            columns[column][start : start + len(rows)] = value[order]
        judged = judged or chunk
        start, rows_made = start + len(rows), int(rows.max()) + 1
    advice = _advice(name, pack, judged, rows_made, drawn) if judged else []
    return _NewPlan(columns, drawn.audits, [*warnings(name, drawn.audits), *advice])


def _mapped(folder: Path, field: pa.Field, size: int) -> npt.NDArray[Any]:
    """Return an array in a file without a name, which the system may write back instead of holding it."""
    dtype = np.dtype(field.type.to_pandas_dtype())
    if not size:
        return np.empty(0, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=size)


def _advice(name: str, pack: PackConfig, first: DrawChunk, rows: int, drawn: BlendedDraws) -> list[str]:
    """Return a note about a clearly better row length, if there is one."""
    full = sum(audit.tokens for audit in drawn.audits.values()) / rows / pack.seq_len
    if not pack.shuffle or full > 1 - _NOTEWORTHY_WASTE or len(drawn) < _FEW_SAMPLES:
        return []
    needs = image_needs(pack, first.images)
    best, better = better_seq_len(first.tokens, needs, pack.seq_len, image_slots(pack))
    if better < full + _NOTEWORTHY_WASTE / 2:
        return []
    return [
        f"note: packs.{name}: rows of {pack.seq_len} are {full:.1%} full, rows of {best} would be {better:.1%} full"
    ]


def _write(path: Path, made: _NewPlan, settings: dict[str, Any]) -> None:
    audits = {name: asdict(entry) for name, entry in made.audits.items()}
    meta = json.dumps({"settings": settings, "corpora": list(audits), "audits": audits}, sort_keys=True)
    columns = [pa.array(made.columns[field.name], type=field.type) for field in PLAN_SCHEMA]
    table = pa.Table.from_arrays(columns, schema=PLAN_SCHEMA.with_metadata({"plan": meta}))
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    write_atomic(path.with_suffix(".sha256"), sha256_line(sha256_file(path), path.name))
