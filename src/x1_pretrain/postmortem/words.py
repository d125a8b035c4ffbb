"""Numbers as the pages on spikes say them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from x1_pretrain.numbers import human

SMALL = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def word(number: int) -> str:
    """four, 41."""
    return SMALL[number] if 0 <= number < len(SMALL) else f"{number:,}"


def count(number: int, what: str, plural: str | None = None) -> str:
    """one step, 41 steps."""
    return f"{word(number)} {what if number == 1 else plural or what + 's'}"


def spoken(seconds: float) -> str:
    """30 ms, 42 seconds, 8.6 minutes, 2.1 hours."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 1e-3 else "less than 1 ms"
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def dollars(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 0.01 else f"${usd:.2g}"


def number(value: float) -> str:
    """Three digits; or that it was none."""
    return human(value) if math.isfinite(value) else "not finite"


def nats(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no finite number"


def percent(share: float) -> str:
    """51 %, 0.22 %; no line is broken before the sign."""
    return f"{100 * share:.0f}\u00a0%" if share >= 0.01 else f"{100 * share:.2g}\u00a0%"


def times(factor: float) -> str:
    return f"{factor:.0f} times" if factor >= 10 else f"{factor:.1f} times"


def joined(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def spans(steps: Sequence[int]) -> str:
    """12,001 to 12,005 and 12,009."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    said: list[str] = []
    for first, last in runs:
        pair = [f"{step:,}" for step in range(first, last + 1)]
        said += pair if len(pair) <= 2 else [f"{first:,} to {last:,}"]
    return joined(said if len(said) <= 6 else [*said[:5], f"{len(said) - 5} more stretches"])


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", ":")) else ".")


def moment(utc: str) -> str:
    """2026-05-23T15:42:01.123Z -> 2026-05-23 15:42 UTC."""
    return f"{utc[:10]} {utc[11:16]} UTC" if len(utc) >= 16 else utc


def code(text: str) -> str:
    """As code in Markdown, also in a table."""
    plain = text.replace("`", "'").replace("|", "¦").replace("\n", " ")
    return f"`{plain}`" if plain.strip() else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns to the left, numbers to the right."""
    rule = ["---" if place < left else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
