"""The judge of each step, on series whose right answer is known beforehand."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from x1_pretrain.config import StabilityConfig
from x1_pretrain.learning.stability import (
    CALM,
    GIVE_UP,
    KNOWN,
    SKIPS,
    STREAK_LIMIT,
    Episode,
    Judged,
    State,
    after_rewind,
    expected_log_norm,
    expected_loss,
    judge,
)

POLICIES = ("watch", "clip", "skip", "rewind")
CLIP = 1.0
NAN, INF = math.nan, math.inf


def quiet(steps: int, seed: int = 0, loss: float = 3.0, norm: float = 0.3) -> list[tuple[float, float]]:
    """A run past its early fall: 0.02 nats and 10 % of noise."""
    draw = random.Random(seed)
    return [(loss + draw.gauss(0, 0.02), norm * math.exp(draw.gauss(0, 0.1))) for _ in range(steps)]


def run(
    rows: Iterable[tuple[float, float]],
    policy: str = "clip",
    state: State | None = None,
    start: int = 0,
    **fields: object,
) -> list[Judged]:
    """Every step judged in turn."""
    configured = StabilityConfig.model_validate({"policy": policy, **fields})
    state, out = state or State(), []
    for step, (loss, norm) in enumerate(rows, start + 1):
        out.append(judge(state, step, loss, norm, configured, CLIP))
        state = out[-1].state
    return out


def verdicts(judged: Sequence[Judged]) -> list[str]:
    return [j.verdict for j in judged]


def began(judged: Sequence[Judged]) -> list[Episode]:
    return [j.began for j in judged if j.began]


def ended(judged: Sequence[Judged]) -> list[Episode]:
    return [j.ended for j in judged if j.ended]


KNOWN_WELL = run(quiet(200))[-1].state  # what is known after 200 quiet steps


# ------------------------------------------------------------------------------------------------------------
# Not finite


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", [(NAN, 1.0), (3.0, INF), (-INF, NAN), (INF, 0.0)])
def test_a_step_that_is_not_finite_is_never_made(policy: str, bad: tuple[float, float]) -> None:
    (judged,) = run([bad], policy, KNOWN_WELL, 200)
    assert judged.verdict == "skip"
    assert judged.state == replace(KNOWN_WELL, streak=1)  # nothing of it entered the windows
    (then,) = run(quiet(1), policy, judged.state, 201)
    assert (then.verdict, then.state.streak) == ("go", 0)


@pytest.mark.parametrize("policy", ["watch", "clip", "skip"])
@pytest.mark.parametrize("state", [State(), KNOWN_WELL])
def test_a_streak_stops_the_run(policy: str, state: State) -> None:
    judged = run([(NAN, NAN)] * 4, policy, state, 200)
    assert verdicts(judged) == ["skip"] * (STREAK_LIMIT - 1) + ["stop"] * 2
    assert [j.state.streak for j in judged] == [1, 2, 3, 4]


def test_policy_rewind_goes_back_from_a_streak_first() -> None:
    judged = run([(NAN, NAN)] * STREAK_LIMIT, "rewind", KNOWN_WELL, 200, max_rewinds=1)
    assert verdicts(judged) == ["skip", "skip", "rewind"]
    back = after_rewind(KNOWN_WELL, judged[-1].state)
    assert (back.streak, back.rewinds) == (0, 1)
    again = run([(NAN, NAN)] * STREAK_LIMIT, "rewind", back, 200, max_rewinds=1)
    assert verdicts(again) == ["skip", "skip", "stop"]


def test_an_episode_ends_with_the_streak() -> None:
    judged = run([(6.0, 9.0), (7.0, 9.0), *[(NAN, NAN)] * 3], "clip", KNOWN_WELL, 200)
    assert [e.onset for e in ended(judged)] == [201]
    assert judged[-1].ended is not None
    assert judged[-1].state.episode is None
    assert judged[-1].ended.peak_loss == 7.0


# ------------------------------------------------------------------------------------------------------------
# What is expected


def test_the_measure_of_a_steady_series_is_its_median_and_deviation() -> None:
    draw = random.Random(1)
    values = [draw.gauss(5.0, 0.5) for _ in range(20_000)]
    assert expected_log_norm(values).level == pytest.approx(5.0, abs=0.02)
    assert expected_log_norm(values).deviation == pytest.approx(0.5, rel=0.03)
    assert expected_loss(values).deviation == pytest.approx(0.5, rel=0.03)


def test_a_falling_loss_is_not_taken_for_noise() -> None:
    draw = random.Random(2)
    falling = [10 - 0.02 * i + draw.gauss(0, 0.01) for i in range(128)]
    expected = expected_loss(falling)
    assert expected.deviation == pytest.approx(math.hypot(0.01, 0.02 / math.sqrt(2)), rel=0.5)
    assert expected.deviation < statistics.stdev(falling) / 10
    assert falling[-1] < expected.level < falling[-1] + 0.02 * 8  # the shortest median leads


def test_a_creeping_loss_does_not_take_its_measure_along() -> None:
    creeping = [3.0] * 100 + [3.0 + 0.02 * i for i in range(28)]
    assert expected_loss(creeping).level == 3.0


def test_spikes_do_not_widen_the_measure() -> None:
    with_spikes = [v + (5.0 if i % 10 == 0 else 0.0) for i, (v, _) in enumerate(quiet(128))]
    plain = expected_loss([v for v, _ in quiet(128)])
    assert expected_loss(with_spikes).deviation < 2 * plain.deviation
    assert expected_loss(with_spikes).level == pytest.approx(plain.level, abs=0.02)


def test_a_very_quiet_run_does_not_alarm_at_trifles() -> None:
    judged = run([(3.0, 0.3)] * 100 + [(3.02, 0.35)] + [(3.0, 0.3)] * 20)
    assert not began(judged)
    assert judged[100].loss_z == pytest.approx(0.02 / 0.005)
    assert judged[100].grad_z == pytest.approx(math.log(0.35 / 0.3) / 0.05)


# ------------------------------------------------------------------------------------------------------------
# Alarms, true and false


def test_nothing_stands_out_while_too_little_is_known() -> None:
    judged = run([*quiet(KNOWN - 1), (9.0, 90.0), *quiet(2)])
    assert [j.loss_z is None for j in judged] == [True] * KNOWN + [False] * 2
    assert not began(judged[:KNOWN])
    assert all(j.clip == CLIP for j in judged[:KNOWN])


@pytest.mark.parametrize("seed", range(5))
def test_warm_up_and_the_early_fall_give_no_alarm(seed: int) -> None:
    draw = random.Random(seed)
    rows = []
    for t in range(1500):
        law = 2.8 + 7.6 * (1 + t / 60) ** -0.5
        hump = 1.2 * math.exp(-(((t - 60) / 40) ** 2)) + 1.5 * math.exp(-t / 15)
        rows.append((law + draw.gauss(0, 0.03), 0.3 * math.exp(hump + draw.gauss(0, 0.1))))
    assert not began(run(rows))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(("height", "factor"), [(0.3, 1.0), (0.5, 5.0), (5.0, 100.0)])
def test_a_spike_is_noticed_at_once(length: int, height: float, factor: float) -> None:
    rows = quiet(300)
    rows[250 : 250 + length] = [(a + height, b * factor) for a, b in rows[250 : 250 + length]]
    judged = run(rows)
    assert [e.onset for e in began(judged)] == [251]
    assert [i + 1 for i, j in enumerate(judged) if j.flagged] == [*range(251, 251 + length)]


def test_both_signals_together_need_less_loss() -> None:
    after = expected_loss(KNOWN_WELL.losses)
    up = after.level + 4 * after.deviation  # of alarm 6
    assert not began(run([(up, 0.3)], "clip", KNOWN_WELL, 200))
    assert began(run([(up, 3.0)], "clip", KNOWN_WELL, 200))


def test_a_large_gradient_alone_is_cut_and_no_spike() -> None:
    (judged,) = run([(3.0, 30.0)], "clip", KNOWN_WELL, 200)
    assert judged.grad_z is not None
    assert judged.grad_z > 20
    assert (judged.verdict, judged.began) == ("go", None)
    assert judged.clip < 0.6


def test_only_upward() -> None:
    assert not began(run([(0.1, 1e-9)] * 20, "skip", KNOWN_WELL, 200))
    assert verdicts(run([(0.1, 0.0)] * 20, "skip", KNOWN_WELL, 200)) == ["go"] * 20


def test_protected_right_after_a_resume() -> None:
    kept = State.from_json(json.loads(json.dumps(KNOWN_WELL.to_json())))
    assert began(run([(4.0, 3.0)], "clip", kept, 200))
    assert not began(run([(4.0, 3.0)], "clip", State(), 200))


# ------------------------------------------------------------------------------------------------------------
# The episode


def test_an_episode_from_end_to_end() -> None:
    rows = [(3.5, 2.0), (5.0, 8.0), (4.0, 9.0), *quiet(40, seed=3)]
    judged = run(rows, "clip", KNOWN_WELL, 200)
    (first,), (last,) = began(judged), ended(judged)
    assert (first.onset, first.peak_loss, first.peak_grad_norm, first.recovered) == (201, 3.5, 2.0, None)
    assert first.loss_before == pytest.approx(3.0, abs=0.02)
    assert first.grad_norm_before == pytest.approx(0.3, rel=0.1)
    assert (last.onset, last.last_flagged, last.recovered) == (201, 203, 204)
    assert (last.peak_loss, last.peak_loss_step) == (5.0, 202)
    assert (last.peak_grad_norm, last.peak_grad_norm_step) == (9.0, 203)
    assert judged.index(next(j for j in judged if j.ended)) == 2 + CALM
    assert judged[-1].state.episode is None
    assert judged[-1].state.aside_losses == ()


def test_back_means_back_for_good() -> None:
    """A loss that dips and comes up again has not recovered at the dip."""
    rows = [(4.0, 2.0)] * 3 + [(3.0, 0.3)] * 3 + [(4.0, 2.0)] + [(3.0, 0.3)] * 20
    (last,) = ended(run(rows, "clip", KNOWN_WELL, 200))
    assert (last.recovered, last.last_flagged) == (208, 207)


def test_a_loss_that_stays_a_little_up_is_not_back() -> None:
    """Below the alarm, and yet outside of three deviations."""
    normal = expected_loss(KNOWN_WELL.losses)
    up = normal.level + 4.5 * normal.deviation
    judged = run([(4.0, 2.0), *[(up, 0.3)] * 20, *quiet(20, seed=8)], "clip", KNOWN_WELL, 200)
    assert [j.flagged for j in judged] == [True] + [False] * 40
    assert [e.recovered for e in ended(judged)] == [222]


def test_a_cluster_is_one_episode_measured_from_before_it() -> None:
    rows = ([(4.0, 2.0)] * 5 + quiet(CALM - 2, seed=4)) * 4 + quiet(30, seed=5)
    judged = run(rows, "clip", KNOWN_WELL, 200)
    assert len(began(judged)) == len(ended(judged)) == 1
    assert sum(j.flagged for j in judged) == 20  # the later ones no less than the first


def test_a_step_that_is_not_finite_is_not_calm() -> None:
    rows = [(4.0, 2.0), *[(3.0, 0.3)] * 5, (NAN, 1.0), *[(3.0, 0.3)] * 20]
    judged = run(rows, "clip", KNOWN_WELL, 200)
    assert judged.index(next(j for j in judged if j.ended)) == 6 + CALM


def test_a_lasting_shift_is_the_new_normal_after_a_while() -> None:
    judged = run(quiet(500, seed=6, loss=3.4, norm=0.6), "clip", KNOWN_WELL, 200)
    (last,) = ended(judged)
    assert (last.onset, last.recovered) == (201, None)
    assert judged.index(next(j for j in judged if j.ended)) == GIVE_UP
    assert not any(j.flagged for j in judged[GIVE_UP + 1 :])
    assert not any(j.clip < 0.6 for j in judged[GIVE_UP + 1 :])
    assert min(judged[GIVE_UP].state.losses) > 3.3  # what was before it is past
    spike = run([(3.8, 3.0)], "clip", judged[-1].state, 700)
    assert began(spike)[0].loss_before == pytest.approx(3.4, abs=0.02)


@pytest.mark.parametrize("window", [16, 24, 64, 128])
def test_an_episode_ends_whatever_the_window(window: int) -> None:
    state = run(quiet(200), window=window)[-1].state
    judged = run(quiet(100, loss=4.0), "clip", state, 200, window=window)
    assert (len(began(judged)), len(ended(judged))) == (1, 1)
    assert judged[0].loss_z is not None


# ------------------------------------------------------------------------------------------------------------
# Policies

SPIKE = [(6.0, 30.0)] * 40


def test_watch_says_and_does_nothing() -> None:
    judged = run(SPIKE, "watch", KNOWN_WELL, 200)
    assert set(verdicts(judged)) == {"go"}
    assert {j.clip for j in judged} == {CLIP}
    assert len(began(judged)) == 1


def test_clip_cuts_at_the_usual_size_and_a_few_deviations() -> None:
    judged = run(SPIKE, "clip", KNOWN_WELL, 200)
    assert set(verdicts(judged)) == {"go"}
    logs = [math.log(norm) for _, norm in quiet(200)[-128:]]
    middle = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(v - middle) for v in logs)
    limit = math.exp(middle + 4 * deviation)
    assert [j.clip for j in judged] == pytest.approx([limit] * 40)  # the spike does not loosen it
    assert 0.3 < limit < 0.6


def test_the_given_clip_holds_where_it_is_lower() -> None:
    state = run(quiet(200, norm=4.0))[-1].state
    assert run([(3.0, 4.0)], "clip", state, 200)[0].clip == CLIP


def test_skip_leaves_out_a_few_and_no_more() -> None:
    judged = run(SPIKE, "skip", KNOWN_WELL, 200)
    assert verdicts(judged) == ["skip"] * SKIPS + ["go"] * 35
    assert verdicts(run([(3.0, 0.3 * 1e4)], "skip", KNOWN_WELL, 200)) == ["skip"]  # the gradient alone
    assert verdicts(run([(30.0, 0.3)], "skip", KNOWN_WELL, 200)) == ["skip"]  # the loss alone


def test_skip_leaves_a_spike_below_the_hard_threshold_to_clipping() -> None:
    z = run([(3.25, 1.0)], "skip", KNOWN_WELL, 200)[0]
    assert z.began is not None
    assert max(z.loss_z or 0, z.grad_z or 0) < StabilityConfig().hard
    assert z.verdict == "go"


def test_after_a_step_below_it_skipping_may_begin_again() -> None:
    rows = [*SPIKE[:7], (3.0, 0.3), *SPIKE[:7]]
    judged = run(rows, "skip", KNOWN_WELL, 200)
    assert verdicts(judged) == (["skip"] * 5 + ["go"] * 2) + ["go"] + (["skip"] * 5 + ["go"] * 2)


def test_rewind_when_the_loss_stays_up() -> None:
    judged = run(SPIKE, "rewind", KNOWN_WELL, 200, patience=12)
    assert verdicts(judged)[:13] == ["skip"] * SKIPS + ["go"] * 7 + ["rewind"]
    last = judged[12]
    assert last.ended is not None
    assert (last.ended.onset, last.ended.recovered, last.state.episode) == (201, None, None)


def test_the_longest_patience_still_comes_before_giving_up() -> None:
    judged = run(quiet(70, loss=4.0), "rewind", KNOWN_WELL, 200, patience=GIVE_UP - 1)
    assert verdicts(judged).index("rewind") == GIVE_UP - 1
    with pytest.raises(ValidationError):
        StabilityConfig(patience=GIVE_UP)


def test_no_rewind_from_a_spike_that_is_over() -> None:
    rows = [*SPIKE[:3], *quiet(40, seed=7)]
    assert "rewind" not in verdicts(run(rows, "rewind", KNOWN_WELL, 200, patience=4))


def test_after_the_last_rewind_it_is_policy_skip() -> None:
    spent = replace(KNOWN_WELL, rewinds=3)
    assert verdicts(run(SPIKE, "rewind", spent, 200)) == verdicts(run(SPIKE, "skip", KNOWN_WELL, 200))
    assert "rewind" not in verdicts(run(SPIKE, "rewind", KNOWN_WELL, 200, max_rewinds=0))


def test_after_a_rewind_what_was_normal_is_known_and_no_episode_is_open() -> None:
    during = run(SPIKE[:5], "rewind", KNOWN_WELL, 200)[-1].state
    now = replace(during, rewinds=1, streak=2)
    for saved in (KNOWN_WELL, during):
        back = after_rewind(saved, now)
        assert back == replace(KNOWN_WELL, rewinds=2)
    assert began(run([(4.0, 3.0)], "rewind", after_rewind(KNOWN_WELL, now), 190))


# ------------------------------------------------------------------------------------------------------------
# The state on disk


def test_the_state_comes_back_exactly() -> None:
    for state in (State(), KNOWN_WELL, run([*SPIKE[:3], (NAN, 1.0)], "skip", KNOWN_WELL, 200)[-1].state):
        assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


FULL = run(SPIKE[:3], "skip", KNOWN_WELL, 200)[-1].state.to_json()


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"bad_streak": 2},
        None,
        [],
        "state",
        {**FULL, "losses": 5},
        {**FULL, "losses": "3.0"},
        {**FULL, "losses": None},
        {**FULL, "losses": [3.0, "x"]},
        {**FULL, "losses": [3.0, True], "log_norms": [0.0, 0.0]},
        {**FULL, "losses": [3.0, NAN], "log_norms": [0.0, 0.0]},
        {**FULL, "losses": FULL["losses"][:-1]},
        {**FULL, "aside_losses": []},
        {**FULL, "streak": -1},
        {**FULL, "streak": "2"},
        {**FULL, "skips": 1.5},
        {**FULL, "calm": True},
        {**FULL, "episode": {}},
        {**FULL, "episode": 7},
        {**FULL, "episode": {**FULL["episode"], "onset": None}},
        {**FULL, "episode": {**FULL["episode"], "peak_loss": NAN}},
        {**FULL, "episode": {**FULL["episode"], "more": 1}},
    ],
)
def test_a_damaged_tree_means_that_nothing_is_known(tree: object) -> None:
    assert State.from_json(tree) == State()  # type: ignore[arg-type]


def test_an_older_tree_keeps_what_it_has() -> None:
    older = {key: FULL[key] for key in ("losses", "log_norms", "streak")} | {"unknown": 1}
    assert State.from_json(older) == KNOWN_WELL


# ------------------------------------------------------------------------------------------------------------
# Always

anything = st.floats(allow_nan=True, allow_infinity=True, width=64)
usual = st.tuples(st.floats(0.5, 12.0), st.floats(1e-3, 1e3))
series = st.lists(st.one_of(usual, st.tuples(anything, anything.map(abs))), max_size=60)


@settings(max_examples=150)
@given(
    rows=series,
    policy=st.sampled_from(POLICIES),
    window=st.integers(16, 200),
    clip=st.floats(1e-6, 1e6),
    warm=st.booleans(),
    patience=st.integers(1, 30),
)
def test_always(
    rows: list[tuple[float, float]], policy: str, window: int, clip: float, warm: bool, patience: int
) -> None:
    fields = {"policy": policy, "window": window, "patience": patience}
    configured = StabilityConfig.model_validate(fields)
    state = KNOWN_WELL if warm else State()
    skipped = 0
    for step, (loss, norm) in enumerate(rows, 201):
        before = state.to_json()
        judged = judge(state, step, loss, norm, configured, clip)
        assert judge(state, step, loss, norm, configured, clip) == judged  # pure
        assert state.to_json() == before
        finite = math.isfinite(loss) and math.isfinite(norm)
        state = judged.state
        if finite:
            for window_of in (state.losses, state.log_norms):
                assert len(window_of) <= max(window, 128)
        assert len(state.losses) == len(state.log_norms)
        assert all(map(math.isfinite, (*state.losses, *state.log_norms, *state.aside_losses)))
        assert len(state.aside_losses) <= GIVE_UP
        assert 0 < judged.clip <= clip
        if policy == "watch":
            assert judged.clip == clip
        if policy in ("watch", "clip"):
            assert (judged.verdict == "go") == finite
        assert finite or judged.verdict != "go"
        skipped = skipped + 1 if finite and judged.verdict == "skip" else 0
        assert skipped <= SKIPS
        assert (state.episode is None) == (state.aside_losses == ())
        assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@settings(max_examples=30)
@given(steps=st.integers(0, 400), window=st.integers(16, 64), seed=st.integers(0, 9))
def test_windows_hold_the_latest_steps(steps: int, window: int, seed: int) -> None:
    rows = quiet(steps, seed)
    state = State()
    for judged in run(rows, window=window):
        state = judged.state
        assert len(state.losses) <= window
    if state.episode is None:
        assert state.losses == tuple(loss for loss, _ in rows[-window:]) if steps else state.losses == ()
