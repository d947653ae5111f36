"""Step 2: assigns every sample of the run to a row. The order of rows is the order of training."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
from data_prep.ingest.prompts import draw_prompts, prompt_ids
from data_prep.ingest.samples import read_sample_stats
from data_prep.ingest.step import require_ingested
from data_prep.ingest.workspace import CorpusVariant, ShardOutput, ShardReport, Workspace
from data_prep.planning.audit import CorpusAudit, audit_corpus, check_audit, warnings
from data_prep.planning.packing import (
    Ints,
    better_seq_len,
    efficiency_by_seq_len,
    exact_draws,
    interleave,
    pack_in_order,
    pack_windows,
    packing_efficiency,
    sample_order,
    token_slots,
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
            made = _make(name, pack, recipe.seed, sources, Tokenizer.load(space.tokenizer))
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
class _Draws:
    """Draws; arrays of equal length."""

    shard: npt.NDArray[np.int32]
    index: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    """Tokens, including the prompt."""
    images: npt.NDArray[np.int32]
    image_tokens: npt.NDArray[np.int32]
    prompt: npt.NDArray[np.int16]

    def image_slots(self, pack: PackConfig) -> tuple[Ints | npt.NDArray[np.int32], int | None]:
        """Return what the images of each draw take of a row's room for images, and that room; None: no limit."""
        if pack.max_image_tokens is None:
            return self.images, pack.max_images
        return token_slots(self.image_tokens, pack.max_image_tokens)


@dataclass(frozen=True, slots=True)
class _Blend:
    """All draws of a pack set in blended order."""

    corpus: npt.NDArray[np.int16]
    draws: _Draws

    @classmethod
    def of(cls, pack: PackConfig, parts: Sequence[tuple[Ints, _Draws]]) -> _Blend:
        """Blend the numbered draws of several corpora; without shuffling, corpus after corpus."""
        corpus = interleave([len(numbers) for numbers, _ in parts])
        corpus = corpus if pack.shuffle else np.sort(corpus)
        places = np.argsort(corpus, kind="stable")  # draws of the first corpus, then of the second, ...
        starts = itertools.accumulate((len(numbers) for numbers, _ in parts), initial=0)
        at = np.concatenate([places[start:][numbers] for start, (numbers, _) in zip(starts, parts, strict=False)])

        def spread(name: str) -> npt.NDArray[Any]:
            joined = np.concatenate([getattr(draws, name) for _, draws in parts])
            blended = np.empty_like(joined)
            blended[at] = joined
            return blended

        return cls(corpus, _Draws(*(spread(field.name) for field in fields(_Draws))))


@dataclass(frozen=True, slots=True)
class _NewPlan:
    """A plan before it is written."""

    table: pa.Table
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
        draws = _blended(name, pack, recipe.seed, sources, tokenizer)[0].draws
        needs, slots = draws.image_slots(pack)
        found[name] = efficiency_by_seq_len(draws.tokens, needs, pack.seq_len, slots)
    return found


def _make(name: str, pack: PackConfig, seed: int, sources: Sequence[_Source], tokenizer: Tokenizer) -> _NewPlan:
    blend, audits = _blended(name, pack, seed, sources, tokenizer)
    rows = _rows(pack, seed, blend.draws)
    order = np.argsort(rows, kind="stable")
    draws = blend.draws
    values: list[npt.NDArray[Any]] = [
        rows,
        blend.corpus,
        draws.shard,
        draws.index,
        np.arange(len(order)),
        draws.prompt,
    ]
    arrays = [pa.array(value[order], type=field.type) for value, field in zip(values, PLAN_SCHEMA, strict=True)]
    advice = [*warnings(name, audits), *_advice(name, pack, draws, rows)]
    return _NewPlan(pa.Table.from_arrays(arrays, schema=PLAN_SCHEMA), audits, advice)


def _blended(
    name: str, pack: PackConfig, seed: int, sources: Sequence[_Source], tokenizer: Tokenizer
) -> tuple[_Blend, dict[str, CorpusAudit]]:
    """Return all draws of a pack set in blended order, and their audits. Raises UserError if an audit fails."""
    orders = _draw(pack, seed, [source.corpus for source in sources], [sum(source.kept) for source in sources])
    first_outputs = itertools.accumulate((len(source.outputs) for source in sources), initial=0)
    prompt_tokens = np.array([*(len(ids) for ids in prompt_ids(tokenizer, pack.prompts)), 0], dtype=np.int32)
    drawn = [
        _drawn(source, chosen, first_output, seed, prompt_tokens)
        for source, chosen, first_output in zip(sources, orders, first_outputs, strict=False)
    ]
    audits = {source.corpus: audit for source, (_, _, audit) in zip(sources, drawn, strict=True)}
    check_audit(name, audits)
    return _Blend.of(pack, [(numbers, draws) for numbers, draws, _ in drawn]), audits


def _drawn(
    source: _Source, chosen: Ints, first_output: int, seed: int, prompt_tokens: npt.NDArray[np.int32]
) -> tuple[Ints, _Draws, CorpusAudit]:
    """Return the draw numbers of a corpus, its draws in storage order, and its audit.

    Args:
        source: the corpus.
        chosen: its sample numbers in draw order.
        first_output: index of its first shard output among those of all corpora.
        seed: seed of the recipe.
        prompt_tokens: length of each prompt and, last, 0 for no prompt.
    """
    part = read_sample_stats(source.outputs, source.kept, chosen)
    prompt = draw_prompts(part.place, part.stats["prompted"], len(prompt_tokens) - 1, seed, source.corpus)
    tokens = part.stats["tokens"] + prompt_tokens[prompt]  # the last entry is for NO_PROMPT
    draws = _Draws(
        part.shard + np.int32(first_output),
        part.index,
        tokens,
        part.stats["images"],
        part.stats["image_tokens"],
        prompt,
    )
    return part.place, draws, audit_corpus(part, sum(source.kept), tokens)


def _draw(pack: PackConfig, seed: int, names: Sequence[str], samples: Sequence[int]) -> Iterator[Ints]:
    """Yield the sample numbers of each corpus in draw order."""
    if pack.draws is None:
        counts = [count * (pack.epochs or 1) for count in samples]
    else:
        counts = exact_draws([pack.corpora[name] for name in names], pack.draws)
    for name, size, count in zip(names, samples, counts, strict=True):
        yield sample_order(size, count, seed, name) if pack.shuffle else np.resize(np.arange(size), count)


def _rows(pack: PackConfig, seed: int, draws: _Draws) -> Ints:
    needs, slots = draws.image_slots(pack)
    if not pack.shuffle:
        return pack_in_order(draws.tokens, needs, pack.seq_len, slots)
    return pack_windows(draws.tokens, needs, pack.seq_len, slots, seed)


def _advice(name: str, pack: PackConfig, draws: _Draws, rows: Ints) -> list[str]:
    """Return a note about a clearly better row length, if there is one."""
    full = packing_efficiency(draws.tokens, rows, pack.seq_len)
    if not pack.shuffle or full > 1 - _NOTEWORTHY_WASTE or len(rows) < _FEW_SAMPLES:
        return []
    needs, slots = draws.image_slots(pack)
    best, better = better_seq_len(draws.tokens, needs, pack.seq_len, slots)
    if better < full + _NOTEWORTHY_WASTE / 2:
        return []
    return [
        f"note: packs.{name}: rows of {pack.seq_len} are {full:.1%} full, rows of {best} would be {better:.1%} full"
    ]


def _write(path: Path, made: _NewPlan, settings: dict[str, Any]) -> None:
    audits = {name: asdict(entry) for name, entry in made.audits.items()}
    meta = json.dumps({"settings": settings, "corpora": list(audits), "audits": audits}, sort_keys=True)
    table = made.table.replace_schema_metadata({"plan": meta})
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    write_atomic(path.with_suffix(".sha256"), sha256_line(sha256_file(path), path.name))
