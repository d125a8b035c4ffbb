"""What the loss was expected to be, and whether the run kept to it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from x1_pretrain.errors import UserError
from x1_pretrain.laws.fitted import KIND, read_fit
from x1_pretrain.report import state, words
from x1_pretrain.report.blocks import Block, Level, Line, Table
from x1_pretrain.report.material import Material


@dataclass(frozen=True)
class Expected:
    """The final validation loss that somebody said beforehand."""

    who: str
    low: float
    high: float
    point: float | None = None
    aside: str = ""

    @property
    def level(self) -> Level:
        band = f"[{self.low:.3f}, {self.high:.3f}]"
        return Level(self.low, self.high, f"{self.who}: {band}" if self.low < self.high else self.who)


def expectations(m: Material, prediction: Path | None) -> list[Expected]:
    """The config's band, and a law's word where one is given."""
    found = []
    if band := m.run.config.verify.loss_band:
        found.append(Expected("the band set in the config", band[0], band[1]))
    if prediction is not None:
        found.append(of_file(m, prediction))
    return found


def of_file(m: Material, file: Path) -> Expected:
    """A fit.json (asked for this run's N and D), or what `x1 predict --json` printed."""
    try:
        tree = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"--prediction {file}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--prediction {file}: not valid JSON ({error})") from None
    if isinstance(tree, dict) and tree.get("kind") == KIND:
        return _of_fit(m, file)
    found = tree.get("at") if isinstance(tree, dict) else None
    loss = found.get("loss") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(loss, dict) or not _finite(loss.get("point")):
        raise UserError(
            f"--prediction {file}: expected a fit.json or the output of `x1 predict --n N --d D --json`, "
            f"found {'no `at` in it' if isinstance(tree, dict) else type(tree).__name__}"
        )
    point, low, high = float(loss["point"]), loss.get("low95"), loss.get("high95")
    if not (_finite(low) and _finite(high)):
        low = high = point
    return Expected("the scaling law", low, high, point, _asked(m, found, file))


def _asked(m: Material, found: dict[str, Any], file: Path) -> str:
    """What the prediction was made for; and the run's own tokens where those are others."""
    d, aside = (
        found.get("D"),
        f"for N = {words.tokens(found.get('N'))} and D = {words.tokens(found.get('D'))}",
    )
    if _finite(d) and abs(d / m.total_tokens - 1) > 0.02:
        aside += f" (the run has D = {words.tokens(m.total_tokens)})"
    return f"{aside}, from {file.name}"


def _finite(found: Any) -> TypeGuard[float]:
    return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)


def _of_fit(m: Material, file: Path) -> Expected:
    fitted = read_fit(file)
    n = state.parameters(m, "non_embedding" if fitted.counts == "matrices" else "total")
    if n is None:
        raise UserError(
            f"--prediction {file}: the run's manifest has no parameter count to ask the law about; add "
            "`parameters` to manifest.json or leave --prediction out"
        )
    band = fitted.loss(n, m.total_tokens)
    low, high = (band.low, band.high) if band.has_interval else (band.point, band.point)
    counted = "parameters in matrices" if fitted.counts == "matrices" else "parameters"
    aside = f"for {words.tokens(n)} {counted} and {words.tokens(m.total_tokens)} tokens, from {file.name}"
    return Expected("the scaling law", low, high, band.point, aside)


# ------------------------------------------------------------------------------------------------------------
# Did it match?


def check(m: Material, expected: list[Expected]) -> list[Block]:
    if not expected:
        return [
            Line(
                "Nothing was predicted for this run: the config sets no verify.loss_band, and no law was "
                "given (--prediction fit.json).",
                "note",
            )
        ]
    found = m.last("val/loss")
    verdicts = [_verdict(m, one, found) for one in expected]
    rows = [
        [one.who, _number(one.point), f"{one.low:.4f} to {one.high:.4f}", words.loss(found), one.aside]
        for one in expected
    ]
    head = ["who said it", "point", "tolerance", "measured", "what it is for"]
    return [*verdicts, Table("Predicted and measured validation loss", head, rows, frozenset({0, 4}))]


def _number(point: float | None) -> str:
    return "none" if point is None else f"{point:.4f}"


def _verdict(m: Material, one: Expected, found: float | None) -> Line:
    if found is None:
        return Line(f"Not known yet: no validation loss to hold against {one.who}.", "note")
    if not m.finished:
        return Line(
            f"Not known yet: {one.who} speaks of the end of the run, and this is step {m.step:,} of "
            f"{m.run.total_steps:,} (val/loss {found:.4f} so far).",
            "note",
        )
    if one.low == one.high:
        off = f"{found - one.low:+.4f} nats ({found / one.low - 1:+.1%})"
        return Line(f"{one.who} gave a point without an interval: the run ended {off} from it.", "note")
    if one.low <= found <= one.high:
        return Line(f"Yes: val/loss ended at {found:.4f}, inside {one.level.text}.", "good")
    off_by = found - one.high if found > one.high else found - one.low
    return Line(f"No: val/loss ended at {found:.4f}, {off_by:+.4f} outside {one.level.text}.", "bad")
