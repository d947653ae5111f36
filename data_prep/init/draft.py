"""The recipe that ``mma-prep init`` writes: plain YAML with a comment on what is worth changing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Draft:
    """Everything a recipe says."""

    command: str
    """How it was written, for its first line."""
    root: str
    out: str
    tokenizer: str
    """Path, or empty to train one."""
    vocab_size: int
    image_tokens: int
    corpora: Mapping[str, Mapping[str, Any]]
    comments: Mapping[str, str]
    """Corpus -> what it was taken for."""
    training: Sequence[str]
    """Corpora that are trained on."""
    evaluation: Sequence[str]
    """Corpora that are held out; may be empty."""
    pack: str
    """Name of the pack set that is trained on."""
    template: str
    seq_len: int
    longest: int
    """Tokens of the longest sample that was seen."""
    too_long: str = "reject"
    max_bad_fraction: float = 0.02
    bad: str = ""
    """What was rejected among the samples seen, where that is more than the usual fraction."""

    def text(self) -> str:
        """Return the recipe as YAML."""
        return "\n".join([*self._head(), "", *self._corpora(), "", *self._packs()]) + "\n"

    def _head(self) -> Iterator[str]:
        yield f"# Written by `{self.command}`."
        yield "# Options of a corpus type: mma-prep types TYPE. Rows in the end: mma-prep inspect OUT/packs/NAME"
        yield f"root: {_scalar(self.root)}  # raw data; all paths below are relative to it"
        yield f"out: {_scalar(self.out)}"
        if self.tokenizer:
            yield f"tokenizer: {_scalar(self.tokenizer)}"
        else:
            yield "tokenizer:  # trained on the corpora; for a pretrained language model: tokenizer: PATH"
            yield f"  train: {{vocab_size: {self.vocab_size}}}"
        yield f"image_tokens: {self.image_tokens}  # tokens per image; the model's connector must produce as many"
        seen = f"; {self.bad}" if self.bad else ""
        yield f"max_bad_fraction: {self.max_bad_fraction}  # share of unusable samples above which the job fails{seen}"

    def _corpora(self) -> Iterator[str]:
        yield "corpora:"
        for name, settings in self.corpora.items():
            yield f"  {_scalar(name)}:  # {self.comments[name]}"
            for key, value in settings.items():
                yield f"    {key}: {_scalar(value)}"

    def _packs(self) -> Iterator[str]:
        yield "packs:"
        yield from self._pack(self.pack, self.training, f"the longest sample seen has {self.longest} tokens")
        yield "    epochs: 1  # or draws: N, with a weight for each corpus"
        if self.evaluation:
            yield from self._pack("eval", self.evaluation, "held out")
            yield "    epochs: 1"
            yield "    shuffle: false"

    def _pack(self, name: str, corpora: Sequence[str], comment: str) -> Iterator[str]:
        yield f"  {name}:"
        yield f"    corpora: {_scalar(list(corpora))}"
        yield f"    template: {self.template}"
        yield f"    seq_len: {self.seq_len}  # {comment}; other lengths: mma-prep plan FILE --suggest-seq-len"
        if self.too_long != "reject":
            yield f"    too_long: {self.too_long}  # instead of rejecting samples longer than seq_len"


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
