"""A study file: arms, seeds, stages, budgets and held-out data, as strictly typed YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.validation import problems, report
from data_prep.common.yaml_files import expand, read_mapping
from pipeline.config.schema import NonNegative, Positive, Rate, Section

STUDIES = Path(__file__).parent / "studies"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
Settings = dict[str, str | int | float | bool | list[str]]
"""Dotted keys of a recipe and their values, as flags of `mma train`."""


class Preparation(Section):
    """A command that makes data."""

    run: str
    """An `mma-prep` command line; no shell reads it."""
    makes: str
    """A file or folder: the command is skipped where it exists."""


class StageSpec(Section):
    """One training run of a chain, such as PT or SFT."""

    recipe: str
    """Shipped recipe or YAML file."""
    after: str = ""
    """The stage whose weights it starts from; empty = from scratch."""
    tokens: NonNegative = 0
    """Budget in packed tokens, from which the steps follow; 0 = as the recipe says."""
    set: Settings = Field(default_factory=dict)
    """Flags of this stage in all arms."""


class ArmSpec(Section):
    """One condition of the study."""

    about: str = ""
    """What it is, in a few words."""
    stage: str = ""
    """Its last stage; empty = the last one of the study."""
    set: Settings = Field(default_factory=dict)
    """Flags of its last stage."""
    set_all: Settings = Field(default_factory=dict)
    """Flags of all of its stages, which it then shares with no other arm."""
    validation: str = ""
    """Held-out packs of its own, with the samples of the study's, such as text before images."""
    test: str = ""
    """The same for the test."""


class TuningSpec(Section):
    """The learning rate of each arm's last stage, chosen on the validation rows by seeds that are not reported."""

    lr: list[Rate] = Field(default_factory=list)
    """Rates to try; one = used as it is, none = the recipe's."""
    seeds: list[NonNegative] = Field(default_factory=list)
    """Seeds of the trials, none of them among the study's."""
    metric: Literal["teacher_forced_accuracy", "loss"] = "teacher_forced_accuracy"
    """What decides, as its mean over the trials' last evaluations."""


class HeldOutSpec(Section):
    """What is held out: rows that choose the learning rate, and questions that are reported."""

    validation: str
    """Pack folder of the evaluations during training."""
    test: str
    """Pack folder of the reported answers; may be that of the validation."""
    validation_samples: NonNegative = 0
    """Samples of the validation, in whole rows; 0 = all. In the folder of the test, the test leaves these rows out."""
    test_samples: NonNegative = 0
    """Questions of the test; 0 = all."""
    evaluations: Positive = 8
    """Evaluations of a run: the points of its learning curve."""


class MeasureSpec(Section):
    """One way to ask the trained models of all arms."""

    policy: str = ""
    """Mask policy at inference; empty = the one of training."""
    adaptive_flow: bool = False
    """Cut what text reads of the images, see docs/masks.md."""


class Study(Section):
    """A study: every arm is trained with every seed, and compared with the baseline seed by seed."""

    out: str
    """Folder of its runs and reports."""
    about: str = ""
    """The question it asks."""
    prepare: list[Preparation] = Field(default_factory=list)
    """Commands that make the data, in order."""
    ranks: Positive = 1
    """Ranks of each run, on one node."""
    flags: Settings = Field(default_factory=dict)
    """Flags of all runs."""
    stages: dict[Name, StageSpec]
    """Stages by name; a stage follows those above it."""
    arms: dict[Name, ArmSpec]
    """Arms by name."""
    baseline: str
    """The arm that all others are compared with."""
    seeds: Annotated[list[NonNegative], Field(min_length=1)]
    """Seeds of the reported runs: train.seed, the weights made from scratch."""
    tuning: TuningSpec = TuningSpec()
    """Choice of the learning rate."""
    held_out: HeldOutSpec
    """Validation and test."""
    measure: dict[Name, MeasureSpec] = Field(default_factory=lambda: {"plain": MeasureSpec()})
    """Ways to ask the trained models; the first one is compared."""

    @model_validator(mode="after")
    def _names_exist(self) -> Study:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: unknown arm '{self.baseline}'{did_you_mean(self.baseline, self.arms)}")
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if stage.after and stage.after not in earlier:
                raise ValueError(f"stages.{name}.after: no stage '{stage.after}' above it")
            earlier.append(name)
        for name, arm in self.arms.items():
            if arm.stage and arm.stage not in self.stages:
                raise ValueError(f"arms.{name}.stage: unknown{did_you_mean(arm.stage, self.stages)}")
        return self

    @model_validator(mode="after")
    def _test_is_held_out(self) -> Study:
        if not self.held_out.validation_samples and any(map(self.tests_validation_rows, self.arms)):
            raise ValueError(
                "held_out: validation and test are one folder: set validation_samples, the test uses the other rows"
            )
        return self

    @model_validator(mode="after")
    def _seeds_are_fresh(self) -> Study:
        tuning = self.tuning
        if len(tuning.lr) > 1 and not tuning.seeds:
            raise ValueError("tuning.seeds is empty: name seeds for the trials of several rates")
        if both := set(tuning.seeds) & set(self.seeds):
            raise ValueError(f"seeds: {sorted(both)} also choose the learning rate: report fresh seeds")
        if len(set(self.seeds)) < len(self.seeds) or not self.measure:
            raise ValueError("seeds occur once each, and measure is not empty")
        return self

    def validation_folder(self, arm: str) -> str:
        """Return the pack folder that an arm is validated on."""
        return self.arms[arm].validation or self.held_out.validation

    def test_folder(self, arm: str) -> str:
        """Return the pack folder of an arm's test questions."""
        return self.arms[arm].test or self.held_out.test

    def tests_validation_rows(self, arm: str) -> bool:
        """Whether an arm's validation and test are one folder, however they are written."""
        return Path(self.validation_folder(arm)).resolve() == Path(self.test_folder(arm)).resolve()

    def last_stage(self, arm: str) -> str:
        """Return the name of an arm's last stage."""
        return self.arms[arm].stage or list(self.stages)[-1]


def study_path(name: str) -> Path:
    """Return the file of a shipped study or of a path that ends in .yaml. Raises UserError with the closest name."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"study file {name} does not exist")
        return Path(name)
    shipped = {path.stem: path for path in STUDIES.glob("*.yaml")}
    if name not in shipped:
        raise UserError(f"unknown study '{name}'{did_you_mean(name, shipped)}; shipped: {', '.join(sorted(shipped))}")
    return shipped[name]


def load_study(name: str) -> Study:
    """Read a study by name or file. Raises UserError naming the key and the fix."""
    path = study_path(name)
    raw: dict[str, Any] = expand(read_mapping(path), str(path))
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(report(str(path), problems(error))) from None
