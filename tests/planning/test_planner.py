"""Plans against sums made by hand and against brute force."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.plans import MACHINE, PRICE, SMALL, SPEED, ask
from x1_pretrain.errors import UserError
from x1_pretrain.laws import forms
from x1_pretrain.model import shapes
from x1_pretrain.model.flops import flops_per_token, parameter_counts
from x1_pretrain.planning import data_check
from x1_pretrain.planning.belief import REFIT, Belief, parameters_for, spread
from x1_pretrain.planning.choice import Candidates, best_served, tokens_to_reach
from x1_pretrain.planning.cluster import exchange_s
from x1_pretrain.planning.data_check import Data, Part
from x1_pretrain.planning.planner import Plan, plan
from x1_pretrain.planning.remarks import notes
from x1_pretrain.planning.ways import napkin, ways

LADDER = tuple(shapes.ladder())
SIX = 6 * (50_331_648 + 50_257 * 768)  # 6 (N + V d)
PALM, CAUSAL = SIX + 12 * 8 * 768 * 1024, SIX + 6 * 8 * 768 * 1025


# ------------------------------------------------------------------------------------------------------------
# Money and time


def test_dollars_become_tokens_by_price_reserve_and_speed() -> None:
    made = plan(ask(dollars=Decimal(35)))
    hourly = 1.19 + 0.0278
    hours = (35 * 0.9 - 0.03) / hourly - 0.9167  # a tenth is kept, three amounts are rounded up
    tokens = hours * 3600 * 150e12 / PALM
    assert made.tokens == pytest.approx(tokens, abs=made.recipe.batch_tokens)
    assert made.hours == pytest.approx(hours, rel=1e-3)
    assert Decimal("31.3") < made.quote.total_usd <= Decimal("31.5")
    assert made.quote.ceiling_usd == 35


@given(st.floats(1.5, 5000), st.floats(0, 0.5), st.floats(0.05, 30), st.floats(0, 0.3))
@settings(max_examples=60)
def test_the_gate_never_refuses_a_plan(dollars: float, buffer: float, price: float, tax: float) -> None:
    money = replace(PRICE, usd_per_hr=Decimal(f"{price:.3f}"), tax=Decimal(f"{tax:.2f}"))
    try:
        made = plan(ask(dollars=Decimal(f"{dollars:.2f}"), buffer=buffer, price=money, batch_tokens=1024))
    except UserError:
        return  # not even the reserve
    assert made.quote.buffer_usd >= 0
    assert made.quote.total_usd <= made.quote.ceiling_usd * Decimal(str(1 - buffer)) + Decimal("0.01")


@pytest.mark.parametrize(
    ("changes", "binding"),
    [
        ({"dollars": Decimal(35), "hours": 24.0}, "--hours"),
        ({"dollars": Decimal(20), "hours": 24.0}, "--dollars"),
        ({"hours": 24.0}, "--hours"),
    ],
)
def test_the_tighter_limit_binds(changes: dict[str, object], binding: str) -> None:
    made = plan(ask(**changes))
    assert made.binding == binding
    assert made.hours <= 24
    if binding == "--hours":  # 24 h at 150 TFLOP/s, attention in full
        assert made.tokens == pytest.approx(24 * 3600 * 150e12 / PALM, rel=1e-3)


def test_given_size_and_tokens_the_dollars_are_the_outcome() -> None:
    made = plan(ask(tokens=10e9))
    assert made.hours == pytest.approx(10e9 * PALM / 150e12 / 3600, rel=1e-3)  # 11.3 h
    assert float(made.quote.total_usd) == pytest.approx((made.hours + 0.9167) * (1.19 + 0.0278), abs=0.03)
    assert made.quote.buffer_usd < 1


def test_tokens_beyond_the_dollars_are_refused_with_what_fits() -> None:
    with pytest.raises(UserError, match=r"--tokens: 44 B tokens .*above --dollars 35; that buys 2\d\.\d B"):
        plan(ask(tokens=44e9, dollars=Decimal(35)))
    with pytest.raises(UserError, match=r"--tokens: 44 B tokens take 49\.6 h, more than --hours 24"):
        plan(ask(tokens=44e9, hours=24.0))


def test_dollars_that_pay_for_nothing() -> None:
    with pytest.raises(UserError, match=r"--dollars 1: setting up .*nothing is left"):
        plan(ask(dollars=Decimal(1)))


# ------------------------------------------------------------------------------------------------------------
# Size


def brute(limit_s: float, data: Data | None = None) -> tuple[float, int]:
    """Loss and matrices of the best of the ladder, one by one with the law's own formula."""
    law, found = forms.REFIT.law, []
    for model in LADDER:
        tokens = limit_s * 150e12 / flops_per_token(model).palm
        n = float(parameter_counts(model).total)
        if data:
            enough = float(parameters_for(law, data.tokens))
            excess = n / enough - 1
            n = enough * (1 + 5.31 * (1 - np.exp(-excess / 5.31))) if n > enough else n
            repeats = tokens / data.tokens - 1
            tokens = data.tokens * (1 + 15.39 * (1 - np.exp(-repeats / 15.39))) if repeats > 0 else tokens
        loss = law.E + law.A / n**law.alpha + law.B / tokens**law.beta
        found.append((float(loss), parameter_counts(model).matrices))
    return min(found)


@pytest.mark.parametrize("hours", [0.1, 1.0, 24.0])
@pytest.mark.parametrize("unique", [None, 1e9])
def test_the_size_is_the_best_of_the_ladder(hours: float, unique: float | None) -> None:
    data = None if unique is None else data_check.stated(unique, 50257)
    made = plan(ask(*LADDER, hours=hours, data=data))
    loss, matrices = brute(hours * 3600, data)
    assert made.counts.matrices == matrices
    assert made.expected.point == pytest.approx(loss, abs=1e-3)


def test_scarce_data_call_for_other_runs() -> None:
    plenty = plan(ask(*LADDER, hours=100.0))
    scarce = plan(ask(*LADDER, hours=100.0, data=data_check.stated(0.2e9, 50257)))
    assert scarce.expected.point > plenty.expected.point
    assert scarce.tokens > 0.2e9
    assert scarce.model != plenty.model


def test_a_model_that_does_not_fit_the_gpu_is_not_chosen() -> None:
    free = plan(ask(*LADDER, hours=20_000.0, gpus=8, speed=replace(SPEED, flops_per_sec=1.2e15)))
    tight = plan(
        ask(*LADDER, hours=20_000.0, gpus=8, memory_gib=16.0, speed=replace(SPEED, flops_per_sec=1.2e15))
    )
    assert tight.counts.total * 16 < 16 * 2**30 < free.counts.total * 16
    assert tight.left_out is not None
    assert any("would do better, and does not fit one A100" in note for note in notes(tight))
    assert not any("would do better" in note for note in notes(plan(ask(*LADDER, hours=1.0))))
    assert tight.micro_batch


def test_tokens_alone_choose_the_size_they_are_best_for() -> None:
    made = plan(ask(*LADDER, tokens=5e9))
    assert float(forms.tokens_for(forms.REFIT.law, made.counts.total)) == pytest.approx(5e9, rel=0.1)


def test_a_size_alone_gets_its_best_tokens() -> None:
    made = plan(ask(SMALL))
    assert made.binding == "the law's optimum"
    assert made.tokens == pytest.approx(float(forms.tokens_for(forms.REFIT.law, 88_942_080)), rel=1e-3)


def test_a_budget_of_flops_is_of_true_ones() -> None:
    made = plan(ask(flops=1e18))
    assert made.flops == pytest.approx(1e18, rel=1e-3)
    assert made.tokens == pytest.approx(1e18 / CAUSAL, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Serving


def test_tokens_to_reach_is_the_inverse_of_the_loss() -> None:
    found = Candidates.of(LADDER[100:140], REFIT)
    data = data_check.stated(2e9, 50257)
    for known in (None, data):
        tokens = np.full(len(found.n), 5e9)
        losses = REFIT.loss(found.n, tokens, known)
        back = tokens_to_reach(found, losses[:, None], REFIT, known)
        assert np.diag(back) == pytest.approx(tokens, rel=1e-3)


def test_a_model_that_serves_much_is_smaller_and_cheaper_in_all() -> None:
    plain = plan(ask(*LADDER, hours=24.0))
    served = plan(ask(*LADDER, hours=24.0, inference_tokens=1e11))
    more = plan(ask(*LADDER, hours=24.0, inference_tokens=1e12))
    assert more.counts.matrices < served.counts.matrices < plain.counts.matrices
    assert served.serving is not None
    assert served.serving.saved_flops > served.serving.extra_flops > 0
    # the same loss by the law, with 2 N a served token, N with the output matrix
    other = served.serving.instead_of
    law, n = forms.REFIT.law, parameter_counts(other).total
    assert float(forms.loss(law, n, served.serving.instead_tokens)) == pytest.approx(
        served.expected.point, abs=1e-3
    )
    saved = 2 * (n - parameter_counts(other).norms - served.counts.total + served.counts.norms) * 1e11
    assert served.serving.saved_flops == pytest.approx(saved)


def test_nothing_served_changes_nothing() -> None:
    found = Candidates.of(LADDER, REFIT)
    tokens = 86400 * 150e12 / found.palm
    a_token = best_served(found, tokens, REFIT, None, 1.0)
    assert parameter_counts(a_token.model).matrices == pytest.approx(
        plan(ask(*LADDER, hours=24.0)).counts.matrices, rel=0.35
    )


# ------------------------------------------------------------------------------------------------------------
# Loss


def test_a_published_law_comes_with_the_spread_of_all_of_them() -> None:
    made = plan(ask(tokens=10e9))
    values = [
        law.E + law.A / n**law.alpha + law.B / made.tokens**law.beta
        for law in (one.law for one in forms.PUBLISHED)
        for n in (50_331_648, 88_942_080)
    ]
    assert made.expected.low == pytest.approx(min(values))
    assert made.expected.high == pytest.approx(max(values))
    assert sorted(spread(SMALL, float(made.tokens), None)) == pytest.approx(sorted(values))


def test_a_law_of_ones_own_brings_its_interval_and_its_count() -> None:
    rng = np.random.default_rng(0)
    law = forms.Law(1.7, 400.0, 0.34, 2000.0, 0.36)
    draws = law.rows() * np.exp(0.01 * rng.standard_normal((500, 5)))
    fitted = replace(REFIT.fitted, law=law, draws=draws, method="bootstrap", counts="matrices", scatter=0.01)
    made = plan(replace(ask(tokens=10e9), belief=Belief(fitted, own=True)))
    expected = 1.7 + 400 / 50_331_648**0.34 + 2000 / made.tokens**0.36
    assert made.expected.point == pytest.approx(expected)
    assert made.expected.low < expected < made.expected.high
    assert made.expected.high / expected > np.exp(1.96 * 0.01) - 1e-9


def test_the_regret_of_being_off() -> None:
    shares = {off: share for off, _, share in plan(ask(tokens=10e9)).regrets()}
    assert shares[2.0] == pytest.approx(0.04, abs=0.006)
    assert shares[4.0] == pytest.approx(0.15, abs=0.015)
    assert shares[10.0] == pytest.approx(0.355, abs=0.025)


# ------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize(
    ("epochs", "value"), [(1.0, 1.0), (4.0, 0.93), (4.4, 0.92), (10.0, 0.78), (40.0, 0.38)]
)
def test_what_repeats_are_worth(epochs: float, value: float) -> None:
    data = data_check.stated(1e9, 50257)
    assert data.effective(epochs * 1e9) / (epochs * 1e9) == pytest.approx(value, abs=0.006)
    assert data.epochs(epochs * 1e9) == (epochs,)


def test_each_corpus_of_a_mixture_repeats_by_itself() -> None:
    data = Data((Part("web", 9e9, 0.5, 0.0), Part("math", 1e9, 0.5, 0.0)), "here")
    assert data.epochs(8e9) == pytest.approx((4 / 9, 4.0))
    assert data.effective(8e9) == pytest.approx(4e9 + forms.effective_tokens(1e9, 4e9))
    assert data.drawn_for(np.array([data.effective(8e9)])) == pytest.approx([8e9], rel=1e-3)
    assert data.drawn_for(np.array([1e13])) == pytest.approx([np.inf])


def test_a_corpus_folder_is_read_by_its_manifest(corpus: Path, tmp_path: Path) -> None:
    data = data_check.read_data(corpus)
    assert len(data.parts) == 1
    assert data.tokens == (corpus / "train.bin").stat().st_size / 2
    assert data.disk_bytes == sum((corpus / f"{s}.bin").stat().st_size for s in ("train", "val"))
    both = tmp_path / "both"
    both.mkdir()
    (both / "a").symlink_to(corpus)
    (both / "b").symlink_to(corpus)
    two = data_check.read_data(both)
    assert [part.share for part in two.parts] == [0.5, 0.5]
    assert two.tokens == 2 * data.tokens
    with pytest.raises(UserError, match=r"--data .*no manifest\.json"):
        data_check.read_data(tmp_path / "both" / "..")


# ------------------------------------------------------------------------------------------------------------
# Steps, memory, disk


def test_tokens_a_step_are_a_product() -> None:
    made = plan(ask(tokens=10e9, gpus=4, batch_tokens=524_288))
    rows = [int(word.replace(",", "")) for word in made.product.split() if word.replace(",", "").isdigit()]
    sequences, context, ranks, accumulated, total = rows
    assert sequences * context * ranks * accumulated == total == 524_288
    assert (context, ranks) == (1024, 4)


def test_checkpoints_are_half_an_hour_apart_and_twenty_at_least() -> None:
    long = plan(ask(tokens=44e9))
    assert 25 < long.checkpoint_every * long.seconds / long.recipe.steps / 60 <= 30
    short = plan(ask(tokens=1e9))
    assert short.recipe.steps / short.checkpoint_every >= 20


def test_evaluations_cost_a_hundredth_at_most() -> None:
    usual = plan(ask(tokens=10e9))
    assert usual.evaluation_every == usual.checkpoint_every
    small = plan(ask(tokens=100e6, batch_tokens=65_536))  # 1,525 steps: 20 checkpoints would be 75 apart
    assert small.checkpoint_every <= 76
    assert 0.01 * small.evaluation_every * 65_536 >= 1_048_576 / 3
    assert small.evaluation_every % small.checkpoint_every == 0
    tiny = plan(ask(tokens=1e6, batch_tokens=1024))
    assert tiny.evaluation_every == tiny.recipe.steps  # once, at the end


def test_the_disk_holds_corpus_checkpoints_and_export() -> None:
    made = plan(ask(tokens=10e9, data=data_check.stated(10e9, 50257)))
    kept = 12 * 88_942_080
    assert made.disk.total_bytes == 2 * 10e9 + 3 * kept + kept


# ------------------------------------------------------------------------------------------------------------
# The classic ways, the napkin, the cluster


def test_three_ways_are_never_mixed() -> None:
    made = plan(ask(tokens=10e9, batch_tokens=524_288))
    rows = {way.name: way for way in ways(made, 84_000, 4e19, None)}
    assert rows["84,000 steps"].tokens == 84_000 * 524_288 == 44_040_192_000
    assert rows["4e19 true FLOPs"].tokens == pytest.approx(4e19 / CAUSAL)
    assert rows["4e19 = 6ND"].tokens == pytest.approx(4e19 / (6 * 50_331_648))
    assert rows["4e19 = 6ND, all"].tokens == pytest.approx(4e19 / (6 * 88_942_080))
    assert rows["20:1"].per_matrix == pytest.approx(20)
    assert rows["20:1, all"].per_parameter == pytest.approx(20)
    for way in rows.values():
        assert way.flops / way.six_nd == pytest.approx(CAUSAL / (6 * 50_331_648))
        assert way.hours == pytest.approx(way.tokens * PALM / 150e12 / 3600)
    assert rows["this plan (--tokens)"].usd == float(made.quote.total_usd)


def test_five_hundred_million_by_hand() -> None:
    model = shapes.shape_for(524e6)
    made = plan(ask(model, asked_n=524e6, ratio=20.0, batch_tokens=524_288))
    way = next(way for way in ways(made, None, None, 20.0) if "asked" in way.name)
    assert way.tokens == 10.48e9
    assert way.steps == pytest.approx(19_989, abs=1)


def test_seventy_billion_on_a_napkin() -> None:
    model = shapes.shape_for(70e9)
    made = plan(ask(model, tokens=200e9, asked_n=70e9, gpus=2048, speed=replace(SPEED, flops_per_sec=2.2e17)))
    by_hand = napkin(made)
    assert by_hand is not None
    assert by_hand.flops == pytest.approx(8.4e22)
    assert [round(days, 2) for _, days in by_hand.days] == [1.52, 3.04, 3.80, 5.07]
    assert by_hand.ratio == pytest.approx(2.86, abs=0.01)
    assert by_hand.balanced_flops == pytest.approx(5.88e23)
    assert by_hand.balanced_days == pytest.approx(21.3, abs=0.05)
    assert made.micro_batch is None  # 16 bytes a parameter alone are over a terabyte
    assert "shard" in made.shared.width(2048).stops
    assert made.shared.widest() == 0


def test_the_exchange_of_gradients() -> None:
    # 88.9M fp32 gradients, 356 MB; 8 GPUs at 300 GB/s: 2 x 7/8 x 0.3558 / 300; 64: the network's 50 GB/s
    assert exchange_s(88_942_080, 8, 300.0) == pytest.approx(1.75 * 0.355768 / 300, rel=1e-4)
    assert exchange_s(88_942_080, 64, 300.0) == pytest.approx(2 * 63 / 64 * 0.355768 / 50, rel=1e-4)
    assert exchange_s(88_942_080, 64, 32.0) == pytest.approx(2 * 63 / 64 * 0.355768 / 32, rel=1e-4)
    assert exchange_s(1e9, 1, 300.0) == 0
    assert exchange_s(1e9, 8, None) is None


def wide(gpus: int) -> tuple[Plan, float]:
    made = plan(ask(tokens=10e9, batch_tokens=524_288))
    return made, made.shared.width(gpus).hours


def test_more_gpus_take_arithmetic_and_then_the_exchange() -> None:
    made, hours = wide(8)
    step = 524_288 * PALM / 150e12 / 8 + 1.75 * 0.355768 / 300
    assert hours == pytest.approx(made.recipe.steps * step / 3600, rel=1e-3)
    width = made.shared.width(8)
    assert width.tokens_per_gpu == 65_536
    assert width.usd == pytest.approx((hours + 0.9167) * (1.19 + 0.0278) * 8, rel=1e-3)
    assert width.efficiency == pytest.approx(1 - 1.75 * 0.355768 / 300 / step, rel=1e-3)
    assert not width.stops


def test_where_data_parallelism_stops() -> None:
    made, _ = wide(1)
    assert made.shared.width(1024).stops == "512 sequences a step, fewer than GPUs"
    assert made.shared.width(512).stops == "exchange takes longer than arithmetic"  # 4.2 ms against 14 ms
    # 2.13 s / W > 2 (W-1)/W x 7.1 ms holds up to W = 150
    assert made.shared.widest() == 128


def test_the_machine_of_the_tests_is_the_gates() -> None:
    assert MACHINE.price.all_in_usd_per_hr == Decimal("1.2178")
