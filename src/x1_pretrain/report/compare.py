"""What the page of several runs says: their curves in one frame, final numbers side by side, what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from x1_pretrain.config import flatten
from x1_pretrain.records.naming import titled
from x1_pretrain.report import curves, learning, state, words
from x1_pretrain.report.aligned import aligned
from x1_pretrain.report.blocks import Block, Chart, Curve, Line, Mark, Page, Section, Table, Views
from x1_pretrain.report.material import Material, clean

ABSENT = "not there"
FIGURES: Sequence[tuple[str, Callable[[Material], str]]] = (
    ("state", lambda m: state.state(m).words),
    ("steps", lambda m: f"{m.step:,} of {m.run.total_steps:,}"),
    ("parameters", lambda m: words.tokens(state.parameters(m))),
    ("tokens", lambda m: words.tokens(m.tokens)),
    ("validation loss, last", lambda m: words.loss(m.last("val/loss"))),
    ("training loss, last", lambda m: words.loss((state.training_loss(m) or (0, None))[1])),
    ("speed, median tokens/s", lambda m: words.tokens(state.median(m, "tokens_per_sec"))),
    ("mfu (PaLM), median", lambda m: words.share(state.median(m, "mfu"))),
    ("mfu_causal, median", lambda m: words.share(state.median(m, "mfu_causal"))),
    ("time in the trainer", lambda m: words.duration(state.trained_s(m))),
    ("sessions", lambda m: f"{state.sessions(m):,}"),
    ("spikes", lambda m: f"{len(m.spikes):,}"),
    ("goodput", lambda m: words.share(m.paid_time.share if m.paid_time else None)),
    ("cost", lambda m: "not priced" if (usd := state.spent_usd(m)) is None else words.usd(usd)),
    (
        "cost per billion tokens",
        lambda m: "not priced" if (usd := state.usd_per_billion(m)) is None else words.usd(usd),
    ),
)


def page(runs: Sequence[Material], refresh_s: float | None = None) -> Page:
    names = labels(runs)
    over = all(state.state(m).over for m in runs)
    done = sum(m.finished for m in runs)
    placed = marks(runs, names)
    problems = [Line(f"{name}: {p}", "bad") for name, m in zip(names, runs, strict=True) for p in m.problems]
    sections = [
        Section("numbers", "Final numbers", [_figures(runs, names), *problems]),
        Section("loss", "Loss", [*_losses(runs, names, placed), *learning.mark_list(placed)]),
        Section("speed", "Speed", _overlaid(runs, names, _SPEED, placed)),
        Section("norms", "Gradients and weights", _overlaid(runs, names, _NORMS, placed)),
        Section("differences", "What differs", _differences(runs, names)),
    ]
    return Page(
        title=" · ".join(names) if len(names) <= 4 else f"{len(names)} runs",
        kicker=f"Report of {len(runs)} runs · written {runs[0].now:%Y-%m-%d %H:%M} UTC",
        state=f"{done} of {len(runs)} finished",
        tone="good" if done == len(runs) else "note",
        share_done=None,
        lead=[Line("Overlaid over trained tokens. `x1 report RUN` gives each its own page.", "note")],
        sections=aligned(sections),
        refresh_s=None if over else refresh_s,
    )


def labels(runs: Sequence[Material]) -> list[str]:
    """Their names and folders; the whole path where two share both."""
    names = [titled(m.run) for m in runs]
    return [
        f"{m.run.name} ({m.run.folder})" if names.count(n) > 1 else n
        for n, m in zip(names, runs, strict=True)
    ]


def marks(runs: Sequence[Material], names: Sequence[str]) -> list[Mark]:
    """Spikes, rewinds and injections of all runs, counted through; each says whose it is."""
    found = [
        (mark, name)
        for m, name in zip(runs, names, strict=True)
        for mark in learning.marks(m)
        if mark.kind in ("spike", "rewind", "inject")
    ]
    counted: dict[str, int] = {}
    made = []
    for mark, name in sorted(found, key=lambda one: one[0].x):
        letter = mark.label[0]
        counted[letter] = counted.get(letter, 0) + 1
        made.append(replace(mark, label=f"{letter}{counted[letter]}", text=f"{name}: {mark.text}"))
    return made


def _figures(runs: Sequence[Material], names: Sequence[str]) -> Table:
    rows = [[title, *(figure(m) for m in runs)] for title, figure in FIGURES]
    return Table("Side by side", ["", *names], rows)


def _losses(runs: Sequence[Material], names: Sequence[str], placed: Sequence[Mark]) -> list[Block]:
    train = _curves(runs, names, "train/loss")
    validation = _curves(runs, names, "val/loss")
    made: list[Block] = []
    for title, name, drawn in (("Validation loss", "val", validation), ("Training loss", "train", train)):
        if drawn:
            made.append(Views(f"{name}-views", _views(title, name, drawn, placed)))
    return made or [Line("No losses on record yet.", "note")]


def _views(title: str, name: str, drawn: Sequence[Curve], placed: Sequence[Mark]) -> list[tuple[str, Chart]]:
    end = max(float(c.x.max()) for c in drawn)
    begin = min((float(c.x[c.x > 0].min()) for c in drawn if (c.x > 0).any()), default=1.0)
    kinds = (
        ("whole run", 0.0, False),
        ("later part", learning.EARLY * end, False),
        ("logarithmic", begin, True),
    )
    made = []
    for place, (kind, first, log) in enumerate(kinds):
        y_range, above = learning.loss_range(drawn, 0.0 if log else first)
        chart = Chart(
            f"{name}-{place}",
            title,
            "nats per token",
            drawn,
            x_name="tokens trained" + (", logarithmic" if log else ""),
            x_log=log,
            x_range=(first, end),
            y_range=y_range,
            marks=placed,
            notes=[f"{words.count(above, 'higher value')} above the frame"] if above else [],
            tall=True,
        )
        made.append((kind, chart))
    return made


_SPEED = (("tokens_per_sec", "Throughput", "tokens a second"), ("mfu", "MFU (PaLM)", "share of the peak"))
_NORMS = (("grad_norm", "Gradient norm", "L2"), ("param_norm", "Parameter norm", "L2"))


def _overlaid(
    runs: Sequence[Material],
    names: Sequence[str],
    wanted: Sequence[tuple[str, str, str]],
    placed: Sequence[Mark],
) -> list[Block]:
    made: list[Block] = []
    for name, title, unit in wanted:
        if drawn := _curves(runs, names, name):
            share, zero = name == "mfu", name in ("mfu", "tokens_per_sec")
            wide = max(curves.spread(c.y) for c in drawn) > 20
            made.append(
                Chart(
                    f"all-{name}",
                    title,
                    unit,
                    drawn,
                    y_share=share,
                    y_zero=zero,
                    y_log=wide and not zero,
                    marks=placed,
                )
            )
    return made or [Line("Nothing on record yet.", "note")]


def _curves(runs: Sequence[Material], names: Sequence[str], metric: str) -> list[Curve]:
    """A line a run, smoothed where it is long; the same style in every chart. What every step tells stays
    below its median, so that a spike of one step is seen."""
    drawn: list[Curve] = []
    for place, (m, name) in enumerate(zip(runs, names, strict=True)):
        each = EVERY_STEP.get(metric)
        x, y = m.every_step(each, metric) if each else m.column(metric)
        if len(x):
            found = curves.curves(name, x, y, place, _last(metric, float(y[-1])))
            drawn += [c for c in found if each or not c.faint]
    return drawn


EVERY_STEP = {"train/loss": "loss", "grad_norm": "grad_norm"}  # in the rows, in the steps


def _last(metric: str, value: float) -> str:
    if metric == "mfu":
        return words.share(value)
    if metric == "tokens_per_sec":
        return words.tokens(value)
    return words.loss(value) if metric.endswith("loss") else words.number(value)


def _differences(runs: Sequence[Material], names: Sequence[str]) -> list[Block]:
    """Only fields that differ; of the manifests the content of the corpora."""
    flat = [flatten(m.run.config.model_dump(mode="json")) for m in runs]
    for tree, m in zip(flat, runs, strict=True):
        tree |= {f"corpus {c.facts.get('name')}": str(c.facts.get("fingerprint"))[:12] for c in m.corpora}
        for own in ("name", "run_dir"):  # which say only which run it is
            tree.pop(own, None)
    fields = list(dict.fromkeys(field for tree in flat for field in tree))
    differing = [f for f in fields if any(t.get(f, ABSENT) != flat[0].get(f, ABSENT) for t in flat)]
    if not differing:
        return [Line("The configs and the data are the same.", "good")]
    rows = [[field, *(str(clean(tree.get(field, ABSENT))) for tree in flat)] for field in differing]
    same = len(fields) - len(differing)
    everywhere = frozenset(range(len(runs) + 1))
    return [
        Table("Fields that differ", ["field", *names], rows, everywhere),
        Line(f"{words.count(same, 'field')} more {'is' if same == 1 else 'are'} the same.", "note"),
    ]
