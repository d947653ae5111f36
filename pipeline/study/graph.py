"""The runs of a study, and what each of them needs: pure, from the study file and the rates chosen so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.config.flags import flag_name
from pipeline.study.spec import Settings, Study

Kind = Literal["stages", "tuning", "final"]


@dataclass(frozen=True)
class Run:
    """One training run. Its folder is ``OUT/KIND/NAME``."""

    kind: Kind
    """stages: of several arms, or before an arm's last one; tuning: tries a rate; final: reported."""
    label: str
    stage: str
    arm: str
    """The arm it belongs to; empty for a stage that arms share."""
    seed: int
    settings: tuple[tuple[str, object], ...]
    """Dotted keys and values, later ones win."""
    after: str = ""
    """Name of the run whose weights it starts from."""
    lr: float | None = None
    """Its rate, if the study sets it."""

    @property
    def name(self) -> str:
        """Its folder below the study's."""
        return f"{self.kind}/{self.label}"

    def words(self) -> list[str]:
        """Return its flags of ``mma train``, without folders and length."""
        merged = dict(self.settings)
        return [word for key, value in merged.items() for word in (flag_name(key), as_word(value))]


def as_word(value: object) -> str:
    """Return a value as a flag takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def runs_of(study: Study, chosen: Mapping[str, float | None]) -> list[Run]:
    """Return all runs that are known by now, each after the one it needs.

    ``chosen`` has the rate of each arm whose rate is known (None = the recipe's): its final runs are among the result.
    """
    found: dict[str, Run] = {}
    for run in (*_tuning(study), *_final(study, chosen)):
        found.setdefault(run.name, run)
    return list(found.values())


def _tuning(study: Study) -> Iterator[Run]:
    tuning = study.tuning
    if len(tuning.lr) < 2:
        return
    for seed in tuning.seeds:
        for arm in study.arms:
            for lr in tuning.lr:
                yield from _chain(study, "tuning", arm, seed, lr, f"{arm}-lr{lr:g}-s{seed}")


def _final(study: Study, chosen: Mapping[str, float | None]) -> Iterator[Run]:
    for seed in study.seeds:
        for arm in study.arms:
            if arm in chosen:
                yield from _chain(study, "final", arm, seed, chosen[arm], f"{arm}-s{seed}")


def _chain(study: Study, kind: Kind, arm: str, seed: int, lr: float | None, label: str) -> Iterator[Run]:
    """Yield the stages before an arm's last one, then that one."""
    spec, last = study.arms[arm], study.last_stage(arm)
    chain = [last]
    while before := study.stages[chain[0]].after:
        chain.insert(0, before)
    after = ""
    for stage in chain[:-1]:
        own = f"{arm}." if spec.set_all else ""
        run = Run(
            "stages", f"{own}{stage}-s{seed}", stage, arm if own else "", seed,
            _settings(study, stage, seed, spec.set_all), after,
        )  # fmt: skip
        yield run
        after = run.name
    rate: Settings = {} if lr is None else {"train.lr": lr}
    yield Run(kind, label, last, arm, seed, _settings(study, last, seed, spec.set_all, spec.set, rate), after, lr)


def _settings(study: Study, stage: str, seed: int, *more: Settings) -> tuple[tuple[str, object], ...]:
    merged = {key: value for part in (study.flags, study.stages[stage].set, *more) for key, value in part.items()}
    return (*merged.items(), ("train.seed", seed))
