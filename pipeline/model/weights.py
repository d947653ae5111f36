"""Pretrained weights, read from safetensors one tensor at a time by global name.

A source is a Hugging Face model folder (a language model, a vision tower, or a whole vision-language model) or an
export of this project, which holds every part. Names and shapes are checked when the source is opened, before anything
is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_prep.common.errors import UserError, one_line
from pipeline.attention.gate import is_gate
from pipeline.model.export_names import exported_name, is_spare, layout_in, layout_of
from pipeline.model.families.llm import Piece
from pipeline.model.limits import read_bounded
from pipeline.model.lora import adapter_shapes
from pipeline.model.spec import ModelSpec
from pipeline.model.towers import Tower

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("F32", "F16", "BF16", "F64")
"""Dtypes of weights that are read; integers and 8-bit floats are quantized, and meaningless without their scales."""
_MAX_NAME = 255  # no file system has a longer one; Path.is_file would raise
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class TensorFolder:
    """The tensors of one folder of safetensors files, sharded or single."""

    def __init__(self, directory: Path | str) -> None:
        """Read the index. Raises UserError if the folder has no safetensors, or its index points outside the folder."""
        self.directory = Path(directory)
        self._handles: dict[Path, Any] = {}
        self.files = self._index()
        """Tensor name -> file."""

    def _index(self) -> dict[str, Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            return {key: self._inside(name) for key, name in _weight_map(index).items()}
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        if any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt*")):
            raise UserError(
                f"{self.directory} holds only pickled weights, which are never read because they can run code: "
                "convert them with save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{self.directory} holds neither {SINGLE} nor {INDEX}: give a folder with safetensors weights")

    def _inside(self, name: str) -> Path:
        path = self.directory / name
        if len(name) > _MAX_NAME or Path(name).name != name or not path.is_file():
            raise UserError(
                f"{self.directory / INDEX} lists {name!r}, which is not a file of the folder: copy it again"
            )
        return path

    def describe(self, key: str) -> tuple[tuple[int, ...], str]:
        """Return a tensor's shape and its dtype in safetensors' words (``BF16``), without reading its values.

        Raises UserError when the file that the index names does not hold it.
        """
        try:
            found = self._open(self.files[key]).get_slice(key)
            return tuple(found.get_shape()), str(found.get_dtype())
        except SafetensorError as error:
            raise UserError(f"{self.files[key]} does not hold {key}, as {INDEX} says: copy the folder again") from error

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor on the CPU, in the dtype it was saved in."""
        tensor: torch.Tensor = self._open(self.files[key]).get_tensor(key)
        return tensor

    def close(self) -> None:
        """Unmap the files; the next read reopens its own. Pages already read may stay in the page cache."""
        self._handles.clear()

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}): copy it again") from error
        return self._handles[path]


class WeightSource:
    """The origin of each parameter by global name; parts without a folder are absent and start from scratch."""

    def __init__(self) -> None:
        """Start empty; see :meth:`open` and :meth:`open_export`."""
        self._where: dict[str, tuple[TensorFolder, Piece]] = {}
        self.unused: dict[Path, int] = {}
        """Tensors of each folder that the model does not read, such as the text half of a CLIP model."""
        self.short_vocabulary: dict[Path, int] = {}
        """Rows of the vocabulary that each folder lacks; they start at the mean of its rows."""

    @classmethod
    def open(cls, spec: ModelSpec) -> WeightSource | None:
        """Open the folders named by a spec; None when everything starts from scratch.

        Raises UserError listing missing or unexpected tensors, or naming a tensor of the wrong shape.
        """
        source = cls()
        if spec.start is not None and spec.start.source:
            source._add_start(spec, TensorFolder(spec.start.source))
        if spec.llm_source:
            source._add_llm(spec, TensorFolder(spec.llm_source))
        for name, tower in spec.towers.items():
            if tower.source:
                source._add_tower(name, tower, TensorFolder(tower.source))
        return source if source._where else None

    @classmethod
    def open_export(cls, spec: ModelSpec, directory: Path | str) -> WeightSource:
        """Open an export of this project as the source of every part. Raises UserError as :meth:`open` does."""
        source, folder = cls(), TensorFolder(directory)
        shapes = dict(global_shapes(spec))
        layout = layout_of(folder.files, spec.start)
        if layout == "vlm":
            source._add_start(spec, folder)
            return source
        if not any(is_gate(key) for key in folder.files):  # trained without gates: new ones start at zero
            shapes = {name: shape for name, shape in shapes.items() if not is_gate(name)}
        found = [key for key in folder.files if not is_spare(key, layout)]
        source._add(folder, shapes, {name: Piece(exported_name(name, layout)) for name in shapes}, found)
        source._share_head(spec)
        return source

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def fill(self, name: str, into: torch.Tensor) -> None:
        """Copy a parameter into ``into``; vocabulary rows that the folder lacks are set to the mean of its rows."""
        folder, (key, part, parts) = self._where[name]
        values = folder.read(key)
        values = values.chunk(parts)[part] if parts > 1 else values
        into[: len(values)].copy_(values) if values.dim() else into.copy_(values)
        if name in _VOCABULARY and len(values) < len(into):
            into[len(values) :] = values.mean(dim=0, dtype=torch.float32).to(into.dtype)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a parameter of that shape in fp32, filled as by :meth:`fill`."""
        values = torch.empty(shape)
        self.fill(name, values)
        return values

    def close(self) -> None:
        """Release the memory of everything read so far; reading remains possible."""
        for folder, _ in self._where.values():
            folder.close()

    def _add_start(self, spec: ModelSpec, folder: TensorFolder) -> None:
        """Add every part from the folder of a vision-language model, in one of its layouts."""
        assert spec.start is not None
        model, tower = spec.start.family, spec.towers["vision"]
        names = layout_in(folder.files, model)
        shapes = {name: shape for name, shape in global_shapes(spec) if not is_gate(name)}
        pieces = {}
        for name in shapes:
            part, _, own = name.partition(".")
            if part == "vision":
                options = [each._replace(key=names.vision + each.key) for each in tower.family.pieces(own)]
            elif part == "connector":
                options = [Piece(names.connector + model.connector_name(own))]
            else:
                options = [*spec.llm_family.pieces(name, names.text)]
            pieces[name] = _first(options, folder)
        used = {piece.key for piece in pieces.values()}
        heads = [each.key for each in spec.llm_family.pieces("lm_head.weight", names.text)] if spec.tied else []
        for key in folder.files.keys() & heads:
            if not torch.equal(folder.read(key), folder.read(pieces[_VOCABULARY[0]].key)):
                raise UserError(
                    f"{folder.directory}: {key} differs from the embedding, but the config ties them: set "
                    "model.llm.config.tie_word_embeddings to false"
                )

        def rightly_unread(key: str) -> bool:
            tower_key = key.removeprefix(names.vision)
            of_tower = tower_key != key and tower.family.unread(tower_key, tower.config)
            return key in heads or key.endswith("inv_freq") or of_tower

        self._add(folder, shapes, pieces, [key for key in folder.files if key in used or not rightly_unread(key)])
        self._share_head(spec)

    def _add_llm(self, spec: ModelSpec, folder: TensorFolder) -> None:
        family = spec.llm_family
        home = next((home for home in family.homes() if any(key.startswith(home) for key in folder.files)), "model.")
        shapes = {
            name: shape
            for name, shape in global_shapes(spec)
            if name.startswith(("model.", "lm_head.")) and not is_gate(name)
        }
        pieces = {name: _first(family.pieces(name, home), folder) for name in shapes}
        spare = [piece.key for piece in family.pieces("lm_head.weight", home)] if spec.tied else []
        found = [key for key in folder.files if not family.unread(key, home) and key not in spare]
        self._add(folder, shapes, pieces, found)
        self._share_head(spec)

    def _share_head(self, spec: ModelSpec) -> None:
        if spec.tied:  # a last stage that is not also the first holds its own copy
            self._where["lm_head.weight"] = self._where["model.embed_tokens.weight"]

    def _add_tower(self, home: str, tower: Tower, folder: TensorFolder) -> None:
        family = tower.family
        shapes = {f"{home}.{own}": tuple(param.shape) for own, param in tower.meta().named_parameters()}
        prefix = next((own for own in family.prefixes if any(key.startswith(own) for key in folder.files)), "")
        pieces = {}
        for name in shapes:
            own = (piece._replace(key=prefix + piece.key) for piece in family.pieces(name.removeprefix(f"{home}.")))
            pieces[name] = _first(own, folder)
        used = {piece.key for piece in pieces.values()}
        found = [
            key for key in folder.files if key in used or not family.unread(key.removeprefix(prefix), tower.config)
        ]
        self._add(folder, shapes, pieces, found)

    def _add(
        self,
        folder: TensorFolder,
        shapes: Mapping[str, tuple[int, ...]],
        pieces: Mapping[str, Piece],
        found: Iterable[str],
    ) -> None:
        keys = {piece.key for piece in pieces.values()}
        missing = sorted(keys - set(folder.files))
        unexpected = sorted(set(found) - keys)
        for fault, names in (("lacks", missing), ("has, but the config does not,", unexpected)):
            if names:
                listed = ", ".join(names[:3] + ["..."] * (len(names) > 3))
                raise UserError(
                    f"{folder.directory} {fault} {len(names)} tensors ({listed}): "
                    "its weights and its config.json belong to different models"
                )
        for name, shape in shapes.items():
            saved = self._check(folder, name, shape, pieces[name])
            self._where[name] = (folder, pieces[name])
            if saved != shape and name == _VOCABULARY[0]:
                self.short_vocabulary[folder.directory] = shape[0] - saved[0]
        if unused := len(folder.files.keys() - keys):
            self.unused[folder.directory] = unused

    @staticmethod
    def _check(folder: TensorFolder, name: str, shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
        """Return the shape of a tensor as saved; refuse one whose dtype or shape is not the model's."""
        saved, dtype = folder.describe(piece.key)
        if dtype not in DTYPES:
            raise UserError(
                f"{folder.directory}: {piece.key} is stored as {dtype}: only {', '.join(DTYPES)} can be read, "
                "give weights that are not quantized"
            )
        whole = (shape[0] * piece.parts, *shape[1:]) if shape else shape
        shorter = name in _VOCABULARY and saved[:1] <= whole[:1] and saved[1:] == whole[1:]
        if saved != whole and not shorter:
            raise UserError(
                f"{folder.directory}: {piece.key} has shape {list(saved)}, but the config asks for {list(whole)}"
            )
        return saved


def _first(pieces: Iterable[Piece], folder: TensorFolder) -> Piece:
    """Return the first piece whose tensor the folder has; without any, the likeliest, which will be named missing."""
    listed = list(pieces)
    return next((piece for piece in listed if piece.key in folder.files), listed[0])


def global_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (global name, shape) of every parameter of the whole model; a tied head is omitted."""
    decoder = spec.llm_family.parts(spec.meta_llm()).named()
    parts: tuple[tuple[str, Any], ...] = (
        *((name, tower.meta()) for name, tower in spec.towers.items()),
        ("connector", spec.meta_connector()),
        *((name, module) for name, module in decoder if not (spec.tied and name == "lm_head")),
    )
    for prefix, module in parts:
        yield from ((f"{prefix}.{name}", tuple(param.shape)) for name, param in module.named_parameters())


def parameter_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (global name, shape) of every parameter that a run has, those of adapters too."""
    shapes = dict(global_shapes(spec))
    yield from shapes.items()
    yield from adapter_shapes(spec.lora, shapes)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(key): str(name) for key, name in json.loads(read_bounded(index))["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({one_line(error)}): copy the folder again") from error
