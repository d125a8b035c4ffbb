"""What the page of one run says, from top to bottom. Pure: a `Material` in, a `Page` out."""

from __future__ import annotations

from pathlib import Path

from x1_pretrain.records.naming import titled
from x1_pretrain.report import happenings, health, learning, origin, outlook, pace, state, words
from x1_pretrain.report.aligned import aligned
from x1_pretrain.report.blocks import Block, Facts, Page, Section
from x1_pretrain.report.material import Material


def page(m: Material, prediction: Path | None = None, refresh_s: float | None = None) -> Page:
    """The report of one run."""
    stands, expected = state.state(m), outlook.expectations(m, prediction)
    placed = learning.marks(m)
    sections: list[Section | None] = [
        learning.loss(m, expected, placed),
        learning.evaluations(m, expected),
        learning.samples(m),
        happenings.spikes(m),
        happenings.events(m),
        pace.speed(m, placed),
        pace.paid_time(m),
        pace.money(m),
        health.norms(m, placed),
        health.machine(m),
        origin.data(m),
        origin.checks(m),
        origin.records(m),
    ]
    return Page(
        title=titled(m.run),
        kicker=kicker(m),
        state=f"step {m.step:,} of {m.run.total_steps:,}; {stands.words}",
        tone=stands.tone,
        share_done=min(1.0, m.step / m.run.total_steps),
        lead=lead(m),
        sections=aligned([section for section in sections if section is not None]),
        refresh_s=None if stands.over else refresh_s,
    )


def kicker(m: Material) -> str:
    """What this is, and when it was made."""
    return f"Run report · {m.manifest.get('run_id', 'no id')} · written {m.now:%Y-%m-%d %H:%M} UTC"


def lead(m: Material) -> list[Block]:
    return [*pace.gate_words(m), Facts(key_facts(m))]


def key_facts(m: Material) -> list[tuple[str, str, str]]:
    """One line of figures, each with what it counts."""
    matrices, injected = state.parameters(m, "non_embedding"), state.injected_tokens(m)
    inner = f"{words.tokens(matrices)} in matrices" if matrices is not None else ""
    goodput = m.paid_time.share if m.paid_time is not None else None
    per_billion, spent = state.usd_per_billion(m), state.spent_usd(m)
    seconds, count = state.trained_s(m), state.sessions(m)
    trained = state.training_loss(m)
    apart = f", {words.tokens(injected)} injected not counted" if injected else ""
    return [
        ("parameters", words.tokens(state.parameters(m)), inner),
        ("tokens", words.tokens(m.tokens), f"of {words.tokens(m.total_tokens)}{apart}"),
        ("validation loss", words.loss(m.last("val/loss")), "nats per token, last evaluation"),
        ("training loss", words.loss(trained[1] if trained else None), _where(trained)),
        ("time", words.duration(seconds), f"in the trainer, {words.count(count, 'session')}"),
        ("cost", "not priced" if spent is None else words.usd(spent), _ceiling(m)),
        (
            "per billion tokens",
            "not priced" if per_billion is None else words.usd(per_billion),
            "tokens kept",
        ),
        ("goodput", words.share(goodput), "useful of paid time"),
    ]


def _where(trained: tuple[int, float] | None) -> str:
    return f"of step {trained[0]:,}" if trained else ""


def _ceiling(m: Material) -> str:
    ceiling = m.money.ceiling_usd if m.money is not None else None
    return "no ceiling" if ceiling is None else f"ceiling {words.usd(ceiling)}"
