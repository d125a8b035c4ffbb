"""What a store costs: by hand-computed bills, never counted twice, and nothing guessed of a store that no
list knows."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.corpora import write_config
from tests.money.fakes import START, Steps

from x1_pretrain.config import CheckpointConfig, MirrorConfig
from x1_pretrain.config_reading import load_config
from x1_pretrain.errors import UserError
from x1_pretrain.money import storage
from x1_pretrain.money.account import account
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger, Row
from x1_pretrain.money.pricing import mirror_planned
from x1_pretrain.money.storage import Bytes, Planned, Rates, most_held, most_kept, rates, storage_row

S3, HUB = "s3://bucket/runs", "hf://user/runs"
DEAR = Rates(Decimal(720), Decimal(10), "as a test has it")  # $1 a GiB and hour, $10 a GiB fetched


@pytest.mark.parametrize(
    ("uri", "endpoint", "name", "month", "egress"),
    [
        (S3, None, "Amazon S3", "0.023", "0.09"),
        (S3, "https://x.r2.cloudflarestorage.com", "Cloudflare R2", "0.01610612736", "0"),
        (S3, "https://x.eu.r2.cloudflarestorage.com:443/", "Cloudflare R2", "0.01610612736", "0"),
        (S3, "https://s3.us-west-004.backblazeb2.com", "Backblaze B2", "0.006442450944", "0.01073741824"),
        ("gs://bucket/runs", None, "Google Cloud Storage", "0.020", "0.12"),
        ("az://container/runs", None, "Azure Blob", "0.018", "0.087"),
        ("hf://user/repository", None, "Hugging Face", "0.019327352832", "0"),
    ],
)
def test_the_store_is_known_by_its_address(
    uri: str, endpoint: str | None, name: str, month: str, egress: str
) -> None:
    """A GiB is 1.0737 of the GB that some stores bill."""
    found = rates(uri, endpoint)
    assert found.known
    assert name in found.said
    assert found.usd_per_gib_month == Decimal(month)
    assert found.egress_usd_per_gib == Decimal(egress)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9000",
        "https://s3.wasabisys.com",
        "https://notr2.cloudflarestorage.com.example.org",
        "https://evilr2.cloudflarestorage.com",
        "http://user:secret@minio.lan:9000/x",
    ],
)
def test_a_store_that_no_list_knows_is_not_guessed(endpoint: str) -> None:
    """An endpoint of one's own is not billed as Amazon's, and its password is not shown."""
    found = rates(S3, endpoint)
    assert (found.known, found.usd_per_gib_month, found.egress_usd_per_gib) == (False, 0, 0)
    assert "no list price" in found.said
    assert "secret" not in found.said


def test_what_a_person_states_is_above_the_list() -> None:
    both = rates(S3, None, 0.01, 0.0)
    assert (both.usd_per_gib_month, both.egress_usd_per_gib, both.said) == (
        Decimal("0.01"),
        Decimal(0),
        "as stated",
    )
    one = rates(S3, "http://minio.lan", 0.01)
    assert one.known
    assert one.kept_usd(100, 720) == 1


@pytest.mark.parametrize("uri", ["/mnt/disk/runs", "runs/copy", "file:///mnt/disk"])
def test_a_folder_bills_nothing(uri: str) -> None:
    found = rates(uri)
    assert (found.kept_usd(1e6, 1e6), found.fetched_usd(1e6), found.known) == (0, 0, True)


def test_a_bill_by_hand() -> None:
    """100 GiB at S3 for 30 days: 100 x $0.023; 10 GiB out: 10 x $0.09."""
    found = rates(S3)
    assert found.kept_usd(100, 30 * 24) == Decimal("2.3")
    assert found.fetched_usd(10) == Decimal("0.9")
    assert found.kept_usd(-1, 5) == found.kept_usd(5, -1) == 0


@pytest.mark.parametrize(
    ("fields", "steps", "kept"),
    [
        ({}, 100_000, 3),
        ({"keep_best": 2}, 100_000, 5),
        ({"keep_every": 10_000}, 100_000, 14),  # 0, 10,000, ..., 100,000 and 3
        ({"at": [5, 7]}, 100_000, 5),
        ({"every": 1800, "keep_every": 1800}, 3600, 4),  # 0, 1800, 3600: no more are ever made, and one spare
        ({"every": 50, "keep_last": 9}, 100, 4),
    ],
)
def test_as_many_checkpoints_as_there_can_be(fields: dict[str, Any], steps: int, kept: int) -> None:
    assert most_kept(CheckpointConfig(**fields), steps) == kept


def test_a_plan_counts_all_that_is_kept_and_one_fetch() -> None:
    planned = Planned(DEAR, S3, checkpoints=3, checkpoint_gib=2.0, rows_gib=0.5, corpus_gib=4.0)
    assert planned.usd(hours=5) == Decimal((3 * 2 + 4.5) * 5 + (2 + 4.5) * 10)


def test_a_repository_is_planned_with_every_checkpoint_from_when_it_is_there() -> None:
    fields = CheckpointConfig(every=100, at=[5, 7])
    assert most_held(S3, fields, 1000) == most_kept(fields, 1000) == 5
    assert most_held(HUB, fields, 1000) == 8  # half of 0, 100, ..., 1000 and one spare; 5 and 7


@given(
    every=st.integers(1, 60),
    total=st.integers(1, 500),
    at=st.lists(st.integers(1, 500), max_size=3, unique=True),
)
def test_a_history_is_never_counted_below_what_it_holds(every: int, total: int, at: list[int]) -> None:
    """Each checkpoint from its step on; and no more than one too many."""
    own = [step for step in at if step <= total]
    regular = {*range(0, total + 1, every), total}
    held = sum(1 - step / total for step in regular | set(own))
    counted = most_held(HUB, CheckpointConfig(every=every, at=own), total)
    assert held <= counted + 1e-9
    assert counted <= sum(1 - step / total for step in regular) + len(own) + 0.5 + 1e-9


def test_the_gate_counts_the_corpora_that_are_sent(tmp_path: Path) -> None:
    """As large as they are here; one that is made on the machine by its tokens, of two bytes."""
    file = write_config(tmp_path / "c.yaml", mirror={"uri": S3}, data={"dir": str(tmp_path / "absent")})
    config = load_config(file)

    def corpus_gib(**changes: Any) -> float:
        changed = {name: getattr(config, name).model_copy(update=new) for name, new in changes.items()}
        planned = mirror_planned(config.model_copy(update=changed))
        assert planned is not None
        assert planned.rows_gib == 600 * config.training.total_steps / 2**30
        return planned.corpus_gib

    assert corpus_gib() == 0
    tokens = config.training.total_steps * config.training.batch_tokens
    assert corpus_gib(mirror={"data": True}) * 2**30 == 2 * tokens
    here = tmp_path / "corpus"
    here.mkdir()
    (here / "train.bin").write_bytes(b"x" * 1000)
    (here / "manifest.json").write_bytes(b"{}")
    (here / "notes.txt").write_bytes(b"is not sent")
    assert corpus_gib(mirror={"data": True}, data={"dir": str(here)}) * 2**30 == 1002


# ------------------------------------------------------------------------------------------------------------
# The ledger


def at(hours: float) -> Any:
    return START + timedelta(hours=hours)


def row(rows: list[Row], session: str, gib: float, fetched: float, begun: float, now: float) -> Row:
    made = storage_row(rows, session, gib, fetched, DEAR, at(begun), at(now))
    rows.append({"event": "storage", **made})
    return rows[-1]


def test_a_session_s_rows_hold_its_sum() -> None:
    rows: list[Row] = []
    assert row(rows, "e0001", 0.0, 3.0, 0, 0)["storage_usd"] == 30  # fetched at the start
    assert row(rows, "e0001", 2.0, 3.0, 0, 1)["storage_usd"] == 32
    assert row(rows, "e0001", 4.0, 3.0, 0, 2)["storage_usd"] == 36
    assert account(rows).beside_usd == 36


def test_the_store_bills_on_between_two_sessions() -> None:
    """Hour 0 to 1, nobody until 5, a second session to 6: 2 GiB for 6 hours."""
    rows: list[Row] = []
    row(rows, "e0001", 2.0, 0.0, 0, 1)
    row(rows, "e0002", 2.0, 0.0, 5, 6)
    assert account(rows).beside_usd == 12


def test_a_row_that_comes_twice_counts_once(tmp_path: Path) -> None:
    """As after two copies of a ledger were brought together."""
    rows: list[Row] = []
    row(rows, "e0001", 2.0, 1.0, 0, 1)
    row(rows, "e0002", 2.0, 1.0, 1, 2)
    assert account(rows + rows).beside_usd == account(rows).beside_usd == 24


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    rows: list[Row] = []
    row(rows, "e0001", 2.0, 0.0, 0, 3)
    row(rows, "e0001", 2.0, 0.0, 0, 1)
    row(rows, "e0001", 2.0, 0.0, 0, 4)
    assert account(rows).beside_usd == 8


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0, 100), st.floats(0.01, 10), st.floats(0, 5)),
        min_size=1,
        max_size=12,
    )
)
def test_whatever_the_order_of_rows_the_sum_is_the_integral(
    looks: list[tuple[str, float, float, float]],
) -> None:
    """Sessions one after another, each writing as often as it likes: nothing is left out, nothing doubled."""
    rows: list[Row] = []
    looks = sorted(looks, key=lambda look: look[0])  # sessions do not overlap
    now, expected, fetched = 0.0, Decimal(0), dict.fromkeys("abc", 0.0)
    for session, gib, hours, more in looks:
        seconds = round(hours * 3600)
        now += seconds / 3600
        fetched[session] += more
        row(rows, session, gib, fetched[session], 0.0, round(now * 3600) / 3600)
        expected += Decimal(repr(gib)) * seconds / 3600
    expected += 10 * sum((Decimal(repr(each)) for each in fetched.values()), Decimal(0))
    assert abs(account(rows).beside_usd - expected) < Decimal("0.01")


def test_a_ledger_takes_the_row_and_counts_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", Clock())
    ledger.append("storage", **storage_row(ledger.rows(), "e1", 1.0, 0.5, DEAR, at(0), at(2)))
    again = storage_row(ledger.rows(), "e1", 1.0, 0.5, DEAR, at(0), at(3))
    assert again["storage_usd"] == 8
    known = account(ledger.rows())
    assert (known.beside_usd, known.spent_by(at(9)), known.settled_usd()) == (7, 7, 7)


def test_what_the_trainer_calls(tmp_path: Path) -> None:
    ledger, gib = Ledger(tmp_path / "ledger.jsonl", Steps()), 2**30
    storage.record(ledger, MirrorConfig(), None, 1, Bytes(gib, gib, gib))
    assert not ledger.file.exists()
    mirror = MirrorConfig(uri=S3, storage_usd_per_gib_month=720, egress_usd_per_gib=10)
    storage.record(ledger, mirror, None, 1, Bytes(0, 0, 2 * gib))
    ledger.clock.sleep(3600)
    storage.record(ledger, mirror, None, 1, Bytes(3 * gib, 99 * gib, 2 * gib))
    storage.record(ledger, mirror, None, 2, Bytes(3 * gib, 0, 0))
    assert account(ledger.rows()).beside_usd == 2 * 10 + 3
    assert [row["basis"] for row in ledger.rows()] == ["as stated"] * 3


def test_each_mirror_counts_its_own_epochs(tmp_path: Path) -> None:
    """The run changes its mirror, and its first epoch comes again: both are paid."""
    ledger, gib = Ledger(tmp_path / "ledger.jsonl", Steps()), 2**30
    for bucket, fetched in (("s3://one/runs", 6), ("s3://two/runs", 1)):
        mirror = MirrorConfig(uri=bucket, storage_usd_per_gib_month=0, egress_usd_per_gib=1)
        storage.record(ledger, mirror, None, 1, Bytes(0, 0, fetched * gib))
        storage.record(ledger, mirror, None, 1, Bytes(0, 0, fetched * gib))
    assert account(ledger.rows()).beside_usd == 7


def test_a_history_holds_all_that_was_ever_sent(tmp_path: Path) -> None:
    """The first session sends 10 GiB and is killed, the second sends 4; the head names 3 of them: a
    repository holds 14, a bucket 3."""
    held = {}
    for uri in (HUB, S3):
        ledger, gib = Ledger(tmp_path / uri[:2] / "ledger.jsonl", Steps()), 2**30
        mirror = MirrorConfig(uri=uri)
        for epoch, names, sent in ((1, 0, 0), (1, 3, 6), (1, 3, 4), (2, 3, 0), (2, 3, 4), (2, 3, 0)):
            storage.record(ledger, mirror, None, epoch, Bytes(names * gib, sent * gib, 0))
        elsewhere = MirrorConfig(uri=f"{uri}-2")
        storage.record(ledger, elsewhere, None, 1, Bytes(gib, gib, 0))
        held[uri] = [row["gib"] for row in ledger.rows()]
    assert held == {HUB: [0, 6, 10, 10, 14, 14, 1], S3: [0, 3, 3, 3, 3, 3, 1]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("usd_per_gb_month = -1", "usd_per_gb_month"),
        ('gb = "decimals"', "gb"),
        ("price = 3", "price"),
    ],
)
def test_a_slip_in_the_list_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    entry = {
        "name": '"A"',
        "scheme": '"s3"',
        "usd_per_gb_month": "0.01",
        "egress_usd_per_gb": "0.0",
        "gb": '"binary"',
        "date": '"2026-11-21"',
        "source": '"a page"',
    }
    name, _, value = text.partition(" = ")
    lines = [f"{key} = {each}" for key, each in (entry | {name: value}).items()]
    file = tmp_path / "storage.toml"
    file.write_text("[[storage]]\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"storage 1 .*{said}"):
        storage.table(file)
