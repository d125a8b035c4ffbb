"""A lost machine's run goes on at the next provider: by the same terms, never two machines at once, nothing
counted twice; and not where it would do no good."""

from __future__ import annotations

import base64
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.corpora import write_config
from tests.money.fakes import Rental, Turns, renting, waiting

from x1_pretrain.command import run as run_app
from x1_pretrain.errors import FAULT, FINISHED, INTERRUPTED, REFUSED, USAGE
from x1_pretrain.money import guard_command, latch, launch, launch_mirror, moving
from x1_pretrain.money import renting as renting_module
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.notify import Notifier
from x1_pretrain.money.renting import BusyError
from x1_pretrain.money.standing import Mirror, Standing, verdict
from x1_pretrain.stores.folder_store import FolderStore

SECRET = "wJalrXUtnFEMI"
WRITING = Standing(
    epoch=1, beat=1, writing=True, host="gpu-1", state="running", step=12, good_step=8, silent_s=500
)
DONE = replace(WRITING, writing=False, state="finished", step=20, good_step=20)


@dataclass
class Scripted(Mirror):
    """A mirror whose words are known for each moment of a test's clock."""

    clock: Any = None
    words: list[tuple[float, Standing | str | None]] = field(default_factory=list)  # from then on

    def look(self) -> Standing | None:
        now_s = self.clock.steady_s()
        word = next((w for at_s, w in reversed(self.words) if at_s <= now_s), None)
        self.trouble = word if isinstance(word, str) else ""
        return None if isinstance(word, str) else word


@pytest.fixture(params=["runpod"])
def rental(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rental]:
    folder = tmp_path / "runs" / "tiny"
    write_config(
        tmp_path / "tiny.yaml", run_dir=str(folder), mirror={"uri": "s3://bucket/runs", "every_s": 1}
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(launch, "refuse_silence", lambda *_: None)
    with renting(folder, monkeypatch, request.param, gpu="A100 80GB", price_usd_per_hr="1.19") as rental:
        monkeypatch.setattr(Clock, "from_environment", lambda: rental.clock)
        waiting(monkeypatch, Turns(rental.clock, for_s=30 * 3600))
        yield rental
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def says(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, *words: tuple[float, Standing | str | None]
) -> Scripted:
    """At so many seconds after now, the mirror says so."""
    start_s = rental.clock.steady_s()
    store = FolderStore(str(rental.folder.parent / "mirror"))
    script = [(-1e9, None), *((start_s + at_s, word) for at_s, word in words)]
    mirror = Scripted(store, "tiny", clock=rental.clock, words=script)
    monkeypatch.setattr(launch_mirror, "opened", lambda *_: mirror)
    return mirror


def command(
    rental: Rental, *words: str, provider: str = "runpod,lambda", cap: str = "9", price: str = "4"
) -> int:
    config = rental.folder.parent.parent / "tiny.yaml"
    given = ["--config", str(config), "--provider", provider, "--budget-cap-usd", cap, "--max-price", price]
    given += [
        "--tokens-per-sec",
        "2",
        "--source",
        "x1.whl",
        "--ssh-key",
        "fake",
        "--yes",
        "--linger",
        "10m",
        "--every-s",
        "600",
    ]
    return run_app(launch.app, [*given, *words], prog="x1 launch")


def truths(rental: Rental) -> list[Any]:
    rental.fake.world.advance()
    return list(rental.fake.world.machines.values())


def alive(rental: Rental) -> int:
    return sum(m.alive for m in truths(rental))


def lost(rental: Rental, times: int = 1, after_s: float = 900, kind: str = "unhealthy") -> None:
    rental.fake.fault(kind, after_s=after_s, times=times)


def test_the_next_provider_takes_over(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING), (9000, replace(DONE, epoch=2)))
    assert command(rental) == FINISHED
    first, second = truths(rental)
    assert (first.api, second.api) == ("runpod", "lambda")
    assert alive(rental) == 0
    assert second.created_s >= first.gone_s  # never two at once
    [row] = rental.rows("moved")
    assert (row["from"], row["to"], row["lost_steps"]) == (first.name, second.name, 4)
    out = capsys.readouterr().out
    assert out.count("moved (1 of at most 5)") == 1
    assert "goes on from step 8, 4 steps to do again" in out
    assert len(rental.rows("terminate_confirmed")) == 2
    counted = account(rental.ledger.rows()).spent_by(rental.clock.now())
    assert rental.bill_usd() <= counted <= rental.bill_usd() * Decimal("1.11") + Decimal("0.10")  # tax


def test_the_new_machine_is_told_all_it_needs(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror, the credentials' values, the dead machine and its dollars; none of it is kept at home."""
    lost(rental)
    says(rental, monkeypatch, (100, WRITING), (9000, replace(DONE, epoch=2)))
    assert command(rental) == FINISHED
    first, second = truths(rental)
    script, environment = base64.b64decode(first.asked["env"]["X1_START_SCRIPT"]), first.asked["env"]
    assert environment["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert SECRET.encode() not in script
    text = second.asked["user_data"]
    assert f'AWS_SECRET_ACCESS_KEY=\\"{SECRET}\\"' in text
    command_line = text[text.index("SUPERVISE=(") :].split(")")[0].split()
    assert command_line[command_line.index("--mirror") + 1] == "s3://bucket/runs"
    tag, when, usd = command_line[command_line.index("--ended") + 1].strip("'").split("=")
    [end] = [row for row in rental.rows("terminate_confirmed") if row["tag"] == first.name]
    assert (tag, when) == (first.name, end["time_utc"])
    assert Decimal(usd) >= rental.fake.world.bill_usd(first.id)
    before = Decimal(command_line[command_line.index("--spent-before-usd") + 1])
    assert abs(before - Decimal(usd)) < Decimal("0.0002")
    for file in rental.folder.rglob("*"):
        assert SECRET not in file.read_text(errors="replace")


@pytest.mark.slow
def test_what_is_left_is_priced_not_the_whole_run(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING), (9000, replace(DONE, epoch=2)))
    assert command(rental) == FINISHED
    first, second = [row for row in rental.rows("gate") if row["verdict"] == "passed"]
    assert first["tokens"] * 22 == second["tokens"] * 30  # 8 of 30 steps are in the mirror
    assert first["ceiling_usd"] == second["ceiling_usd"]
    assert Decimal(second["before_usd"]) > 0 == Decimal(first["before_usd"])


def test_the_mirror_is_in_the_price(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(rental, monkeypatch)
    assert command(rental, "--price-only", "--set", "mirror.storage_usd_per_gib_month=1e4") == FINISHED
    assert " + mirror $" in capsys.readouterr().out
    assert command(rental, "--price-only", "--set", "mirror.storage_usd_per_gib_month=1e6") == REFUSED
    assert "the total" in capsys.readouterr().err
    assert not truths(rental)


@pytest.mark.slow
def test_a_dearer_provider_is_passed_over(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lambda is next, and above --max-price: RunPod again."""
    rental.fake.prices = type(rental.fake.prices)()  # Lambda 1.79, RunPod 1.19 by the list
    lost(rental)
    says(rental, monkeypatch, (100, WRITING), (9000, replace(DONE, epoch=2)))
    assert command(rental, price="1.50") == FINISHED
    assert [m.api for m in truths(rental)] == ["runpod", "runpod"]


@pytest.mark.slow
def test_what_does_not_fit_under_the_ceiling_is_not_rented(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost(rental, after_s=3000)
    says(rental, monkeypatch, (100, replace(WRITING, good_step=0)))
    assert command(rental, cap="3.00") == REFUSED
    assert "the total" in capsys.readouterr().out
    assert len(truths(rental)) == 1
    assert alive(rental) == 0


@pytest.mark.slow
def test_there_is_a_most_of_moves(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost(rental, times=99, after_s=300)
    says(rental, monkeypatch, (100, WRITING))
    assert command(rental, "--moves", "2", cap="30") == FAULT
    assert len(truths(rental)) == 3
    assert alive(rental) == 0
    assert len(rental.rows("moved")) == 2
    assert "it was moved 2 times already" in capsys.readouterr().out


@pytest.mark.slow
def test_moves_0_ends_it_as_without_a_mirror(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING))
    assert command(rental, "--moves", "0") == FAULT
    assert (len(truths(rental)), alive(rental)) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_run_that_is_over_is_not_moved(
    state: str, rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pod exits by itself: that is no loss."""
    lost(rental, kind="exited")
    says(rental, monkeypatch, (100, replace(DONE, state=state, why="$30 of $30")))
    assert command(rental) == FINISHED
    assert (len(truths(rental)), alive(rental)) == (1, 0)
    assert not rental.rows("moved")
    assert "it is not moved" in capsys.readouterr().out


@pytest.mark.slow
def test_a_machine_whose_run_is_over_is_ended_though_it_looks_well(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Lambda nothing outside shows that a run has ended; its mirror does."""
    says(rental, monkeypatch, (100, WRITING), (2000, DONE))
    assert command(rental, provider="lambda", cap="30") == FINISHED
    [machine] = truths(rental)
    assert not machine.alive
    assert 2000 + 600 < machine.gone_s < 2000 + 600 + 2 * 600 + 60  # linger, polls, the proof


@pytest.mark.slow
def test_a_fault_is_a_persons_unless_it_got_on(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental, times=2, kind="exited")
    ended = replace(WRITING, writing=False, state="ended", why="CUDA error")
    again = replace(ended, epoch=2)  # no further than before
    says(rental, monkeypatch, (100, ended), (1500, again))
    assert command(rental, provider="runpod", cap="30") == FAULT
    assert len(truths(rental)) == 2
    assert any("not moved" in row["key"] for row in rental.rows("alert_due"))


@pytest.mark.slow
@pytest.mark.parametrize(("state", "machines"), [("ended", 2), ("interrupted", 2), ("stopped", 1)])
def test_a_trainer_that_left_is_seen_by_its_mirror(
    state: str, machines: int, rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Lambda the machine stays up and looks well; with nobody at work on it for long it is a lost one."""
    left = replace(WRITING, writing=False, state=state)
    says(rental, monkeypatch, (100, WRITING), (2000, left), (9000, replace(DONE, epoch=2)))
    assert command(rental, provider="lambda", cap="30") == FINISHED
    assert len(truths(rental)) == machines
    assert alive(rental) == 0


@pytest.mark.slow
def test_a_relaunch_on_the_machine_is_no_loss(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    left, back = replace(WRITING, writing=False, state="died"), replace(WRITING, epoch=2)
    says(rental, monkeypatch, (100, WRITING), (2400, left), (2500, back), (5000, replace(DONE, epoch=2)))
    assert command(rental, provider="lambda", cap="30") == FINISHED
    assert len(truths(rental)) == 1


@pytest.mark.slow
def test_nobody_else_s_run_is_taken(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Someone moved it by hand: their trainer writes on after our machine is gone."""
    lost(rental)
    beats = [(100 + k, replace(WRITING, epoch=2, beat=k, host="elsewhere", silent_s=1)) for k in range(3000)]
    says(rental, monkeypatch, (50, WRITING), *beats)
    assert command(rental) == REFUSED
    assert (len(truths(rental)), alive(rental)) == (1, 0)
    assert "being trained on elsewhere" in capsys.readouterr().out


def test_a_run_that_is_being_trained_is_refused_before_anything_is_paid(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(rental, monkeypatch, (-1, replace(WRITING, silent_s=4)))
    assert command(rental) == REFUSED
    assert not truths(rental)
    assert "is being trained on gpu-1 (last sign of life 4 s ago" in capsys.readouterr().err


@pytest.mark.slow
def test_the_mirror_s_word_is_waited_for(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, "s3: no answer"), (4000, WRITING), (9000, replace(DONE, epoch=2)))
    assert command(rental) == FINISHED
    first, second = truths(rental)
    assert second.created_s >= 4000
    assert first.gone_s < 4000  # nothing is paid meanwhile


@pytest.mark.slow
def test_a_mirror_that_never_answers_is_a_fault(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, "s3: no answer"))
    assert command(rental) == FAULT
    assert (len(truths(rental)), alive(rental)) == (1, 0)


@pytest.mark.slow
def test_a_machine_that_was_not_seen_to_end_keeps_the_next_from_being_rented(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(rental)
    rental.fake.fault("terminate_ignored", times=10_000)
    says(rental, monkeypatch, (100, WRITING))
    assert command(rental) == FAULT
    assert len(truths(rental)) == 1
    assert len(rental.rows("terminate_unconfirmed")) == moving.END_TRIES


@pytest.mark.slow
def test_a_next_machine_that_never_runs_is_ended_too(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING), (20_000, replace(DONE, epoch=2)))
    wait, calls = moving.wait_active, list[int]()

    def never_the_first(*arguments: Any) -> bool:
        calls.append(1)
        return wait(*arguments) if len(calls) > 1 else False

    monkeypatch.setattr(moving, "wait_active", never_the_first)
    assert command(rental) == FINISHED
    assert [m.api for m in truths(rental)] == ["runpod", "lambda", "runpod"]
    assert alive(rental) == 0


@pytest.mark.slow
def test_nothing_free_is_waited_for(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    rental.fake.fault("no_capacity", after_s=600, for_s=1800)
    says(rental, monkeypatch, (100, WRITING), (9000, replace(DONE, epoch=2)))
    assert command(rental) == FINISHED
    assert len(truths(rental)) == 2
    assert truths(rental)[1].created_s >= 2400


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_between_two_machines_ends_what_is_rented(
    number: signal.Signals, rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING))
    monkeypatch.setattr(moving, "wait_active", lambda *_: os.kill(os.getpid(), number))
    assert command(rental) == INTERRUPTED
    assert (len(truths(rental)), alive(rental)) == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name"), [(guard_command, "end_loudly"), (Notifier, "close")], ids=["is_ended", "is_told"]
)
def test_ctrl_c_while_the_lost_machine(
    place: Any, name: str, rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING))
    do = getattr(place, name)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return do(*arguments)

    monkeypatch.setattr(place, name, interrupted)
    assert command(rental) == INTERRUPTED
    assert (len(truths(rental)), alive(rental)) == (1, 0)
    assert "it is not moved; the same `x1 launch` goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_an_error_of_ours_leaves_no_machine(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING))

    def broken(*_: Any) -> bool:
        raise OSError(5, "no such luck")

    monkeypatch.setattr(moving, "wait_active", broken)
    with pytest.raises(OSError, match="no such luck"):
        command(rental)
    assert (len(truths(rental)), alive(rental)) == (2, 0)


@pytest.mark.slow
def test_machines_that_publish_nothing_are_not_rented_in_a_row(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their start-up fails, and that of the next would too."""
    lost(rental, times=99, after_s=300)
    says(rental, monkeypatch, (-1, None))
    assert command(rental, cap="30") == FAULT
    assert (len(truths(rental)), alive(rental)) == (2, 0)
    assert "2 machines in a row worked, and published nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stop_at_home_is_heeded(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    lost(rental)
    says(rental, monkeypatch, (100, WRITING))
    end = guard_command.end_loudly

    def stopped(*arguments: Any) -> int:
        latch.write(rental.folder, latch.Stop("a person decided", "person", 76, "2026-05-23T13:00:00Z"))
        return end(*arguments)

    monkeypatch.setattr(guard_command, "end_loudly", stopped)
    assert command(rental) == FINISHED
    assert len(truths(rental)) == 1


@pytest.mark.slow
def test_another_launch_here_is_waited_for(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may stand at its question for long: that is no move."""
    lost(rental)
    says(rental, monkeypatch, (100, WRITING), (9000, replace(DONE, epoch=2)))
    lock, calls = moving.one_launch, list[int]()

    def busy(runs: Path) -> Any:
        calls.append(1)
        if len(calls) <= 20:
            raise BusyError("another x1 launch is going on here")
        return lock(runs)

    monkeypatch.setattr(moving, "one_launch", busy)
    assert command(rental, "--moves", "1") == FINISHED
    assert len(truths(rental)) == 2
    assert capsys.readouterr().out.count("waiting for it") == 1


@pytest.mark.slow
def test_what_a_move_cost_is_the_sum_over_all_machines(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lost one after its last sign of life, one that never worked, one that was refused, the last one."""
    lost(rental)
    says(rental, monkeypatch, (100, WRITING), (20_000, replace(DONE, epoch=2)))
    wait, calls = moving.wait_active, list[int]()

    def never_the_first(*arguments: Any) -> bool:
        calls.append(1)
        if len(calls) > 1:
            return wait(*arguments)
        rental.clock.sleep(1800)
        rental.fake.fault("401", on="launch", times=1)
        return False

    monkeypatch.setattr(moving, "wait_active", never_the_first)
    assert command(rental) == FINISHED
    first, second, third = truths(rental)
    [row] = rental.rows("moved")
    assert (row["from"], row["to"]) == (first.name, third.name)
    refused = [m for m in rental.machines() if m.machine_id is None]
    assert len(refused) == 1
    useless = rental.fake.world.bill_usd(second.id)
    assert useless > Decimal("0.55")
    paid = Decimal(row["downtime_usd"])
    assert useless <= paid <= useless * Decimal("1.11") + Decimal("0.40")  # idle at both ends
    assert "(2 of at most 5)" in row["message"]
    spent = Decimal(re.search(r"\$([0-9.]+) of \$9.00 spent so far", row["message"])[1])
    assert paid <= spent < paid + Decimal("0.50")


@pytest.mark.slow
def test_a_first_machine_that_never_runs_is_moved_too(
    rental: Rental, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(rental, monkeypatch, (9000, DONE))
    monkeypatch.setattr(renting_module, "wait_active", lambda *_: False)
    assert command(rental) == FINISHED
    assert [m.api for m in truths(rental)] == ["runpod", "lambda"]
    assert alive(rental) == 0


def test_price_only_prices_what_is_left(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(rental, monkeypatch, (-1, replace(WRITING, spent_usd=Decimal("1.50"))))
    assert command(rental, "--price-only", cap="30") == FINISHED
    out = capsys.readouterr().out
    assert "for 5,632 tokens" in out  # 22 of 30 steps
    assert "$1.50 spent before" in out


@pytest.mark.slow
def test_the_ceiling_ends_it_and_nothing_is_moved(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    says(rental, monkeypatch, (100, WRITING))
    assert command(rental, cap="4.60") == FINISHED
    assert (len(truths(rental)), alive(rental)) == (1, 0)
    assert rental.bill_usd() < Decimal("4.60")


@pytest.mark.slow
def test_a_person_s_teardown_is_no_loss(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    says(rental, monkeypatch, (100, WRITING))
    turns = Turns(rental.clock)
    wait = turns.wait

    def and_a_teardown(timeout: float | None = None) -> bool:
        from x1_pretrain.money.teardown import end_all

        end_all(rental.folder, rental.clock, lambda _: None)
        return wait(timeout)

    monkeypatch.setattr(turns, "wait", and_a_teardown)
    waiting(monkeypatch, turns)
    assert command(rental) == FINISHED
    assert (len(truths(rental)), alive(rental)) == (1, 0)


@pytest.mark.slow
def test_a_second_launch_goes_on_where_the_mirror_is(rental: Rental, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder at home: what is done and what it cost come from the mirror."""
    spent = replace(WRITING, writing=False, state="interrupted", spent_usd=Decimal("1.50"))
    says(rental, monkeypatch, (-1, spent), (2000, replace(DONE, epoch=2)))
    assert command(rental, cap="30") == FINISHED
    [row] = [row for row in rental.rows("gate") if row["verdict"] == "passed"]
    assert (row["before_usd"], row["tokens"]) == ("1.50", 22 * 256)
    script = base64.b64decode(truths(rental)[0].asked["env"]["X1_START_SCRIPT"]).decode()
    assert "--spent-before-usd\n    1.50" in script


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--provider", "runpod,local"], "leave `local` out"),
        (["--provider", "runpod,runpot"], "no provider is called 'runpot'"),
        (["--mirror", "s4://bucket/runs"], "did you mean s3://bucket/runs"),
        (["--mirror", "/mnt/disk"], "a machine at runpod does not see"),
        (["--moves", "-1"], "moves"),
    ],
)
def test_a_slip_is_one_line(
    words: list[str], said: str, rental: Rental, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(rental, *words) == USAGE
    assert said in capsys.readouterr().err
    assert not truths(rental)


def test_several_providers_need_a_mirror(rental: Rental, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(rental.folder.parent.parent / "tiny.yaml", run_dir=str(rental.folder))
    assert command(rental) == USAGE
    assert "only with a mirror" in capsys.readouterr().err


def test_missing_credentials_are_named_before_anything_is_asked(
    rental: Rental, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert command(rental) == USAGE
    assert "AWS_SECRET_ACCESS_KEY is not set here" in capsys.readouterr().err
    assert not truths(rental)


# ------------------------------------------------------------------------------------------------------------
# The verdict

BEFORE = Standing(epoch=3, beat=9, writing=False, host="a", state="died", step=50, good_step=40)
AFTER = replace(BEFORE, epoch=4, step=70, good_step=60)
TRASHED = replace(BEFORE, state="trashed", step=0, good_step=0)


@pytest.mark.parametrize(
    ("now", "before", "do"),
    [
        (None, None, "move"),  # nothing was published yet
        (AFTER, None, "move"),
        (AFTER, BEFORE, "move"),
        (BEFORE, BEFORE, "move"),
        (replace(BEFORE, state="finished"), BEFORE, "move"),  # before: its steps were raised since
        (replace(AFTER, state="finished"), BEFORE, "over"),
        (replace(AFTER, state="stopped"), BEFORE, "over"),
        (replace(AFTER, state="ended"), BEFORE, "move"),
        (replace(AFTER, state="ended", good_step=40), BEFORE, "fault"),
        (replace(AFTER, state="ended", good_step=0), None, "fault"),  # before any checkpoint
        (replace(AFTER, state="ended", good_step=1), None, "move"),
        (replace(AFTER, state="trashed"), BEFORE, "over"),
        (replace(BEFORE, state="trashed"), None, "over"),
        (replace(BEFORE, state="trashed"), BEFORE, "over"),  # thrown away after the loss
        (TRASHED, TRASHED, "move"),  # it was in the trash when the machine was launched
        (replace(TRASHED, epoch=4), TRASHED, "over"),
        (replace(AFTER, state="running", why="and told to stop: a person decided"), BEFORE, "over"),
        (replace(AFTER, state="interrupted", good_step=40), BEFORE, "move"),
        (replace(AFTER, state="running", good_step=40), BEFORE, "move"),
        (replace(AFTER, state="a word of tomorrow"), BEFORE, "move"),
    ],
)
def test_whether_it_goes_on(now: Standing | None, before: Standing | None, do: str) -> None:
    assert verdict(now, before)[0] == do
