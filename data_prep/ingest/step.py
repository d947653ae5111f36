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
from data_prep.ingest.image_store_build import forget_damaged, seal_store
from data_prep.ingest.train_tokenizer import has_tokenizer, prepare_tokenizer
from data_prep.ingest.unit_writer import UnitJob, ingest_unit
from data_prep.ingest.workspace import Intake, Unit, Workspace, describe_missing
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
        UnitJob(unit, replace(intake, shards={}))  # a job that knew all shards would be large to send
        for intake in space.intakes(tokenizer_sha256)
        for unit in intake.units
    ]
    mine = team.share(jobs)
    unchanged = sources.unchanged([job.unit for job in mine], space.recipe.root_dir)
    waiting = [job for job, same in zip(mine, unchanged, strict=True) if not (same and job.unit.done())]
    with reporter.task(f"ingest ({team.description})", len(waiting)) as task:
        team.map(ingest_unit, waiting, lambda report: task.advance(report.tally))
    if not team.does_all:
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
    units = pack_units(space.intakes(tokenizer_sha256))
    return Ingested(tokenizer_sha256, seal_store(units, space.images, team), tally)


def _check_units(space: Workspace) -> tuple[str, Tally]:
    """Return the tokenizer's hash and what became of all samples."""
    forget_damaged(space.out)
    if space.shards and not has_tokenizer(space):  # what is wrong with the corpora is said first
        raise UserError("nothing is ingested yet: run `mma-prep ingest` with this recipe")
    tokenizer_sha256 = Tokenizer.load(space.tokenizer).sha256
    units = pack_units(space.intakes(tokenizer_sha256))
    reports = [unit.done() for unit in units]
    missing = [unit for unit, report in zip(units, reports, strict=True) if report is None]
    if missing:
        raise UserError(f"ingest is incomplete: {describe_missing(missing)}; run `mma-prep ingest` with this recipe")
    write_rejects(space, units)
    tallies = {unit: report.tally for unit, report in zip(units, reports, strict=True) if report is not None}
    check_bad_fraction(_by_writing(space, tokenizer_sha256, tallies), space.recipe.max_bad_fraction, space.rejects)
    return tokenizer_sha256, add_tallies(tallies.values())


def _by_writing(space: Workspace, tokenizer_sha256: str, tallies: Mapping[Unit, Tally]) -> dict[str, list[Tally]]:
    """Return the tallies of units by corpus and by the way it is written, under the keys of the recipe that say so.

    Together, a way that all of a corpus fits would hide one that hardly any of it does.
    """
    sets: dict[Path, list[str]] = {}
    for name, pack in space.recipe.packs.items():
        for corpus in pack.corpora:
            sets.setdefault(space.intake(corpus, pack, tokenizer_sha256).folder, []).append(f"packs.{name}")
    intakes, found = space.intakes(tokenizer_sha256), {}
    ways = Counter(intake.corpus for intake in intakes)
    for intake in intakes:
        which = f" (in {', '.join(sets[intake.folder])})" if ways[intake.corpus] > 1 else ""
        found[f"corpora.{intake.corpus}{which}"] = [tallies[unit] for unit in intake.units]
    return found


def pack_units(intakes: Iterable[Intake]) -> list[Unit]:
    """Return the units of several intakes, in the order that plans number them."""
    return [unit for intake in intakes for unit in intake.units]


def tallies_by_corpus(units: Iterable[Unit], tallies: Iterable[Tally]) -> dict[str, Tally]:
    """Return what became of each corpus's samples, from the tallies of units."""
    gathered: dict[str, list[Tally]] = {}
    for unit, tally in zip(units, tallies, strict=True):
        gathered.setdefault(unit.corpus, []).append(tally)
    return {corpus: add_tallies(found) for corpus, found in sorted(gathered.items())}


def write_rejects(space: Workspace, units: Sequence[Unit]) -> None:
    """Gather the quarantine lists of all units into one file, in unit order, and write its hash beside it."""
    digest = hashlib.sha256()
    with atomic_path(space.rejects) as temporary, temporary.open("wb") as out:
        for unit in units:
            part = unit.rejects.read_bytes()
            digest.update(part)
            out.write(part)
    line, sums = sha256_line(digest.hexdigest(), space.rejects.name), space.rejects.with_suffix(".sha256")
    if not sums.is_file() or sums.read_bytes() != line:
        write_atomic(sums, line)
