"""Readers of raw corpora: one file per format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.plugins import Registry, must_subclass
from data_prep.common.validation import problems
from data_prep.corpora.aokvqa import AOKVQA
from data_prep.corpora.base import Corpus, Input
from data_prep.corpora.captions import Captions
from data_prep.corpora.chat import Chat
from data_prep.corpora.gqa import GQA
from data_prep.corpora.hold_out import HoldOut
from data_prep.corpora.image_folder import ImageFolder
from data_prep.corpora.interleaved import Interleaved
from data_prep.corpora.llava import LLaVA
from data_prep.corpora.nlvr import NLVR
from data_prep.corpora.ocrvqa import OCRVQA
from data_prep.corpora.refcoco import RefCOCO
from data_prep.corpora.scienceqa import ScienceQA
from data_prep.corpora.table import Table
from data_prep.corpora.visual_genome import VisualGenome
from data_prep.corpora.vqav2 import VQAv2
from data_prep.corpora.vsr import VSR
from data_prep.corpora.webdataset import WebDataset

__all__ = ["COMMON_OPTIONS", "CORPORA", "Corpus", "HoldOut", "build_corpus", "corpus_problems", "with_parity"]

CORPORA: Registry[type[Corpus]] = Registry(
    "mma.corpora",
    "corpus type",
    {
        "aokvqa": AOKVQA,
        "captions": Captions,
        "chat": Chat,
        "gqa": GQA,
        "image_folder": ImageFolder,
        "interleaved": Interleaved,
        "llava": LLaVA,
        "nlvr": NLVR,
        "ocrvqa": OCRVQA,
        "refcoco": RefCOCO,
        "scienceqa": ScienceQA,
        "table": Table,
        "visual_genome": VisualGenome,
        "vqav2": VQAv2,
        "vsr": VSR,
        "webdataset": WebDataset,
    },
    must_subclass(Corpus),  # type: ignore[type-abstract]  # its subclasses are not
)
"""Corpus ``type`` of a recipe -> its reader."""


COMMON_OPTIONS = ("hold_out", "part")
"""Options of every corpus (``data_prep.corpora.hold_out``)."""


def build_corpus(kind: str, options: Mapping[str, Any], root: Path) -> Corpus:
    """Return the reader of a corpus whose raw files lie under ``root``.

    Raises:
        UserError: ``kind`` or an option is unknown, an option has a wrong value, or a raw file is missing.
    """
    corpus, lines = _validate(kind, options, root)
    if corpus is None or lines:
        raise UserError("; ".join(lines))
    lines = _missing_inputs(kind, corpus)
    if lines:
        raise UserError("; ".join(lines))
    corpus.files()
    return corpus


def corpus_problems(kind: str, options: Mapping[str, Any], root: Path, *, check_files: bool) -> list[str]:
    """Return everything that is wrong with the type and the options of a corpus and, if asked, with its raw files."""
    corpus, lines = _validate(kind, options, root)
    if corpus is None or not check_files:
        return lines
    lines += _missing_inputs(kind, corpus)
    if not lines:
        try:
            corpus.check_files()
        except UserError as problem:
            lines.append(str(problem))
    return lines


def _validate(kind: str, options: Mapping[str, Any], root: Path) -> tuple[Corpus | None, list[str]]:
    """Return the reader, if its options are valid, and what is wrong with them."""
    if kind not in CORPORA:
        return None, [f"unknown corpus type '{kind}'{did_you_mean(kind, CORPORA)}; known: {', '.join(CORPORA)}"]
    reader = CORPORA[kind]
    known = [name for name in reader.model_fields if name != "root"]
    common = {name: options[name] for name in COMMON_OPTIONS if name in options and name not in known}
    own = {name: value for name, value in options.items() if name not in common}
    lines = [
        f"{kind}.{name}: unknown option{did_you_mean(name, [*known, *COMMON_OPTIONS])}; known: {', '.join(known)}"
        for name in own
        if name not in known
    ]
    try:
        corpus: Corpus = reader(root=root, **{name: value for name, value in own.items() if name in known})
        if common:
            corpus = HoldOut(root=root, whole=corpus, **common)
    except ValidationError as problem:
        return None, [*lines, *problems(problem, within=kind)]
    return corpus, lines


def _missing_inputs(kind: str, corpus: Corpus) -> list[str]:
    return [
        f"{kind}.{name}: {what.value} {path} does not exist; set '{name}' or the recipe's root"
        for name, (what, path) in corpus.inputs().items()
        if not (path.is_file() if what is Input.FILE else path.is_dir())
    ]


def with_parity(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a corpus with the prompts of the released AKI, where its reader has them."""
    known = "aki_parity" in CORPORA[kind].model_fields
    return {**options, "aki_parity": True} if known and "aki_parity" not in options else dict(options)
