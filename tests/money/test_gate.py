"""The sentence and its refusals, against sums made with nothing of the gate's own."""

from __future__ import annotations

import re
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.money.gate import (
    ASSUMED_MFU,
    Price,
    Quote,
    Work,
    assumed_rate,
    billions,
    broken,
    exact,
    reserve_h,
    sentence,
)

CENT = Decimal("0.01")
HOUR_TPS = 19.0e9 / (21.4 * 3600)  # 19.0 B tokens in 21.4 h


def quote(**changes: Any) -> Quote:
    """1.19/h for 21.4 h, a disk of 0.0266/h, 1.0924 h paid and not trained: the published example."""
    price = Price("1x A100 80GB", "RunPod secure", Decimal("1.19"), "live price, 12:03Z", Decimal("0.0266"))
    work = Work(19_000_000_000, HOUR_TPS, "measured in runs/x1")
    priced = Quote(price, work, Decimal("35"), Decimal("1.0924"))
    inner = {k: changes.pop(k) for k in list(changes) if k in Price.__dataclass_fields__}
    worked = {k: changes.pop(k) for k in list(changes) if k in Work.__dataclass_fields__}
    return replace(priced, price=replace(price, **inner), work=replace(work, **worked), **changes)


def test_the_published_sentence() -> None:
    assert sentence(quote()) == (
        "This will start 1x A100 80GB on RunPod secure at $1.19/h (live price, 12:03Z), run about 21.4 h for "
        "19.0 B tokens (measured in runs/x1) = $25.47, + disk $0.60 + tax/reserve $1.30 = $27.37 of your "
        "$35.00 ceiling; $7.63 buffer."
    )
    assert broken(quote(), Decimal("1.40")) == []
    assert Decimal("1.19") * Decimal("21.4") == Decimal("25.466")
    assert Decimal("25.47") + Decimal("0.60") + Decimal("1.30") == Decimal("35") - Decimal("7.63")


def test_what_was_spent_before_is_a_term_of_its_own() -> None:
    said = sentence(quote(spent_usd=Decimal("4.001")), "go on with")
    assert said.startswith("This will go on with 1x A100")
    assert "+ tax/reserve $1.30 + $4.01 spent before = $31.38 of your $35.00 ceiling; $3.62 buffer." in said


def test_tax_is_on_machine_disk_and_reserve_alike() -> None:
    taxed = quote(tax=Decimal("0.10"))
    hours = Decimal("21.4") + Decimal("1.0924")
    extra = Decimal("0.10") * (Decimal("1.19") + Decimal("0.0266")) * hours
    assert abs(taxed.total_usd - quote().total_usd - extra) <= CENT
    assert taxed.price.all_in_usd_per_hr == (Decimal("1.19") + Decimal("0.0266")) * Decimal("1.1")


amounts = st.decimals(0, 20, places=4)


def printed(said: str) -> list[Decimal]:
    """The dollars of a sentence, the hourly price left out."""
    return [Decimal(text.replace(",", "")) for text in re.findall(r"\$([\d,]+\.\d+)(?!/h)(?!\d)", said)]


@given(amounts, amounts, st.decimals(0, 1, places=3), st.integers(1, 10**11), st.floats(1e3, 1e7),
       st.decimals(0, 3, places=3), amounts, st.integers(1, 10_000))  # fmt: skip
def test_what_is_printed_adds_up_and_covers_the_exact_sum(
    rate: Decimal,
    disk: Decimal,
    tax: Decimal,
    tokens: int,
    tps: float,
    reserve: Decimal,
    before: Decimal,
    cap: int,
) -> None:
    priced = quote(usd_per_hr=rate, storage_usd_per_hr=disk, tax=tax, tokens=tokens, tokens_per_sec=tps,
                   reserve_h=reserve, spent_usd=before, ceiling_usd=Decimal(cap))  # fmt: skip
    *terms, total, ceiling, room = printed(sentence(priced).partition(" = ")[2])
    assert sum(terms) == total
    assert ceiling == cap
    assert room == abs(ceiling - total)
    assert ("buffer" in sentence(priced)) == (total <= ceiling) == (broken(priced, None) == [])
    hours = Decimal(tokens) / Decimal(tps) / 3600
    true = before + (hours + reserve) * (rate + disk) * (1 + tax)
    assert true - CENT / 1000 <= total <= true + 4 * CENT
    assert priced.fields()["total_usd"] == total


@given(st.decimals("0.05", 20, places=3), amounts, st.decimals(0, "0.2", places=3),
       st.integers(10**5, 10**11), st.floats(1e4, 1e7), amounts, st.floats(0.05, 0.99))  # fmt: skip
def test_what_it_says_would_fit_fits_and_hardly_more_would(
    rate: Decimal, disk: Decimal, tax: Decimal, tokens: int, tps: float, before: Decimal, share: float
) -> None:
    whole = quote(usd_per_hr=rate, storage_usd_per_hr=disk, tax=tax, tokens=tokens, tokens_per_sec=tps,
                  spent_usd=before)  # fmt: skip
    whole = replace(whole, ceiling_usd=(whole.total_usd * Decimal(share)).quantize(CENT, "ROUND_DOWN"))
    [term] = broken(whole, None)
    found = re.search(r"pays for about ([\d.,]+)( B| M|) tokens", term)
    if found is None:
        assert "not even the reserve fits" in term
        assert not _fits(whole, int(tps * 3600 * float(5 * CENT / rate)) + 1)
        return
    unit = {" B": 10**9, " M": 10**6, "": 1}[found[2]]
    fits = int(Decimal(found[1].replace(",", "")) * unit)
    assert _fits(whole, fits)
    slack = int(tps * 3600 * float(5 * CENT / rate)) + (10**8 if found[2] == " B" else 10**4) + 1
    assert not _fits(whole, fits + slack)


@pytest.mark.parametrize("ceiling", range(500, 2700, 37))
def test_what_would_fit_is_never_rounded_up(ceiling: int) -> None:
    whole = quote(ceiling_usd=ceiling * CENT)
    found = re.search(r"pays for about ([\d.]+) B", broken(whole, None)[0])
    assert found is not None
    assert _fits(whole, int(Decimal(found[1]) * 10**9))
    assert not _fits(whole, int((Decimal(found[1]) + Decimal("0.2")) * 10**9))


def _fits(whole: Quote, tokens: int) -> bool:
    return broken(replace(whole, work=replace(whole.work, tokens=tokens)), None) == []


def test_each_broken_term_is_named_with_what_mends_it() -> None:
    dear = quote(usd_per_hr=Decimal("1.405"), ceiling_usd=Decimal("20"))
    price, total = broken(dear, Decimal("1.40"))
    assert price.startswith("the price: $1.405/h is above --max-price $1.40/h (budget.max_usd_per_hr; ")
    assert re.match(
        r"the total: \$32\.\d\d is above the ceiling of \$20\.00; it pays for about 11\.\d B", total
    )
    assert broken(quote(usd_per_hr=Decimal("1.40")), Decimal("1.40")) == []


def test_a_ceiling_that_is_just_met_holds_and_a_cent_less_does_not() -> None:
    total = quote().total_usd
    assert broken(quote(ceiling_usd=total), None) == []
    assert sentence(quote(ceiling_usd=total)).endswith("; $0.00 buffer.")
    assert len(broken(quote(ceiling_usd=total - CENT), None)) == 1
    assert sentence(quote(ceiling_usd=total - CENT)).endswith("; $0.01 too much.")


@pytest.mark.parametrize("speed", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_unknown_hours_are_said_and_never_counted_as_none(speed: float | None) -> None:
    priced = quote(tokens_per_sec=speed, basis="no GPU of this name", spent_usd=Decimal("2"))
    assert priced.work.hours is None
    said = sentence(priced)
    assert "in hours not known yet (no GPU of this name); $2.00 of your $35.00 ceiling spent before." in said
    assert "buffer" not in said
    assert priced.fields()["hours"] is None


def test_a_run_that_is_done_costs_only_its_reserve() -> None:
    done = quote(tokens=0)
    assert (done.work.hours, done.compute_usd) == (0, 0)
    assert "run about 0 min for 0 tokens" in sentence(done)
    assert broken(replace(done, ceiling_usd=CENT), None)


def test_nothing_is_priced_below_what_is_known() -> None:
    assert assumed_rate(None, 3e8, 1) is None
    assert assumed_rate(312e12, 3e8, 2) == pytest.approx(ASSUMED_MFU * 312e12 * 2 / 3e8)
    assert reserve_h(300, 300) == Decimal("0.5") + Decimal(600) / 3600
    free = quote(usd_per_hr=Decimal(0), storage_usd_per_hr=Decimal(0))
    assert free.total_usd == 0
    assert broken(replace(free, spent_usd=Decimal(36)), None) == [
        "the total: $36.00 is above the ceiling of $35.00; not even the reserve fits"
    ]


@pytest.mark.parametrize(
    ("amount", "text"),
    [("1.19", "$1.19"), ("0.345", "$0.345"), ("10", "$10.00"), ("1234.5", "$1,234.50"), ("0", "$0.00"),
     ("100", "$100.00"), ("0.0072", "$0.0072")],
)  # fmt: skip
def test_a_price_keeps_its_fine_digits(amount: str, text: str) -> None:
    assert exact(Decimal(amount)) == text


@pytest.mark.parametrize(
    ("tokens", "text"), [(950, "950"), (10_000, "0.01 M"), (3_276_800, "3.28 M"), (19_000_000_000, "19.0 B")]
)
def test_tokens_as_people_say_them(tokens: int, text: str) -> None:
    assert billions(tokens) == text
