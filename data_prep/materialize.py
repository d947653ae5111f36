"""Step 3: writes the packs. Rows in plan order, one file per slice of rows, then the manifest."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.common.errors import UserError
from data_prep.common.events import EventLedger
from data_prep.common.files import FileEntry, hash_json, sha256_file, sha256_line, write_atomic
from data_prep.common.modalities import IMAGE, TEXT
from data_prep.common.supervision import predicts_target
from data_prep.common.workers import Team
from data_prep.images.augment import Augment, Augmentations, draw_augmentations
from data_prep.images.store import ImageStore
from data_prep.ingest.prompts import insert_prompt, prompt_ids
from data_prep.ingest.samples import Sample, SampleReader
from data_prep.ingest.step import Ingested, require_ingested, shard_outputs_of, tallies_by_corpus
from data_prep.ingest.workspace import ShardOutput, Workspace
from data_prep.media.spec import Header, MediaSpec, MediaTable
from data_prep.packs import CorpusStats, Manifest, PackRow, Source, write_rows
from data_prep.planning.step import PackingPlan, pack_variants, plan_path, require_plan
from data_prep.progress import Reporter
from data_prep.quarantine import Tally
from data_prep.recipe import PackConfig, Recipe
from data_prep.text.tokenizer import Tokenizer
from data_prep.verify import check_tokens

ROWS_VERSION = 4
"""Incremented when the same plan would give different rows or markers."""
FILE_BYTES = 32 << 20
"""Size of a row file: small enough to spread over workers, large enough to keep files few."""
_BYTES_PER_TOKEN = 14


@dataclass(frozen=True, slots=True)
class RowFileJob:
    """One row file to write: rows ``[start, stop)`` of the plan in ``folder``."""

    folder: Path
    key: str
    number: int
    start: int
    stop: int

    @property
    def path(self) -> Path:
        """The row file."""
        return self.folder / f"rows-{self.number:05d}.arrow"

    @property
    def marker(self) -> Path:
        """Its done-marker."""
        return _work(self.folder) / f"rows-{self.number:05d}.json"

    def done(self) -> dict[str, Any] | None:
        """Return the contents of the done-marker, or None if the file is missing or was made from other inputs."""
        if not (self.marker.is_file() and self.path.is_file()):
            return None
        try:
            found: dict[str, Any] = json.loads(self.marker.read_text(encoding="utf-8"))
            intact = found.pop("marker_sha256") == hash_json(found)
        except (ValueError, KeyError, AttributeError):
            return None
        same = intact and found["key"] == self.key and self.path.stat().st_size == found["file"]["bytes"]
        return found if same else None


def materialize(recipe: Recipe, team: Team, reporter: Reporter) -> None:
    """Write every pack set whose plan, images or tokenizer changed.

    Raises:
        UserError: an earlier step is incomplete or had other settings, or its files are damaged.
    """
    space = Workspace(recipe)
    ready = team.serial(lambda: require_ingested(space, reporter.events(space.out)))
    checked: set[ShardOutput] = set()
    for name, pack in recipe.packs.items():
        jobs, outputs = team.serial(functools.partial(_prepare, space, name, pack, ready, reporter.events(space.out)))
        unchecked = [output for output in outputs if output not in checked]
        # Shares do not wait for each other, so each one checks all inputs of its rows.
        team.map(check_tokens, [team.share(unchecked) if team.covers_all else unchecked], lambda _: None)
        checked.update(outputs)
        waiting = [job for job in team.share(jobs) if job.done() is None]
        with reporter.task(f"materialize {name} ({team.description})", len(waiting)) as task:
            team.map(write_row_file, waiting, lambda _: task.advance(Tally()))
        team.serial(functools.partial(_finish, space, name, pack, ready, jobs, reporter))
    team.serial(functools.partial(_prune_stores, space, ready))


def _work(folder: Path) -> Path:
    return folder / ".work"


def _prepare(
    space: Workspace, name: str, pack: PackConfig, ready: Ingested, events: EventLedger
) -> tuple[list[RowFileJob], list[ShardOutput]]:
    """Write the context file for the workers; return the row files of a pack set and the shard outputs to read."""
    folder = space.packs(name)
    plan = require_plan(space, name, ready.tokenizer_sha256)
    outputs = shard_outputs_of(pack_variants(space, pack, ready.tokenizer_sha256))
    key = hash_json(
        [
            ROWS_VERSION,
            plan.sha256,
            ImageStore(ready.images).identity,
            ready.tokenizer_sha256,
            space.recipe.media_spec.model_dump(mode="json"),
        ]
    )
    context = {
        "shards": [[output.corpus, output.shard, str(output.folder), output.raw] for output in outputs],
        "store": ready.images.name,
        "images": str(ready.images),
        "media": space.recipe.media_spec.model_dump(mode="json"),
        "seq_len": pack.seq_len,
        "prompts": prompt_ids(Tokenizer.load(space.tokenizer), pack.prompts),
        "seed": space.recipe.seed,
        "augments": {corpus: augment.model_dump() for corpus, augment in space.recipe.augments(pack).items()},
    }
    write_atomic(_work(folder) / f"context-{key[:12]}.json", json.dumps(context).encode())
    Tokenizer.load(space.tokenizer).save(folder / "tokenizer")
    per_file = max(1, FILE_BYTES // (_BYTES_PER_TOKEN * pack.seq_len))
    starts = range(0, plan.rows, per_file)
    jobs = [
        RowFileJob(folder, key, number, start, min(start + per_file, plan.rows)) for number, start in enumerate(starts)
    ]
    waiting = [job for job in jobs if job.done() is None]
    events.record("packs-rebuilt", sum(job.path.exists() for job in waiting), packs=name)
    return jobs, outputs if waiting else []


@dataclass(frozen=True)
class _Context:
    """State a worker process keeps between the row files of one pack set."""

    plan: PackingPlan
    samples: SampleReader
    tokenizer: Tokenizer
    media: MediaSpec
    images: ImageStore
    seq_len: int
    prompts: list[list[int]]
    """Token ids of each prompt."""
    seed: int
    augments: dict[str, Augment]
    """Augmentation settings by corpus."""


@functools.lru_cache(maxsize=1)
def _context(folder: Path, key: str) -> _Context:
    raw = json.loads((_work(folder) / f"context-{key[:12]}.json").read_text(encoding="utf-8"))
    outputs = [ShardOutput(corpus, shard, Path(place), files) for corpus, shard, place, files in raw["shards"]]
    tokenizer = Tokenizer.load(folder / "tokenizer")
    samples = SampleReader(outputs, raw["store"])
    settings = {name: raw[name] for name in ("seq_len", "prompts", "seed")}
    media, images = MediaSpec.model_validate(raw["media"]), ImageStore(Path(raw["images"]))
    augments = {corpus: Augment(**asked) for corpus, asked in raw["augments"].items()}
    plan = PackingPlan.load(plan_path(folder))
    return _Context(plan, samples, tokenizer, media, images, **settings, augments=augments)


def write_row_file(job: RowFileJob) -> None:
    """Write one row file and its done-marker."""
    context = _context(job.folder, job.key)
    bounds = np.searchsorted(context.plan.row, np.arange(job.start, job.stop + 1)).tolist()
    samples = iter(_drawn(context, slice(bounds[0], bounds[-1])))
    rows = [_row(context, range(first, last), samples) for first, last in itertools.pairwise(bounds)]
    (job.folder / "manifest.json").unlink(missing_ok=True)  # from here on, it no longer describes the rows
    entry = write_rows(job.path, rows, context.seq_len)
    counts = {
        "targets": sum(row.n_target for row in rows),
        "tokens": sum(int(np.count_nonzero(row.segment)) for row in rows),
        "images": sum(len(row.image_row) for row in rows),
        "media_tokens": sum(int(np.count_nonzero(row.modality)) for row in rows),
        "max_images": max(len(row.image_row) for row in rows),
        "max_segment_tokens": max(int(np.bincount(row.segment)[1:].max()) for row in rows),
    }
    done = {"key": job.key, "file": asdict(entry), **counts}
    write_atomic(job.marker, json.dumps({**done, "marker_sha256": hash_json(done)}).encode())


def _row(context: _Context, draws: range, drawn: Iterator[Sample]) -> PackRow:
    """Build the row of a range of draws from the next samples."""
    plan, samples, part = context.plan, list(itertools.islice(drawn, len(draws))), slice(draws.start, draws.stop)
    sources = tuple(
        Source(plan.names[corpus], sample.name, draw, sample.family)
        for corpus, draw, sample in zip(plan.corpus[part].tolist(), plan.draw[part].tolist(), samples, strict=True)
    )
    tokenizer, spec = context.tokenizer, context.media
    media = None if spec.is_fixed else _media(context, samples)
    tokens = spec.image.view_tokens if media is None else media[:, 4]
    row = pack_row(samples, sources, context.seq_len, tokens, tokenizer.image_id, tokenizer.pad_id)
    augmentation = _augmentations(context, samples, sources) if context.augments else None
    return replace(row, augmentation=augmentation, media=media)


def _media(context: _Context, samples: Sequence[Sample]) -> MediaTable:
    """Return the media table of a row from the sizes of its images.

    A crop does not change it: tokens are counted before augmentation is drawn; the crop is resized to the same grid.
    """
    store = context.images
    return context.media.table([Header(*store.size(row)) for sample in samples for row in sample.images.tolist()])


def _augmentations(context: _Context, samples: Sequence[Sample], sources: Sequence[Source]) -> Augmentations:
    """Return the augmentations of the images of a row, determined by seed, corpus, sample and draw."""
    none = Augment()
    return np.concatenate(
        [
            draw_augmentations(
                context.augments.get(source.dataset, none), sample.allowed, len(sample.images),
                context.seed, source.dataset, source.sample, source.draw,
            )
            for sample, source in zip(samples, sources, strict=True)
        ]
    )  # fmt: skip


def _drawn(context: _Context, draws: slice) -> Iterator[Sample]:
    """Yield the samples of draws with their prompts."""
    plan = context.plan
    samples = context.samples.read(plan.shard[draws], plan.index[draws])
    for sample, prompt in zip(samples, plan.prompt[draws].tolist(), strict=True):
        yield sample if prompt < 0 else insert_prompt(sample, context.prompts[prompt])


def pack_row(
    samples: Sequence[Sample],
    sources: tuple[Source, ...],
    seq_len: int,
    image_tokens: int | npt.NDArray[np.int32],
    image_id: int,
    pad_id: int,
) -> PackRow:
    """Concatenate samples into a row of ``seq_len`` tokens, padded at its end.

    Args:
        samples: in order.
        sources: of the samples.
        seq_len: tokens of the row.
        image_tokens: of every image, or of each image of the row.
        image_id: token id at image positions.
        pad_id: token id of padding.

    Raises:
        UserError: image positions and images do not match.
    """
    ids = np.concatenate([sample.input_ids for sample in samples])
    modality = np.where(ids == image_id, IMAGE, TEXT).astype(np.int8)  # text never yields the image id
    segment = np.repeat(np.arange(1, len(samples) + 1), [len(sample.input_ids) for sample in samples]).astype(np.int32)
    generated = np.concatenate([sample.generated for sample in samples])
    image_row = np.concatenate([sample.images for sample in samples])
    counts = np.broadcast_to(image_tokens, len(image_row))
    if np.count_nonzero(modality) != counts.sum():
        names = ", ".join(f"{source.dataset}/{source.sample}" for source in sources)
        raise UserError(
            f"image positions and images do not match in one of {names}: `mma-prep verify` names the damaged file"
        )
    instance = np.full(len(ids), -1, dtype=np.int16)
    instance[modality == IMAGE] = np.repeat(np.arange(len(image_row), dtype=np.int16), counts)
    segment = _padded(segment, seq_len, 0)
    generated = _padded(generated, seq_len, 0)
    return PackRow(
        input_ids=_padded(ids, seq_len, pad_id),
        modality=_padded(modality, seq_len, TEXT),
        segment=segment,
        instance=_padded(instance, seq_len, -1),
        generated=generated,
        image_row=image_row,
        n_target=int(np.count_nonzero(predicts_target(segment, generated))),
        source=sources,
    )


def _padded(values: npt.NDArray[Any], seq_len: int, fill: int) -> npt.NDArray[Any]:
    row = np.full(seq_len, fill, dtype=values.dtype)
    row[: len(values)] = values
    return row


def _finish(
    space: Workspace, name: str, pack: PackConfig, ready: Ingested, jobs: Sequence[RowFileJob], reporter: Reporter
) -> None:
    """Write the manifest once every row file exists."""
    found = [job.done() for job in jobs]
    missing = found.count(None)
    if missing:
        reporter.say(f"materialize {name}: this share is done; {missing} row files are left for the other shares")
        return
    folder = space.packs(name)
    manifest = _manifest(space, name, pack, ready, [entry for entry in found if entry is not None])
    text = manifest.to_json().encode()
    path, sums = folder / "manifest.json", folder / "manifest.sha256"
    line = sha256_line(hashlib.sha256(text).hexdigest(), path.name)
    if _bytes_of(path) != text or _bytes_of(sums) != line:
        write_atomic(sums, line)
        write_atomic(path, text)
        _remove_unlisted(folder, manifest, jobs)
    reporter.say(
        f"packs {name}: {manifest.rows:,} rows of {manifest.seq_len}, {manifest.tokens:,} tokens, "
        f"{manifest.targets:,} supervised, in {folder}"
    )


def _manifest(
    space: Workspace, name: str, pack: PackConfig, ready: Ingested, files: Sequence[dict[str, Any]]
) -> Manifest:
    recipe, folder = space.recipe, space.packs(name)
    tokenizer, plan = Tokenizer.load(folder / "tokenizer"), PackingPlan.load(plan_path(folder))
    store, template = ImageStore(ready.images), pack.to_template()
    rows = [FileEntry(**entry["file"]) for entry in files]
    targets, tokens = (sum(entry[key] for entry in files) for key in ("targets", "tokens"))
    if targets == 0:
        raise UserError(f"packs.{name}: no token is supervised, so the loss would be 0; fix template or corpora")
    outputs = shard_outputs_of(pack_variants(space, pack, ready.tokenizer_sha256))
    tallies = tallies_by_corpus(outputs, [output.report().tally for output in outputs])
    corpora = {
        corpus: CorpusStats(
            audit.draws,
            audit.samples,
            audit.epochs,
            audit.tokens,
            audit.targets,
            audit.repeated,
            audit.left_out,
            dict(tallies[corpus].repairs),
        )
        for corpus, audit in plan.audits.items()
    }
    sources = {corpus: recipe.corpora[corpus].model_dump() for corpus in pack.corpora}
    return Manifest(
        seq_len=pack.seq_len,
        rows=plan.rows,
        targets=targets,
        tokens=tokens,
        image_tokens=recipe.media_spec.image.view_tokens,
        media=None if recipe.media_spec.is_fixed else recipe.media_spec,
        media_tokens=None if recipe.media_spec.is_fixed else sum(entry["media_tokens"] for entry in files),
        images=sum(entry["images"] for entry in files),
        max_images=max(entry["max_images"] for entry in files),
        max_segment_tokens=max(entry["max_segment_tokens"] for entry in files),
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_id,
        image_id=tokenizer.image_id,
        eos_ids=tuple(sorted({tokenizer.id_of(token) for token in template.ends})),
        tokenizer="tokenizer",
        tokenizer_sha256=tokenizer.sha256,
        template=pack.template,
        plan_sha256=plan.sha256,
        image_store=os.path.relpath(ready.images, folder) if len(store) else "",
        image_store_sha256=store.identity if len(store) else "",
        corpora=corpora,
        files=(*rows, *_other_files(folder)),
        seed=recipe.seed,
        recipe={**pack.model_dump(), "name": name, "sources": sources},
    )


def _other_files(folder: Path) -> list[FileEntry]:
    paths = [plan_path(folder), *sorted((folder / "tokenizer").iterdir())]
    return [FileEntry(str(path.relative_to(folder)), path.stat().st_size, sha256_file(path)) for path in paths]


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _remove_unlisted(folder: Path, manifest: Manifest, jobs: Sequence[RowFileJob]) -> None:
    """Remove row files, markers, contexts and temporary files of an earlier plan or a killed process."""
    listed = {entry.name for entry in manifest.files}
    kept = {job.marker.name for job in jobs} | {f"context-{job.key[:12]}.json" for job in jobs}
    unlisted = [path for path in folder.glob("rows-*.arrow") if path.name not in listed]
    unlisted += [path for path in _work(folder).iterdir() if path.name not in kept]
    for path in [*unlisted, *folder.glob(".*.tmp"), *(folder / "tokenizer").glob(".*.tmp")]:
        path.unlink(missing_ok=True)


def _prune_stores(space: Workspace, ready: Ingested) -> None:
    """Remove image stores that no packs of this output folder refer to any more."""
    manifests = [Manifest.load(path.parent) for path in space.out.glob("packs/*/manifest.json")]
    used = {Path(manifest.image_store).name for manifest in manifests} | {ready.images.name}
    for store in space.images.iterdir():
        if store.name not in used and len(manifests) >= len(space.recipe.packs):
            shutil.rmtree(store, ignore_errors=True)
