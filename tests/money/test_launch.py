"""`x1 launch` against the fake provider: a sentence before anything is billed, each refusal without a single
launch request, one machine at most whatever becomes of the answer, no secret anywhere."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config
from tests.money.fakes import Rental, Turns, renting, waiting

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import FAULT, FINISHED, INTERRUPTED, REFUSED, USAGE, UserError
from x1_pretrain.money import latch, launch, launching, machine_jobs, pricing, reconcile
from x1_pretrain.money import renting as renting_module
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.money.providers.fake.server import FakeProvider
from x1_pretrain.money.providers.runpod import RunPod
from x1_pretrain.money.teardown import end_loudly
from x1_pretrain.records import run_manifest

SECRET = "s3cr3t-t0ken"
ALERTS = f"json://user:{SECRET}@127.0.0.1:9/hook"


@pytest.fixture(params=["fake"])
def rental(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rental]:
    folder = tmp_path / "runs" / "tiny"
    write_config(tmp_path / "tiny.yaml", run_dir=str(folder))
    world = {"gpu": "A100 80GB", "price_usd_per_hr": "1.19"}
    with renting(folder, monkeypatch, request.param, **world) as rental:
        monkeypatch.setattr(Clock, "from_environment", lambda: rental.clock)
        yield rental


on_real_apis = pytest.mark.parametrize("rental", ["runpod", "lambda"], indirect=True)


def command(rental: Rental, *words: str, cap: str = "5", price: str = "4.50", yes: bool = True) -> int:
    config = rental.folder.parent.parent / "tiny.yaml"
    given = ["--config", str(config), "--provider", rental.provider.name, "--budget-cap-usd", cap]
    given += [
        "--tokens-per-sec",
        "2",
        "--max-price",
        price,
        "--source",
        "x1.whl",
        *(["--yes"] if yes else []),
    ]
    return run_app(launch.app, [*given, *words], prog="x1 launch")


def launches(rental: Rental) -> int:
    return sum(count for name, count in rental.fake.world.requests.items() if name.endswith(" launch"))


def nothing_happened(rental: Rental) -> bool:
    return launches(rental) == 0 and not rental.fake.world.machines and not rental.rows("intent")


# ------------------------------------------------------------------------------------------------------------
# The sentence


def test_the_sentence_is_printed_and_kept_before_the_request(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before: dict[str, Any] = {}
    send = type(rental.provider).launch

    def watched(provider: Any, request: Any) -> str:
        before["printed"] = capsys.readouterr().out
        before["events"] = [(row["event"], row.get("verdict")) for row in rental.ledger.rows()]
        before["requests"] = launches(rental)
        return str(send(provider, request))

    monkeypatch.setattr(type(rental.provider), "launch", watched)
    assert command(rental, "--detach") == FINISHED
    assert before["printed"].startswith("This will start 1x A100 80GB on the fake provider secure at $1.19/h")
    assert before["events"] == [("gate", "passed"), ("intent", None)]
    assert before["requests"] == 0
    assert rental.rows("gate")[0]["message"] in before["printed"]
    assert launches(rental) == 1
    assert rental.rows("intent")[0]["usd_per_hr"] > "1.19"  # the disk is in it
    assert rental.rows("launched")[0]["machine_id"] == next(iter(rental.fake.world.machines))
    assert rental.rows("active")
    assert "x1 guard" in capsys.readouterr().out


def test_price_only_prints_it_and_leaves_nothing(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(rental, "--price-only", yes=False) == FINISHED
    assert capsys.readouterr().out.count("This will start") == 1
    assert nothing_happened(rental)
    assert not rental.ledger.rows()
    assert command(rental, "--price-only", cap="0.50") == REFUSED
    assert not rental.ledger.rows()


@pytest.mark.parametrize("rental", ["fake", "runpod"], indirect=True)
@pytest.mark.parametrize("count", [1, 2])
def test_every_gpu_that_is_paid_for_gets_a_rank(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    scripts: list[str] = []
    send = type(rental.provider).launch

    def kept(provider: Any, request: Any) -> str:
        scripts.append(request.script)
        return str(send(provider, request))

    monkeypatch.setattr(type(rental.provider), "launch", kept)
    monkeypatch.setattr(launch, "refuse_silence", lambda *_: None)
    assert command(rental, "--gpus", str(count), "--detach") == FINISHED
    words = scripts[0].split()
    places = [place for place, word in enumerate(words) if word == "--ranks"]
    assert bool(places) == (count > 1)
    for place in places:
        assert words[place + 1] == str(count)
        assert "--" in words[place - 20 : place]  # the trainer's, not the supervisor's


def test_gpus_that_can_not_share_a_step_are_not_rented(
    rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(rental, "--gpus", "3") == USAGE
    assert "256 is 8 blocks of 32, which 3 ranks can't share evenly" in capsys.readouterr().err
    assert nothing_happened(rental)


# ------------------------------------------------------------------------------------------------------------
# Refusals


def refused(rental: Rental, capsys: pytest.CaptureFixture[str], *words: str, **options: Any) -> str:
    assert command(rental, *words, **options) == REFUSED
    assert nothing_happened(rental)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_above_the_ceiling(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(rental, capsys, cap="0.90")
    assert "the total" in error
    assert "This will start" in error
    assert "too much" in error


def test_above_the_highest_price(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(rental, capsys, price="1.10")
    assert "$1.19/h is above --max-price $1.10/h" in error
    assert "This will start" in error


def test_waiting_for_a_price_that_falls(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    rental.fake.fault("price_jump", factor="0.9", after_s=3000)
    begun = rental.clock.steady_s()
    assert command(rental, "--wait", "4h", "--detach", price="1.10") == FINISHED
    assert 3000 <= rental.clock.steady_s() - begun < 3600
    assert "at $1.071/h" in capsys.readouterr().out
    assert launches(rental) == 1


def test_waiting_for_a_price_that_does_not(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    begun = rental.clock.steady_s()
    refused(rental, capsys, "--wait", "2h", price="1.10")
    assert 7200 <= rental.clock.steady_s() - begun < 7600


def test_waiting_survives_a_provider_that_is_down(rental: Rental) -> None:
    rental.fake.fault("500", on="catalog", for_s=1200)
    assert command(rental, "--wait", "4h", "--detach") == FINISHED


def test_nothing_free(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    rental.fake.fault("no_capacity", for_s=1800)
    assert "nothing of this kind is free" in refused(rental, capsys)
    assert command(rental, "--wait", "1h", "--detach") == FINISHED


@on_real_apis
def test_alerts_that_reach_nobody(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(rental, capsys)
    assert "X1_ALERTS" in error
    assert "docs/alerts.md" in error
    assert "This will start" in error


def test_alerts_that_fail(
    rental: Rental, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X1_ALERTS", ALERTS)
    error = refused(rental, capsys)
    assert "did not get through" in error
    assert SECRET not in error
    assert SECRET not in rental.ledger.file.read_text()


def test_hardware_without_a_price(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(rental, capsys, "--gpu", "b200")
    assert "no price for 1x b200: without one nothing starts; try another --gpu" in error


def test_hours_that_nobody_knows(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "peak_bf16_flops_per_sec", lambda _: None)
    assert command(rental, "--tokens-per-sec", "2", "--detach", "--price-only") == FINISHED
    words = ["--config", str(rental.folder.parent.parent / "tiny.yaml"), "--provider", "fake", "--yes"]
    assert run_app(launch.app, [*words, "--budget-cap-usd", "35"], prog="x1 launch") == REFUSED
    assert nothing_happened(rental)


@pytest.mark.parametrize("rental", ["runpod"], indirect=True)
def test_a_balance_that_does_not_last(
    rental: Rental, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepaid machines end at $0; a provider that does not tell its balance (None) is no reason to refuse."""
    monkeypatch.setenv("X1_ALERTS", "")
    monkeypatch.setattr(launch, "refuse_silence", lambda *_: None)
    for balance, code in ((Decimal("0.05"), REFUSED), (None, FINISHED)):
        monkeypatch.setattr(RunPod, "balance_usd", lambda _, balance=balance: balance)
        assert command(rental, "--detach") == code
        if balance is not None:
            assert "the balance: RunPod holds $0.05, this needs" in capsys.readouterr().err
            assert nothing_happened(rental)


def test_two_launches_at_once_rent_one_machine(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second comes while the first waits for a person's yes."""
    second: list[int] = []

    def said(_: str) -> str:
        second.append(command(rental, "--detach"))
        return "y"

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", said)
    assert command(rental, "--detach", yes=False) == FINISHED
    assert second == [REFUSED]
    assert "another x1 launch is going on here" in capsys.readouterr().err
    assert len(rental.fake.world.machines) == 1


def git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *own, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_machine_runs_the_code_that_is_seen_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of a clean checkout that a remote has; anything else must be named by the user."""
    remote, here = tmp_path / "remote", tmp_path / "here"
    git(tmp_path, "init", "--bare", str(remote))
    git(tmp_path, "clone", str(remote), str(here))
    file = here / "a.py"
    file.write_text("1")
    git(here, "add", "a.py")
    git(here, "commit", "-m", "a")
    monkeypatch.setattr(machine_jobs, "__file__", str(file))
    monkeypatch.setattr(run_manifest, "__file__", str(file))
    git(here, "remote", "set-url", "origin", "https://example.org/x1.git")
    with pytest.raises(UserError, match="not pushed"):
        machine_jobs.this_checkout()
    git(here, "push", str(remote), "HEAD:main")
    git(here, "update-ref", "refs/remotes/origin/main", "HEAD")
    commit = git(here, "rev-parse", "HEAD")
    assert machine_jobs.this_checkout() == f"x1-pretrain @ git+https://example.org/x1.git@{commit}"
    file.write_text("2")
    with pytest.raises(UserError, match="has edits"):
        machine_jobs.this_checkout()


def test_a_machine_left_over_from_another_run(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    other = Ledger(rental.folder.parent / "other" / "ledger.jsonl", rental.clock)
    other.append("intent", tag="x1-other", provider="runpod", usd_per_hr=Decimal(1))
    error = refused(rental, capsys)
    assert "x1-other at runpod" in error
    assert "x1 reconcile" in error
    assert "This will start" in error
    other.append("launch_failed", tag="x1-other")
    assert command(rental, "--detach") == FINISHED


def test_a_stop_latch_until_a_person_raises_the_ceiling(
    rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    latch.write(rental.folder, latch.Stop("too dear", "guard", 76, "2026-05-23T11:00:00Z"))
    error = refused(rental, capsys)
    assert "too dear" in error
    assert "--raise-ceiling-to" in error
    assert "This will start" in error
    assert command(rental, "--detach", "--raise-ceiling-to", "8") == FINISHED
    assert latch.read(rental.folder) is None
    assert account(rental.ledger.rows()).ceiling_usd == 8


# ------------------------------------------------------------------------------------------------------------
# Agreement


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "starts"), [("y", 1), ("", 0), ("no", 0), (EOFError, 0)])
def test_a_person_s_word(rental: Rental, monkeypatch: pytest.MonkeyPatch, answer: Any, starts: int) -> None:
    def said(_: str) -> str:
        if answer is EOFError:
            raise EOFError
        return str(answer)

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", said)
    assert command(rental, "--detach", yes=False) == (FINISHED if starts else REFUSED)
    assert launches(rental) == starts


def test_nobody_at_the_terminal(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(rental, yes=False) == USAGE
    assert "--yes: is needed" in capsys.readouterr().err
    assert nothing_happened(rental)


# ------------------------------------------------------------------------------------------------------------
# The request and its answer


@pytest.mark.parametrize("kind", ["500_after_create", "malformed"])
@pytest.mark.parametrize("rental", ["runpod", "lambda", "fake"], indirect=True)
def test_an_answer_that_was_lost_leads_to_one_machine(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(launch, "refuse_silence", lambda *_: None)
    rental.fake.fault(kind, on="launch")
    rental.fake.fault("not_listed_yet", for_s=60)
    assert command(rental, "--detach") == FINISHED
    assert len(rental.fake.world.machines) == launches(rental) == 1
    [machine] = rental.machines()
    assert machine.open
    assert machine.machine_id in rental.fake.world.machines


def test_a_timeout_after_the_machine_was_made(rental: Rental) -> None:
    rental.fake.fault("timeout_after_create", hold_s=0.2)
    assert command(rental, "--detach") == FINISHED
    assert len(rental.fake.world.machines) == launches(rental) == 1


def test_a_500_that_made_nothing_is_closed(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    rental.fake.fault("500", on="launch")
    assert command(rental, "--detach") == REFUSED
    assert "made no machine" in capsys.readouterr().err
    assert launches(rental) == 1
    assert not account(rental.ledger.rows()).open_machines()
    assert command(rental, "--detach") == FINISHED


@pytest.mark.parametrize("kind", ["401", "429"])
def test_a_plain_no_is_closed_and_not_sent_again(rental: Rental, kind: str) -> None:
    rental.fake.fault(kind, on="launch")
    assert command(rental, "--detach") == FAULT
    assert launches(rental) == 1
    assert not account(rental.ledger.rows()).open_machines()


def test_nothing_free_by_the_time_it_is_asked_for(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    confirmed = launch.confirmed

    def and_gone(yes: bool) -> bool:
        rental.fake.fault("no_capacity")
        return confirmed(yes)

    monkeypatch.setattr(launch, "confirmed", and_gone)
    assert command(rental, "--detach") == FAULT
    assert not account(rental.ledger.rows()).open_machines()


def test_a_machine_that_never_runs_is_ended(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    rental.fake.world.boot_s = Decimal(100_000)
    assert command(rental) == FAULT
    assert "it does not run: ending it" in capsys.readouterr().out
    assert not rental.fake.world.alive()
    assert not account(rental.ledger.rows()).open_machines()


def test_an_outage_while_it_boots_is_waited_out(rental: Rental) -> None:
    rental.fake.fault("500", on="get", for_s=400)
    assert command(rental, "--detach") == FINISHED
    assert rental.rows("active")


def test_ctrl_c_while_it_boots_ends_it(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(renting_module, "wait_active", interrupt)
    assert command(rental) == INTERRUPTED
    assert not rental.fake.world.alive()


def test_a_second_signal_is_answered_from_the_first_word_on(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that is closed sends two, one just after the other."""
    said, unheard = list[str](), list[int]()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(renting_module, "say", say)
    before = signal.signal(signal.SIGTERM, lambda number, _: unheard.append(number))
    try:
        assert renting_module.interrupted(rental.folder, rental.clock) == INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert unheard == []
    assert "a machine may be left, and bill" in said[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("before_it_works", [True, False])
def test_no_signal_leaves_a_machine_that_nobody_guards(
    number: signal.Signals,
    before_it_works: bool,
    rental: Rental,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While it is asked for, and between its start and the guard's."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here (nohup), and that is respected")
    send = type(rental.provider).launch

    def then_killed(provider: Any, request: Any) -> str:
        made = str(send(provider, request))
        os.kill(os.getpid(), number)
        return made

    def killed(*_: Any) -> int:
        os.kill(os.getpid(), number)
        return FINISHED

    if before_it_works:
        monkeypatch.setattr(type(rental.provider), "launch", then_killed)
    else:
        monkeypatch.setattr(launching, "guard_machine", killed)
    assert command(rental) == INTERRUPTED
    assert "interrupted: ending what is rented" in capsys.readouterr().out
    assert not rental.fake.world.alive()
    assert not account(rental.ledger.rows()).open_machines()
    assert signal.getsignal(number) is not None


def test_a_fault_of_ours_after_the_request_leaves_no_machine(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> bool:
        raise OSError(5, "no such luck")

    monkeypatch.setattr(renting_module, "wait_active", broken)
    with pytest.raises(OSError, match="no such luck"):
        command(rental)
    assert not rental.fake.world.alive()


def test_a_closed_terminal_keeps_no_machine(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    rental.launch()

    def closed(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.print", closed)
    assert end_loudly(rental.folder, rental.clock) == FINISHED
    assert not rental.fake.world.alive()


def test_at_home_the_mirror_comes_along(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Started(Exception):
        pass

    def execv(_: str, words: list[str]) -> None:
        started.append(words)
        raise Started

    monkeypatch.setattr("os.execv", execv)
    words = [
        "--provider",
        "local",
        "--rate-usd-per-hr",
        "0.1",
        "--mirror",
        "s3://bucket/runs",
        "--mirror-data",
    ]
    with pytest.raises(Started):
        command(rental, *words)
    [told] = started
    assert told[told.index("--mirror") + 1] == "s3://bucket/runs"
    assert "--mirror-data" in told[told.index("--") :]


def test_it_is_watched_to_its_end(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing runs on this machine at all: it ends below the ceiling all the same."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    waiting(monkeypatch, Turns(rental.clock, 1e6))
    try:
        assert command(rental, cap="3") == FINISHED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    rental.fake.world.advance()
    assert not rental.fake.world.alive()
    assert Decimal("2.4") < rental.fake.world.bill_usd() <= 3
    assert "termination.json" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# What the machine gets, and who else sees it


@on_real_apis
def test_the_start_script_arrives_and_no_secret_stays(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("X1_ALERTS", ALERTS)
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    monkeypatch.setattr(launch, "refuse_silence", lambda *_: None)
    assert command(rental, "--detach", "--tax", "0.1") == FINISHED
    asked = next(iter(rental.fake.world.machines.values())).asked
    if rental.provider.name == "lambda":
        text = str(asked["user_data"])
        assert text.startswith("#cloud-config\n")
        assert SECRET in text
    else:
        text = base64.b64decode(asked["env"]["X1_START_SCRIPT"]).decode()
        assert text.startswith("#!")
        assert asked["env"]["X1_ALERTS"] == ALERTS
        assert asked["env"]["X1_START_MODE"] == "foreground"
        assert SECRET not in text
    [machine] = rental.machines()
    for word in (machine.tag, "supervise", "--budget-cap-usd", "x1.whl", "--disk-gib"):
        assert word in text
    printed = capsys.readouterr()
    kept = "".join(f.read_text() for f in rental.folder.rglob("*") if f.is_file())
    assert SECRET not in kept + printed.out + printed.err


def test_files_for_other_launchers_need_no_key_and_hold_no_secret(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("X1_ALERTS", ALERTS)
    monkeypatch.delenv("RUNPOD_API_KEY")
    folder = tmp_path / "files"
    assert command(rental, "--provider", "runpod", "--write", str(folder)) == REFUSED  # 4.50/h, of 5.00
    assert "the total" in capsys.readouterr().err
    assert not folder.exists()
    assert command(rental, "--provider", "runpod", "--write", str(folder), cap="35") == FINISHED
    assert "at $4.50/h (--max-price)" in capsys.readouterr().out
    assert command(rental, "--provider", "runpod", "--write", str(folder), cap="35") == FINISHED
    names = {"start.sh", "cloud-init.yaml", "x1-tiny.service", "skypilot.yaml"}
    assert {f.name for f in folder.iterdir()} == names
    assert all(str(folder / name) in capsys.readouterr().out for name in ["start.sh"])
    assert SECRET not in "".join(f.read_text() for f in folder.iterdir())
    assert nothing_happened(rental)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--wait", "soon"], "--wait soon: expected a time such as 4h"),
        (["--linger", "1.2.3h"], "--linger 1.2.3h: expected a time"),
        (["--budget-cap-usd", "0"], "--budget-cap-usd 0.0: expected a number above 0"),
        (["--budget-cap-usd", "nan"], "--budget-cap-usd nan: expected a number above 0"),
        (["--max-price", "-1"], "--max-price -1.0: expected a number above 0"),
        (["--tier", "cheap"], "--tier cheap: expected secure, community or any"),
        (["--gpu", "a100"], "did you mean a100-40gb or a100-80gb?"),
        (["--provider", "runpot"], "no provider is called 'runpot'"),
        (["--provider", "local"], "--rate-usd-per-hr: is needed with --provider local"),
        (["--like", "nowhere"], "--like nowhere: no metrics.jsonl in it"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_slip_is_one_line_and_launches_nothing(
    rental: Rental, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert command(rental, *words) == USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert nothing_happened(rental)


# ------------------------------------------------------------------------------------------------------------
# Killed in the middle


def test_killed_right_after_the_request_reconcile_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes: the machine is made, no answer comes, and `x1 launch` is killed."""
    folder = tmp_path / "runs" / "tiny"
    config = write_config(tmp_path / "tiny.yaml", run_dir=str(folder))
    anchor = time.time()
    monkeypatch.setenv("X1_CLOCK", f"100@{anchor:.0f}")
    monkeypatch.delenv("X1_ALERTS", raising=False)
    with FakeProvider(Clock.from_environment()) as fake:
        monkeypatch.setenv("X1_FAKE_URL", fake.url)
        fake.fault("timeout_after_create", hold_s=30)
        words = ["--config", str(config), "--provider", "fake", "--budget-cap-usd", "5", "--yes"]
        process = subprocess.Popen(
            [sys.executable, "-m", "x1_pretrain.money.launch", *words, "--tokens-per-sec", "2"],
            env=dict(os.environ),
            stdout=subprocess.PIPE,
        )
        end = time.monotonic() + 60
        while not fake.world.machines:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.communicate()
        rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
        assert [row["event"] for row in rows] == ["gate", "intent"]
        assert run_app(reconcile.app, [str(tmp_path / "runs")], prog="x1 reconcile") == FAULT
        assert "the launch was cut off" in capsys.readouterr().out
        assert run_app(reconcile.app, [str(tmp_path / "runs"), "--end"], prog="x1 reconcile") == FINISHED
        assert not fake.world.alive()
    assert (folder / "termination.json").exists()


@pytest.mark.parametrize("field", ["mlflow.uri", "budget.curr_cost_uri"])
def test_a_secret_in_the_config_does_not_travel(
    field: str, rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(rental, "--set", f"{field}=https://user:{SECRET}@example.org/x") == USAGE
    assert nothing_happened(rental)
    error = capsys.readouterr().err
    assert field in error
    assert SECRET not in error
