"""Sections of speed and money: throughput, MFU, where the paid time went, the gate and the bill."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from x1_pretrain.money.gate import exact
from x1_pretrain.money.ledger import Row
from x1_pretrain.report import curves, state, words
from x1_pretrain.report.blocks import (
    Block,
    Chart,
    Curve,
    Facts,
    Folded,
    Level,
    Line,
    Mark,
    Part,
    Section,
    Stack,
    Table,
)
from x1_pretrain.report.material import Material

CONVENTIONS = (
    "mfu counts attention as if every token looked at the whole context (PaLM's convention, which most "
    "trainers print); mfu_causal counts the work that has to be done"
)


def speed(m: Material, placed: Sequence[Mark]) -> Section:
    x, rate = m.column("tokens_per_sec")
    if not len(x):
        return Section("speed", "Speed", [Line("No speed on record yet.", "note")])
    middle = state.median(m, "tokens_per_sec")
    drawn = curves.curves("tokens/s", x, rate, 0, words.tokens(float(rate[-1])))
    blocks: list[Block] = [
        Facts(_speed_facts(m)),
        Chart(
            "throughput",
            "Throughput",
            "tokens a second",
            drawn,
            y_zero=True,
            marks=placed,
            levels=[Level(middle, middle, f"median {words.tokens(middle)}")] if middle else [],
            notes=["without evaluation, checkpoints and the first step of a session, which compiles"],
        ),
        *_mfu(m),
    ]
    return Section("speed", "Speed", blocks)


def _speed_facts(m: Material) -> list[tuple[str, str, str]]:
    rate, flops = state.median(m, "tokens_per_sec"), state.median(m, "flops_per_sec")
    facts = [("median speed", f"{words.tokens(rate)} tokens/s", "of the logged rows")]
    if flops is not None:
        facts.append(("realized", words.flops(flops), "causal count"))
    if (wait := state.median(m, "data/wait_share")) is not None:
        facts.append(("waiting for data", words.share(wait, 2), "of step time, median"))
    if (attention := m.last("attention/flop_share")) is not None:
        facts.append(("attention", words.share(attention), "of the FLOPs, causal count"))
    return facts


def _mfu(m: Material) -> list[Block]:
    drawn = []
    for place, (name, title) in enumerate((("mfu", "mfu (PaLM)"), ("mfu_causal", "mfu_causal"))):
        x, y = m.column(name)
        last = words.share(float(y[-1])) if len(y) else ""
        drawn += [c for c in curves.curves(title, x, y, place, last) if len(c.x) and not c.faint]
    if not drawn:
        return [Line("MFU: not measured, the peak of this device is not known.", "note")]
    return [Chart("mfu", "MFU", "share of the peak", drawn, y_share=True, y_zero=True, notes=[CONVENTIONS])]


# ------------------------------------------------------------------------------------------------------------
# Paid time


def paid_time(m: Material) -> Section:
    found = m.paid_time
    if found is None or not found.parts or found.share is None:
        return Section("time", "Paid time", [Line("Goodput: not measured, no session on record.", "note")])
    head = ["where it went", "time", "share", "dollars"]
    parts = [
        Part(p.name, p.seconds, _columns(p.seconds, found.paid_s, p.usd), p.useful)
        for p in sorted(found.parts, key=lambda part: (not part.useful, -part.seconds))
    ]
    said = (
        f"Goodput {found.share:.1%}: {words.duration(found.useful_s)} of {words.duration(found.paid_s)} went "
        "into steps that are in the final run."
    )
    stack = Stack("goodput", "Where the paid time went", head, parts)
    return Section(
        "time", "Paid time", [Line(said), stack, Line(f"{found.note[:1].upper()}{found.note[1:]}.", "note")]
    )


def _columns(seconds: float, paid_s: float, usd: Decimal | None) -> list[str]:
    return [words.duration(seconds), words.share(seconds / paid_s), _usd(usd)]


def _usd(amount: Decimal | None) -> str:
    return "not priced" if amount is None else words.usd(amount)


# ------------------------------------------------------------------------------------------------------------
# Money


def gate_words(m: Material) -> list[Block]:
    """What was said before it started, and what it really cost."""
    gates = [row for row in m.ledger if row["event"] == "gate"]
    if not gates:
        return [Line(_unpriced(m), "note")]
    first = next((row for row in gates if row.get("verdict") == "passed"), gates[0])
    said = str(first.get("message") or "").strip()
    if first.get("verdict") != "passed":
        return [Line(f"Refused before it started: {said}", "bad")]
    return [Line(f"Said before it started: “{said}”"), Line(real_cost(m, first))]


def _unpriced(m: Material) -> str:
    spent = state.spent_usd(m)
    if spent is not None:
        return f"No gate on record; the rows tell of {words.usd(spent)} spent."
    return "No ledger: nobody priced this run, and nobody counted what it cost."


def real_cost(m: Material, gate: Row) -> str:
    spent, said = state.spent_usd(m), _decimal(gate.get("total_usd"))
    if spent is None:
        return "What it really cost is not known: the ledger holds no reading."
    cost = (
        f"It really cost {words.usd(spent)}"
        if m.finished or m.stop
        else f"By now it has cost {words.usd(spent)}"
    )
    if said is not None and (m.finished or m.stop):
        gap = spent - said
        cost += f", {words.usd(abs(gap))} {'more' if gap > 0 else 'less'} than said"
    ceiling = m.money.ceiling_usd if m.money is not None else None
    if ceiling is None or m.money is None:
        return f"{cost}."
    raised = f", which a person raised from {exact(m.money.before_usd)}" if m.money.raised else ""
    return f"{cost}; {'ABOVE' if spent > ceiling else 'below'} the ceiling of {exact(ceiling)}{raised}."


def _decimal(found: object) -> Decimal | None:
    try:
        amount = Decimal(str(found))
    except InvalidOperation:
        return None
    return amount if amount.is_finite() else None


def money(m: Material) -> Section | None:
    """Machines, readings over the run, every word of the gate; nothing where nothing was priced."""
    if not m.ledger and not len(m.column("budget/spent_usd")[0]):
        return None
    blocks: list[Block] = [*_spending(m), *_machines(m)]
    told = {"gate", "raised", "stop", "correction", "answer", "agreed", "terminate_confirmed", "ceiling"}
    rows = [row for row in m.ledger if row["event"] in told]
    table = [[words.when(r.get("time_utc")), r["event"].replace("_", " "), _entry(r)] for r in rows]
    if table:
        head = ["when", "what", "words"]
        blocks.append(Folded("The ledger's decisions", [Table("Ledger", head, table, frozenset({0, 1, 2}))]))
    return Section("money", "Money", blocks)


def _entry(row: Row) -> str:
    amounts = [
        f"{k.removesuffix('_usd')} {words.usd(d)}"
        for k, v in row.items()
        if k.endswith("_usd") and (d := _decimal(v)) is not None
    ]
    return str(row.get("message") or ", ".join(amounts) or "")


def _spending(m: Material) -> list[Block]:
    spent, projected = m.column("budget/spent_usd"), m.column("budget/projected_usd")
    drawn = [Curve("spent", *spent, 0, last=words.usd(float(spent[1][-1])))] if len(spent[0]) else []
    if len(projected[0]):
        drawn.append(Curve("projected in all", *projected, 1, last=words.usd(float(projected[1][-1]))))
    if len(spent[0]) < 2:
        return []
    ceiling = m.money.ceiling_usd if m.money is not None else None
    levels = (
        [Level(float(ceiling), float(ceiling), f"ceiling {exact(ceiling)}")] if ceiling is not None else []
    )
    return [Chart("spending", "Spending", "dollars", drawn, y_zero=True, levels=levels)]


def _machines(m: Material) -> list[Block]:
    machines = m.money.machines if m.money is not None else []
    if not machines:
        return []
    rows = [
        [
            one.machine_id or one.tag,
            one.provider,
            f"{exact(one.usd_per_hr)}/h",
            words.when(one.since.isoformat()),
            words.when(one.ended.isoformat())
            if one.ended
            else "your own"
            if not one.open
            else "NOT SEEN TO END",
            words.usd(one.spent_by(one.ended) if one.ended else one.spent_usd),
        ]
        for one in machines
    ]
    head = ["machine", "provider", "price", "from", "seen to end", "dollars"]
    return [Table("Machines", head, rows, frozenset({0, 1, 3, 4}))]
