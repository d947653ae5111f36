"""Step 1: raw shards become tokenised samples and distinct images, one unit of files per raw shard."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import pyarrow as pa

from data_prep.arrow_files import ArrowWriter, atomic_path
from data_prep.corpora import build_corpus
from data_prep.example import Example, Reject
from data_prep.images import IMAGE_SCHEMA, decode_rgb
from data_prep.packs import IMAGE, sha256_file, write_atomic
from data_prep.progress import Reporter
from data_prep.quarantine import CODES, BadSample, Tally, add_tallies, check_bad_fraction
from data_prep.recipe import Recipe
from data_prep.seal import seal_store
from data_prep.tokenizer import Encoded, Tokenizer, train_sentencepiece
from data_prep.workers import Team
from data_prep.workspace import Intake, Unit, UnitReport, Workspace, Writing, describe_missing, digest

if TYPE_CHECKING:
    from data_prep.corpora.base import Corpus

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("family", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("generated", pa.list_(pa.uint8())),
        ("images", pa.list_(pa.int32())),  # index into the unit's distinct images, in order of instance
        ("n_tokens", pa.int32()),
        ("n_images", pa.int32()),
        ("n_target", pa.int32()),
        ("truncated", pa.bool_()),
        ("ended", pa.bool_()),  # whether the last supervised token ends a turn
    ]
)
_IMAGE_BATCH_ROWS = 64  # images are large: a batch is what a unit holds in memory


@dataclass(frozen=True, slots=True)
class UnitJob:
    """One unit to be made, with all a worker process needs to know."""

    unit: Unit
    intake: Intake


def ingest(recipe: Recipe, team: Team, reporter: Reporter) -> Workspace:
    """Make every unit that is missing, then seal the image store when all units are there.

    Raises:
        UserError: a corpus, the tokenizer or an option is wrong, or too many samples were rejected.
    """
    space = Workspace(recipe)
    tokenizer_sha256 = team.serial(lambda: prepare_tokenizer(space, reporter))
    intakes = space.intakes(tokenizer_sha256)
    jobs = [UnitJob(unit, intake) for intake in intakes for unit in intake.units]
    waiting = [job for job in team.share(jobs) if not job.unit.is_done()]
    with reporter.task(f"ingest ({team.description})", len(waiting)) as task:
        team.map(ingest_unit, waiting, lambda report: task.advance(report.tally))
    team.serial(lambda: _conclude(space, intakes, reporter))
    return space


def _conclude(space: Workspace, intakes: list[Intake], reporter: Reporter) -> None:
    units = [unit for intake in intakes for unit in intake.units]
    missing = [unit for unit in units if not unit.is_done()]
    if missing:
        reporter.say(f"ingest: this share is done; {describe_missing(missing)}, are left to the other shares")
        return
    write_rejects(space, units)
    check_bad_fraction(tallies_by_corpus(intakes), space.recipe.max_bad_fraction, space.rejects)
    store = seal_store(units, space.images)
    tally = add_tallies(unit.report().tally for unit in units)
    rejected = f" ({tally.describe_codes()}; see {space.rejects})" if tally.rejected else ""
    reporter.say(f"ingest: {tally.kept:,} samples kept, {tally.rejected:,} rejected{rejected}; images in {store}")


def tallies_by_corpus(intakes: Iterable[Intake]) -> dict[str, Tally]:
    """Return what became of each corpus's samples, over its done units."""
    grouped = itertools.groupby(sorted(intakes, key=lambda one: one.corpus), key=lambda one: one.corpus)
    return {
        corpus: add_tallies(unit.report().tally for intake in group for unit in intake.units)
        for corpus, group in grouped
    }


def write_rejects(space: Workspace, units: Iterable[Unit]) -> None:
    """Gather the quarantine lists of all units into one file, in unit order."""
    with atomic_path(space.rejects) as temporary, temporary.open("wb") as out:
        for unit in units:
            out.write(unit.rejects.read_bytes())


def prepare_tokenizer(space: Workspace, reporter: Reporter) -> str:
    """Make sure that the output folder has the recipe's tokenizer, training it if asked; return its sha256."""
    recipe, config = space.recipe, space.recipe.tokenizer
    marker = space.tokenizer / "origin.json"
    source = recipe.root_dir / config.path if config.path else None
    raw = {name: space.raw_fingerprint(name) for name in space.corpora} if source is None else _source_hashes(source)
    origin = json.dumps({"key": digest([config.model_dump(), recipe.specials(), raw])}).encode() + b"\n"
    if marker.is_file() and marker.read_bytes() == origin:
        return Tokenizer.load(space.tokenizer).sha256
    if source is None:
        assert config.train is not None
        reporter.say(f"tokenizer: training SentencePiece on up to {config.train.samples:,} samples")
        source = space.tokenizer / "trained.model"
        texts = corpus_texts(list(space.corpora.values()), config.train.samples)
        train_sentencepiece(texts, config.train.vocab_size, recipe.specials(), source)
    tokenizer = Tokenizer.open(source, recipe.specials())
    tokenizer.save(space.tokenizer)
    write_atomic(marker, origin)
    reporter.say(f"tokenizer: {len(tokenizer):,} ids, sha256 {tokenizer.sha256[:12]}")
    return tokenizer.sha256


def _source_hashes(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(item for item in path.glob("*") if item.is_file())
    return {item.name: sha256_file(item) for item in files}


def corpus_texts(corpora: list[Corpus], samples: int) -> Iterator[str]:
    """Yield the texts of about ``samples`` samples, evenly over the corpora and over each corpus's shards."""
    for corpus in corpora:
        shards = corpus.shards()
        quota = -(-samples // (len(corpora) * max(1, len(shards))))
        for shard in shards:
            kept = (item for item in corpus.examples(shard) if isinstance(item, Example))
            for example in itertools.islice(kept, quota):
                yield from (part for turn in example.turns for part in turn.parts if isinstance(part, str))


@functools.lru_cache(maxsize=4)
def _reader(kind: str, options: str, root: str) -> Corpus:
    return build_corpus(kind, json.loads(options), Path(root))


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str, origin: bytes) -> Tokenizer:
    """Load the tokenizer once per process; ``origin`` tells a new one in the same folder."""
    return Tokenizer.load(folder)


def ingest_unit(job: UnitJob) -> UnitReport:
    """Make one unit: read its raw shard, tokenise, validate images, and write its files; the marker comes last."""
    intake, unit = job.intake, job.unit
    corpus = _reader(intake.kind, json.dumps(intake.options, sort_keys=True), str(intake.root))
    tokenizer = _tokenizer(str(intake.tokenizer), (intake.tokenizer / "origin.json").read_bytes())
    with UnitWriter(unit, intake.writing, tokenizer) as writer:
        for item in corpus.examples(unit.shard):
            if isinstance(item, Reject):
                writer.reject(item.sample, item.code, item.detail)
                continue
            try:
                writer.keep(item)
            except BadSample as problem:
                writer.reject(item.id, problem.code, problem.detail)
    report = writer.report()
    write_atomic(unit.marker, report.to_json().encode())
    return report


class UnitWriter:
    """Writes the files of one unit in constant memory."""

    def __init__(self, unit: Unit, writing: Writing, tokenizer: Tokenizer) -> None:
        self._unit, self._writing, self._tokenizer = unit, writing, tokenizer
        self._ends = {tokenizer.id_of(token) for token in writing.template.ends}
        self._images: dict[bytes, int] = {}
        self._bad_images: dict[bytes, BadSample] = {}
        self._codes: Counter[str] = Counter()
        self._kept = 0

    def __enter__(self) -> UnitWriter:
        with ExitStack() as stack:
            self._samples = stack.enter_context(ArrowWriter(self._unit.tokens, SAMPLE_SCHEMA))
            self._pixels = stack.enter_context(
                ArrowWriter(self._unit.images, IMAGE_SCHEMA, batch_rows=_IMAGE_BATCH_ROWS)
            )
            rejects = stack.enter_context(atomic_path(self._unit.rejects))
            self._rejects: TextIO = stack.enter_context(rejects.open("w", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.__exit__(*failure)  # type: ignore[arg-type]
        if failure[0] is None:
            write_atomic(self._unit.digests, b"".join(self._images))

    def report(self) -> UnitReport:
        """Return what the unit holds, once it is closed."""
        entry, tally = self._samples.entry, Tally(self._kept, dict(sorted(self._codes.items())))
        return UnitReport(tally, len(self._images), entry.bytes, entry.sha256)

    def reject(self, sample: str, code: str, detail: str) -> None:
        """Count and list a sample that cannot be used."""
        assert code in CODES, code
        self._codes[code] += 1
        place = {"corpus": self._unit.corpus, "shard": self._unit.shard, "sample": sample}
        self._rejects.write(json.dumps({**place, "code": code, "detail": detail}) + "\n")

    def keep(self, example: Example) -> None:
        """Add a sample with its images. Raises BadSample when it cannot be used; nothing is added then."""
        check_text(example)
        encoded, truncated = self._encode(example)
        images = [self._register(*image) for image in self._validated(example)]
        supervised = np.flatnonzero(encoded.generated[1:])
        ended = bool(len(supervised)) and int(encoded.ids[supervised[-1] + 1]) in self._ends
        counts = (len(encoded), len(images), len(supervised), truncated, ended)
        self._samples.append((example.id, example.family, encoded.ids, encoded.generated, images, *counts))
        self._kept += 1

    def _encode(self, example: Example) -> tuple[Encoded, bool]:
        writing, count = self._writing, len(example.images)
        if writing.max_images is not None and count > writing.max_images:
            raise BadSample("too-many-images", f"{count} images, max_images={writing.max_images}")
        encoded = self._tokenizer.encode(writing.template.pieces(example), writing.image_tokens)
        if not encoded.generated[1:].any():
            raise BadSample("no-target", "no generated token after the first")
        limit = writing.length
        if writing.max_text_tokens is not None:
            limit = min(limit, writing.max_text_tokens + count * writing.image_tokens)
        if len(encoded) <= limit:
            return encoded, False
        if writing.too_long == "reject":
            raise BadSample("too-long", f"{len(encoded)} tokens with {count} images, {limit} fit")
        return cut_tail(encoded, limit), True

    def _validated(self, example: Example) -> list[tuple[bytes, bytes, tuple[int, int]]]:
        """Return (sha256, bytes, upright size) of the images, decoding what this unit has not seen yet."""
        found = []
        for image in example.images:
            try:
                data = image.read()
            except OSError as error:
                raise BadSample("missing-image", f"{image.name}: {error.strerror or error}") from error
            key = hashlib.sha256(data).digest()
            if key in self._bad_images:
                raise self._bad_images[key]
            size = (0, 0)
            if key not in self._images:
                try:
                    size = decode_rgb(data).size
                except BadSample as problem:
                    self._bad_images[key] = BadSample(problem.code, f"{image.name}: {problem.detail}")
                    raise self._bad_images[key] from problem
            found.append((key, data, size))
        return found

    def _register(self, key: bytes, data: bytes, size: tuple[int, int]) -> int:
        if key not in self._images:
            self._images[key] = len(self._images)
            self._pixels.append((key, *size, data))
        return self._images[key]


def check_text(example: Example) -> None:
    """Raise BadSample when a text holds NUL or a lone surrogate, which no tokenizer should meet."""
    for turn in example.turns:
        for part in turn.parts:
            if isinstance(part, str) and ("\x00" in part or (not part.isascii() and _has_surrogate(part))):
                raise BadSample("bad-encoding", f"NUL or lone surrogate in a {turn.role} turn")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def cut_tail(encoded: Encoded, limit: int) -> Encoded:
    """Cut a sample to ``limit`` tokens, back to its last generated one; its end token is gone, as it must be.

    Raises:
        BadSample: an image would be cut, or no supervised token would be left.
    """
    if (encoded.modality[limit:] == IMAGE).any():
        raise BadSample("too-long", f"{len(encoded)} tokens, {limit} fit, and the cut would lose an image")
    supervised = np.flatnonzero(encoded.generated[1:limit])
    if not len(supervised):
        raise BadSample("too-long", f"{len(encoded)} tokens, {limit} fit, and the cut would lose every target")
    return encoded.cut(int(supervised[-1]) + 2)
