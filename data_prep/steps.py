"""All steps of a recipe, one after the other."""

from __future__ import annotations

from data_prep.ingest import ingest
from data_prep.materialize import materialize
from data_prep.plan import plan
from data_prep.progress import Reporter
from data_prep.recipe import Recipe
from data_prep.workers import Team


def run(recipe: Recipe, team: Team, reporter: Reporter) -> None:
    """Ingest, plan and materialize; each step does only what is missing. Raises UserError."""
    ingest(recipe, team, reporter)
    team.serial(lambda: plan(recipe, reporter))
    materialize(recipe, team, reporter)
