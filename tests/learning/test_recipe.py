"""The rules for batch, rate and warm-up, against sums made by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.config import ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from x1_pretrain.learning.recipe import Recipe, batch_rule, body_flops_per_token, lr_rule, recipe

SMALL = ModelConfig(layers=8, d_model=768, heads=12, kv_heads=4, d_ff=2048, context=1024, vocab_size=50257)
# 8 layers: attention 2 x 768 x 64 x (12 + 4) = 1,572,864 and MLP 3 x 768 x 2048 = 4,718,592 a layer
MATRICES = 8 * (1_572_864 + 4_718_592)


def test_the_flops_of_the_rules_leave_out_the_vocabulary() -> None:
    assert body_flops_per_token(SMALL) == 6 * MATRICES + 12 * 8 * 768 * 1024


@pytest.mark.parametrize(
    ("flops", "lr", "batch"),
    [(3e18, 1.53e-3, 0.323e6), (1.32e19, 1.27e-3, 0.525e6)],  # 6ND of 50M on 10 B and on 44 B
)
def test_the_published_formulas(flops: float, lr: float, batch: float) -> None:
    assert lr_rule(flops) == pytest.approx(lr, rel=0.01)
    assert batch_rule(flops) == pytest.approx(batch, rel=0.01)
    assert lr_rule(flops) == pytest.approx(0.3118 / flops**0.125)


def test_the_rate_is_not_extrapolated_to_toys() -> None:
    assert lr_rule(6e11) == lr_rule(1e17) == pytest.approx(0.3118 / 1e17**0.125)


def test_fifty_million_on_ten_billion() -> None:
    made = recipe(SMALL, 10e9)
    assert made.batch_tokens == 262_144  # 348k by the rule with attention; 256 sequences, not 512
    assert made.steps == 38_146  # 10e9 / 262,144 = 38,146.97
    assert made.lr == 0.0015
    assert made.warmup_steps == 381  # 192 steps hold N tokens: one percent is more
    assert made.decay_steps == 7_629
    assert made.min_lr == 0.0
    assert made.tokens == 38_146 * 262_144 <= 10e9


def test_warm_up_holds_as_many_tokens_as_parameters_between_its_bounds() -> None:
    made = recipe(SMALL, 3e9, batch_tokens=524_288)  # 5,722 steps: 58 to 572
    assert made.warmup_steps == math.ceil(MATRICES / 524_288) == 96
    short = recipe(SMALL, 100e6, batch_tokens=524_288)  # 190 steps: 96 is more than a tenth
    assert short.warmup_steps == 19


def test_a_given_batch_is_taken_and_said() -> None:
    made = recipe(SMALL, 1e9, batch_tokens=100 * 1024)
    assert made.batch_tokens == 102_400
    assert made.steps == 9_765
    assert made.lines[0].source == "--batch-tokens"


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 8, 2048])
def test_every_rank_has_a_power_of_two_of_sequences(ranks: int) -> None:
    per_rank = recipe(SMALL, 10e9, ranks=ranks).batch_tokens / (1024 * ranks)
    assert per_rank >= 1
    assert math.log2(per_rank).is_integer()


def test_outside_of_what_the_rules_were_fitted_on_it_is_said() -> None:
    def sources(made: Recipe) -> str:
        return " ".join(line.source for line in made.lines)

    assert "extrapolated" not in sources(recipe(SMALL, 10e9))
    assert sources(recipe(SMALL, 10e6)).count("extrapolated") == 2
    assert sources(recipe(SMALL, 400e9)).count("extrapolated") == 2


def test_each_number_has_formula_and_source() -> None:
    lines = recipe(SMALL, 10e9).lines
    assert [line.name for line in lines] == ["batch", "steps", "learning rate", "warm-up", "decay"]
    for line in lines:
        assert all((line.shown, line.formula, line.numbers, line.source)), line


@given(st.floats(1e4, 1e13), st.integers(1, 64))
def test_training_takes_every_recipe(tokens: float, ranks: int) -> None:
    made = recipe(SMALL, tokens, ranks=ranks)
    optimizer = OptimizerConfig(
        lr=made.lr, min_lr=0.0, warmup_steps=made.warmup_steps, schedule="wsd", decay_steps=made.decay_steps
    )
    training = TrainingConfig(total_steps=made.steps, batch_tokens=made.batch_tokens)
    RunConfig(name="x", model=SMALL, training=training, optimizer=optimizer)
    assert made.tokens <= tokens or made.steps == 1
