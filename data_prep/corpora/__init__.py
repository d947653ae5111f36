"""Readers of raw corpora: one file per format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.validation import problems
from data_prep.corpora.aokvqa import AOKVQA
from data_prep.corpora.base import Corpus, Input
from data_prep.corpora.captions import Captions
from data_prep.corpora.chat import Chat
from data_prep.corpora.gqa import GQA
from data_prep.corpora.interleaved import Interleaved
from data_prep.corpora.llava import LLaVA
from data_prep.corpora.nlvr import NLVR
from data_prep.corpora.ocrvqa import OCRVQA
from data_prep.corpora.refcoco import RefCOCO
from data_prep.corpora.scienceqa import ScienceQA
from data_prep.corpora.visual_genome import VisualGenome
from data_prep.corpora.vqav2 import VQAv2
from data_prep.corpora.vsr import VSR
from data_prep.corpora.webdataset import WebDataset

__all__ = ["CORPORA", "Corpus", "build_corpus", "with_parity"]

CORPORA: Mapping[str, type[Corpus]] = MappingProxyType(
    {
        "aokvqa": AOKVQA,
        "captions": Captions,
        "chat": Chat,
        "gqa": GQA,
        "interleaved": Interleaved,
        "llava": LLaVA,
        "nlvr": NLVR,
        "ocrvqa": OCRVQA,
        "refcoco": RefCOCO,
        "scienceqa": ScienceQA,
        "visual_genome": VisualGenome,
        "vqav2": VQAv2,
        "vsr": VSR,
        "webdataset": WebDataset,
    }
)
"""Corpus ``type`` of a recipe -> its reader."""


def build_corpus(kind: str, options: Mapping[str, Any], root: Path) -> Corpus:
    """Return the reader of a corpus whose raw files lie under ``root``.

    Raises:
        UserError: ``kind`` or an option is unknown, an option has a wrong value, or a raw file is missing.
    """
    if kind not in CORPORA:
        raise UserError(f"unknown corpus type '{kind}'{did_you_mean(kind, CORPORA)}; known: {', '.join(CORPORA)}")
    reader = CORPORA[kind]
    known = [name for name in reader.model_fields if name != "root"]
    for name in options:
        if name not in known:
            raise UserError(f"{kind}.{name}: unknown option{did_you_mean(name, known)}; known: {', '.join(known)}")
    try:
        corpus = reader(root=root, **options)
    except ValidationError as problem:
        raise UserError("; ".join(problems(problem, within=kind))) from None
    _check_inputs(kind, corpus)
    return corpus


def with_parity(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a corpus with the prompts of the released AKI, where its reader has them."""
    known = "aki_parity" in CORPORA[kind].model_fields
    return {**options, "aki_parity": True} if known and "aki_parity" not in options else dict(options)


def _check_inputs(kind: str, corpus: Corpus) -> None:
    for name, (what, path) in corpus.inputs().items():
        if not (path.is_file() if what is Input.FILE else path.is_dir()):
            raise UserError(f"{kind}.{name}: {what.value} {path} does not exist; set '{name}' or the recipe's root")
    corpus.files()
