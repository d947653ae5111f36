"""All steps of a recipe in sequence."""

from __future__ import annotations

from data_prep.common.workers import Team
from data_prep.ingest.step import ingest
from data_prep.materialize import materialize
from data_prep.planning.step import plan
from data_prep.progress import Reporter
from data_prep.recipe import Recipe


def run(recipe: Recipe, team: Team, reporter: Reporter) -> None:
    """Ingest, plan and materialize; each step does only the missing work. Raises UserError."""
    ingest(recipe, team, reporter)
    team.serial(lambda: plan(recipe, reporter))
    materialize(recipe, team, reporter)
