"""What a branch rests on: the order of the data begins the same, however long the run is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpora import tiny_config
from x1_pretrain.config import ADDED, OptimizerConfig, config_hash, step_fields
from x1_pretrain.config_reading import parse_config
from x1_pretrain.corpus.order import Order, Source
from x1_pretrain.runtime.branch import SCHEDULE, optimizer_of, unlike
from x1_pretrain.runtime.checkpoint import RunState, read_state


@settings(max_examples=60)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=4),
    blocks=st.integers(3, 40),
    batch=st.integers(1, 9),
    short=st.integers(1, 40),
    more=st.integers(0, 40),
)
def test_a_longer_run_begins_with_the_blocks_of_a_shorter_one(
    weights: list[float], blocks: int, batch: int, short: int, more: int
) -> None:
    sources = [Source(f"corpus {i}", blocks + i, weight) for i, weight in enumerate(weights)]
    one, other = (Order(7, sources, batch, total) for total in (short, short + more))
    assert [one.step_blocks(s) for s in range(short)] == [other.step_blocks(s) for s in range(short)]


def test_only_the_fields_of_the_learning_rate_may_differ() -> None:
    """Whoever adds a field to the optimizer has to say whether it is one of them."""
    own = {path.removeprefix("optimizer.") for path in SCHEDULE if path.startswith("optimizer.")}
    others = {"beta1", "beta2", "eps", "weight_decay", "clip"}
    assert own | others == set(OptimizerConfig.model_fields)


def test_a_state_from_before_there_were_two_schedules_is_a_cosine() -> None:
    fields = {"optimizer.lr": 1e-3, "optimizer.min_lr": 0.0, "optimizer.warmup_steps": 3, "seed": 1}
    assert optimizer_of(fields) == OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=3)


def test_a_state_written_before_there_were_branches_is_read(tmp_path: Path) -> None:
    """And its run goes on: hash and fields are those that today's config gives with its defaults, and with
    the one policy that leaves a step as it was then."""
    config = parse_config(tiny_config(stability={"policy": "watch"}), "test")
    fields = {path: value for path, value in step_fields(config).items() if path not in ADDED}
    assert fields == step_fields(config)
    old = RunState("run", 3, 768, 1.5, 1, config_hash(config, ["a"]), fields, ["a"], "fp32", 32)
    written = {"schema_version": 1, **asdict(old)}
    del written["parent"]
    (tmp_path / "state.json").write_text(json.dumps(written))
    assert read_state(tmp_path) == old
    assert unlike(config, ["a"], old) == []
    assert unlike(config, ["b"], old) == ["content of the corpora: a -> b"]
