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

Positions, commit indices, labels and cu_seqlens are derived, never stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.common.errors import UserError
from data_prep.common.files import RERUN, FileEntry, check_format, sha256_file, write_atomic

FORMAT = "mma-pack"
VERSION = 2
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


def row_schema(seq_len: int, *, augmentations: bool = False) -> pa.Schema:
    """Return the Arrow schema of rows of ``seq_len`` tokens, with or without augmentations of their images."""
    tokens = [(name, pa.list_(kind, seq_len)) for name, (kind, _) in TOKEN_COLUMNS.items()]
    tail = [("image_row", pa.list_(pa.int64())), ("n_target", pa.int32()), ("source", pa.list_(SOURCE_TYPE))]
    return pa.schema([*tokens, *tail, *([("augmentation", pa.list_(pa.int16()))] if augmentations else [])])


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


@dataclass(frozen=True, slots=True)
class CorpusStats:
    """Statistics of one corpus in the packs."""

    draws: int
    samples: int
    epochs: float
    tokens: int
    targets: int
    repeated: int = 0
    """Tokens of earlier turns that other samples also hold."""
    left_out: int = 0
    """Later answers of the drawn conversations that no sample holds."""
    repairs: dict[str, int] = field(default_factory=dict)
    """Repairs of kept samples: code of ``data_prep.quarantine.REPAIRS`` -> count."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a trainer must know about a pack folder before it reads a row."""

    seq_len: int
    """Tokens per row (``L``)."""
    rows: int
    targets: int
    """Supervised tokens over all rows."""
    tokens: int
    """Tokens that are not padding, over all rows."""
    image_tokens: int
    """Token positions of one image; the model's connector must produce as many."""
    images: int
    """Images over all rows, repeats counted."""
    max_images: int
    """Maximum images in one row."""
    max_segment_tokens: int
    """Longest packed sample in tokens."""
    vocab_size: int
    """Embedding rows that the token ids need: ``len(tokenizer)``."""
    pad_id: int
    image_id: int
    """Token id written at image positions; its embedding is never read."""
    eos_ids: tuple[int, ...]
    """Token ids that end a generated turn."""
    tokenizer: str
    """Folder of the tokenizer, relative to the manifest."""
    tokenizer_sha256: str
    template: str
    """Name of the prompt template; inference must write prompts with the same one."""
    plan_sha256: str
    """Identity of the row order; resume refuses a different one."""
    image_store: str
    """Folder of the image store, relative to the manifest; empty for text-only packs."""
    image_store_sha256: str = ""
    corpora: dict[str, CorpusStats] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    seed: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe, for the record."""

    def to_json(self) -> str:
        """Return the manifest as stable JSON text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def load(cls, directory: Path | str) -> Manifest:
        """Read ``directory/manifest.json``. Raises UserError if it is missing, foreign or malformed."""
        path = Path(directory) / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"{directory} is not a pack folder (no manifest.json): run mma-prep first, or fix data.packs"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            check_format(path, raw, format=FORMAT, version=VERSION, fix=RERUN)
            del raw["format"], raw["version"]
            raw["files"] = tuple(FileEntry(**entry) for entry in raw["files"])
            raw["corpora"] = {name: CorpusStats(**entry) for name, entry in raw["corpora"].items()}
            raw["eos_ids"] = tuple(raw["eos_ids"])
            return cls(**raw)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: malformed manifest ({error}); run mma-prep again") from error


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
    augmentations = has_augmentations(rows)
    if augmentations:
        columns.append(
            pa.array(
                [[] if row.augmentation is None else row.augmentation.ravel() for row in rows], pa.list_(pa.int16())
            )
        )
    return pa.RecordBatch.from_arrays(columns, schema=row_schema(seq_len, augmentations=augmentations))


def has_augmentations(rows: Sequence[PackRow]) -> bool:
    """Return whether rows have augmentations: all of them do, or none."""
    assert len({row.augmentation is None for row in rows}) <= 1, "rows with and without augmentation in one file"
    return bool(rows) and rows[0].augmentation is not None


def write_rows(path: Path, rows: Sequence[PackRow], seq_len: int) -> FileEntry:
    """Write one row file atomically and return its manifest entry (named relative to ``path.parent``)."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, row_schema(seq_len, augmentations=has_augmentations(rows))) as writer:
        if rows:
            writer.write_batch(rows_to_batch(rows, seq_len))
    data = memoryview(sink.getvalue())
    write_atomic(path, data)
    return FileEntry(path.name, len(data), hashlib.sha256(data).hexdigest(), len(rows))


class PackReader:
    """Random access to the rows of a pack folder; zero-copy, lazily opened, safe to pickle to workers."""

    def __init__(self, directory: Path | str, *, verify: bool = False) -> None:
        """Open a folder; ``verify=True`` hashes every file first (UserError names the first that differs)."""
        self.directory = Path(directory)
        self._seen = self._stat_manifest()
        self.manifest = Manifest.load(self.directory)
        self._row_files = [entry for entry in self.manifest.files if entry.rows]
        self._starts = np.cumsum([0] + [entry.rows for entry in self._row_files])
        self._batches: dict[int, pa.RecordBatch] = {}
        if verify:
            self.verify()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}

    def __len__(self) -> int:
        return self.manifest.rows

    def __iter__(self) -> Iterator[PackRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> PackRow:
        """Return row ``index`` (0-based, in training order). Raises IndexError outside the folder."""
        batch, local = self._locate(index)
        arrays = {name: self._tokens(batch, name, local) for name in TOKEN_COLUMNS}
        image_row = np.asarray(np.from_dlpack(batch.column("image_row")[local].values), dtype=np.int64)
        source = tuple(Source(**entry) for entry in batch.column("source")[local].as_py())
        return PackRow(
            **arrays,
            image_row=image_row,
            n_target=batch.column("n_target")[local].as_py(),
            source=source,
            augmentation=self._augmentation(batch, local),
        )

    def segment(self, index: int) -> npt.NDArray[np.int32]:
        """Return the segment numbers of one row, int32[L], without reading the rest of it."""
        batch, local = self._locate(index)
        return self._tokens(batch, "segment", local)

    def n_target(self, index: int) -> int:
        """Return the supervised tokens of one row without reading the rest of it."""
        batch, local = self._locate(index)
        return int(batch.column("n_target")[local].as_py())

    def sources(self, index: int) -> tuple[Source, ...]:
        """Return the sources of one row without reading the rest of it."""
        batch, local = self._locate(index)
        return tuple(Source(**entry) for entry in batch.column("source")[local].as_py())

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

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.directory}")
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        if which not in self._batches:
            self._batches[which] = self._open(self._row_files[which])
        return self._batches[which], index - int(self._starts[which])

    def _open(self, entry: FileEntry) -> pa.RecordBatch:
        path = self.directory / entry.name
        try:
            with pa.memory_map(str(path)) as mapped:  # the batch keeps the map but no file descriptor
                size, batch = mapped.size(), pa.ipc.open_file(mapped).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            self._check_unchanged()
            raise UserError(f"{path}: cannot be read ({error}); run `mma-prep verify {self.directory}`") from error
        self._check_unchanged()  # last: a writer first removes the manifest, then replaces rows
        schemas = [row_schema(self.manifest.seq_len, augmentations=augmentations) for augmentations in (False, True)]
        if size != entry.bytes or batch.num_rows != entry.rows or batch.schema not in schemas:
            raise UserError(f"{path}: not the rows its manifest lists; run `mma-prep verify {self.directory}`")
        return batch

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

    @staticmethod
    def _augmentation(batch: pa.RecordBatch, local: int) -> npt.NDArray[np.int16] | None:
        if "augmentation" not in batch.schema.names:
            return None
        flat = np.from_dlpack(batch.column("augmentation")[local].values)
        return np.asarray(flat, dtype=np.int16).reshape(-1, 5)

    def _tokens(self, batch: pa.RecordBatch, name: str, local: int) -> npt.NDArray[Any]:
        seq_len = self.manifest.seq_len
        flat: npt.NDArray[Any] = np.from_dlpack(batch.column(name).values)  # to_numpy() imports pandas
        return flat[local * seq_len : (local + 1) * seq_len]
