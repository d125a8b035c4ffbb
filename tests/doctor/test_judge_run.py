"""What the numbers mean for a run, as tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from x1_pretrain.doctor import judge_run as judge
from x1_pretrain.doctor.all_reduce import Attempt
from x1_pretrain.doctor.estimate import Estimate, Price
from x1_pretrain.doctor.services import Alerts, Budget, Store
from x1_pretrain.doctor.trial import Trial

CORPUS = {
    "name": "web",
    "train_tokens": 10_000_000_000,
    "val_tokens": 10_000_000,
    "tokenizer": "gpt2",
    "vocab_size": 50257,
}
OPEN = {"corpora": [CORPUS]}
SAME = {
    "files": [
        {"file": "train.bin", "bytes": 5 << 30, "same": None},
        {"file": "val.bin", "bytes": 9, "same": True},
    ]
}
WRONG = {"files": [{"file": "tokenizer.json", "bytes": 9, "same": False}]}
ALL = {"open": OPEN, "hash web": SAME, "ids web": {}}


@pytest.mark.parametrize(
    ("trial", "status", "words"),
    [
        (Trial(ALL), "ok", "10 B tokens"),
        (Trial({"refused": {"message": "/x: no such corpus folder"}}), "broken", "no such corpus"),
        (Trial({"open": OPEN, "refused": {"message": "tokenized differently"}}), "broken", "differently"),
        (Trial({}, "ended after 20 s"), "broken", "ended after 20 s"),
        (Trial({**ALL, "refused": {"message": "an id outside"}}), "ok", "web"),  # said with the hashes
    ],
)
def test_corpora(trial: Trial, status: str, words: str) -> None:
    found = judge.corpora(trial)
    assert found.status == status
    assert words in found.found


@pytest.mark.parametrize(
    ("trial", "status", "words"),
    [
        (Trial(ALL), "ok", "the size alone of web/train.bin (5 GiB)"),
        (Trial({"open": OPEN, "hash web": WRONG}), "broken", "web/tokenizer.json"),
        (
            Trial({"open": OPEN, "hash web": SAME, "refused": {"message": "id 9 is outside"}}),
            "broken",
            "id 9",
        ),
        (Trial({"open": OPEN, "hash web": SAME}, "ended after 20 s"), "-", "ids not checked"),
        (Trial({}), "-", "did not open"),
    ],
)
def test_hashes(trial: Trial, status: str, words: str) -> None:
    found = judge.hashes(trial)
    assert found.status == status
    assert words in found.found


@pytest.mark.parametrize(("epochs", "status"), [(0.2, "ok"), (4.0, "ok"), (4.4, "slow")])
def test_plan_against_data(epochs: float, status: str) -> None:
    facts = {"asked_tokens": 4.4e10, "there_tokens": 1e10, "epochs": {"web": epochs, "code": 0.1}}
    found = judge.plan(facts)
    assert found.status == status
    assert "44 B tokens asked, 10 B there" in found.found
    assert judge.plan({}).status == "-"


@pytest.mark.parametrize(
    ("rate", "need", "status"),
    [(None, 1.0, "-"), (5e6, None, "ok"), (5e6, 2.5e6, "ok"), (5e6, 2.6e6, "slow"), (1e5, 1e6, "slow")],
)
def test_reading(rate: float | None, need: float | None, status: str) -> None:
    assert judge.reading({"tokens_per_sec": rate}, need).status == status


@pytest.mark.parametrize(
    ("line", "requested", "gpu", "status"),
    [
        ("attention: flash_attn (agrees)", "flash", True, "ok"),
        ("attention: sdpa (flash_attn can't be imported: x)", "flash", True, "slow"),
        ("attention: sdpa (flash_attn can't be imported: x)", "auto", True, "ok"),
        ("attention: sdpa (the device is cpu)", "flash", False, "ok"),
        (None, "auto", True, "-"),
    ],
)
def test_attention(line: str | None, requested: str, gpu: bool, status: str) -> None:
    assert judge.attention(line, requested, gpu).status == status


def message(text: str, mode: str, wanted: str = "max-autotune") -> dict[str, str]:
    return {"message": f"compile: {text}", "mode": mode, "wanted": wanted}


@pytest.mark.parametrize(
    ("facts", "eager", "compiled", "trouble", "status", "fix"),
    [
        (message("max-autotune (tried in 40 s)", "max-autotune"), 1.0, 0.6, None, "ok", ""),
        (message("off (asked for)", "off", "off"), 1.0, None, None, "ok", ""),
        (
            message(
                "default (tried in 9 s); max-autotune failed: still compiling after 20 s, ended", "default"
            ),
            1.0,
            0.7,
            None,
            "slow",
            "compile=default",
        ),
        (
            message("off; default failed: CompilationError: no C compiler", "off", "default"),
            1.0,
            None,
            None,
            "slow",
            "C compiler",
        ),
        (message("off after all (RuntimeError: x)", "off", "default"), 1.0, None, None, "slow", "compile"),
        (message("default (tried in 9 s)", "default", "default"), 1.0, 1.2, None, "slow", "compile=off"),
        ({}, 1.0, None, "ended after 60 s", "slow", "falls back"),
        ({}, None, None, "SIGSEGV", "-", ""),
    ],
)
def test_compilation(
    facts: dict[str, str],
    eager: float | None,
    compiled: float | None,
    trouble: str | None,
    status: str,
    fix: str,
) -> None:
    found = judge.compilation(facts, eager, compiled, trouble)
    assert found.status == status
    assert fix in found.fix
    assert bool(fix) == bool(found.fix)


MICRO = {"sequences": 8, "blocks": 512, "said": "micro-batch: 8 sequences (dry run: peak 9 GiB)"}


def test_dry_run() -> None:
    whole = judge.dry_run(Trial({"micro_batch": MICRO, "eager": {"sequences": 8}}))
    assert whole.status == "ok"
    assert "x 64 accumulated" in whole.found
    assert "measured with" not in whole.found
    part = judge.dry_run(Trial({"micro_batch": MICRO, "eager": {"sequences": 2}}))
    assert "measured with 2 at a time" in part.found
    refused = judge.dry_run(Trial({"refused": {"message": "not even one sequence fits"}}))
    assert (refused.status, refused.found) == ("broken", "not even one sequence fits")
    assert "SIGSEGV" in judge.dry_run(Trial({}, "killed by SIGSEGV")).found


@pytest.mark.parametrize(
    ("peak", "predicted", "status"),
    [
        (10, 10.0, "ok"),
        (12, 10.0, "ok"),
        (13, 10.0, "slow"),
        (7, 10.0, "slow"),
        (None, 10.0, "ok"),
        (1, None, "-"),
    ],
)
def test_peak_memory(peak: int | None, predicted: float | None, status: str) -> None:
    facts = {"peak_bytes": peak, "predicted_bytes": predicted, "resident_bytes": 5}
    assert judge.peak_memory(facts).status == status


PLAIN = Attempt({}, "works", "", 200e9)
HUNG = Attempt({}, "hangs", "no sign of life")
P2P = Attempt({"NCCL_P2P_DISABLE": "1"}, "works", "", 20e9)
SLOWER = Attempt({"NCCL_NET": "Socket"}, "works", "", 2e9)


@pytest.mark.parametrize(
    ("attempts", "link", "status", "words"),
    [
        ([], 450.0, "-", "one GPU"),
        ([PLAIN], 450.0, "ok", "200.0 GB/s"),
        ([PLAIN], None, "ok", "200.0 GB/s"),
        ([replace(PLAIN, bus_bytes_per_sec=100e9)], 450.0, "slow", "450 GB/s links"),
        ([HUNG, SLOWER, P2P], 450.0, "slow", "Best: NCCL_P2P_DISABLE=1"),
        ([HUNG, HUNG], 450.0, "broken", "hangs"),
        ([Attempt({}, "wrong", "the sum is wrong", 9e9)], 450.0, "broken", "wrong"),
    ],
)
def test_all_reduce(attempts: list[Attempt], link: float | None, status: str, words: str) -> None:
    found = judge.all_reduce(attempts, link, "/c/x1-nccl.env")
    assert found.status == status
    assert words in found.found
    if "Best" in words:
        assert "/c/x1-nccl.env" in found.fix
        assert "NCCL_NET=Socket: works, 2.0 GB/s" in found.found


@pytest.mark.parametrize(
    ("found", "capped", "status", "words"),
    [
        (Alerts(trouble="X1_ALERTS: address 1"), True, "broken", "address 1"),
        (Alerts(), False, "-", "no channel"),
        (Alerts(("ntfy://",)), True, "ok", "nothing sent"),
        (Alerts(("ntfy://",), ("SUCCESS",)), True, "ok", "taken"),
        (Alerts(("a://", "b://"), ("SUCCESS", "HTTP 404")), True, "broken", "b://: HTTP 404"),
    ],
)
def test_alerts(found: Alerts, capped: bool, status: str, words: str) -> None:
    row = judge.alerts(found, capped)
    assert row.status == status
    assert words in row.found
    assert bool(judge.alerts(Alerts(), capped).fix) is capped


STORE = Store("sqlite:////m/mlflow.db", Path("/m/mlflow.db"), True, True)


@pytest.mark.parametrize(
    ("store", "trial", "status"),
    [
        (None, None, "-"),
        (replace(STORE, installed=False), None, "broken"),
        (replace(STORE, writable=False), None, "broken"),
        (STORE, None, "ok"),
        (STORE, Trial({"store": {"experiments": 1}}), "ok"),
        (STORE, Trial({"store": {"trouble": "refused"}}), "broken"),
        (STORE, Trial({}, "ended after 15 s"), "broken"),
    ],
)
def test_mlflow(store: Store | None, trial: Trial | None, status: str) -> None:
    assert judge.mlflow(store, trial).status == status


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (None, "-"),
        (Budget("b.json", absent=True), "-"),
        (Budget("b.json", trouble="not valid JSON"), "broken"),
        (Budget("b.json", 1.5, 2.0), "ok"),
    ],
)
def test_budget(found: Budget | None, status: str) -> None:
    assert judge.budget(found).status == status


def estimated(usd: float, low: float, high: float) -> Estimate:
    return Estimate((1.0, 1.0, 1.0), (usd, low, high), {}, 10, Price(1.0, "x"))


@pytest.mark.parametrize(
    ("found", "cap", "status"),
    [
        (estimated(20, 18, 25), None, "-"),
        (None, 35.0, "-"),
        (replace(estimated(20, 18, 25), price=None), 35.0, "-"),
        (estimated(20, 18, 25), 35.0, "ok"),
        (estimated(33, 30, 36), 35.0, "slow"),
        (estimated(36, 34, 40), 35.0, "broken"),
    ],
)
def test_cost_against_the_ceiling(found: Any, cap: float | None, status: str) -> None:
    assert judge.cost(found, cap).status == status
