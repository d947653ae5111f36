"""Step 1: raw shards become tokenised samples and distinct images, one shard output per raw shard."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.common.arrow_files import atomic_path
from data_prep.common.errors import UserError
from data_prep.common.events import EVENTS, EventLedger
from data_prep.common.files import Hashed, sha256_line, write_atomic
from data_prep.common.plugins import plugins_in_use
from data_prep.common.workers import ALONE, Team
from data_prep.corpora.probe import require_some_images
from data_prep.ingest import sources
from data_prep.ingest.changes import record_raw_changes, record_rebuilds
from data_prep.ingest.image_store_build import build_image_store, forget_damaged
from data_prep.ingest.shard_writer import ShardJob, ingest_shard
from data_prep.ingest.train_tokenizer import has_tokenizer, load_tokenizer, prepare_tokenizer
from data_prep.ingest.workspace import CorpusVariant, ShardOutput, Workspace, describe_missing
from data_prep.progress import Reporter
from data_prep.quarantine import DAMAGED_FILES, Tally, add_tallies, check_bad_fraction
from data_prep.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Ingested:
    """Results of ingest that the next steps need."""

    tokenizer_sha256: str
    images: Path
    """Folder of the image store."""
    tally: Tally
    """Kept and rejected samples."""


def ingest(recipe: Recipe, team: Team, reporter: Reporter) -> None:
    """Ingest every raw shard that is missing or out of date; a team that covers all of them builds the image store.

    Raises:
        UserError: a corpus, the tokenizer or an option is wrong, or too many samples were rejected.
    """
    space, events = Workspace(recipe), reporter.events(recipe.out_dir)
    team.serial(lambda: _forget_damaged(space, events))
    team.serial(lambda: record_raw_changes(space, reporter))
    team.serial(lambda: _probe_images(space))
    tokenizer_sha256 = team.serial(lambda: prepare_tokenizer(space, reporter))
    jobs = [
        ShardJob(output, replace(variant, shards={}))  # keeps the job small: it is sent to a worker
        for variant in space.variants(tokenizer_sha256)
        for output in variant.outputs
    ]
    mine = team.share(jobs)
    unchanged = sources.unchanged([job.output for job in mine], space.recipe.root_dir)
    waiting = [job for job, same in zip(mine, unchanged, strict=True) if not (same and job.output.done())]
    outputs = [job.output for job in waiting]
    team.map(lambda found: record_rebuilds(found, recipe.root_dir, events), [outputs], lambda _: None)
    with reporter.task(f"ingest ({team.description})", len(waiting)) as task:
        team.map(ingest_shard, waiting, lambda report: task.advance(report.tally))
    if not team.covers_all:
        reporter.say("ingest: this share is done; run plan once all shares are")
        return
    done = require_ingested(space, events, team)
    rejected = (
        f" ({done.tally.describe_codes()}; `mma-prep rejects {space.out}` shows them)" if done.tally.rejected else ""
    )
    counts = f"{done.tally.kept:,} samples kept, {done.tally.rejected:,} rejected{rejected}"
    reporter.say(f"ingest: {counts}; images in {done.images}")


def _probe_images(space: Workspace) -> None:
    """Look for a few images of each corpus that was not ingested before. Raises UserError when there are none."""
    for name, corpus in space.corpora.items():
        if not any((space.out / "ingest" / name).glob("*/*.json")):
            require_some_images(f"corpora.{name}", corpus, space.recipe.max_bad_fraction)


def require_ingested(space: Workspace, events: EventLedger, team: Team = ALONE) -> Ingested:
    """Check that every shard is ingested, list and limit the rejected samples, and build the image store.

    Raises:
        UserError: shards are missing (the message counts them and names the first), or too many samples were rejected.
    """
    tokenizer_sha256, tally = team.serial(lambda: _check_outputs(space, events))
    outputs = shard_outputs_of(space.variants(tokenizer_sha256))
    return Ingested(tokenizer_sha256, build_image_store(outputs, space.images, team), tally)


def _forget_damaged(space: Workspace, events: EventLedger) -> None:
    for store in forget_damaged(space.out):
        events.record("store-damaged", path=store)


def _check_outputs(space: Workspace, events: EventLedger) -> tuple[str, Tally]:
    """Return the hash of the tokenizer and the tally of all samples."""
    _forget_damaged(space, events)
    if space.shards and not has_tokenizer(space):  # errors of the corpora come first
        raise UserError("nothing is ingested yet: run `mma-prep ingest` with this recipe")
    tokenizer_sha256 = load_tokenizer(space).sha256
    outputs = shard_outputs_of(space.variants(tokenizer_sha256))
    reports = [output.done() for output in outputs]
    missing = [output for output, report in zip(outputs, reports, strict=True) if report is None]
    if missing:
        raise UserError(f"ingest is incomplete: {describe_missing(missing)}; run `mma-prep ingest` with this recipe")
    write_rejects(space, outputs)
    tallies = {output: report.tally for output, report in zip(outputs, reports, strict=True) if report is not None}
    _record(space.variants(tokenizer_sha256), tallies, events)
    check_bad_fraction(
        _tallies_by_variant(space, tokenizer_sha256, tallies), space.recipe.max_bad_fraction, space.rejects
    )
    return tokenizer_sha256, add_tallies(tallies.values())


def _record(variants: Iterable[CorpusVariant], tallies: Mapping[ShardOutput, Tally], events: EventLedger) -> None:
    """Record the plug-ins, and the rejected and repaired samples of each corpus variant."""
    for plugin in plugins_in_use("mma.corpora"):
        events.record_once("plugin-used", **plugin)
    for variant in variants:
        tally = add_tallies(tallies[output] for output in variant.outputs)
        place = {"corpus": variant.corpus, "variant": variant.folder.name}
        for reason, count in tally.codes.items():
            code = "raw-file-damaged" if reason in DAMAGED_FILES else "sample-rejected"
            events.record_once(code, count, **place, reason=reason)
        for repair, count in tally.repairs.items():
            code = repair if repair in EVENTS else "sample-repaired"
            events.record_once(code, count, **place, repair=repair)


def _tallies_by_variant(
    space: Workspace, tokenizer_sha256: str, tallies: Mapping[ShardOutput, Tally]
) -> dict[str, list[Tally]]:
    """Return tallies by corpus variant, under the recipe keys that define it.

    Variants are kept apart because one that keeps every sample would hide one that keeps hardly any.
    """
    sets: dict[Path, list[str]] = {}
    for name, pack in space.recipe.packs.items():
        for corpus in pack.corpora:
            sets.setdefault(space.variant(corpus, pack, tokenizer_sha256).folder, []).append(f"packs.{name}")
    variants, found = space.variants(tokenizer_sha256), {}
    ways = Counter(variant.corpus for variant in variants)
    for variant in variants:
        which = f" (in {', '.join(sets[variant.folder])})" if ways[variant.corpus] > 1 else ""
        found[f"corpora.{variant.corpus}{which}"] = [tallies[output] for output in variant.outputs]
    return found


def shard_outputs_of(variants: Iterable[CorpusVariant]) -> list[ShardOutput]:
    """Return the shard outputs of corpus variants, in the order in which plans number them."""
    return [output for variant in variants for output in variant.outputs]


def tallies_by_corpus(outputs: Iterable[ShardOutput], tallies: Iterable[Tally]) -> dict[str, Tally]:
    """Return the tally of each corpus from those of its shard outputs."""
    gathered: dict[str, list[Tally]] = {}
    for output, tally in zip(outputs, tallies, strict=True):
        gathered.setdefault(output.corpus, []).append(tally)
    return {corpus: add_tallies(found) for corpus, found in sorted(gathered.items())}


def write_rejects(space: Workspace, outputs: Sequence[ShardOutput]) -> None:
    """Join the quarantine lists of all shard outputs, in order, and write the hash of the result beside it."""
    rejects_hash = hashlib.sha256()
    with atomic_path(space.rejects) as temporary, temporary.open("wb") as out:
        for output in outputs:
            part = Hashed(output.rejects, output.report().rejects_sha256, output.marker.name).read()
            rejects_hash.update(part)
            out.write(part)
    line, sums = sha256_line(rejects_hash.hexdigest(), space.rejects.name), space.rejects.with_suffix(".sha256")
    if not sums.is_file() or sums.read_bytes() != line:
        write_atomic(sums, line)
