"""The output folder: where every step puts its files, and how it knows that they are done.

::

    OUT/tokenizer/                               one tokenizer for all pack sets
    OUT/ingest/CORPUS/shards-KEY.json            shards of the raw files, so that no step counts their rows again
    OUT/ingest/CORPUS/SETTINGS/SHARD.*           tokenised samples, one unit per raw shard; ``.json`` is the done-marker
    OUT/images/KEY/                              the sealed image store
    OUT/packs/SET/                               the packs
    OUT/rejects.jsonl                            every quarantined sample, with its reason; ``rejects.sha256`` its hash
    OUT/.lock                                    held while a step writes here (``data_prep.common.folder_lock``)

A unit is made anew when its raw files change: annotation files, tars and the images it read, by name, size and time. A
tokenizer that is trained on the corpora follows the annotation files and tars alone. The folder they lie in does not
count, so that raw data may be moved: two roots whose files agree in all of that need two output folders.

``ingest/`` keeps the work of earlier settings, so that going back to them is cheap; it may be deleted once the packs
are made, and is made again by the next change.
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
from data_prep.corpora import build_corpus
from data_prep.quarantine import Tally
from data_prep.recipe import PackConfig, Recipe
from data_prep.text.template import Template

if TYPE_CHECKING:
    from data_prep.corpora.base import Corpus

INGEST_VERSION = 12
"""Raised whenever the same raw sample would become other files: old units are then made again."""
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged done-marker raises."""
_HASHES = ("sha256", "stats_sha256", "images_sha256", "rejects_sha256", "sources_sha256")


@dataclass(frozen=True, slots=True)
class EncodingConfig:
    """How a pack set writes its samples: everything besides the raw data that shapes tokens."""

    template: Template
    image_tokens: int
    seq_len: int
    max_text_tokens: int | None
    max_images: int | None
    too_long: Literal["reject", "truncate"]

    @classmethod
    def of(cls, pack: PackConfig, image_tokens: int) -> EncodingConfig:
        """Return the writing that a pack set asks for."""
        template = pack.to_template()
        return cls(template, image_tokens, pack.seq_len, pack.max_text_tokens, pack.max_images, pack.too_long)


@dataclass(frozen=True, slots=True)
class ShardOutput:
    """One raw shard of one corpus, written in one way: the smallest piece of work, and its files."""

    corpus: str
    shard: str
    folder: Path
    raw: str
    """Identity of the raw files it is made from."""

    @property
    def tokens(self) -> Path:
        """Tokenised samples (Arrow IPC)."""
        return self.folder / f"{self.shard}.arrow"

    @property
    def stats(self) -> Path:
        """What a plan needs to know of each sample (``data_prep.ingest.samples.SAMPLE_STATS``)."""
        return self.folder / f"{self.shard}.stats"

    @property
    def images(self) -> Path:
        """Distinct images of the unit; removed once the store that holds them is sealed."""
        return self.folder / f"{self.shard}.images"

    @property
    def image_hashes(self) -> Path:
        """Hashes of the distinct images (``data_prep.ingest.image_hashes``)."""
        return self.folder / f"{self.shard}.sha256"

    @property
    def sources(self) -> Path:
        """Sizes and times of the image files it read (``data_prep.ingest.sources``)."""
        return self.folder / f"{self.shard}.sources"

    @property
    def rejects(self) -> Path:
        """Quarantined samples, one JSON line each."""
        return self.folder / f"{self.shard}.rejects"

    @property
    def marker(self) -> Path:
        """Done-marker with the hash of the tokens; written last."""
        return self.folder / f"{self.shard}.json"

    def is_outdated(self) -> bool:
        """Return whether another version of mma-prep made the unit, so that no run builds on it."""
        try:
            return _read_marker(self.marker.read_text(encoding="utf-8")).get("version") != INGEST_VERSION
        except (OSError, *_DAMAGED):
            return False

    def rows(self, store: str) -> Path:
        """Store row of every distinct image (int64), for one sealed store."""
        return self.folder / f"{self.shard}.rows-{store}"

    def report(self) -> ShardReport:
        """Read the done-marker. Raises UserError when it is absent or was damaged."""
        try:
            return ShardReport.from_json(self.marker.read_text(encoding="utf-8"))
        except (OSError, *_DAMAGED) as error:
            raise UserError(
                f"{self.marker}: no readable done-marker ({error}); delete it and run ingest again"
            ) from error

    def done(self) -> ShardReport | None:
        """Return what the unit holds, or None when not all of its files are in place or its raw files changed."""
        files = (self.marker, self.tokens, self.stats, self.image_hashes, self.rejects, self.sources)
        if not all(path.is_file() for path in files):
            return None
        report = self.report()
        whole = report.raw == self.raw and self.tokens.stat().st_size == report.size
        stores = self.folder.parents[2] / "images"
        own = is_of_size(self.images, report.pixels.bytes)
        whole = whole and (not report.images or own or self.store_of(stores) is not None)
        return report if whole else None

    def store_of(self, stores: Path) -> str | None:
        """Return the name of a sealed image store in ``stores`` that this unit knows its rows of."""
        names = sorted(index.parent.name for index in stores.glob("*/store.json"))  # few, where units are many
        return next((name for name in names if self.rows(name).is_file()), None)

    def forget(self) -> None:
        """Remove the marker, the rows of sealed stores and what a killed attempt left: the unit is made anew."""
        files = (self.tokens, self.stats, self.images, self.image_hashes, self.sources, self.rejects, self.marker)
        names = {path.name for path in files}  # another unit's may begin as this one's do
        begun = self.folder.glob(f".{glob.escape(self.shard)}.*.tmp")
        unfinished = [path for path in begun if path.name[1:].rsplit(".", 2)[0] in names]
        for path in (self.marker, *self.row_files(), *unfinished):
            path.unlink(missing_ok=True)

    def row_files(self) -> list[Path]:
        """Return the files of store rows, one for each store that was sealed with this unit."""
        return list(self.folder.glob(f"{glob.escape(self.shard)}.rows-*"))


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a done unit holds."""

    raw: str
    """Identity of the raw files it was made from."""
    tally: Tally
    pixels: FileEntry
    """The file of its distinct images; a sealed store takes it over."""
    size: int
    """Bytes of the token file."""
    sha256: str
    """Hash of the token file."""
    stats_sha256: str
    """Hash of what a plan needs to know."""
    images_sha256: str
    """Hash of the hashes of its images."""
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
        """Parse a done-marker. Raises ValueError, KeyError, TypeError or AttributeError where it is damaged."""
        raw = _read_marker(text)
        tally = Tally(raw["kept"], raw["codes"], raw["repairs"])
        return cls(raw["raw"], tally, FileEntry(**raw["pixels"]), raw["bytes"], *(raw[name] for name in _HASHES))

    def to_json(self) -> str:
        """Return the done-marker's text, which holds its own hash."""
        fields = {"version": INGEST_VERSION, "raw": self.raw, "kept": self.tally.kept, "codes": dict(self.tally.codes)}
        fields |= {"repairs": dict(self.tally.repairs), "pixels": asdict(self.pixels), "bytes": self.size}
        whole = {**fields, **{name: getattr(self, name) for name in _HASHES}}
        return json.dumps({**whole, "marker_sha256": hash_json(whole)}, sort_keys=True) + "\n"


def _read_marker(text: str) -> dict[str, Any]:
    """Return what a done-marker of any version says. Raises ValueError, KeyError, TypeError or AttributeError."""
    raw: dict[str, Any] = json.loads(text)
    if raw.pop("marker_sha256") != hash_json(raw):
        raise ValueError("it differs from its own hash")
    return raw


@dataclass(frozen=True)
class CorpusVariant:
    """One corpus written in one way; shared by all pack sets that write it so."""

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
    """Identity of all of them."""

    @property
    def outputs(self) -> list[ShardOutput]:
        """Units of the corpus in its own order."""
        return [ShardOutput(self.corpus, shard, self.folder, raw) for shard, raw in self.shards.items()]


class Workspace:
    """Paths and contents of one recipe's output folder."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.out = recipe.out_dir
        self.tokenizer = self.out / "tokenizer"
        self.images = self.out / "images"
        self.rejects = self.out / "rejects.jsonl"

    def packs(self, name: str) -> Path:
        """Folder of a pack set."""
        return self.out / "packs" / name

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        """Readers of the corpora that some pack set uses. Raises UserError for wrong options or missing files."""
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
        """Corpus -> shard -> identity of its raw files: their names, sizes and times, not their contents."""
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
        """Return the shards of a corpus: as an earlier step listed them, while its raw files (``raw``) are the same.

        To count the rows of a large file takes as long as to read it.
        """
        config = self.recipe.corpora[name]
        key = hash_json([INGEST_VERSION, config.type, config.options, raw])[:12]
        path = self.out / "ingest" / name / f"shards-{key}.json"
        listed: list[str] | None = read_hashed(path)
        if listed is None:
            listed = list(self.corpora[name].shards())
            write_atomic(path, with_hash(listed))
        return listed

    def variant(self, corpus: str, pack: PackConfig, tokenizer_sha256: str) -> CorpusVariant:
        """Return how a corpus enters a pack set."""
        config = self.recipe.corpora[corpus]
        encoding = EncodingConfig.of(pack, self.recipe.image_tokens)
        key = hash_json([INGEST_VERSION, config.type, config.options, asdict(encoding), tokenizer_sha256])[:12]
        folder = self.out / "ingest" / corpus / key
        return CorpusVariant(
            corpus=corpus,
            kind=config.type,
            options=config.options,
            root=self.recipe.root_dir,
            tokenizer=self.tokenizer,
            encoding=encoding,
            folder=folder,
            shards=self.shards[corpus],
            raw=self._identities[corpus],
        )

    def variants(self, tokenizer_sha256: str) -> list[CorpusVariant]:
        """Return the distinct intakes of all pack sets, in recipe order."""
        every = [
            self.variant(corpus, pack, tokenizer_sha256)
            for pack in self.recipe.packs.values()
            for corpus in pack.corpora
        ]
        return list({variant.folder: variant for variant in every}.values())


def lock_of(out: Path) -> FolderLock:
    """Return the lock of an output folder: one writer at a time; shares of one step hold it together."""
    return FolderLock(
        out / ".lock",
        busy="{folder} is being written by another mma-prep ({holder}): wait for it",
        once="start one mma-prep at a time there",
    )


def _file_identity(path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return path.name, about.st_size, about.st_mtime_ns


def describe_missing(outputs: Sequence[ShardOutput]) -> str:
    """Return ``12 units, the first vqa/rows-00003``."""
    return f"{len(outputs)} unit{'s' * (len(outputs) > 1)}, the first {outputs[0].corpus}/{outputs[0].shard}"
