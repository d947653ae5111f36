"""Plans of AKI's blend, scaled down: what is drawn, how often, and where it goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.data.aki import CORPORA, make_workspace
from data_prep.common.errors import UserError
from data_prep.ingest.samples import SAMPLE_STATS
from data_prep.ingest.workspace import ShardOutput, Workspace
from data_prep.planning import draws, packing
from data_prep.planning.packing import exact_draws
from data_prep.planning.step import PackingPlan, plan, plan_path
from data_prep.progress import Reporter
from data_prep.quarantine import Tally
from data_prep.recipe import Recipe
from data_prep.text.tokenizer import Tokenizer

DRAWS, LENGTH = 16_001, 2048


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_workspace(tmp_path_factory.mktemp("aki"), LENGTH, DRAWS, scale=0.002)


@pytest.fixture(scope="module")
def made(recipe: Recipe) -> PackingPlan:
    plan(recipe, Reporter(quiet=True))
    return PackingPlan.load(plan_path(Workspace(recipe).packs("sft")))


def outputs_of(recipe: Recipe) -> list[ShardOutput]:
    space = Workspace(recipe)
    return [output for variant in space.variants(Tokenizer.load(space.tokenizer).sha256) for output in variant.outputs]


def test_the_mixture_is_exact_to_one_draw_over_the_plan_and_over_every_prefix(made: PackingPlan) -> None:
    weights = [corpus.weight for corpus in CORPORA.values()]
    counts = np.bincount(made.corpus, minlength=len(weights))
    assert counts.tolist() == exact_draws(weights, DRAWS)
    exact = np.array(weights) / sum(weights) * DRAWS
    assert np.abs(counts - exact).max() < 1
    blended = made.corpus[np.argsort(made.draw)]
    for first in range(0, DRAWS, 500):
        seen = np.bincount(blended[:first], minlength=len(weights))
        assert np.abs(seen - exact * first / DRAWS).max() <= (1 + len(weights)) / 2


def test_a_plan_does_not_depend_on_how_many_draws_are_in_memory(
    made: PackingPlan, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (packing, draws):
        monkeypatch.setattr(module, "CHUNK_DRAWS", 1000)
    path = plan_path(Workspace(recipe).packs("sft"))
    whole = path.read_bytes()
    path.unlink()
    plan(recipe, Reporter(quiet=True))
    assert path.read_bytes() == whole


def test_every_sample_is_drawn_equally_often(made: PackingPlan, recipe: Recipe) -> None:
    outputs = outputs_of(recipe)
    drawn: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in CORPORA}
    for corpus, output, index in zip(made.corpus.tolist(), made.shard.tolist(), made.index.tolist(), strict=True):
        assert outputs[output].corpus == made.names[corpus] and index < outputs[output].report().tally.kept
        drawn[made.names[corpus]][output, index] += 1
    for name, counts in drawn.items():
        samples = int(CORPORA[name].samples * 0.002)
        assert set(counts.values()) <= {counts.total() // samples, counts.total() // samples + 1}


def test_rows_hold_what_the_samples_say_and_no_more(made: PackingPlan, recipe: Recipe) -> None:
    outputs = outputs_of(recipe)
    stats = {number: np.fromfile(outputs[number].stats, SAMPLE_STATS) for number in np.unique(made.shard).tolist()}
    lengths = [
        int(stats[output][index]["tokens"])
        for output, index in zip(made.shard.tolist(), made.index.tolist(), strict=True)
    ]
    filled = np.bincount(made.row, weights=lengths)
    assert filled.max() <= LENGTH and (np.diff(made.row) >= 0).all()
    assert filled.sum() == sum(audit.tokens for audit in made.audits.values())
    assert filled.mean() / LENGTH > 0.96


def test_a_shard_output_that_disagrees_with_its_marker_is_named(recipe: Recipe, made: PackingPlan) -> None:
    output = outputs_of(recipe)[0]
    report = output.report()
    fewer = replace(report, tally=Tally(report.tally.kept - 1))
    output.marker.write_text(fewer.to_json())
    with pytest.raises(
        UserError, match=rf"{output.shard}.stats: cannot be used \({report.tally.kept} samples, .* says "
    ):
        plan(recipe.model_copy(update={"seed": 1}), Reporter(quiet=True))
    output.marker.write_text(report.to_json())
