"""One tokenizer for data preparation and training, over Hugging Face fast tokenizers and SentencePiece models.

Special tokens come only from ``Special`` pieces. Text that spells one (``<image>``, ``<|assistant|>``) is encoded as
ordinary text, so no caption can start a turn or claim an image.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from data_prep.common.errors import UserError
from data_prep.common.files import RERUN, write_atomic
from data_prep.common.typed_json import Count, check_typed, parse_object, read_bytes
from data_prep.text.encoding import Encoded, Ids, Markers, PieceEncoder
from data_prep.text.template import EOS, Piece

if TYPE_CHECKING:
    import tokenizers

PAD = "<pad>"
IMAGE_TOKEN = "<image>"
META = "mma_tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files copied beside a Hugging Face tokenizer so that other libraries can load the saved folder."""


class _Backend(ABC):
    """Operations that differ between the two kinds of tokenizer."""

    filename: str

    @abstractmethod
    def payload(self) -> bytes:
        """Return the content of the saved file."""

    @abstractmethod
    def size(self) -> int:
        """Return the number of ids, including added ones."""

    @abstractmethod
    def find(self, name: str) -> int | None:
        """Return the id of a token by its exact name, or None."""

    @abstractmethod
    def own(self, role: str) -> str | None:
        """Return the name of the tokenizer's own ``eos`` or ``pad`` token, or None. Raises UserError for plain text."""

    @abstractmethod
    def reserved(self) -> Mapping[int, str]:
        """Return id -> name of the tokens that text must never encode to."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Encode text without adding any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids that hold no reserved token."""

    def strips_after(self, name: str) -> bool:
        """Return whether white space after a special token is dropped (as Phi-3 does)."""
        return False


class _HuggingFace(_Backend):
    filename = "tokenizer.json"

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], specials: Sequence[str]) -> None:
        from tokenizers import AddedToken

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches of one gain nothing from threads
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self._tokenizer, self._config = tokenizer, config
        added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        missing = [name for name in specials if name not in added or not added[name].special]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])
        self._added = tokenizer.get_added_tokens_decoder()
        self._stripping = {token.content for token in self._added.values() if token.rstrip}

    def payload(self) -> bytes:
        return str(self._tokenizer.to_str(pretty=True)).encode()

    def size(self) -> int:
        return int(max(self._tokenizer.get_vocab(with_added_tokens=True).values())) + 1

    def find(self, name: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(name)
        return found

    def own(self, role: str) -> str | None:
        token = self._config.get(f"{role}_token")
        name = token.get("content") if isinstance(token, dict) else token
        if not isinstance(name, str) or self.find(name) is None:
            return None
        if name not in {token.content for token in self._added.values()}:
            raise UserError(
                f"tokenizer: its {role}_token {name!r} is ordinary text, which would be removed from every sample: set "
                "one of the added_tokens of tokenizer.json in tokenizer_config.json"
            )
        return name

    def reserved(self) -> Mapping[int, str]:
        return {index: token.content for index, token in self._added.items() if token.special}

    def encode(self, text: str) -> Ids:
        (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)  # fast: no offsets
        return np.array(encoded.ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def strips_after(self, name: str) -> bool:
        return name in self._stripping


class _SentencePiece(_Backend):
    filename = "tokenizer.model"

    def __init__(self, model: bytes, specials: Sequence[str]) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        absent = [name for name in specials if self._inside(name) is None]
        first = self._processor.get_piece_size()
        self._appended = {name: first + offset for offset, name in enumerate(absent)}

    def _inside(self, name: str) -> int | None:
        index = int(self._processor.piece_to_id(name))
        return None if index == self._processor.unk_id() else index

    def payload(self) -> bytes:
        return self._model

    def size(self) -> int:
        return int(self._processor.get_piece_size()) + len(self._appended)

    def find(self, name: str) -> int | None:
        return self._appended.get(name, self._inside(name))

    def own(self, role: str) -> str | None:
        index = self._processor.eos_id() if role == "eos" else self._processor.pad_id()
        return None if index < 0 else str(self._processor.id_to_piece(index))

    def reserved(self) -> Mapping[int, str]:
        size = self._processor.get_piece_size()
        control = {
            index: self._processor.id_to_piece(index) for index in range(size) if self._processor.IsControl(index)
        }
        return {**control, **{index: name for name, index in self._appended.items()}}

    def encode(self, text: str) -> Ids:
        return np.array(self._processor.encode(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))


class Tokenizer:
    """Encodes pieces to ids with sidecars and decodes ids. Create with ``open`` (raw files) or ``load`` (saved)."""

    def __init__(self, backend: _Backend, tokens: Mapping[str, int], companions: Mapping[str, bytes]) -> None:
        self._backend = backend
        self._tokens = dict(tokens)
        self._companions = dict(companions)
        self._size = backend.size()
        self._reserved = {**{index: name for name, index in tokens.items()}, **backend.reserved()}
        self.pad_id = self._tokens[PAD]
        self.image_id = self._tokens[IMAGE_TOKEN]
        stripping = tuple(name for name in tokens if backend.strips_after(name))
        self.markers = Markers(self._tokens, self._reserved, self.image_id, self._size, stripping)
        self._encoder = PieceEncoder(backend.encode, self.markers)

    @classmethod
    def open(cls, path: Path, specials: Sequence[str], image_token: str = IMAGE_TOKEN) -> Tokenizer:
        """Open raw tokenizer files; add those of ``specials``, ``<pad>``, ``<eos>`` and ``<image>`` that are missing.

        Args:
            path: a folder with ``tokenizer.json`` or ``tokenizer.model``, or one such file.
            specials: names of the special tokens that templates write.
            image_token: the tokenizer's name of the token at image positions.

        Raises:
            UserError: ``path`` holds no tokenizer, or it cannot be read.
        """
        file = _tokenizer_file(path)
        companions = {name: (file.parent / name).read_bytes() for name in COMPANIONS if (file.parent / name).is_file()}
        probe = _backend(file, companions, ())
        names = {**{name: name for name in specials}, IMAGE_TOKEN: image_token}
        names |= {alias: probe.own(role) or alias for alias, role in ((EOS, "eos"), (PAD, "pad"))}
        if image_token in (names[EOS], names[PAD]):
            raise UserError(f"tokenizer: {path} uses {image_token} as its eos or pad token: use another token for that")
        backend = _backend(file, companions, sorted(set(names.values())))
        tokens = {alias: index for alias, name in names.items() if (index := backend.find(name)) is not None}
        assert tokens.keys() == names.keys()
        return cls(backend, dict(sorted(tokens.items())), companions if isinstance(backend, _HuggingFace) else {})

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Load a folder written by ``save``. Raises UserError if it is missing or malformed."""
        folder = Path(directory)
        if not (folder / META).is_file():
            raise UserError(
                f"{folder}: not a tokenizer folder written by mma-prep ({META} is missing); run mma-prep again"
            )
        tokens = _read_tokens(folder / META)
        file = _tokenizer_file(folder)
        companions = {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
        probe = _backend(file, companions, ())
        if max(tokens.values()) >= probe.size() + len(tokens):
            raise UserError(f"{folder / META}: malformed (an id is outside the vocabulary); {RERUN}")
        appended = sorted((index, name) for name, index in tokens.items() if index >= probe.size())
        return cls(_backend(file, companions, [name for _, name in appended]), tokens, companions)

    def save(self, directory: Path) -> None:
        """Write the tokenizer to a folder, each file atomically; remove files of a previous tokenizer."""
        files = self._files()
        for name in {_HuggingFace.filename, _SentencePiece.filename, *COMPANIONS} - files.keys():
            (directory / name).unlink(missing_ok=True)
        for name, data in files.items():
            path = directory / name
            if not path.is_file() or path.read_bytes() != data:
                write_atomic(path, data)

    @property
    def sha256(self) -> str:
        """Hash of everything that determines ids: the tokenizer file and the special-token table."""
        files = self._files()
        return hashlib.sha256(files[self._backend.filename] + files[META]).hexdigest()

    @property
    def payload(self) -> tuple[str, bytes]:
        """Name and content of the tokenizer file, ``tokenizer.json`` or ``tokenizer.model``."""
        return self._backend.filename, self._backend.payload()

    def __len__(self) -> int:
        """Number of embedding rows the ids need."""
        return self._size

    def is_special(self, index: int) -> bool:
        """Return whether an id is a special token; ordinary text never encodes to one."""
        return index in self._reserved

    def id_of(self, token: str) -> int:
        """Return the id of a special token by its name in templates. Raises UserError if it was never added."""
        return self._encoder.id_of(token)

    def encode(self, pieces: Iterable[Piece], image_tokens: int | Sequence[int]) -> Encoded:
        """Return ids and sidecars of pieces; see :meth:`PieceEncoder.encode`."""
        return self._encoder.encode(pieces, image_tokens)

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Return the text of ids; special tokens appear by name if ``specials``, else they are dropped."""
        words: list[str] = []
        for special, run in groupby(ids, key=lambda index: int(index) in self._reserved):
            if not special:
                words.append(self._backend.decode([int(index) for index in run]))
            elif specials:
                words += [self._reserved[int(index)] for index in run]
        return "".join(words)

    def _files(self) -> dict[str, bytes]:
        meta = json.dumps({"tokens": self._tokens}, indent=1, sort_keys=True).encode() + b"\n"
        return {self._backend.filename: self._backend.payload(), META: meta, **self._companions}


def _read_tokens(path: Path) -> dict[str, int]:
    """Return the ids of special tokens by name. Raises UserError if the table is malformed."""
    raw = parse_object(read_bytes(path, RERUN), path, RERUN)
    tokens: dict[str, int] = check_typed(_tokens_type(), raw.get("tokens"), path, RERUN)
    for name in (PAD, IMAGE_TOKEN):
        if name not in tokens:
            raise UserError(f"{path}: malformed (it has no id of {name}); {RERUN}")
    return tokens


@functools.cache
def _tokens_type() -> TypeAdapter[dict[str, Count]]:
    return TypeAdapter(dict[str, Count])


def _tokenizer_file(path: Path) -> Path:
    candidates = [path] if path.is_file() else [path / "tokenizer.json", path / "tokenizer.model"]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".json", ".model"):
            return candidate
    raise UserError(
        f"tokenizer: {path} holds neither tokenizer.json nor tokenizer.model; give the folder of a tokenizer"
    )


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files that ``Tokenizer.open`` reads. Raises UserError if there is no tokenizer."""
    file = _tokenizer_file(path)
    return [file, *(file.parent / name for name in COMPANIONS if (file.parent / name).is_file())]


def _backend(file: Path, companions: Mapping[str, bytes], specials: Sequence[str]) -> _Backend:
    try:
        if file.suffix == ".model":
            return _SentencePiece(file.read_bytes(), specials)
        import tokenizers

        config = json.loads(companions.get("tokenizer_config.json", b"{}"))
        return _HuggingFace(tokenizers.Tokenizer.from_file(str(file)), config, specials)
    except Exception as error:  # both libraries raise plain Exception and RuntimeError on damaged files
        raise UserError(f"tokenizer: {file} cannot be read ({error})") from error


def train_sentencepiece(texts: Iterable[str], vocab_size: int, specials: Sequence[str], out: Path) -> None:
    """Train a byte-pair model on ``texts`` and write it to the file ``out``; deterministic to the byte.

    Args:
        texts: training texts, split at line breaks.
        vocab_size: largest number of pieces, including special tokens and the 256 byte pieces.
        specials: names that become control symbols, to which text never encodes.
        out: path of the model file, replaced atomically.

    Raises:
        UserError: there is no text, or ``vocab_size`` is too small for its characters.
    """
    from sentencepiece import SentencePieceTrainer

    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError("tokenizer.train: the corpora hold no text to train on; fix their paths")
    model = io.BytesIO()
    symbols = [name for name in dict.fromkeys((*specials, PAD, IMAGE_TOKEN)) if name not in (EOS, PAD)]
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",  # learns whole frequent words; unigram falls back to letters with small vocabularies
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",  # lossless: decoding returns the text
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 16,
            num_threads=1,
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=2,
            eos_piece=EOS,
            pad_piece=PAD,
            control_symbols=symbols,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"tokenizer.train.vocab_size={vocab_size}: SentencePiece failed ({reason}); raise it"
        ) from error
    write_atomic(out, model.getvalue())
