"""Which parameters of a model a run trains, and at which learning rate: ``train.freeze`` and ``train.lr_of``.

A pattern names a part (``vision``, ``connector``, ``llm``), a module (``model.layers.3``) or parameters, by their
global names (see `pipeline.model.stage`); ``*`` stands for any characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate

from data_prep.common.errors import did_you_mean
from pipeline.config.schema import ConfigError, TrainSection
from pipeline.model.lora import is_adapter
from pipeline.model.spec import ModelSpec

PARTS: Mapping[str, tuple[str, ...]] = {
    "vision": ("vision", "extra_vision"), "connector": ("connector",), "llm": ("model", "lm_head"),
}  # fmt: skip
"""Part -> the first words of its parameters' names."""
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to."""
    return next(part for part, roots in PARTS.items() if name.partition(".")[0] in roots)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter, a module that holds it, or its part."""
    return pattern == part_of(name) or any(fnmatchcase(each, pattern) for each in _names_of(name))


def _names_of(name: str) -> Iterable[str]:
    """Return ``a``, ``a.b`` and ``a.b.c`` of a parameter ``a.b.c``."""
    return accumulate(name.split("."), "{}.{}".format)


@dataclass(frozen=True)
class Trainable:
    """The rule; the same on every rank, whatever stage a parameter is on."""

    tied: bool = False
    """The head is the embedding: one weight under two names."""
    vision_frozen: bool = True
    unread: tuple[str, ...] = ()
    """Units of the tower whose output nothing reads."""
    lora: bool = False
    """Decoder and tower train nothing but their adapters."""
    freeze: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    """(pattern, peak learning rate); the last that matches counts."""
    lr: float = 1.0
    """Peak learning rate of everything else."""

    @classmethod
    def of(cls, spec: ModelSpec, train: TrainSection, names: Iterable[str]) -> Trainable:
        """Return the rule of a run, checked against the names of all parameters.

        Raises ConfigError for a pattern without effect, and when nothing is trained.
        """
        everything = cls.everything_of(spec)
        rates = tuple(train.lr_of.items())
        rule = replace(everything, freeze=tuple(train.freeze), rates=rates, lr=train.lr)
        every = list(names)
        for pattern in rule.freeze:
            _check_matches("train.freeze", pattern, every)
        trained = [name for name in every if rule.trains(name)]
        for pattern, _ in rule.rates:
            _check_matches("train.lr_of", pattern, every)
            if not any(matches(pattern, name) for name in trained):
                hint = ": set model.vision.frozen to false" if pattern == "vision" and rule.vision_frozen else ""
                raise ConfigError(
                    f"train.lr_of: everything that '{pattern}' names is frozen{hint or ': unfreeze it'}, or remove it"
                )
        if not trained:
            raise ConfigError(
                f"train.freeze={', '.join(rule.freeze)} leaves nothing to train: remove one of them"
            )  # fmt: skip
        return rule

    @classmethod
    def everything_of(cls, spec: ModelSpec) -> Trainable:
        """Return the rule without ``train.freeze``: everything trains but a frozen tower."""
        return cls(spec.tied, spec.vision_frozen, spec.unread, spec.lora is not None)

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained."""
        name = self._own_name(name)
        part = part_of(name)
        if not is_adapter(name) and ((self.vision_frozen and part == "vision") or (self.lora and part != "connector")):
            return False
        if any(name.startswith(f"{unit}.") for unit in self.unread):
            return False
        return not any(matches(pattern, name) for pattern in self.freeze)

    def label(self, name: str) -> str:
        """Return what a trained parameter's learning rate is called: its pattern in ``lr_of``, else its part."""
        name = self._own_name(name)
        return next((pattern for pattern, _ in reversed(self.rates) if matches(pattern, name)), part_of(name))

    def scale(self, label: str) -> float:
        """Return the learning rate of a label as a multiple of ``train.lr``."""
        return dict(self.rates).get(label, self.lr) / self.lr

    def scales(self, names: Iterable[str]) -> dict[str, float]:
        """Return label -> multiple of ``train.lr`` of all parameters that train, in order of the model."""
        labels = dict.fromkeys(self.label(name) for name in names if self.trains(name))
        return {label: self.scale(label) for label in labels}

    def _own_name(self, name: str) -> str:
        return _EMBEDDING if self.tied and name == _HEAD else name


def _check_matches(key: str, pattern: str, names: list[str]) -> None:
    if any(matches(pattern, name) for name in names):
        return
    known = dict.fromkeys([*PARTS, *(each for name in names for each in _names_of(name))])
    raise ConfigError(
        f"{key}: '{pattern}' matches no parameter{did_you_mean(pattern, known)}; parts: {', '.join(PARTS)}"
    )
