"""What is read from runs.csv, and what is refused, naming row and column."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from x1_pretrain.errors import UserError
from x1_pretrain.laws.points import Points
from x1_pretrain.laws.reading import read_points
from x1_pretrain.numbers import compact, flop, human, interval, number, parse_amount, size, with_interval

LAB = """run_id,N,D,val_loss,usd_spent
A,5M,4.5B,4.66,1.10
B,25M,900M,4.40,0.90
C,100M,225M,4.48,1.00
"""


def read(folder: Path, text: str | bytes, **options: object) -> Points:
    file = folder / "runs.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_points(file, **options)  # type: ignore[arg-type]


def refusal(folder: Path, text: str | bytes, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, text, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder / "runs.csv") in said
    return said


def test_the_published_labs_table(tmp_path: Path) -> None:
    points = read(tmp_path, LAB)
    assert points.n.tolist() == [5e6, 25e6, 100e6]
    assert points.d.tolist() == [4.5e9, 9e8, 2.25e8]
    assert points.loss.tolist() == [4.66, 4.40, 4.48]
    assert points.usd.tolist() == [1.10, 0.90, 1.00]
    assert points.flops == pytest.approx([1.35e17] * 3)
    assert (points.flops_basis, points.counts, points.names) == ("6ND", "as given", ("A", "B", "C"))
    assert points.cluster.tolist() == [0, 1, 2]
    assert points.sha256 == hashlib.sha256(LAB.encode()).hexdigest()
    assert points.notes == ()


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + LAB,
        LAB.replace("\n", "\r\n"),
        "# made by hand\n\n" + LAB.replace("B,25M", "# a remark, with commas\n  \nB,25M") + ",,,,\n",
        LAB.replace("5M,4.5B", "5_000_000,4.5e9").replace("100M,225M", '"100,000,000",225 M'),
        LAB.replace("1.10\n", "1.10,,\n"),
        LAB.replace(",usd_spent", " , usd_spent ").replace("1.10", "$1.10"),
    ],
    ids=["BOM", "CRLF", "blank lines and remarks", "other spellings", "empty cells behind", "spaces"],
)
def test_the_same_table_in_other_spellings(tmp_path: Path, text: str) -> None:
    plain, points = read(tmp_path, LAB), read(tmp_path, text)
    for field in ("n", "d", "loss", "usd", "flops"):
        assert getattr(points, field).tolist() == getattr(plain, field).tolist()
    assert points.sha256 != plain.sha256


ROWS = (
    ("N", "5M", "", "row 2, column N: empty"),
    ("val_loss", "4.66", "NaN", "row 2, column val_loss: NaN is not a number"),
    ("val_loss", "4.66", "-inf", "row 2, column val_loss: -inf is not a number"),
    ("val_loss", "4.40", "four", "row 3, column val_loss: 'four' is not a number"),
    ("val_loss", "4.48", "-4.48", "row 4, column val_loss: -4.48 is not above zero"),
    ("D", "900M", "0", "row 3, column D: 0 is not above zero"),
    ("N", "100M", "-100M", "row 4, column N: -100M is not above zero"),
    ("N", "25M", "25", "row 3, column N: 25 parameters; expected the full number, or a unit: 25M"),
    ("D", "225M", "225", "row 4, column D: 225 tokens"),
    ("val_loss", "4.66", "105.6", "row 2, column val_loss: 105.6 nats per token"),
    ("usd_spent", "1.10", "-1", "row 2, column usd_spent: '-1'"),
    ("run_id", "C,", "A,", "row 4, column run_id: A is in row 2 already"),
)


@pytest.mark.parametrize(("column", "old", "new", "said"), ROWS, ids=[f"{r[0]}={r[2]}" for r in ROWS])
def test_a_bad_cell_is_named_by_row_and_column(
    tmp_path: Path, column: str, old: str, new: str, said: str
) -> None:
    text = refusal(tmp_path, LAB.replace(old, new, 1))
    # rows are counted as an editor counts lines
    shifted = refusal(tmp_path, "# first\n" + LAB.replace(old, new, 1))
    assert said in text
    line = int(said.split()[1].rstrip(","))
    assert f"row {line + 1}, column {column}" in shifted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "empty; expected the columns run_id, N, D, val_loss"),
        ("\n# nothing\n", "empty"),
        ("run_id,N,D,val_loss\n", "no rows"),
        (LAB.replace(",", ";"), "separated by semicolons"),
        (LAB.replace(",", "\t"), "separated by tabs"),
        (LAB.encode("utf-16"), "not UTF-8"),
        (LAB.replace("run_id,N", "run_id,D"), "2 columns D"),
        (LAB.replace("4.66", "4,66"), "row 2: 6 cells under 5 columns"),
        (LAB.replace(",4.66,1.10", ""), "row 2: 3 cells under 5 columns"),
        (LAB.replace("val_loss", "bpb"), "bits per byte"),
        (LAB.replace("val_loss", "bits"), "--bits"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_missing_columns_name_what_was_found_and_the_nearest(tmp_path: Path) -> None:
    said = refusal(tmp_path, LAB.replace("val_loss", "valid_loss").replace("run_id", "x"))
    assert "no column run_id, val_loss; found x, N, D, valid_loss, usd_spent" in said
    assert "valid_loss to val_loss" in said
    assert "rename n to N" in refusal(tmp_path, LAB.replace(",N,", ",n,"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: can't be read \(No such file"):
        read_points(tmp_path / "none.csv")
    with pytest.raises(UserError, match="directory"):
        read_points(tmp_path)


def test_copies_are_refused_and_repeats_are_not(tmp_path: Path) -> None:
    again = LAB + "A,5M,4.5B,4.70,1\n"
    assert "row 5, column run_id: A is in row 2 already" in refusal(tmp_path, again)
    assert "row 5, column N: N, D and loss are those of row 2" in refusal(
        tmp_path, LAB + "X,5M,4.5B,4.66,1\n"
    )
    assert "row 5, column run_id: A is in row 2 already, with N = 5 M" in refusal(
        tmp_path, LAB + "A,6M,1B,4.7,1\n"
    )
    repeat = read(tmp_path, LAB + "A2,5M,4.5B,4.664,1\n")
    assert len(repeat) == repeat.clusters == 4
    assert any("repeat the N and D" in note for note in repeat.notes)


def test_bits_are_converted_when_asked_and_suspected_when_not(tmp_path: Path) -> None:
    bits = LAB
    for nats in (4.66, 4.40, 4.48):
        bits = bits.replace(f"{nats:.2f}", repr(nats / math.log(2)))
    assert any("--bits" in note for note in read(tmp_path, bits).notes)
    converted = read(tmp_path, bits, in_bits=True)
    assert converted.loss == pytest.approx([4.66, 4.40, 4.48])
    assert converted.notes == ()
    named = read(tmp_path, bits.replace("val_loss", "bits"), in_bits=True)
    assert named.loss == pytest.approx([4.66, 4.40, 4.48])


def test_swapped_columns_are_a_note_and_are_not_swapped_back(tmp_path: Path) -> None:
    points = read(tmp_path, LAB.replace("N,D", "D,N"))
    assert points.n.tolist() == [4.5e9, 9e8, 2.25e8]
    assert any("swapped?" in note for note in points.notes)


TRUNKS = """run_id,N,D,val_loss,trunk,schedule,decayed
t1-a,10M,100M,5.0,t1,wsd,yes
t1-b,10M,200M,4.7,t1,wsd,yes
t2-a,20M,100M,4.8,t2,wsd,yes
t3,40M,200M,4.4,t3,wsd,yes
"""


def test_rows_of_one_trunk_are_one_cluster(tmp_path: Path) -> None:
    points = read(tmp_path, TRUNKS)
    assert points.cluster.tolist() == [0, 0, 1, 2]
    assert points.clusters == 3
    shuffled = read(tmp_path, "\n".join([TRUNKS.split("\n")[0], *reversed(TRUNKS.strip().split("\n")[1:])]))
    assert shuffled.cluster.tolist() == [0, 1, 2, 2]


COSINE = """run_id,N,D,val_loss,schedule
a,10M,100M,5.0,cosine
a,10M,200M,4.7,cosine
a,10M,400M,4.5,cosine
b,20M,400M,4.4,cosine
"""


@pytest.mark.parametrize(
    ("text", "middle", "place"),
    [
        (COSINE, 2, "row 2, column schedule: a "),
        (COSINE.replace(",schedule", "").replace(",cosine", ""), 2, "row 2, column D: a "),
        (
            COSINE.replace("schedule", "schedule,trunk")
            .replace("cosine", "cosine,t")
            .replace("a,10M,1", "c,10M,1"),
            2,
            "row 2, column schedule: c ",
        ),
        (TRUNKS.replace("4.7,t1,wsd,yes", "4.7,t1,wsd,no"), 1, "row 3, column decayed: t1-b "),
        (TRUNKS.replace("wsd,yes", "constant,"), 4, "row 2, column schedule: t1-a "),
    ],
    ids=["one run, cosine", "one run, schedule not said", "one trunk, cosine", "marked", "constant"],
)
def test_losses_from_the_middle_of_a_schedule(tmp_path: Path, text: str, middle: int, place: str) -> None:
    if "t\n" in text:
        text = text.replace("b,20M,400M,4.4,cosine,t", "b,20M,400M,4.4,cosine,other")
    said = refusal(tmp_path, text)
    assert place in said
    assert f"{middle} of 4 rows" in said
    for fact in (".020 to .067 nats", "40 to 120 times", "1295 B", "15 to 30 B", "--allow-undecayed"):
        assert fact in said
    allowed = read(tmp_path, text, allow_undecayed=True)
    assert len(allowed) == 4
    assert sum("middle of a schedule" in note for note in allowed.notes) == 1


def test_finished_cooldowns_and_single_runs_are_not_taken_for_undecayed(tmp_path: Path) -> None:
    for text in (TRUNKS, LAB, TRUNKS.replace(",yes", ","), COSINE.replace("cosine", "cosine,yes")):
        fixed = text.replace("val_loss,schedule\n", "val_loss,schedule,decayed\n")
        assert read(tmp_path, fixed).notes == ()
    assert "'maybe' is neither yes nor no" in refusal(tmp_path, TRUNKS.replace("yes", "maybe", 1))


COUNTED = """run_id,N,D,val_loss,N_total,flops,data,context,val_tokens
a,5M,4.5B,4.66,17.6M,4.9e17,abc,512,1M
b,25M,900M,4.40,44.6M,2.5e17,abc,512,1M
"""


def test_what_n_counts(tmp_path: Path) -> None:
    assert read(tmp_path, COUNTED).counts == "matrices"
    assert read(tmp_path, COUNTED).n.tolist() == [5e6, 25e6]
    total = read(tmp_path, COUNTED, counts="total")
    assert (total.counts, total.n.tolist()) == ("total", [17.6e6, 44.6e6])
    said = read(tmp_path, LAB, counts="total")
    assert said.counts == "total"
    assert said.n.tolist() == [5e6, 25e6, 100e6]
    assert "no column N_total" in said.notes[0]
    below = refusal(tmp_path, COUNTED.replace("44.6M", "20M"))
    assert "row 3, column N_total: 20 M is below N = 25 M" in below


def test_flops_are_of_one_kind(tmp_path: Path) -> None:
    points = read(tmp_path, COUNTED)
    assert points.flops.tolist() == [4.9e17, 2.5e17]
    assert points.flops_basis == "as measured"
    mixed = read(tmp_path, COUNTED.replace("2.5e17", ""))
    assert mixed.flops_basis == "6ND"
    assert mixed.flops == pytest.approx([1.35e17] * 2)
    assert any("1 of 2 rows have FLOPs" in note for note in mixed.notes)


def test_rows_that_can_not_be_compared(tmp_path: Path) -> None:
    said = refusal(tmp_path, COUNTED.replace("2.5e17,abc", "2.5e17,xyz"))
    assert "row 3, column data: xyz, but abc in row 2" in said
    notes = read(tmp_path, COUNTED.replace("abc,512,1M\n", "abc,1024,2M\n", 1)).notes
    assert [note.split(" differs")[0] for note in notes] == ["context", "val_tokens"]
    assert "512, 1024" in notes[0]


def test_the_chinchilla_points(shared: Path) -> None:
    points = read_points(shared / "scaling/chinchilla_ndl.csv")
    assert len(points) == points.clusters == 240
    assert "240 of 245 rows are used" in points.notes[0]
    assert points.counts == "as given"
    assert np.isnan(points.usd).all()
    assert points.flops_basis == "6ND"


# ------------------------------------------------------------------------------------------------------------
# Amounts


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.5B", 1.5e9), ("4.5 b", 4.5e9), ("1.35e17", 1.35e17), ("500_000", 5e5), ("1,000,000", 1e6)]
    + [("2T", 2e12), ("3k", 3e3), (".5M", 5e5), ("-3", -3.0), ("7.", 7.0), ("0", 0.0)]
    + [(bad, None) for bad in ("", "nan", "inf", "2,5", "1.2.3", "5MB", "1e400", "ten", "--3")],
)
def test_amounts_as_people_write_them(text: str, value: float | None) -> None:
    assert number(text) == (None if value is None else pytest.approx(value))


def test_an_amount_of_a_flag_is_positive() -> None:
    assert parse_amount("22.6B", "--n") == pytest.approx(22.6e9)
    for bad in ("0", "-1B", "x"):
        with pytest.raises(UserError, match=f"--n {bad}: expected a positive amount"):
            parse_amount(bad, "--n")


def test_amounts_as_people_read_them() -> None:
    assert [human(v) for v in (22.6e9, 999.96e6, 8800, 1.35e17, 0.00123, 20, 1.5e12)] == [
        "22.6 B",
        "1 B",
        "8,800",
        "1.35e17",
        "0.00123",
        "20",
        "1.5 T",
    ]
    assert human(math.nan) == "unknown"
    assert [size(v) for v in (0, 1, 999, 3500, 999_600, 61_234_567, 1.07e9, 999.4e9, 2.5e12, 1.2345e15)] == [
        "0 bytes",
        "1 byte",
        "999 bytes",
        "3.5 kB",
        "1 MB",
        "61.2 MB",
        "1.07 GB",
        "999 GB",
        "2.5 TB",
        "1,234 TB",
    ]
    assert (compact(5e6), flop(1.35e17), flop(6e20)) == ("5M", "1.35e17", "6e20")
    assert with_interval(22.6e9, 20.1e9, 25.3e9) == "22.6 B [20.1, 25.3]"
    assert with_interval(28e9, 0.7e9, 4e28) == "28 B [700 M, 4e28]"
    assert with_interval(28e9, math.nan, 1e9) == "28 B"
    assert interval(5e6, 1e8) == "[5, 100] M"
