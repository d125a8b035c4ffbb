"""A page for machines that the tests do not run on: GPUs, made of numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import tiny_config

from x1_pretrain.config_reading import parse_config
from x1_pretrain.doctor import conclusion
from x1_pretrain.doctor.all_reduce import Attempt
from x1_pretrain.doctor.conclusion import Page
from x1_pretrain.doctor.disk import Disk
from x1_pretrain.doctor.examination import Examined, Options
from x1_pretrain.doctor.findings import Finding
from x1_pretrain.doctor.gpu import Card, Driver
from x1_pretrain.doctor.machine import look
from x1_pretrain.doctor.mirror import Visit
from x1_pretrain.doctor.services import Budget
from x1_pretrain.doctor.trial import Trial
from x1_pretrain.model.flops import parameter_counts
from x1_pretrain.money.prices import list_price

NAME = "NVIDIA H100 80GB HBM3"
CARDS = tuple(Card(NAME, uuid=f"GPU-{n}", used_mib=3.0, reasons=0, persistence=True) for n in range(2))
RATE = {
    "bf16": 700e12,
    "fp32": 50e12,
    "side": 8192,
    "products": {},
    "copy_bytes_per_sec": 2.8e12,
    "upload_bytes_per_sec": 50e9,
}
MICRO = [0.1] * 12
MEASURED = {
    "sequences": 4,
    "micro_s": MICRO,
    "update_s": 0.02,
    "forward_s": 0.03,
    "peak_bytes": 2_000_000,
    "resident_bytes": 1,
    "predicted_bytes": 2_000_000.0,
}


def machine(**changed: Any) -> Examined:
    compute = {
        "torch": {"version": "2.13.0+cu128", "cuda": "12.8", "problem": None},
        "devices": {"count": 2, "names": [NAME, NAME]},
        "arithmetic": {"works": True},
        "rate 0": RATE,
        "rate 1": RATE,
        "load": {"cards": [card.to_json() for card in CARDS]},
    }
    corpus = {"name": "web", "train_tokens": 10**6, "val_tokens": 10**4, "tokenizer": "t", "vocab_size": 300}
    corpus |= {"domains": {"web": 10**4}, "tokenizer_bytes": 1000}
    step = {
        "model": {"precision": "precision: bf16 (x)", "attention": "attention: sdpa (x)"},
        "micro_batch": {"sequences": 4, "blocks": 8, "said": "micro-batch: 4 sequences"},
        "eager": {**MEASURED, "micro_s": [0.2] * 12},
        "compile": {"message": "compile: default (tried)", "mode": "default", "wanted": "default"},
        "compiled": MEASURED,
    }
    facts: dict[str, Any] = {
        "compute": Trial(compute),
        "data": Trial({"open": {"corpora": [corpus]}}),
        "step": Trial(step),
        "disk": Disk("/x", 1 << 40, "ext4", 1e9, 2e9, 1 << 29, "O_DIRECT"),
        "attempts": [Attempt({}, "works", "", 300e9)],
        "ranks": 2,
        "cuda": True,
    }
    driver = changed.pop("driver", Driver("12.8", "570", CARDS))
    return Examined(look(environment={}), driver, **{**facts, **changed})


def page(facts: Examined, usd_per_hr: float | None = None, **budget: Any) -> Page:
    training = {"batch_tokens": 512, "total_steps": 50}
    config = parse_config(tiny_config(budget=budget, training=training), "test")
    options = Options(config, None, Path(), None, "auto", False, False, True, 100.0, (), {})
    return conclusion.conclude(options, facts, Path("/nowhere/x1-nccl.env"), usd_per_hr)


def row(found: Page, check: str) -> Finding:
    return next(finding for finding in found.findings if finding.check == check)


def test_a_good_machine_of_two_gpus() -> None:
    found = page(machine())
    for check in (
        "CUDA driver",
        "GPUs",
        "GPU kind",
        "GPU health",
        "matmul",
        "memory bandwidth",
        "all-reduce",
    ):
        assert row(found, check).status == "ok", row(found, check)
    assert "2 x NVIDIA H100" in found.estimate_text
    assert "bf16, compile default" in found.estimate_text


def test_the_estimate_is_of_the_compiled_step_on_both_gpus() -> None:
    config = parse_config(tiny_config(model={"vocab_size": 300}), "test")
    weights = parameter_counts(config.model).total
    step_s = 8 / 4 * 0.1 + 0.02 + 4 * weights * 2 * (1 / 2) / 300e9
    estimate = page(machine()).estimate
    assert estimate is not None
    assert estimate.tokens_per_sec[0] == pytest.approx(512 / step_s)
    assert estimate.parts_s["training"] == pytest.approx(50 * step_s)
    assert estimate.parts_s["evaluation"] == pytest.approx(6 * 512 / (4 * 32) * 0.03 / 2)
    size = 12 * weights + 1000 + 65536
    assert estimate.parts_s["checkpoints"] == pytest.approx(6 * (size / 1e9 + 2 * size / 2e9))


def test_without_data_evaluations_are_not_counted() -> None:
    found = page(machine(data=Trial({}, "it did not open")))
    assert found.estimate is not None
    assert found.estimate.parts_s["evaluation"] is None
    assert "evaluation: not counted" in found.estimate_text
    assert "evaluation 0s" not in found.estimate_text


def test_a_cpus_late_trial_breaks_nothing() -> None:
    compute = Trial({"torch": {"version": "2"}, "arithmetic": {"works": True}}, "ended after 35 s")
    assert row(page(machine(compute=compute, cuda=False, ranks=1)), "matmul").status == "slow"
    assert row(page(machine(compute=compute)), "matmul").status == "broken"


def test_the_room_on_the_disk_is_explained() -> None:
    told = row(page(machine()), "disk space").found
    assert "the one being written among them; 64 MiB for logs" in told


def test_which_price_is_taken() -> None:
    listed = list_price("h100", 2)
    assert listed is not None

    def price(facts: Examined, flag: float | None = None, **budget: Any) -> float | None:
        estimate = page(facts, flag, **budget).estimate
        return estimate.price.usd_per_hr if estimate and estimate.price else None

    paid = machine(budget=Budget("b.json", 1.0, 2.5))
    assert price(paid, 9.0, max_usd_per_hr=7.0) == 9.0
    assert price(paid, None, max_usd_per_hr=7.0) == 2.5
    assert price(machine(), None, max_usd_per_hr=7.0) == 7.0
    assert price(machine()) == pytest.approx(2 * float(listed.usd_per_hr))
    assert price(machine(cuda=False)) is None


def test_only_the_processes_on_our_gpus_count() -> None:
    elsewhere = page(machine(driver=Driver("12.8", "570", CARDS, ("GPU-9",))))
    assert row(elsewhere, "GPU health").status == "ok"
    here = page(machine(driver=Driver("12.8", "570", CARDS, ("GPU-1",))))
    assert row(here, "GPU health").status == "slow"


def test_throttling_on_the_second_gpu_is_seen() -> None:
    cards = [CARDS[0].to_json(), replace(CARDS[1], reasons=0x40).to_json()]
    facts = machine()
    facts.compute.parts["load"] = {"cards": cards, "loaded": 2}
    assert "too hot" in row(page(facts), "GPU health").found


def test_a_card_that_was_not_loaded_is_not_judged_as_busy() -> None:
    """Its link sleeps, and its watts are those of doing nothing."""
    idle = replace(CARDS[0], power_w=60.0, pcie_width=1.0, pcie_width_max=16.0)
    facts = machine()
    facts.compute.parts["load"] = {
        "cards": [idle.to_json(), replace(CARDS[1], power_w=650.0).to_json()],
        "loaded": 1,
    }
    found = row(page(facts), "GPU health")
    assert found.status == "ok"
    assert "no throttling on the 1 of 2 under load" in found.found
    assert "650 W under load" in found.found


def test_a_compiler_that_hung_leaves_the_plain_measurement() -> None:
    facts = machine()
    assert facts.step is not None
    parts = {name: part for name, part in facts.step.parts.items() if not name.startswith("compile")}
    found = page(machine(step=Trial(parts, "ended after 60 s without an answer")))
    assert row(found, "compile").status == "slow"
    assert found.estimate is not None
    assert found.estimate.tokens_per_sec[0] == pytest.approx(512 / (2 * 0.2 + 0.02), rel=1e-3)
    assert "compile off" in found.estimate_text


def test_a_mirror_is_judged_by_the_measured_step() -> None:
    """1 MB/s there and back; between two checkpoints 10 steps, each as the estimate has it."""
    sent = {"bytes": 10**6, "seconds": 1.0, "total_bytes": 10**6}
    parts = {"store": {"label": "s3://b/r", "conditional": True, "look_s": 0.0}, "sent": sent, "read": sent}
    tree = tiny_config(
        model={"vocab_size": 300},
        training={"batch_tokens": 512, "total_steps": 50},
        checkpoint={"every": 10},
        mirror={"uri": "s3://b/r", "every_s": 0.5},
    )
    config = parse_config(tree, "test")
    options = Options(config, None, Path(), None, "auto", False, False, True, 100.0, (), {})
    facts = machine(mirror=Visit("s3://b/r", Trial(parts)))
    found = conclusion.conclude(options, facts, Path("/nowhere/x1-nccl.env"), 3.6)
    assert found.estimate is not None
    size = conclusion.checkpoint_bytes(config, facts)
    step_s = 512 / found.estimate.tokens_per_sec[0]
    write_s = size / 1e9 + 2 * size / 2e9
    measured = row(found, "mirror pace").measured
    assert row(found, "mirror").status == "ok"
    assert measured["send_s"] == pytest.approx(size / 1e6)
    assert measured["lost_s"] == pytest.approx(10 * step_s + 2 * write_s + 0.5 + size / 1e6)
    assert f"${measured['lost_s'] / 1000:.2g}" in row(found, "mirror pace").found


def test_no_mirror_does_not_apply() -> None:
    found = page(machine())
    assert row(found, "mirror").status == "-"
    assert "mirror pace" not in [one.check for one in found.findings]
