"""Which runs a sweep is made of, against its definitions; where the optimum is expected, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from x1_pretrain.config import DECAY_SHARE, ModelConfig
from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms, sweep
from x1_pretrain.laws.sweep import Bracket, Pace, PlannedRun
from x1_pretrain.model import shapes
from x1_pretrain.model.flops import flops_per_token, parameter_counts

BUDGET = 1.35e17
LAB = [shapes.shape_for(n, 50257, 1024) for n in (5e6, 25e6, 100e6)]


def trunks(runs: tuple[PlannedRun, ...]) -> list[PlannedRun]:
    return [run for run in runs if run.is_trunk]


def test_runs_of_one_budget_do_the_same_work_by_the_count_that_was_asked_for() -> None:
    for count, work in (("true", lambda run: run.flops), ("6n", lambda run: run.six_nd)):
        runs = sweep.plan({BUDGET: LAB}, count)  # type: ignore[arg-type]
        assert [run.matrices for run in runs] == sorted(parameter_counts(m).matrices for m in LAB)
        for run in runs:
            half_a_step = 0.5 / run.steps
            assert work(run) == pytest.approx(BUDGET, rel=half_a_step)
    assert sweep.apart(list(sweep.plan({BUDGET: LAB}))) < sweep.ALIKE


def test_by_6nd_the_labs_sizes_are_far_apart_in_truth() -> None:
    """The work of a token is 6 (N + V d) + attention: the smaller the model, the more 6N leaves out."""
    runs = sweep.plan({BUDGET: LAB}, "6n")
    expected = [flops_per_token(m).causal / flops_per_token(m).six_n for m in LAB]
    assert sweep.apart(list(runs)) == pytest.approx(max(expected) / min(expected), rel=1e-3)
    assert sweep.apart(list(runs)) > 2


@pytest.mark.parametrize("points", [1, 2, 3, 8])
def test_points_are_evenly_spaced_on_a_log_scale_from_a_twentieth(points: int) -> None:
    found = sweep.lengths(20_000, sweep.lengths_of(points))
    expected = np.geomspace(1000, 20_000, points) if points > 1 else [20_000]
    assert found == pytest.approx(expected, abs=0.51)


def test_a_shorter_span_has_no_short_runs() -> None:
    assert sweep.lengths(1000, sweep.lengths_of(3, 4.0)) == [250, 500, 1000]
    runs = sweep.plan({BUDGET: LAB}, "true", 3, None, 4.0)
    for run in runs:
        trunk = next(one for one in runs if one.name == run.trunk)
        assert 3.9 < max(trunk.steps / one.steps for one in runs if one.trunk == run.trunk) < 4.1


def test_points_that_rounding_made_the_same_are_there_once() -> None:
    found = sweep.lengths(20, sweep.lengths_of(12))
    assert found == sorted(set(found))
    assert (found[0], found[-1], len(found) < 12) == (1, 20, True)
    assert len(sweep.plan({BUDGET: [*LAB, LAB[0]]})) == 3  # a size given twice, or two that are one shape


def test_every_branch_leaves_its_trunk_where_both_have_the_same_past() -> None:
    runs = sweep.plan({BUDGET: LAB}, "true", 8)
    assert len(runs) == 24
    for trunk in trunks(runs):
        family = [run for run in runs if run.trunk == trunk.name]
        assert runs.index(trunk) == min(runs.index(run) for run in family)
        branches = [run for run in family if run is not trunk]
        assert trunk.save_at == tuple(sorted(run.branch_step for run in branches))
        for run in family:
            assert run.decay_steps == pytest.approx(DECAY_SHARE * run.steps, abs=0.5)
            assert (run.lr, run.warmup_steps, run.batch_tokens) == (
                trunk.lr,
                trunk.warmup_steps,
                trunk.batch_tokens,
            )
            assert run.warmup_steps + run.decay_steps <= run.steps
        for run in branches:
            assert run.branch_step == run.steps - run.decay_steps
            assert trunk.warmup_steps <= run.branch_step <= trunk.steps - trunk.decay_steps


def test_eight_cooldowns_cost_a_third_more() -> None:
    """Each branch pays its decay only: a fifth of a geometric sum, r + r^2 + ... + r^7 with r = 20^(-1/7)."""
    runs = sweep.plan({BUDGET: LAB}, "true", 8)
    work, alone = sum(run.own_flops for run in runs), sum(run.flops for run in trunks(runs))
    r = 20 ** (-1 / 7)
    assert work / alone - 1 == pytest.approx(0.2 * r * (1 - r**7) / (1 - r), rel=0.01)
    assert sum(run.own_tokens for run in runs if run.branch_step) == sum(
        run.decay_steps * run.batch_tokens for run in runs if run.branch_step
    )


@pytest.mark.parametrize("count", ["true", "6n"])
@pytest.mark.parametrize("cooldowns", [1, 8])
def test_the_shortest_run_has_enough_steps_and_one_budget_one_batch(
    cooldowns: int, count: sweep.Count
) -> None:
    runs = sweep.plan({BUDGET: LAB, 10 * BUDGET: LAB}, count, cooldowns)
    assert min(run.steps for run in runs) >= sweep.MIN_STEPS
    for budget in (BUDGET, 10 * BUDGET):
        (batch,) = {run.batch_tokens for run in runs if run.budget == budget}
        assert batch % 1024 == 0
        assert (batch // 1024) & (batch // 1024 - 1) == 0  # a power of two of sequences


def test_what_is_too_small_is_refused_naming_the_flag() -> None:
    with pytest.raises(UserError, match=r"--flops 1e13: the shortest run of size 101M .* not even 100 steps"):
        sweep.plan({1e13: LAB})
    with pytest.raises(UserError, match=r"size 101M would have 2 steps of 524,288 tokens; 5 are the least"):
        sweep.plan({1e15: LAB[-1:]}, "true", 1, 524_288)


def test_names_tell_runs_apart_even_when_sizes_read_the_same() -> None:
    one = ModelConfig(layers=7, d_model=256, heads=4, kv_heads=2, d_ff=704, vocab_size=50257)
    other = one.model_copy(
        update={"kv_heads": 4, "d_ff": 661}
    )  # 5.14M and 5.16M: d_ff makes up for the heads
    assert sweep.label(parameter_counts(one).matrices) != sweep.label(1)
    runs = sweep.plan({BUDGET: [one, other], 2 * BUDGET: [one]}, "true", 3)
    assert len({run.name for run in runs}) == len(runs) == 9
    close = one.model_copy(update={"d_ff": 705})
    runs = sweep.plan({BUDGET: [one, close]}, "true", 3)
    assert len({run.name for run in runs}) == 6
    assert {run.trunk for run in runs} == {run.name for run in trunks(runs)}


# ------------------------------------------------------------------------------------------------------------
# Where the optimum is expected


def test_the_expected_optimum_is_the_lowest_loss_that_the_budget_pays_for() -> None:
    """Whatever sizes were asked for: no other shape does better with the tokens it can pay."""
    runs = trunks(sweep.plan({BUDGET: LAB}))
    for counts, field in (("total", "total"), ("matrices", "matrices")):
        found = sweep.bracket(runs, counts, "true")  # type: ignore[arg-type]
        nats = {}
        for shape in shapes.ladder(50257, 1024, low=1e6, high=1e9):
            n = getattr(parameter_counts(shape), field)
            nats[float(n)] = forms.loss(forms.REFIT.law, n, BUDGET / flops_per_token(shape).causal)
        assert nats[found.optimum] == min(nats.values())
        assert found.low <= found.optimum <= found.high
        sizes = [getattr(run, field) for run in runs]
        assert (found.smallest, found.largest) == (min(sizes), max(sizes))
        other = sweep.bracket(trunks(sweep.plan({BUDGET: LAB[:2]})), counts, "true")  # type: ignore[arg-type]
        assert other.optimum == found.optimum


@pytest.mark.parametrize("counts", ["total", "matrices"])
@pytest.mark.parametrize("side", ["small", "large"])
def test_sizes_on_one_side_of_the_optimum_are_told_which_to_add(counts: forms.Counts, side: str) -> None:
    wanted = (1e6, 2e6) if side == "small" else (200e6, 400e6)
    models = [shapes.shape_for(n, 50257, 1024) for n in wanted]
    found = sweep.bracket(sweep.plan({BUDGET: models}), counts, "true")
    assert not found.holds
    add = sweep.size_to_add(found, 50257, 1024)
    assert add is not None
    again = sweep.bracket(sweep.plan({BUDGET: [*models, shapes.shape_for(add, 50257, 1024)]}), counts, "true")
    assert again.holds


def test_with_the_optimum_in_between_nothing_is_added() -> None:
    assert sweep.size_to_add(Bracket(1e17, "total", 1e6, 1e8, 1e7, 9e6, 2e7), 50257, 1024) is None


@pytest.mark.parametrize(
    ("budget", "vocab", "context"), [(1e15, 4096, 256), (1.35e17, 50257, 1024), (1e20, 50257, 2048)]
)
@pytest.mark.parametrize("count", ["true", "6n"])
def test_the_default_sizes_have_the_optimum_in_between(
    budget: float, vocab: int, context: int, count: sweep.Count
) -> None:
    models = sweep.default_models(budget, count, vocab, context)
    runs = sweep.plan({budget: models}, count)
    assert len(runs) == len(sweep.DEFAULT_SIZES)
    assert sweep.bracket(runs, "total", count).holds
    assert sweep.bracket(runs, "matrices", count).holds


# ------------------------------------------------------------------------------------------------------------
# What it takes


def test_seconds_are_own_work_over_speed() -> None:
    trunk, branch, *_ = sweep.plan({BUDGET: LAB[:1]}, "true", 3)
    assert Pace("measured", flops_per_sec=1e14).seconds(trunk) == pytest.approx(trunk.flops / 1e14)
    assert branch.own_flops == pytest.approx(branch.flops * branch.decay_steps / branch.steps)
    assert Pace("measured", flops_per_sec=1e14).seconds(branch) == pytest.approx(branch.own_flops / 1e14)
    palm = flops_per_token(branch.model).palm
    by_mfu = Pace("assumed", palm_flops_per_sec=0.35 * 312e12).seconds(branch)
    assert by_mfu == pytest.approx(branch.decay_steps * branch.batch_tokens * palm / (0.35 * 312e12))
    assert Pace("unknown").seconds(trunk) is None


def test_disk_is_twelve_bytes_a_parameter_for_each_checkpoint_that_stays() -> None:
    runs = sweep.plan({BUDGET: LAB[:1]}, "true", 3)
    total = parameter_counts(LAB[0]).total
    assert sweep.disk_bytes(runs) == 12 * total * (
        2 + 2 + 2 + 2
    )  # three runs' first and last, two to branch from
