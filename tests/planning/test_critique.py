"""The published plan of one day, judged, against the sums that anyone can make."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.planning.plans import ask
from x1_pretrain.config import RunConfig
from x1_pretrain.config_reading import load_config
from x1_pretrain.model import shapes
from x1_pretrain.planning import data_check
from x1_pretrain.planning.critique import Claim, Finding, Judged, judge
from x1_pretrain.planning.planner import plan

LAB = Path(__file__).resolve().parents[2] / "configs/x1-50m-a100.yaml"
LADDER = tuple(shapes.ladder())
PALM, CAUSAL = 6.09e8, 5.71e8  # FLOPs a token: 6 x 88.93M + attention in full 7.55e7, causal 3.77e7


def lab(**changes: Any) -> RunConfig:
    return load_config(LAB, changes)


def judged(config: RunConfig, claim: Claim | None = None, **changes: Any) -> Judged:
    return judge(config, ask(*LADDER, **changes), claim)


def finding(found: Judged, word: str) -> Finding:
    return next(one for one in found.findings if word in f"{one.title} {one.said}")


def titles(found: Judged) -> str:
    return " | ".join(one.title for one in found.findings)


TEN_BILLION = data_check.stated(10e9, 50257)


def test_the_epochs_are_counted() -> None:
    one = finding(judged(lab(), data=TEN_BILLION), "epochs")
    assert 84_000 * 524_288 == 44_040_192_000
    assert "4.40 epochs" in one.title
    assert "44 B tokens" in one.said
    assert "worth 92%" in one.said
    assert one.usd == pytest.approx(0.08 * 49.7 * 1.2178, rel=0.02)


def test_a_rate_that_nothing_reaches_is_impossible_and_has_its_share() -> None:
    one = finding(judged(lab(), Claim(500_000.0)), "500,000 tokens/s")
    assert "impossible" in one.title
    # 500k x 6.09e8 / 312e12 = 97.6 %, x 5.71e8 = 91.5 %
    assert "92% (causal) to 98% (attention in full)" in one.said
    assert pytest.approx(246_300, rel=1e-3) == 150e12 / PALM
    assert pytest.approx(262_700, rel=1e-3) == 150e12 / CAUSAL
    assert "246,276" in one.said
    assert "262,5" in one.said
    hours = 44_040_192_000 / 3600 * (1 / 246_276 - 1 / 500_000)
    assert one.usd == pytest.approx(hours * 1.2178, rel=1e-3)


@pytest.mark.parametrize(
    ("rate", "word"), [(246_276.0, ""), (330_000.0, ""), (350_000.0, "unlikely"), (470_000.0, "impossible")]
)
def test_the_words_for_a_rate(rate: float, word: str) -> None:  # 333k is 65 %, 461k is 90 % of the peak
    found = titles(judged(lab(), Claim(rate)))
    assert ("tokens/s" in found) == bool(word)
    assert word in found


def test_without_a_known_peak_no_rate_is_called_impossible() -> None:
    assert "tokens/s" not in titles(judged(lab(), Claim(5e6), peak_flops_per_sec=None))


def test_a_day_is_too_short() -> None:
    one = finding(judged(lab(), hours=24.0), "h, not 24")
    assert "49.7 h" in one.title
    assert "21.3 B (attention in full) to 22.7 B (causal)" in one.said
    assert one.usd == pytest.approx((49.67 - 24) * 1.2178, rel=1e-3)


def test_dollars_that_do_not_do() -> None:
    one = finding(judged(lab(), dollars=Decimal(35)), "not $35.00")
    assert one.usd == pytest.approx((49.67 + 0.9167) * 1.2178 - 35, abs=0.05)


def test_the_band_would_fail_a_run_that_is_as_the_law_says() -> None:
    one = finding(judged(lab(), data=TEN_BILLION), "verify.loss_band")
    assert "3.10 (N in matrices) or 2.92 (all parameters)" in one.said
    assert "would FAIL" in one.said
    config = lab()
    wide = config.model_copy(update={"verify": config.verify.model_copy(update={"loss_band": [2.9, 3.2]})})
    assert "verify.loss_band" not in titles(judged(wide, data=TEN_BILLION))


def test_the_same_money_at_the_optimum() -> None:
    found = judged(lab(), data=TEN_BILLION)
    assert found.instead is not None
    assert 200e6 < found.instead.counts.matrices < 450e6
    assert 6e9 < found.instead.tokens < 12e9
    assert found.instead.hours == pytest.approx(found.priced.hours, rel=1e-3)
    lost = found.priced.expected.point - found.instead.expected.point
    assert 0.10 < lost < 0.23
    one = finding(found, "tokens per parameter")
    assert "875" in one.title
    assert one.usd is not None
    hours = 49.67 - one.usd / 1.2178  # a run at the optimum is as good after so many
    shorter = plan(ask(*LADDER, hours=hours, data=TEN_BILLION))
    assert shorter.expected.point == pytest.approx(found.priced.expected.point, abs=0.005)


def test_a_plan_at_its_optimum_is_left_alone() -> None:
    found = judged(lab(), data=TEN_BILLION)
    assert found.instead is not None
    best = found.instead
    plain = lab(**{"verify.loss_band": None, "optimizer.schedule": "wsd", "optimizer.lr": best.recipe.lr})
    training = plain.training.model_copy(
        update={"total_steps": best.recipe.steps, "batch_tokens": best.recipe.batch_tokens}
    )
    again = judged(plain.model_copy(update={"model": best.model, "training": training}), data=TEN_BILLION)
    assert "tokens per parameter" not in titles(again)
    assert again.findings == ()


def test_the_learning_rate_is_four_times_below_the_rule() -> None:
    one = finding(judged(lab()), "learning rate")
    assert "4.1 times below" in one.said  # 0.3118 x 1.66e19^-0.125 = 1.23e-3
    assert "learning rate" not in titles(judged(lab(**{"optimizer.lr": 1e-3})))
    high = finding(judged(lab(**{"optimizer.lr": 1e-2})), "learning rate")
    assert "8.1 times above" in high.said


def test_the_batch_of_the_lab_is_fine_and_a_huge_one_is_not() -> None:
    assert "batch" not in titles(judged(lab()))
    assert "above" in finding(judged(lab(**{"training.batch_tokens": 4_194_304})), "batch of").said


@pytest.mark.parametrize(("warmup", "wrong"), [(10, True), (1000, False), (20_000, True)])
def test_warm_up(warmup: int, wrong: bool) -> None:
    assert ("warm-up" in titles(judged(lab(**{"optimizer.warmup_steps": warmup})))) == wrong


def test_a_decay_that_stops_early() -> None:
    assert "min_lr" not in titles(judged(lab()))  # a tenth
    assert "50%" in finding(judged(lab(**{"optimizer.min_lr": 1.5e-4})), "min_lr").said


def test_memory() -> None:
    assert "micro_batch" not in titles(judged(lab()))
    assert "micro_batch 512" in titles(judged(lab(**{"training.micro_batch": 512}), memory_gib=24.0))
    tiny = judged(lab(), memory_gib=1.5)  # 16 bytes x 88.9M are 1.33 GiB
    assert "can't hold it" in titles(tiny)
    assert "512 sequences for 1,024 ranks" in titles(judged(lab(), gpus=1024))


def test_the_dearest_comes_first_and_what_has_no_price_last() -> None:
    found = judged(lab(), Claim(500_000.0), data=TEN_BILLION, hours=24.0, dollars=Decimal(35))
    prices = [one.usd for one in found.findings]
    known = [price for price in prices if price is not None]
    assert known == sorted(known, reverse=True)
    assert prices == known + [None] * (len(prices) - len(known))
    assert len(known) == 5
    assert len(prices) >= 8
    for one in found.findings:
        assert all((one.title, one.said, one.source, one.do)), one
        assert "\n" not in one.said


def test_nothing_of_the_config_is_changed() -> None:
    found = judged(lab())
    assert found.priced.recipe.batch_tokens == 524_288
    assert found.priced.recipe.steps == 84_000
    assert found.priced.model == lab().model
