"""Step 1: raw shards become tokenised samples and distinct images, one unit of files per raw shard."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.common.arrow_files import atomic_path
from data_prep.common.errors import UserError
from data_prep.common.files import sha256_line, write_atomic
from data_prep.common.workers import ALONE, Team
from data_prep.ingest import sources
from data_prep.ingest.image_store_build import build_image_store, forget_damaged
from data_prep.ingest.shard_writer import ShardJob, ingest_shard
from data_prep.ingest.train_tokenizer import has_tokenizer, prepare_tokenizer
from data_prep.ingest.workspace import CorpusVariant, ShardOutput, Workspace, describe_missing
from data_prep.progress import Reporter
from data_prep.quarantine import Tally, add_tallies, check_bad_fraction
from data_prep.recipe import Recipe
from data_prep.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Ingested:
    """What the step leaves to the next ones."""

    tokenizer_sha256: str
    images: Path
    """Folder of the sealed image store."""
    tally: Tally
    """What became of the raw samples."""


def ingest(recipe: Recipe, team: Team, reporter: Reporter) -> None:
    """Make every unit that is missing; a team that does all of them also seals the image store.

    Raises:
        UserError: a corpus, the tokenizer or an option is wrong, or too many samples were rejected.
    """
    space = Workspace(recipe)
    team.serial(lambda: forget_damaged(space.out))
    tokenizer_sha256 = team.serial(lambda: prepare_tokenizer(space, reporter))
    jobs = [
        ShardJob(output, replace(variant, shards={}))  # a job that knew all shards would be large to send
        for variant in space.variants(tokenizer_sha256)
        for output in variant.outputs
    ]
    mine = team.share(jobs)
    unchanged = sources.unchanged([job.output for job in mine], space.recipe.root_dir)
    waiting = [job for job, same in zip(mine, unchanged, strict=True) if not (same and job.output.done())]
    with reporter.task(f"ingest ({team.description})", len(waiting)) as task:
        team.map(ingest_shard, waiting, lambda report: task.advance(report.tally))
    if not team.covers_all:
        reporter.say("ingest: this share is done; plan follows when all shares are")
        return
    done = require_ingested(space, team)
    rejected = (
        f" ({done.tally.describe_codes()}; `mma-prep rejects {space.out}` shows them)" if done.tally.rejected else ""
    )
    counts = f"{done.tally.kept:,} samples kept, {done.tally.rejected:,} rejected{rejected}"
    reporter.say(f"ingest: {counts}; images in {done.images}")


def require_ingested(space: Workspace, team: Team = ALONE) -> Ingested:
    """Check that every unit is there, list and limit the rejected samples, and seal the image store.

    Raises:
        UserError: units are missing (the message counts them and names the first), or too many samples were rejected.
    """
    tokenizer_sha256, tally = team.serial(lambda: _check_units(space))
    outputs = pack_units(space.variants(tokenizer_sha256))
    return Ingested(tokenizer_sha256, build_image_store(outputs, space.images, team), tally)


def _check_units(space: Workspace) -> tuple[str, Tally]:
    """Return the tokenizer's hash and what became of all samples."""
    forget_damaged(space.out)
    if space.shards and not has_tokenizer(space):  # what is wrong with the corpora is said first
        raise UserError("nothing is ingested yet: run `mma-prep ingest` with this recipe")
    tokenizer_sha256 = Tokenizer.load(space.tokenizer).sha256
    outputs = pack_units(space.variants(tokenizer_sha256))
    reports = [output.done() for output in outputs]
    missing = [output for output, report in zip(outputs, reports, strict=True) if report is None]
    if missing:
        raise UserError(f"ingest is incomplete: {describe_missing(missing)}; run `mma-prep ingest` with this recipe")
    write_rejects(space, outputs)
    tallies = {output: report.tally for output, report in zip(outputs, reports, strict=True) if report is not None}
    check_bad_fraction(_by_writing(space, tokenizer_sha256, tallies), space.recipe.max_bad_fraction, space.rejects)
    return tokenizer_sha256, add_tallies(tallies.values())


def _by_writing(
    space: Workspace, tokenizer_sha256: str, tallies: Mapping[ShardOutput, Tally]
) -> dict[str, list[Tally]]:
    """Return the tallies of units by corpus and by the way it is written, under the keys of the recipe that say so.

    Together, a way that all of a corpus fits would hide one that hardly any of it does.
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


def pack_units(variants: Iterable[CorpusVariant]) -> list[ShardOutput]:
    """Return the units of several intakes, in the order that plans number them."""
    return [output for variant in variants for output in variant.outputs]


def tallies_by_corpus(outputs: Iterable[ShardOutput], tallies: Iterable[Tally]) -> dict[str, Tally]:
    """Return what became of each corpus's samples, from the tallies of units."""
    gathered: dict[str, list[Tally]] = {}
    for output, tally in zip(outputs, tallies, strict=True):
        gathered.setdefault(output.corpus, []).append(tally)
    return {corpus: add_tallies(found) for corpus, found in sorted(gathered.items())}


def write_rejects(space: Workspace, outputs: Sequence[ShardOutput]) -> None:
    """Gather the quarantine lists of all units into one file, in unit order, and write its hash beside it."""
    rejects_hash = hashlib.sha256()
    with atomic_path(space.rejects) as temporary, temporary.open("wb") as out:
        for output in outputs:
            part = output.rejects.read_bytes()
            rejects_hash.update(part)
            out.write(part)
    line, sums = sha256_line(rejects_hash.hexdigest(), space.rejects.name), space.rejects.with_suffix(".sha256")
    if not sums.is_file() or sums.read_bytes() != line:
        write_atomic(sums, line)
