"""The output folder: where every step writes its files, and how it knows that they are complete.

::

    OUT/tokenizer/                               one tokenizer for all pack sets
    OUT/ingest/CORPUS/shards-KEY.json            shards of the raw files, so no step counts their rows again
    OUT/ingest/CORPUS/raw-files.json             sizes and times of the raw files, so that changes can be named
    OUT/ingest/CORPUS/SETTINGS/SHARD.*           tokenised samples of one raw shard; ``.json`` is the done-marker
    OUT/images/KEY/                              the image store
    OUT/packs/SET/                               the packs
    OUT/rejects.jsonl                            every quarantined sample, with its reason; ``rejects.sha256`` its hash
    OUT/events.jsonl                             what was dropped, repaired, rebuilt or skipped (``common.events``)
    OUT/.lock                                    held while a step writes here (``data_prep.common.folder_lock``)

A raw shard is ingested again when its raw files change: annotation files, tars and the images it read, identified by
name, size and modification time. A trained tokenizer depends on annotation files and tars only. The folder does not
count, so raw data may be moved (``mv`` or ``rsync -t`` and ``cp -p``, which keep times). Two roots whose files agree in
name, size and time need two output folders.

``ingest/`` keeps the outputs of earlier settings, so switching back is cheap. It may be deleted once the packs are
written; the next change rebuilds it.
"""

from __future__ import annotations

import functools
import glob
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_prep.common.errors import UserError
from data_prep.common.files import FileEntry, hash_json, is_of_size, read_hashed, with_hash, write_atomic
from data_prep.common.folder_lock import FolderLock
from data_prep.corpora import CORPORA, build_corpus, with_parity
from data_prep.ingest.pins import pin_datasets
from data_prep.media.spec import MediaSpec
from data_prep.quarantine import Tally
from data_prep.recipe import PackConfig, Recipe
from data_prep.text.template import Template

if TYPE_CHECKING:
    from data_prep.corpora.base import Corpus

INGEST_VERSION = 14
"""Incremented when the same raw sample would give different files; older outputs are then rebuilt."""
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors that reading a damaged done-marker raises."""
_HASHES = ("sha256", "stats_sha256", "images_sha256", "rejects_sha256", "sources_sha256")


@dataclass(frozen=True, slots=True)
class EncodingConfig:
    """How a pack set encodes its samples: every setting that shapes tokens."""

    template: Template
    media: MediaSpec
    seq_len: int
    max_text_tokens: int | None
    max_images: int | None
    max_image_tokens: int | None
    too_long: Literal["reject", "truncate"]

    @classmethod
    def of(cls, pack: PackConfig, media: MediaSpec) -> EncodingConfig:
        """Return the encoding of a pack set."""
        template = pack.to_template()
        caps = (pack.max_text_tokens, pack.max_images, pack.max_image_tokens)
        return cls(template, media, pack.seq_len, *caps, pack.too_long)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return {**asdict(self), "media": self.media.model_dump(mode="json")}


@dataclass(frozen=True, slots=True)
class ShardOutput:
    """The files of one ingested raw shard in one encoding: the smallest piece of work."""

    corpus: str
    shard: str
    folder: Path
    raw: str
    """Identity of its raw files."""

    @property
    def tokens(self) -> Path:
        """Tokenised samples (Arrow IPC)."""
        return self.folder / f"{self.shard}.arrow"

    @property
    def stats(self) -> Path:
        """Stats of each sample for the plan (``data_prep.ingest.samples.SAMPLE_STATS``)."""
        return self.folder / f"{self.shard}.stats"

    @property
    def images(self) -> Path:
        """Distinct images; removed once an image store holds them."""
        return self.folder / f"{self.shard}.images"

    @property
    def image_hashes(self) -> Path:
        """Hashes of the distinct images (``data_prep.ingest.image_hashes``)."""
        return self.folder / f"{self.shard}.sha256"

    @property
    def sources(self) -> Path:
        """Sizes and modification times of the image files that were read (``data_prep.ingest.sources``)."""
        return self.folder / f"{self.shard}.sources"

    @property
    def rejects(self) -> Path:
        """Quarantined samples, one JSON line each."""
        return self.folder / f"{self.shard}.rejects"

    @property
    def marker(self) -> Path:
        """Done-marker with the hash of every file; written last."""
        return self.folder / f"{self.shard}.json"

    def is_outdated(self) -> bool:
        """Return whether another version of mma-prep wrote it, so no run uses it."""
        try:
            return _read_marker(self.marker.read_text(encoding="utf-8")).get("version") != INGEST_VERSION
        except (OSError, *_DAMAGED):
            return False

    def rows(self, store: str) -> Path:
        """Store row of every distinct image (int64), for one image store."""
        return self.folder / f"{self.shard}.rows-{store}"

    def report(self) -> ShardReport:
        """Read the done-marker. Raises UserError if it is missing or damaged."""
        try:
            return ShardReport.from_json(self.marker.read_text(encoding="utf-8"))
        except (OSError, *_DAMAGED) as error:
            raise UserError(
                f"{self.marker}: done-marker missing or damaged ({error}); delete it and run `mma-prep ingest`"
            ) from error

    def done(self) -> ShardReport | None:
        """Return the report, or None if a file is missing or the raw files changed."""
        files = (self.marker, self.tokens, self.stats, self.image_hashes, self.rejects, self.sources)
        if not all(path.is_file() for path in files):
            return None
        try:
            report = self.report()
        except UserError:  # ingested again
            return None
        complete = report.raw == self.raw and self.tokens.stat().st_size == report.size
        stores = self.folder.parents[2] / "images"
        own = is_of_size(self.images, report.pixels.bytes)
        complete = complete and (not report.images or own or self.store_of(stores) is not None)
        return report if complete else None

    def store_of(self, stores: Path) -> str | None:
        """Return the name of an image store in ``stores`` for which this output has its rows."""
        names = sorted(index.parent.name for index in stores.glob("*/store.json"))  # few, while shard outputs are many
        return next((name for name in names if self.rows(name).is_file()), None)

    def forget(self) -> None:
        """Remove the marker, the store rows and files of killed attempts, so the shard is ingested again."""
        files = (self.tokens, self.stats, self.images, self.image_hashes, self.sources, self.rejects, self.marker)
        names = {path.name for path in files}  # the names of another output may start with this one's
        begun = self.folder.glob(f".{glob.escape(self.shard)}.*.tmp")
        unfinished = [path for path in begun if path.name[1:].rsplit(".", 2)[0] in names]
        for path in (self.marker, *self.row_files(), *unfinished):
            path.unlink(missing_ok=True)

    def row_files(self) -> list[Path]:
        """Return the files of store rows, one for each image store built from this output."""
        return list(self.folder.glob(f"{glob.escape(self.shard)}.rows-*"))


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Contents of a complete shard output."""

    raw: str
    """Identity of its raw files."""
    tally: Tally
    pixels: FileEntry
    """The file of its distinct images, until an image store replaces it."""
    size: int
    """Bytes of the token file."""
    sha256: str
    """Hash of the token file."""
    stats_sha256: str
    """Hash of the stats."""
    images_sha256: str
    """Hash of the image hashes."""
    rejects_sha256: str
    """Hash of the list of quarantined samples."""
    sources_sha256: str
    """Hash of the list of image files."""

    @property
    def images(self) -> int:
        """Distinct images."""
        return self.pixels.rows

    @classmethod
    @functools.lru_cache(1 << 12)  # a step asks for the same markers several times
    def from_json(cls, text: str) -> ShardReport:
        """Parse a done-marker. Raises ValueError, KeyError, TypeError or AttributeError if it is damaged."""
        raw = _read_marker(text)
        tally = Tally(raw["kept"], raw["codes"], raw["repairs"])
        return cls(raw["raw"], tally, FileEntry(**raw["pixels"]), raw["bytes"], *(raw[name] for name in _HASHES))

    def to_json(self) -> str:
        """Return the text of the done-marker, which holds its own hash."""
        fields = {"version": INGEST_VERSION, "raw": self.raw, "kept": self.tally.kept, "codes": dict(self.tally.codes)}
        fields |= {"repairs": dict(self.tally.repairs), "pixels": asdict(self.pixels), "bytes": self.size}
        full = {**fields, **{name: getattr(self, name) for name in _HASHES}}
        return json.dumps({**full, "marker_sha256": hash_json(full)}, sort_keys=True) + "\n"


def _read_marker(text: str) -> dict[str, Any]:
    """Return the contents of a done-marker of any version. Raises ValueError, KeyError, TypeError or AttributeError."""
    raw: dict[str, Any] = json.loads(text)
    if raw.pop("marker_sha256") != hash_json(raw):
        raise ValueError("it does not match its own hash")
    return raw


@dataclass(frozen=True)
class CorpusVariant:
    """One corpus in one encoding, shared by all pack sets that use this encoding."""

    corpus: str
    kind: str
    options: dict[str, Any]
    root: Path
    tokenizer: Path
    encoding: EncodingConfig
    folder: Path
    shards: dict[str, str]
    """Shard -> identity of its raw files, in the corpus's own order."""
    raw: str
    """Identity of all raw files."""

    @property
    def outputs(self) -> list[ShardOutput]:
        """Shard outputs of the corpus in its own order."""
        return [ShardOutput(self.corpus, shard, self.folder, raw) for shard, raw in self.shards.items()]


class Workspace:
    """Paths and contents of the output folder of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = pin_datasets(recipe)
        self.out = recipe.out_dir
        self.tokenizer = self.out / "tokenizer"
        self.images = self.out / "images"
        self.rejects = self.out / "rejects.jsonl"

    def packs(self, name: str) -> Path:
        """Folder of a pack set."""
        return self.out / "packs" / name

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        """Readers of the corpora that pack sets use. Raises UserError for wrong options or missing files."""
        used = {name for pack in self.recipe.packs.values() for name in pack.corpora}
        readers = {name: self._reader(name) for name in self.recipe.corpora if name in used}
        for name, reader in readers.items():
            if self.recipe.corpora[name].augment and reader.never_augment:
                raise UserError(f"corpora.{name}.augment: {reader.never_augment}; remove it")
        return readers

    def _reader(self, name: str) -> Corpus:
        config = self.recipe.corpora[name]
        try:
            return build_corpus(config.type, config.options, self.recipe.root_dir)
        except UserError as error:
            raise UserError(f"corpora.{name}: {error}") from error

    @cached_property
    def shards(self) -> dict[str, dict[str, str]]:
        """Corpus -> shard -> identity of its raw files: names, sizes and modification times, not contents."""
        identity = functools.cache(_file_identity)
        found = {}
        for name, corpus in self.corpora.items():
            shards = self._shards_of(name, hash_json([identity(path) for path in corpus.files()]))
            found[name] = {shard: hash_json([identity(path) for path in corpus.files_of(shard)]) for shard in shards}
        return found

    @cached_property
    def _identities(self) -> dict[str, str]:
        return {name: hash_json(shards) for name, shards in self.shards.items()}

    def _shards_of(self, name: str, raw: str) -> list[str]:
        """Return the shards of a corpus, from an earlier list if its raw files (``raw``) are unchanged.

        Counting the rows of a large file takes as long as reading it.
        """
        config = self.recipe.corpora[name]
        key = hash_json([INGEST_VERSION, CORPORA.identity(config.type), config.options, raw])[:12]
        path = self.out / "ingest" / name / f"shards-{key}.json"
        listed: list[str] | None = read_hashed(path)
        if listed is None:
            listed = list(self.corpora[name].shards())
            write_atomic(path, with_hash(listed))
        return listed

    def variant(self, corpus: str, pack: PackConfig, tokenizer_sha256: str) -> CorpusVariant:
        """Return the variant of a corpus that a pack set uses."""
        config = self.recipe.corpora[corpus]
        options = with_parity(config.type, config.options) if pack.aki_parity else config.options
        encoding = EncodingConfig.of(pack, self.recipe.media_spec)
        identity = CORPORA.identity(config.type)
        key = hash_json([INGEST_VERSION, identity, options, encoding.to_dict(), tokenizer_sha256])[:12]
        folder = self.out / "ingest" / corpus / key
        return CorpusVariant(
            corpus=corpus,
            kind=config.type,
            options=options,
            root=self.recipe.root_dir,
            tokenizer=self.tokenizer,
            encoding=encoding,
            folder=folder,
            shards=self.shards[corpus],
            raw=self._identities[corpus],
        )

    def variants(self, tokenizer_sha256: str) -> list[CorpusVariant]:
        """Return the distinct corpus variants of all pack sets, in recipe order."""
        every = [
            self.variant(corpus, pack, tokenizer_sha256)
            for pack in self.recipe.packs.values()
            for corpus in pack.corpora
        ]
        return list({variant.folder: variant for variant in every}.values())


def lock_of(out: Path) -> FolderLock:
    """Return the lock of an output folder: one writer at a time; shares of one step hold it jointly."""
    return FolderLock(
        out / ".lock",
        busy="{folder} is being written by another mma-prep ({holder}): wait for it",
        once="start one mma-prep at a time there",
    )


def _file_identity(path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return path.name, about.st_size, about.st_mtime_ns


def describe_missing(outputs: Sequence[ShardOutput]) -> str:
    """Return ``12 shards are missing, the first is vqa/rows-00003``."""
    count = f"{len(outputs)} shard{'s are' if len(outputs) > 1 else ' is'} missing"
    return f"{count}, the first is {outputs[0].corpus}/{outputs[0].shard}"
