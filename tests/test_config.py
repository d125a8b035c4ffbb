"""A config is strict, says what is wrong, and knows which of its fields decide what a step computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from tests.corpora import tiny_config
from x1_pretrain import config as cfg
from x1_pretrain import train
from x1_pretrain.command import run
from x1_pretrain.config_reading import load_config, parse_assignment, parse_config, to_yaml
from x1_pretrain.errors import UserError
from x1_pretrain.learning.recipe import recipe
from x1_pretrain.model.flops import flops_per_token, parameter_counts

PUBLISHED = REPOSITORY / "configs" / "x1-50m-a100.yaml"


def test_the_published_config_is_what_was_published() -> None:
    config = load_config(PUBLISHED)
    model, optimizer = config.model, config.optimizer
    assert (model.layers, model.d_model, model.heads, model.kv_heads, model.d_ff) == (8, 768, 12, 4, 2048)
    assert (model.context, model.vocab_size, model.rope_theta, model.init_std) == (1024, 50257, 10000, 0.02)
    assert model.tied_embeddings
    assert model.padded_vocab == 50304
    assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps, optimizer.clip) == (3e-4, 3e-5, 1000, 1.0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (config.training.total_steps, config.training.batch_tokens, config.seed) == (84000, 524288, 42)
    assert config.batch_blocks == 512
    assert config.verify.loss_band == [3.20, 3.50]
    assert config.checkpoint.every == config.evaluation.every == 1800
    assert config.log.every == 10


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(
        PUBLISHED, {"model.qk_norm": True, "data.corpora": {"web": {"dir": "a", "weight": 2.0}}}
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", "3.0e-4", "+3e-4"])
def test_a_number_in_exponent_notation_is_a_number(text: str) -> None:
    path, value = parse_assignment(f"optimizer.lr={text}")
    assert load_config(PUBLISHED, {path: value}).optimizer.lr == 3e-4


def test_off_is_a_word_and_true_is_not(tmp_path: Path) -> None:
    path, value = parse_assignment("training.compile=off")
    assert load_config(PUBLISHED, {path: value}).training.compile == "off"
    (tmp_path / "c.yaml").write_text(PUBLISHED.read_text().replace("compile: max-autotune", "compile: off"))
    assert load_config(tmp_path / "c.yaml").training.compile == "off"
    assert parse_assignment("log.blocks=true") == ("log.blocks", True)


def test_overrides_reach_any_depth() -> None:
    config = load_config(PUBLISHED, {"data.corpora.web.dir": "x", "data.corpora.web.weight": 3})
    assert config.data.mixture() == {"web": cfg.CorpusConfig(dir="x", weight=3.0)}


@pytest.mark.parametrize("value", [True, 1.5, "8", [8], None])
def test_nothing_is_converted_silently(value: Any) -> None:
    with pytest.raises(UserError, match=r"model\.layers: expected a valid integer"):
        parse_config(tiny_config(model={"layers": value}), "test")


def test_every_problem_is_named_at_once() -> None:
    tree = tiny_config(model={"layers": 0}, optimizer={"lr": -1.0}, log={"evry": 3})
    with pytest.raises(UserError) as error:
        parse_config(tree, "c.yaml")
    text = str(error.value)
    assert text.startswith("c.yaml: ")
    for part in ("model.layers", "optimizer.lr", "log.evry: unknown key, did you mean 'every'?"):
        assert part in text
    assert "\n" not in text


LEAVES = sorted(cfg.flatten(parse_config(tiny_config(), "test").model_dump()))


def test_every_field_is_either_harmless_or_part_of_the_hash() -> None:
    """A new field counts as changing a step until someone decides otherwise."""
    config = parse_config(tiny_config(), "test")
    harmless = {leaf for leaf in LEAVES if leaf not in cfg.step_fields(config)} - set(cfg.ADDED)
    assert {leaf.split(".")[0] for leaf in harmless} <= {
        *(
            "name",
            "run_dir",
            "data",
            "training",
            "checkpoint",
            "evaluation",
            "log",
            "mirror",
            "mlflow",
            "budget",
            "stability",
            "telemetry",
            "watchdog",
            "verify",
            "model",
        )
    }
    of_the_step = ("training", "data", "model", "stability")
    assert {leaf for leaf in harmless if leaf.startswith(of_the_step)} == {
        "stability.inject_spike_at_step",
        "data.dir",
        "model.vocab_multiple",
        "training.micro_batch",
        "training.compile",
        "training.compile_timeout_s",
        "training.attention",
        "training.deterministic",
    }


CHANGES: dict[str, Any] = {"model.layers": 3, "optimizer.lr": 1e-3, "seed": 8, "training.total_steps": 31}


@given(path=st.sampled_from(sorted(CHANGES)))
def test_a_change_that_matters_changes_the_hash_and_is_named(path: str) -> None:
    section, _, field = path.partition(".")
    before = parse_config(tiny_config(), "test")
    after = parse_config(tiny_config(**{section: {field: CHANGES[path]} if field else CHANGES[path]}), "test")
    assert cfg.config_hash(before, ["a"]) != cfg.config_hash(after, ["a"])
    assert cfg.config_hash(before, ["a"]) != cfg.config_hash(before, ["b"])
    (named,) = cfg.changed_fields(cfg.step_fields(before), cfg.step_fields(after))
    assert named.startswith(f"{path}: ")


def test_where_the_data_lie_does_not_matter_but_the_mixture_does() -> None:
    def mixture(folder: str, weight: float) -> cfg.RunConfig:
        return parse_config(tiny_config(data={"corpora": {"web": {"dir": folder, "weight": weight}}}), "test")

    assert cfg.config_hash(mixture("a", 1.0), []) == cfg.config_hash(mixture("b", 1.0), [])
    assert cfg.config_hash(mixture("a", 1.0), []) != cfg.config_hash(mixture("a", 2.0), [])


WSD = {"schedule": "wsd", "decay_steps": 6}


def test_fields_that_came_later_leave_an_older_run_as_it_was() -> None:
    """The hash of the tiny config as it was computed before any of them existed. A run from before spikes
    were clipped goes on unclipped: `watch` is what it did."""
    config = parse_config(tiny_config(stability={"policy": "watch"}), "test")
    assert cfg.config_hash(config, ["a"]).startswith("e9ff6060f9441a2b")
    fields = cfg.flatten(config.model_dump())
    assert {path: fields[path] for path in cfg.ADDED} == cfg.ADDED
    wsd = parse_config(tiny_config(optimizer=WSD, stability={"policy": "watch"}), "test")
    assert cfg.config_hash(wsd, ["a"]) != cfg.config_hash(config, ["a"])
    assert cfg.changed_fields(cfg.step_fields(config), cfg.step_fields(wsd)) == [
        "optimizer.decay_steps: None -> 6",
        "optimizer.schedule: cosine -> wsd",
    ]


def test_the_decay_of_wsd_is_a_fifth_of_the_run_unless_said() -> None:
    assert [cfg.OptimizerConfig(schedule="wsd").decay(total) for total in (1, 7, 440, 8800)] == [
        0,
        1,
        88,
        1760,
    ]
    assert cfg.OptimizerConfig(schedule="wsd", decay_steps=0).decay(440) == 0


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"optimizer": {"decay_steps": 6}}, "decay_steps 6 belongs to schedule wsd"),
        ({"optimizer": {**WSD, "decay_steps": 26}}, "warmup_steps 5 + 26 of decay"),
        ({"optimizer": {"schedule": "wsd", "warmup_steps": 25}}, "warmup_steps 25 + 6 of decay"),
        ({"checkpoint": {"at": [3, 31]}}, "checkpoint.at 31 is after the end, training.total_steps 30"),
        ({"checkpoint": {"at": [0]}}, "checkpoint.at.0"),
    ],
)
def test_schedules_and_checkpoints_that_do_not_fit_are_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named.replace("+", r"\+")):
        parse_config(tiny_config(**sections), "test")


# ------------------------------------------------------------------------------------------------------------
# The three sizes of lab 01

LAB = {
    "A": (5e6, 8800, ["--mlflow-uri", "file:///workspace/mlruns"]),
    "B": (25e6, 1760, []),
    "C": (100e6, 440, []),
}


@pytest.mark.parametrize("size", LAB)
def test_the_numbers_in_a_published_configs_comments_are_its_arithmetic(size: str) -> None:
    file = REPOSITORY / "configs" / f"x1-isoflop-{size}.yaml"
    text, config = file.read_text(), load_config(file)
    counts, flops = parameter_counts(config.model), flops_per_token(config.model)
    matrices, steps, _ = LAB[size]
    assert counts.matrices == pytest.approx(matrices, rel=0.04)
    tokens = steps * 524_288
    for number in (f"{counts.matrices:,}", f"{counts.total:,}", f"{tokens:,}", f"{flops.six_n * tokens:.3g}"):
        assert number in text
    assert f"{flops.causal * tokens:.3g} in truth" in text
    assert f"= {tokens / counts.matrices:.3g} tokens a parameter" in text
    assert config.model.d_ff == round(8 / 3 * config.model.d_model / 64) * 64
    assert config.model.head_size == 64
    assert (config.training.total_steps, config.training.batch_tokens) == (steps, 524_288)
    told = recipe(config.model, tokens, 524_288)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps) == (
        told.lr,
        told.min_lr,
        told.warmup_steps,
    )
    assert (optimizer.schedule, optimizer.decay(steps)) == ("wsd", told.decay_steps)


def test_the_three_sizes_share_nothing_that_they_write_and_all_that_they_read() -> None:
    configs = [load_config(REPOSITORY / "configs" / f"x1-isoflop-{size}.yaml") for size in LAB]
    assert len({c.folder for c in configs}) == len({c.checkpoint_folder for c in configs}) == 3
    assert {c.data.dir for c in configs} == {"/workspace/data/tokenized"}
    assert {c.mlflow.uri for c in configs} == {None}
    assert len({(c.evaluation.tokens, c.seed, c.model.context, c.model.vocab_size) for c in configs}) == 1


@pytest.mark.parametrize("size", LAB)
def test_the_published_command_of_lab_01_without_its_folder_is_one_line(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As written: no --data-dir, no --ckpt-dir. Here the config's folder is absent, and the flag is named."""
    if Path("/workspace/data/tokenized").exists():
        pytest.skip("/workspace/data/tokenized is there")
    monkeypatch.chdir(tmp_path)
    _, steps, more = LAB[size]
    command = [
        "--config",
        str(REPOSITORY / "configs" / f"x1-isoflop-{size}.yaml"),
        "--total-steps",
        str(steps),
    ]
    command += ["--eval-every", str(steps // 10), *more, "--mlflow-experiment", f"isoflop-{size}"]
    assert run(train.app, command, prog="x1 train") == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("x1: /workspace/data/tokenized: no such corpus folder; pass --data-dir DIR")
    assert not list(tmp_path.iterdir())
