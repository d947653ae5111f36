"""The contract between the two halves: packed rows in Arrow IPC files, described by a hashed manifest.

A pack folder holds::

    manifest.json             totals, and the sha256 of every file; written last
    manifest.sha256           hash of the manifest, as ``sha256sum`` writes it
    rows-00000.arrow ...      fixed-length rows, memory-mapped by the reader
    tokenizer/                the tokenizer of the rows
    plan.arrow                the plan the rows follow (its hash is the folder's identity)

and refers to an image store (``data_prep.images.store``) whose row ids appear in ``image_row``.

Row (``L`` = ``manifest.seq_len`` tokens):

    input_ids  int32[L]   token ids; the image placeholder id at image positions, pad id where segment is 0
    modality   int8[L]    0 text, 1 image, 2 video, 3 audio
    segment    int32[L]   1, 2, ... for the packed samples in order; 0 = padding (always a suffix)
    instance   int16[L]   index into ``image_row`` of the image a position belongs to; -1 = text
    generated  uint8[L]   1 where the model writes (answers, captions): exactly the supervised tokens
    image_row  list<int64>  image store rows, in order of instance
    n_target   int32      supervised tokens: generated, and not the first token of their segment
    source     list<struct<dataset, sample, draw, family>>  one per segment, in order
    augmentation list<int16>  only with augmented corpora: five numbers per image (data_prep.images.augment)
    media      list<int32>  only where images differ in size: seven numbers per medium (data_prep.media.spec)

Positions, commit indices, labels and cu_seqlens are derived, never stored. Without the column ``media``, every image
has ``image_tokens`` tokens; packs of version 2 hold no other.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter

from data_prep.common.errors import UserError, one_line
from data_prep.common.files import RERUN, FileEntry, check_format, check_sums, sha256_file, write_atomic
from data_prep.common.modalities import IMAGE, MODALITIES
from data_prep.common.store_index import StoreIndex
from data_prep.common.typed_json import (
    STRICT,
    Count,
    InnerPath,
    Real,
    Sha256,
    Text,
    check_typed,
    parse_object,
    read_bytes,
)
from data_prep.media.spec import TABLE_COLUMNS, MediaSpec, MediaTable, extents

FORMAT = "mma-pack"
_LAST_MODALITY = len(MODALITIES) - 1
_max, _min = np.maximum.reduce, np.minimum.reduce  # half the time of the methods on a row
VERSION = 3
"""Version 2 is read as well: it has images of one size only, and no key ``media`` or ``media_tokens``."""
TOKEN_COLUMNS: Mapping[str, tuple[pa.DataType, npt.DTypeLike]] = {
    "input_ids": (pa.int32(), np.int32),
    "modality": (pa.int8(), np.int8),
    "segment": (pa.int32(), np.int32),
    "instance": (pa.int16(), np.int16),
    "generated": (pa.uint8(), np.uint8),
}
SOURCE_TYPE = pa.struct(
    [("dataset", pa.string()), ("sample", pa.string()), ("draw", pa.int64()), ("family", pa.string())]
)


def row_schema(seq_len: int, *, augmentations: bool = False, media: bool = False) -> pa.Schema:
    """Return the Arrow schema of rows of ``seq_len`` tokens, with or without augmentations and media tables."""
    tokens = [(name, pa.list_(kind, seq_len)) for name, (kind, _) in TOKEN_COLUMNS.items()]
    tail = [("image_row", pa.list_(pa.int64())), ("n_target", pa.int32()), ("source", pa.list_(SOURCE_TYPE))]
    tail += [("augmentation", pa.list_(pa.int16()))] if augmentations else []
    tail += [("media", pa.list_(pa.int32()))] if media else []
    return pa.schema([*tokens, *tail])


@dataclass(frozen=True, slots=True)
class Source:
    """Which sample a segment holds: corpus name, sample id, draw number in the plan, question family."""

    dataset: str
    sample: str
    draw: int
    family: str = ""


@dataclass(frozen=True, slots=True)
class PackRow:
    """One packed row; arrays are read-only views into the mapped file (see the module's table)."""

    input_ids: npt.NDArray[np.int32]
    modality: npt.NDArray[np.int8]
    segment: npt.NDArray[np.int32]
    instance: npt.NDArray[np.int16]
    generated: npt.NDArray[np.uint8]
    image_row: npt.NDArray[np.int64]
    n_target: int
    source: tuple[Source, ...]
    augmentation: npt.NDArray[np.int16] | None = None
    """int16[images, 5], see ``data_prep.images.augment``; None without augmentation."""
    media: MediaTable | None = None
    """int32[images, 7], see ``data_prep.media.spec``; None where all images have the same tokens."""


@dataclass(frozen=True, slots=True)
class CorpusStats:
    """Statistics of one corpus in the packs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    draws: Count
    samples: Count
    epochs: Real
    tokens: Count
    targets: Count
    repeated: Count = 0
    """Tokens of earlier turns that other samples also hold."""
    left_out: Count = 0
    """Later answers of the drawn conversations that no sample holds."""
    repairs: dict[Text, Count] = field(default_factory=dict)
    """Repairs of kept samples: code of ``data_prep.quarantine.REPAIRS`` -> count."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a trainer must know about a pack folder before it reads a row."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    seq_len: Annotated[Count, Field(ge=1, le=1 << 24)]
    """Tokens per row (``L``)."""
    rows: Count
    targets: Count
    """Supervised tokens over all rows."""
    tokens: Count
    """Tokens that are not padding, over all rows."""
    image_tokens: Count
    """Token positions of one image, or of one tile (anyres); the model's connector must produce as many. 1 where images
    have their own sizes (native)."""
    images: Count
    """Images over all rows, repeats counted."""
    max_images: Count
    """Maximum images in one row."""
    max_segment_tokens: Count
    """Longest packed sample in tokens."""
    vocab_size: Annotated[Count, Field(ge=1, lt=1 << 31)]
    """Embedding rows that the token ids need: ``len(tokenizer)``."""
    pad_id: Count
    image_id: Count
    """Token id written at image positions; its embedding is never read."""
    eos_ids: tuple[Count, ...]
    """Token ids that end a generated turn."""
    tokenizer: InnerPath
    """Folder of the tokenizer, relative to the manifest."""
    tokenizer_sha256: Sha256
    template: Text
    """Name of the prompt template; inference must write prompts with the same one."""
    plan_sha256: Sha256
    """Identity of the row order; resume refuses a different one."""
    image_store: Text
    """Folder of the image store, relative to the manifest; empty for text-only packs."""
    image_store_sha256: Sha256 = ""
    corpora: dict[Text, CorpusStats] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    seed: Count = 0
    media: MediaSpec | None = None
    """How images become tokens; None: every image takes ``image_tokens``."""
    media_tokens: Count | None = None
    """Image tokens over all rows; None: ``image_tokens`` of every image."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe, for the record."""

    def to_json(self) -> str:
        """Return the manifest as stable JSON text."""
        media = None if self.media is None else self.media.model_dump(mode="json")
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "media": media}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @property
    def media_spec(self) -> MediaSpec:
        """How media become tokens."""
        return self.media or MediaSpec.fixed(self.image_tokens)

    @classmethod
    def load(cls, directory: Path | str) -> Manifest:
        """Read ``directory/manifest.json``. Raises UserError if it is missing, foreign, damaged or malformed."""
        path = Path(directory) / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"{directory} is not a pack folder (no manifest.json): run mma-prep first, or fix data.packs"
            )
        data = read_bytes(path, RERUN)
        check_sums(path, hashlib.sha256(data).hexdigest())
        raw = parse_object(data, path, RERUN)
        check_format(path, raw, format=FORMAT, version=2 if raw.get("version") == 2 else VERSION, fix=RERUN)
        del raw["format"], raw["version"]
        manifest = check_typed(_manifest_type(), raw, path, RERUN)
        for problem in manifest.contradictions():
            raise UserError(f"{path}: malformed ({problem}); {RERUN}")
        return manifest

    @property
    def all_media_tokens(self) -> int:
        """Image tokens over all rows."""
        return self.images * self.image_tokens if self.media_tokens is None else self.media_tokens

    def contradictions(self) -> Iterator[str]:
        """Yield what no writer of packs would write, although every value is of its type."""
        if sum(entry.rows for entry in self.files) != self.rows:
            yield f"rows={self.rows}, but its files hold {sum(entry.rows for entry in self.files)}"
        if not self.targets <= self.tokens <= self.rows * self.seq_len:
            yield f"{self.targets} targets, {self.tokens} tokens, {self.rows} rows of {self.seq_len}"
        if self.media is not None and (self.media.is_fixed or self.media.image.view_tokens != self.image_tokens):
            yield f"image_tokens={self.image_tokens}, but media says {self.media.image.describe()}"
        if (self.media is None) != (self.media_tokens is None):
            yield "media without media_tokens, or media_tokens without media"
        for name in ("pad_id", "image_id"):
            if getattr(self, name) >= self.vocab_size:
                yield f"{name}={getattr(self, name)} is not below vocab_size={self.vocab_size}"


@functools.cache
def _manifest_type() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def last_answer(row: PackRow, number: int) -> range | None:
    """Return the positions of the last generated run of segment ``number``, counted from 1: its answer.

    None if the segment generates nothing, or nothing stands before it (a document of text alone).
    """
    own = np.flatnonzero(row.segment == number)
    written = own[row.generated[own] != 0]
    if not len(written):
        return None
    stop = int(written[-1]) + 1
    given = own[(row.generated[own] == 0) & (own < stop)]
    return range(int(given[-1]) + 1, stop) if len(given) else None


def rows_to_batch(rows: Sequence[PackRow], seq_len: int) -> pa.RecordBatch:
    """Turn rows into one Arrow record batch of the pack schema."""
    columns: list[pa.Array] = []
    for name, (kind, dtype) in TOKEN_COLUMNS.items():
        flat = np.concatenate([getattr(row, name).astype(dtype, copy=False) for row in rows])
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat, type=kind), seq_len))
    columns.append(pa.array([row.image_row.tolist() for row in rows], type=pa.list_(pa.int64())))
    columns.append(pa.array([row.n_target for row in rows], type=pa.int32()))
    sources = [[(source.dataset, source.sample, source.draw, source.family) for source in row.source] for row in rows]
    columns.append(pa.array(sources, type=pa.list_(SOURCE_TYPE)))
    optional = optional_columns(rows)
    if optional["augmentations"]:
        columns.append(pa.array([_numbers(row.augmentation) for row in rows], pa.list_(pa.int16())))
    if optional["media"]:
        columns.append(pa.array([_numbers(row.media) for row in rows], pa.list_(pa.int32())))
    return pa.RecordBatch.from_arrays(columns, schema=row_schema(seq_len, **optional))


def _numbers(table: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    assert table is not None, "a row without a column that others in its file have"
    return table.ravel()


def optional_columns(rows: Sequence[PackRow]) -> dict[str, bool]:
    """Return which optional columns rows have: all of them do, or none."""
    first = rows[0] if rows else None
    assert len({(row.augmentation is None, row.media is None) for row in rows}) <= 1, "rows of different columns"
    return {
        "augmentations": first is not None and first.augmentation is not None,
        "media": first is not None and first.media is not None,
    }


def write_rows(path: Path, rows: Sequence[PackRow], seq_len: int) -> FileEntry:
    """Write one row file atomically and return its manifest entry (named relative to ``path.parent``)."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, row_schema(seq_len, **optional_columns(rows))) as writer:
        if rows:
            writer.write_batch(rows_to_batch(rows, seq_len))
    data = memoryview(sink.getvalue())
    write_atomic(path, data)
    return FileEntry(path.name, len(data), hashlib.sha256(data).hexdigest(), len(rows))


class _RowFile(NamedTuple):
    """An open row file."""

    batch: pa.RecordBatch
    columns: dict[str, npt.NDArray[Any]]
    """[rows, L] per token column, mapped."""


def _sources(batch: pa.RecordBatch, local: int) -> tuple[Source, ...]:
    fields = batch.column("source")[local].values.flatten()  # column by column: half the time of as_py()
    return tuple(map(Source, *(field.to_pylist() for field in fields)))


def _table(batch: pa.RecordBatch, local: int, name: str, columns: int) -> npt.NDArray[Any] | None:
    """Return an optional column of a row as [media, columns]; None if the rows have no such column."""
    if name not in batch.schema.names:
        return None
    flat = np.asarray(np.from_dlpack(batch.column(name)[local].values))
    return flat.reshape(-1, columns) if len(flat) % columns == 0 else flat.reshape(1, -1)


class PackReader:
    """Random access to the rows of a pack folder; zero-copy, lazily opened, safe to pickle to workers."""

    def __init__(self, directory: Path | str, *, verify: bool = False) -> None:
        """Open a folder; ``verify=True`` hashes every file first (UserError names the first that differs)."""
        self.directory = Path(directory)
        self._seen = self._stat_manifest()
        self.manifest = Manifest.load(self.directory)
        self._row_files = [entry for entry in self.manifest.files if entry.rows]
        self._starts = np.cumsum([0] + [entry.rows for entry in self._row_files])
        self._opened: dict[int, _RowFile] = {}
        if verify:
            self.verify()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return self.manifest.rows

    def __iter__(self) -> Iterator[PackRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> PackRow:
        """Return row ``index`` (0-based, in training order), every value of which is in bounds.

        Raises:
            IndexError: ``index`` is outside the folder.
            UserError: a value would index outside the vocabulary, the row's images or samples, or the image store.
        """
        (batch, columns), local = self._locate(index)
        arrays: dict[str, Any] = {name: column[local] for name, column in columns.items()}
        image_row = np.asarray(np.from_dlpack(batch.column("image_row")[local].values), dtype=np.int64)
        row = PackRow(
            **arrays,
            image_row=image_row,
            n_target=batch.column("n_target")[local].as_py(),
            source=_sources(batch, local),
            augmentation=_table(batch, local, "augmentation", 5),
            media=_table(batch, local, "media", TABLE_COLUMNS),
        )
        self._check_bounds(row, index)
        return row

    def segment(self, index: int) -> npt.NDArray[np.int32]:
        """Return the segment numbers of one row, int32[L], without reading the rest of it."""
        (batch, columns), local = self._locate(index)
        segment: npt.NDArray[np.int32] = columns["segment"][local]
        self._check_column(index, "segment", segment, 0, len(batch.column("source")[local]))
        return segment

    def n_target(self, index: int) -> int:
        """Return the supervised tokens of one row without reading the rest of it."""
        (batch, _), local = self._locate(index)
        return int(batch.column("n_target")[local].as_py())

    def sources(self, index: int) -> tuple[Source, ...]:
        """Return the sources of one row without reading the rest of it."""
        (batch, _), local = self._locate(index)
        return _sources(batch, local)

    def rows_that_hold(self, samples: int) -> int:
        """Return how many rows from the first on hold ``samples`` samples together; all rows if 0 or fewer do."""
        rows, held = 0, 0
        while rows < len(self) and (not samples or held < samples):
            rows, held = rows + 1, held + len(self.sources(rows))
        return rows

    def verify(self) -> None:
        """Hash every file of the folder. Raises UserError naming the first missing or altered one."""
        for entry in self.manifest.files:
            path = self.directory / entry.name
            if not path.is_file():
                raise UserError(f"{path}: listed in the manifest but missing; run mma-prep again")
            if path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
                raise UserError(
                    f"{path}: differs from its manifest (damaged or edited); delete it and run mma-prep again"
                )

    def _locate(self, index: int) -> tuple[_RowFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.directory}")
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        if which not in self._opened:
            self._opened[which] = self._open(self._row_files[which])
        return self._opened[which], index - int(self._starts[which])

    def _open(self, entry: FileEntry) -> _RowFile:
        path = self.directory / entry.name
        try:
            with pa.memory_map(str(path)) as mapped:  # the batch keeps the map but no file descriptor
                size, batch = mapped.size(), pa.ipc.open_file(mapped).get_batch(0)
            batch.validate(full=True)  # offsets and text: damaged ones would be read out of bounds
        except (OSError, pa.ArrowException) as error:
            self._check_unchanged()
            raise UserError(
                f"{path}: cannot be read ({one_line(error)}); run `mma-prep verify {self.directory}`"
            ) from error
        self._check_unchanged()  # last: a writer first removes the manifest, then replaces rows
        media = self.manifest.media is not None
        schemas = [row_schema(self.manifest.seq_len, augmentations=has, media=media) for has in (False, True)]
        if size != entry.bytes or batch.num_rows != entry.rows or batch.schema not in schemas:
            raise UserError(f"{path}: not the rows its manifest lists; run `mma-prep verify {self.directory}`")
        flat = {name: np.from_dlpack(batch.column(name).values) for name in TOKEN_COLUMNS}  # to_numpy() imports pandas
        return _RowFile(batch, {name: column.reshape(entry.rows, -1) for name, column in flat.items()})

    def _check_unchanged(self) -> None:
        """Raise UserError if the manifest has changed since opening: old and new rows would be mixed."""
        seen = self._stat_manifest()
        if seen == self._seen:
            return
        try:
            same = Manifest.load(self.directory) == self.manifest
        except UserError:
            same = False
        if not same:
            raise UserError(f"{self.directory}: the packs were rebuilt while they were read: restart this command")
        self._seen = seen

    def _stat_manifest(self) -> tuple[int, int, int] | None:
        """Return file metadata that changes whenever the manifest is written; None if it is missing."""
        try:
            about = (self.directory / "manifest.json").stat()
        except OSError:
            return None
        return about.st_ino, about.st_size, about.st_mtime_ns

    def _check_bounds(self, row: PackRow, index: int) -> None:
        """Check what the trainer uses as an index. Nothing else stops a damaged value when hashes are not checked.

        One pass per column: negative numbers are huge as unsigned ones.
        """
        images = len(row.image_row)
        if not (
            _max(row.input_ids.view(np.uint32)) < self.manifest.vocab_size
            and _max(row.segment.view(np.uint32)) <= len(row.source)
            and _max(row.modality.view(np.uint8)) <= _LAST_MODALITY
            and _max(row.generated) <= 1
            and _max(row.instance) < images
            and _min(row.instance) >= -1
            and 0 <= row.n_target <= len(row.input_ids)
            and (not images or _max(row.image_row.view(np.uint64)) < self._store_rows)
            and (row.augmentation is None or len(row.augmentation) == images)
            and (row.media is None or self._media_fault(row) is None)
        ):
            self._name_damage(row, index)

    def _name_damage(self, row: PackRow, index: int) -> None:
        """Raise UserError naming the first value out of bounds."""
        images = len(row.image_row)
        self._check_column(index, "input_ids", row.input_ids, 0, self.manifest.vocab_size - 1)
        self._check_column(index, "segment", row.segment, 0, len(row.source))
        self._check_column(index, "modality", row.modality, 0, _LAST_MODALITY)
        self._check_column(index, "generated", row.generated, 0, 1)
        self._check_column(index, "instance", row.instance, -1, images - 1)
        self._check_column(index, "n_target", np.array([row.n_target]), 0, self.manifest.seq_len)
        self._check_column(index, "image_row", row.image_row, 0, self._store_rows - 1)
        if row.augmentation is not None and len(row.augmentation) != images:
            raise self._damaged(index, f"column augmentation holds other than 5 numbers for each of {images} images")
        raise self._damaged(index, f"column media {self._media_fault(row)}")

    def _media_fault(self, row: PackRow) -> str | None:
        """Return what is wrong with a media table, whose numbers set the sizes of what training decodes."""
        media, images = row.media, len(row.image_row)
        assert media is not None
        if media.shape != (images, TABLE_COLUMNS):
            return f"holds other than {TABLE_COLUMNS} numbers for each of {images} images"
        if not np.array_equal(np.bincount(row.instance[row.instance >= 0], minlength=images), media[:, 4]):
            return "gives an image other tokens than the row"
        fits = self.manifest.media_spec.image.fits
        wrong = [number for number, extent in enumerate(extents(media)) if not fits(extent)]
        if wrong or (media[:, 0] != IMAGE).any():
            return f"holds an image that {self.manifest.media_spec.image.kind} images cannot give"
        return None

    def _check_column(self, index: int, name: str, values: npt.NDArray[Any], low: int, high: int) -> None:
        if len(values) and (values.min() < low or values.max() > high):
            wrong = values[(values < low) | (values > high)][0]
            raise self._damaged(index, f"column {name} holds {wrong}, outside {low} to {high}")

    def _damaged(self, index: int, problem: str) -> UserError:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        path, local = self.directory / self._row_files[which].name, index - int(self._starts[which])
        return UserError(
            f"{path}: row {local} (row {index} of the packs) is damaged: {problem}; "
            f"run `mma-prep verify {self.directory}`"
        )

    @functools.cached_property
    def _store_rows(self) -> int:
        """Images in the store."""
        return (
            StoreIndex.load(self.directory / self.manifest.image_store).rows if self.manifest.image_store else 1 << 62
        )
