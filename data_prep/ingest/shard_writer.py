"""Ingest of one raw shard: read, template, tokenise and validate images, in constant memory."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import numpy as np

from data_prep.common.arrow_files import ArrowWriter, atomic_path
from data_prep.common.files import sha256_file, write_atomic
from data_prep.common.modalities import IMAGE
from data_prep.corpora import build_corpus
from data_prep.corpora.base import Input
from data_prep.example import MAX_IMAGE_BYTES, Example, ImageRef, Reject
from data_prep.images.augment import allowed_by
from data_prep.images.store import IMAGE_SCHEMA, SHARD_BATCH_ROWS, check_image, misnamed
from data_prep.ingest import image_hashes, sources
from data_prep.ingest.prompts import NO_PROMPT, prompt_ids
from data_prep.ingest.samples import SAMPLE_SCHEMA, SAMPLE_STATS
from data_prep.ingest.workspace import CorpusVariant, EncodingConfig, ShardOutput, ShardReport
from data_prep.media.spec import Header
from data_prep.quarantine import CODES, BadSample, Tally
from data_prep.text.documents import Limits, Size, split_to_fit, without_images
from data_prep.text.encoding import Encoded
from data_prep.text.tokenizer import Tokenizer
from data_prep.text.turns import Excerpt, excerpts

if TYPE_CHECKING:
    from data_prep.corpora.base import Corpus

_SHAPE_TOLERANCE = 0.02  # for the rounded sides of scaled copies
_RAW_CHARACTERS = 400  # of a rejected sample, in its list


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One raw shard to ingest, with everything a worker process needs."""

    output: ShardOutput
    variant: CorpusVariant


@functools.lru_cache(maxsize=4)
def _reader(kind: str, options: str, root: str, raw: str) -> Corpus:
    """Build a reader once per process: it lists all raw files; ``raw`` changes when one of them does."""
    return build_corpus(kind, json.loads(options), Path(root))


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str, origin: bytes) -> Tokenizer:
    """Load the tokenizer once per process; ``origin`` tells a new tokenizer in the same folder from the old one."""
    return Tokenizer.load(folder)


def ingest_shard(job: ShardJob) -> ShardReport:
    """Read one raw shard, tokenise it, validate its images and write its files; the marker is written last."""
    variant, output = job.variant, job.output
    corpus = _reader(variant.kind, json.dumps(variant.options, sort_keys=True), str(variant.root), variant.raw)
    tokenizer = _tokenizer(str(variant.tokenizer), (variant.tokenizer / "origin.json").read_bytes())
    output.forget()
    with ShardWriter(output, variant.encoding, tokenizer) as writer:
        for item in corpus.examples(output.shard):
            writer.take(item)
    folders = [path for kind, path in corpus.inputs().values() if kind is Input.FOLDER] if writer.misses_images else []
    write_atomic(output.sources, sources.describe([*writer.files, *sources.watched(folders)], variant.root))
    report = writer.report()
    write_atomic(output.marker, report.to_json().encode())
    return report


class ShardWriter:
    """Writes the files of one shard output in constant memory."""

    def __init__(self, output: ShardOutput, encoding: EncodingConfig, tokenizer: Tokenizer) -> None:
        self._output, self._encoding, self._tokenizer = output, encoding, tokenizer
        self._ends = {tokenizer.id_of(token) for token in encoding.template.ends}
        self._prompt_room = max(map(len, prompt_ids(tokenizer, encoding.template.prompts)), default=0)
        self._images: dict[bytes, int] = {}
        self._outcomes: dict[bytes, tuple[int, int] | tuple[str, str]] = {}
        self._codes: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()
        self._kept = 0
        self.files: set[Path] = set()
        """Image files that were read, and image files that are missing."""

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            self._samples = stack.enter_context(ArrowWriter(self._output.tokens, SAMPLE_SCHEMA))
            self._pixels = stack.enter_context(
                ArrowWriter(self._output.images, IMAGE_SCHEMA, batch_rows=SHARD_BATCH_ROWS)
            )
            stats = stack.enter_context(atomic_path(self._output.stats))
            self._stats: BinaryIO = stack.enter_context(stats.open("wb"))
            rejects = stack.enter_context(atomic_path(self._output.rejects))
            self._rejects: TextIO = stack.enter_context(rejects.open("w", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.__exit__(*failure)  # type: ignore[arg-type]
        if failure[0] is None:
            write_atomic(self._output.image_hashes, image_hashes.to_bytes(self._images))

    def report(self) -> ShardReport:
        """Return the report of the shard output, once it is closed."""
        entry, tally = self._samples.entry, self._tally()
        others = (self._output.stats, self._output.image_hashes, self._output.rejects, self._output.sources)
        return ShardReport(
            self._output.raw, tally, self._pixels.entry, entry.bytes, entry.sha256, *map(sha256_file, others)
        )

    @property
    def misses_images(self) -> bool:
        """Whether a sample was rejected, or lost an image, because a file is missing."""
        return bool(self._codes["missing-image"] or self._repairs["image-dropped"])

    def take(self, item: Example | Reject) -> None:
        """Keep the samples of a raw sample, or record why it cannot be used."""
        if isinstance(item, Reject):
            self.reject(item)
            return
        try:
            usable = self._usable(item)
        except BadSample as problem:
            self.reject(rejected(item, problem))
            return
        for excerpt in self._excerpts(usable):
            try:
                self.keep(excerpt)
            except BadSample as problem:
                self.reject(rejected(excerpt.example, problem))

    def _usable(self, example: Example) -> Example:
        """Return an example without its unusable optional images. Raises BadSample if none is left."""
        dropped = [image for image in example.images if image.optional and not self._opens(image)]
        if not dropped:
            return example
        if len(dropped) == len(example.images):
            raise BadSample(
                "missing-image", f"none of {len(dropped)} images can be used, the first is {dropped[0].name}"
            )
        self._repairs["image-dropped"] += len(dropped)
        return without_images(example, dropped)

    def _opens(self, image: ImageRef) -> bool:
        try:
            self._validated_image(image)
        except BadSample:
            return False
        return True

    def _excerpts(self, example: Example) -> Iterator[Excerpt]:
        """Yield the samples of an example: parts of a conversation or of a long document."""
        if example.kind == "chat":
            yield from excerpts(example, self._encoding.template.turns)
            return
        encoding = self._encoding
        caps = (encoding.max_text_tokens, encoding.max_images, encoding.max_image_tokens)
        limits = Limits(encoding.seq_len, *caps)
        yield from map(Excerpt, split_to_fit(example, limits, self._measure))

    def _measure(self, example: Example) -> Size:
        try:
            image_tokens = self._image_tokens(example)
        except BadSample:  # whatever the split, the part with this image is rejected
            image_tokens = [1] * len(example.images)
        tokens = len(self._tokenizer.encode(self._encoding.template.pieces(example), image_tokens))
        return Size(tokens, len(example.images), sum(image_tokens))

    def _image_tokens(self, example: Example) -> list[int]:
        """Return the tokens of each image. Raises BadSample if an image whose size matters cannot be used."""
        spec = self._encoding.media
        if spec.is_fixed:
            return [spec.image.view_tokens] * len(example.images)
        return [spec.image.extent(Header(*size)).tokens for _, _, size in self._validated(example)]

    def _tally(self) -> Tally:
        repairs = {code: count for code, count in sorted(self._repairs.items()) if count}
        return Tally(self._kept, dict(sorted(self._codes.items())), repairs)

    def reject(self, item: Reject) -> None:
        """Count and record a sample that cannot be used."""
        assert item.code in CODES, item.code
        self._codes[item.code] += 1
        if item.missing_file is not None:
            self.files.add(item.missing_file)
        place = {"corpus": self._output.corpus, "shard": self._output.shard, "sample": item.sample}
        self._rejects.write(json.dumps({**place, "code": item.code, "detail": item.detail, **shown(item)}) + "\n")

    def keep(self, excerpt: Excerpt) -> None:
        """Add a sample with its images. Raises BadSample, and adds nothing, if it cannot be used."""
        example = excerpt.example
        check_text(example)
        image_tokens = self._image_tokens(example)
        encoded, truncated = self._encode(example, image_tokens)
        images = [self._register(*image) for image in self._validated(example)]
        supervised = np.flatnonzero(encoded.generated[1:])
        ended = bool(len(supervised)) and int(encoded.ids[supervised[-1] + 1]) in self._ends
        prompt_at = self._prompt_at(example, encoded)
        arrays = (encoded.ids, encoded.generated, images)
        self._samples.append((example.id, example.family, *arrays, prompt_at, allowed_by(example)))
        counts = (len(encoded), len(images), len(supervised), self._repeated(excerpt, image_tokens))
        stats = np.zeros((), dtype=SAMPLE_STATS)  # zeros: padding bytes are written too
        stats[()] = (*counts, sum(image_tokens), excerpt.left_out, prompt_at != NO_PROMPT, truncated, ended)
        self._stats.write(stats.tobytes())
        self._kept += 1

    def _repeated(self, excerpt: Excerpt, image_tokens: Sequence[int]) -> int:
        """Return the tokens of the turns that the previous excerpt also holds."""
        if not excerpt.repeated:
            return 0
        before = replace(excerpt.example, turns=excerpt.example.turns[: excerpt.repeated])
        return len(self._tokenizer.encode(self._encoding.template.pieces(before), image_tokens))

    def _prompt_at(self, example: Example, encoded: Encoded) -> int:
        """Return the position for a prompt: before or after the given part, as the template writes it."""
        template = self._encoding.template
        if not template.takes_prompt(example):
            return NO_PROMPT
        return 0 if template.order == "text_first" else int(np.argmax(encoded.generated))

    def _encode(self, example: Example, image_tokens: Sequence[int]) -> tuple[Encoded, bool]:
        encoding, count, held = self._encoding, len(example.images), sum(image_tokens)
        if encoding.max_images is not None and count > encoding.max_images:
            raise BadSample("too-many-images", f"{count} images, max_images={encoding.max_images}")
        if encoding.max_image_tokens is not None and held > encoding.max_image_tokens:
            raise BadSample("too-many-images", f"{held} image tokens, max_image_tokens={encoding.max_image_tokens}")
        encoded = self._tokenizer.encode(encoding.template.pieces(example), image_tokens)
        if not encoded.generated[1:].any():
            raise BadSample("no-target", "no generated token after the first")
        limit = encoding.seq_len
        if encoding.max_text_tokens is not None:
            limit = min(limit, encoding.max_text_tokens + held)
        if encoding.template.takes_prompt(example):
            limit -= self._prompt_room  # the longest prompt fits
        if len(encoded) <= limit:
            return encoded, False
        if encoding.too_long == "reject":
            raise BadSample("too-long", f"{len(encoded)} tokens with {count} images, {limit} fit")
        return truncate_tail(encoded, limit), True

    def _validated(self, example: Example) -> list[tuple[bytes, bytes, tuple[int, int]]]:
        """Return (sha256, bytes, upright size) of the images; each distinct image is decoded once."""
        return [self._validated_image(image) for image in example.images]

    def _validated_image(self, image: ImageRef) -> tuple[bytes, bytes, tuple[int, int]]:
        if image.path is not None:
            self.files.add(image.path)
        try:
            data = image.read()
        except OSError as error:
            code = "too-large" if error.errno == errno.EFBIG else "missing-image"
            raise BadSample(code, f"{image.name}: {error.strerror or error}") from error
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample("too-large", f"{image.name}: {len(data):,} bytes, the limit is {MAX_IMAGE_BYTES:,}")
        key = hashlib.sha256(data).digest()
        size = self._size(key, data, image.name)
        check_annotated_size(image, size)
        return key, data, size

    def _size(self, key: bytes, data: bytes, name: str) -> tuple[int, int]:
        """Return the upright size of an image; each distinct image is decoded once. Raises BadSample."""
        if key not in self._outcomes:
            try:
                self._outcomes[key] = check_image(data)
                self._repairs["misnamed-image"] += misnamed(data, name)
            except BadSample as problem:
                self._outcomes[key] = (problem.code, problem.detail)
        outcome = self._outcomes[key]
        if isinstance(outcome[0], str):
            raise BadSample(outcome[0], f"{name}: {outcome[1]}")
        return outcome[0], int(outcome[1])

    def _register(self, key: bytes, data: bytes, size: tuple[int, int]) -> int:
        if key not in self._images:
            self._images[key] = len(self._images)
            self._pixels.append((key, *size, data))
        return self._images[key]


def rejected(example: Example, problem: BadSample) -> Reject:
    """Return the reject of an example, with its text and first image."""
    texts = (f"{turn.role}: {part}" for turn in example.turns for part in turn.parts if isinstance(part, str))
    return Reject(example.id, problem.code, problem.detail, "\n".join(texts), next(iter(example.images), None))


def shown(item: Reject) -> dict[str, str]:
    """Return what ``mma-prep rejects`` shows of a sample: the start of its text and the path of its image."""
    image, raw = item.image, item.raw[:_RAW_CHARACTERS].encode(errors="backslashreplace").decode()
    if image is None or image.path is None:
        return {"raw": raw}
    member = image.name if image.data is not None else ""
    return {"raw": raw, "image": str(image.path), "member": member.partition("/")[2]}


def check_annotated_size(image: ImageRef, size: tuple[int, int]) -> None:
    """Raise BadSample if the annotated shape is not that of the upright image (EXIF rotation, a crop).

    Scaled copies pass, because positions are fractions of the image.
    """
    if image.annotated_size is None:
        return
    width, height = image.annotated_size
    if abs(width * size[1] - height * size[0]) > _SHAPE_TOLERANCE * width * size[1]:
        drawn, found = f"{width:g} x {height:g}", f"{size[0]} x {size[1]}"
        raise BadSample("bad-box", f"{image.name}: annotated as {drawn} pixels, the upright image has {found}")


def check_text(example: Example) -> None:
    """Raise BadSample if a text holds NUL or a lone surrogate."""
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


def truncate_tail(encoded: Encoded, limit: int) -> Encoded:
    """Truncate a sample to ``limit`` tokens, then back to its last generated token; its end token is lost.

    Raises:
        BadSample: truncation would lose an image or every supervised token.
    """
    if (encoded.modality[limit:] == IMAGE).any():
        raise BadSample("too-long", f"{len(encoded)} tokens, {limit} fit, and truncation would lose an image")
    supervised = np.flatnonzero(encoded.generated[1:limit])
    if not len(supervised):
        raise BadSample("too-long", f"{len(encoded)} tokens, {limit} fit, and truncation would lose every target")
    return encoded.cut(int(supervised[-1]) + 2)
