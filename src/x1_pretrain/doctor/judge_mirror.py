"""What the mirror's numbers mean for this run: plain values in, one `Finding` out. Touches nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from x1_pretrain.doctor.estimate import dollars
from x1_pretrain.doctor.findings import Finding, size
from x1_pretrain.doctor.mirror import Visit
from x1_pretrain.doctor.trial import Facts
from x1_pretrain.planning.losing import LOSS_S, Rates, Timing, round_up
from x1_pretrain.records.console import duration

FAR_LOSS = 2.0  # times what a plan is made to lose: from there a better cadence is named
MEANING = "docs/mirror.md has a table of what such a line means"
LEASE = "can't keep two writers apart (no conditional writes)"


def mirror(visit: Visit | None, without_lease: bool) -> Finding:
    """Whether it can be one, and how fast it takes and gives bytes."""
    if visit is None:
        return Finding("mirror", "-", "none (mirror.uri, --mirror): the run lives as long as this machine")
    trial = visit.trial
    if message := trial.part("refused").get("message"):
        found, _, fix = str(message).removeprefix("mirror ").partition("; ")
        return Finding("mirror", "broken", found, fix or MEANING)
    if not (store := trial.part("store")):
        fix = "check the network and mirror.endpoint, or train without the mirror"
        return Finding("mirror", "broken", f"{visit.uri}: {trial.trouble or 'no answer'}", fix)
    slow, fixes = [], []
    if not store["conditional"]:
        slow.append(LEASE)
        if not without_lease:
            fix = (
                "take a store that can, or set mirror.without_lease if nothing else will ever train this run"
            )
            return Finding("mirror", "broken", f"{store['label']}: {LEASE}", fix, measured(trial.parts))
        fixes.append("mirror.without_lease is set: relaunch nothing unattended")
    if visit.same_disk:
        slow.append("on the same disk as the run: it saves from a wrong `rm`, not from a lost machine")
        fixes.append("name a bucket, or a folder on a disk that is not this machine's")
    if trouble := trial.part("trouble") or ({"message": trial.trouble} if trial.trouble else {}):
        if trouble.get("kind") in ("denied", "damaged"):
            found, _, fix = str(trouble["message"]).partition("; ")
            said = found if store["label"] in found else f"{store['label']}: {found}"
            return Finding("mirror", "broken", said, fix or MEANING, measured(trial.parts))
        slow.append(f"not measured to the end: {trouble['message']}")
        fixes.append("once more; a line like this one makes the mirror wait and try again")
    if left := trial.part("left"):
        slow.append(f"{left['place']} could not be removed: {left['message']}")
        fixes.append("remove it, or leave it to the next x1 doctor after a day")
    two = [] if slow and slow[0] == LEASE else ["keeps two writers apart"]
    shown = f"{store['label']}: {', '.join([*two, *rates_in_words(trial.parts), *slow])}"
    return Finding("mirror", "slow" if slow else "ok", shown, "; ".join(fixes), measured(trial.parts))


def rate(facts: Facts) -> float | None:
    """Bytes a second, of the largest size that was tried."""
    return facts["bytes"] / facts["seconds"] if facts else None


def rates_in_words(parts: dict[str, Facts]) -> list[str]:
    sent, read = parts.get("sent", {}), parts.get("read", {})
    words = [f"takes {mb(value)}"] if (value := rate(sent)) else []
    words += [f"gives {mb(value)}"] if (value := rate(read)) else ["reading not measured"]
    tried = " and ".join(
        f"{size(facts['total_bytes'])} {verb}" for verb, facts in (("sent", sent), ("read", read)) if facts
    )
    return [*words[:-1], f"{words[-1]} ({tried})"] if tried else words


def mb(bytes_per_sec: float) -> str:
    """As `mirror.max_mb_per_s` counts."""
    return f"{bytes_per_sec / 1e6:,.3g} MB/s" if bytes_per_sec < 1e9 else f"{bytes_per_sec / 1e6:,.0f} MB/s"


def measured(parts: dict[str, Facts]) -> dict[str, Any]:
    sent, read, store = (parts.get(name, {}) for name in ("sent", "read", "store"))
    return {
        "send_bytes_per_sec": rate(sent),
        "read_bytes_per_sec": rate(read),
        "sent_bytes": sent.get("total_bytes"),
        "read_bytes": read.get("total_bytes"),
        "conditional_writes": store.get("conditional"),
    }


# ------------------------------------------------------------------------------------------------------------
# For this run


@dataclass(frozen=True)
class Run:
    """What of a run decides how far its mirror is behind."""

    checkpoint_bytes: float
    every: int  # steps between two checkpoints
    steps: int
    step_s: float | None  # None: no step could be measured
    write_s: float  # one checkpoint, to the disk
    look_s: float
    most_mb_per_s: float | None  # that may be sent
    usd_per_hr: float | None


def pace(visit: Visit | None, run: Run) -> Finding:
    """One checkpoint, there and back, against the time between two; and what a lost machine takes with it."""
    parts = visit.trial.parts if visit else {}
    sends, reads = rate(parts.get("sent", {})), rate(parts.get("read", {}))
    if sends is None:
        why = "no mirror" if visit is None else "its rate is not known"
        return Finding("mirror pace", "-", why)
    allowed = min(sends, (run.most_mb_per_s or math.inf) * 1e6)
    send_s, fetch_s = run.checkpoint_bytes / allowed, run.checkpoint_bytes / reads if reads else None
    limit = ", as mirror.max_mb_per_s has it," if allowed < sends else ""
    shown = f"a checkpoint of {size(run.checkpoint_bytes)} is sent in {span(send_s)}{limit}"
    shown += f" and fetched on a new machine in {span(fetch_s)}" if fetch_s is not None else ""
    numbers = {"send_s": send_s, "fetch_s": fetch_s}
    if run.step_s is None:
        return Finding("mirror pace", "-", f"{shown}; no step was measured to compare with", measured=numbers)
    look_s = max(run.look_s, float(parts["store"]["look_s"]))
    rates = Rates(run.step_s, run.write_s, send_s, look_s)
    return _against_cadence(run, rates, shown, sends, numbers)


def _against_cadence(
    run: Run, rates: Rates, shown: str, sends: float, numbers: dict[str, float | None]
) -> Finding:
    every = min(run.every, run.steps)
    timing = rates.timing(every)
    lost_s = timing.worst_s()
    cost = f", {dollars(lost_s / 3600 * run.usd_per_hr)}" if run.usd_per_hr else ""
    lost = f"at worst {span(lost_s)} are lost with this machine{cost}"
    numbers |= {
        "between_s": timing.period_s,
        "lost_s": lost_s,
        "lost_steps": timing.worst_steps(rates.step_s),
    }
    between = f"one every {span(timing.period_s)} ({every:,} steps)"
    if not timing.keeps_up:
        shown += f"; {between}: the mirror lags behind and passes over some; {lost}"
        return Finding("mirror pace", "slow", shown, _keeping_up(run, rates, timing, sends), numbers)
    better = rates.every(at_most=run.steps)
    fix = ""
    if lost_s > FAR_LOSS * LOSS_S and better < every:
        then = span(rates.timing(better).worst_s())
        fix = f"where machines are taken away: --set checkpoint.every={better} loses {then} at worst"
    return Finding("mirror pace", "ok", f"{shown}; {between}; {lost}", fix, numbers)


def _keeping_up(run: Run, rates: Rates, timing: Timing, sends: float) -> str:
    """The cadence that helps, and the limit if it is the limit that holds the line."""
    fixes = []
    left_s = timing.period_s - rates.look_s
    needed = run.checkpoint_bytes / left_s if left_s > 0 else math.inf
    if run.most_mb_per_s and run.most_mb_per_s * 1e6 < needed <= sends:
        fixes.append(f"--set mirror.max_mb_per_s={math.ceil(needed / 1e6)}")
    every = min(round_up(rates.keeping_up), run.steps)
    fixes.append(f"--set checkpoint.every={every}")
    if needed > sends and math.isfinite(needed):
        fixes.append(f"a line that takes {mb(needed)}")
    return ", or ".join(fixes)


def span(seconds: float) -> str:
    """0.4 s, 12 s, 4.9 min, 2h05m."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else duration(seconds)
