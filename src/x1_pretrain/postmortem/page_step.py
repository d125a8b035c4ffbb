"""A page on any step that someone asks about, where no spike was: how the step compares with those before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from x1_pretrain.errors import UserError
from x1_pretrain.learning.stability import NORM_FLOOR, stands_out
from x1_pretrain.numbers import human
from x1_pretrain.postmortem.data import Seen, data_of, patterns
from x1_pretrain.postmortem.effects import Norm, norms
from x1_pretrain.postmortem.episodes import deviation, level, peak, tokens_after
from x1_pretrain.postmortem.page import norms as norms_table
from x1_pretrain.postmortem.page import wrapped
from x1_pretrain.postmortem.page_data import documents_and_sources
from x1_pretrain.postmortem.steps_file import every_step, last_row, rows_between, value
from x1_pretrain.postmortem.words import code, joined, nats, number, sentence
from x1_pretrain.records.data_order import order_of
from x1_pretrain.records.run_folder import Row, Run

AROUND = 20  # steps on either side that count as "around" it
LATELY = 32  # steps whose median is the loss that was to be expected
LOUD = ("spike", "skip", "rewind", "inject", "not_finite", "fault", "resume", "hang", "suspended")
SOURCES = (
    "Figures are from `steps.jsonl`, `metrics.jsonl`, `events.jsonl` and `config.yaml`. Not measured: the "
    "loss of single documents."
)


@dataclass(frozen=True)
class Quiet:
    """A step and its surroundings."""

    run: Run
    step: int
    rows: list[Row]
    loss: tuple[float, float, float]  # at the step, the median before, the deviation before
    norm: tuple[float, float, float]  # the same of the gradient; deviations of its logarithm
    events: list[Row]
    norms: list[Norm]
    seen: Seen | None
    no_data: str

    @property
    def loss_z(self) -> float:
        found, middle, scale = self.loss
        return (found - middle) / scale if scale > 0 else math.nan

    @property
    def norm_z(self) -> float:
        found, middle, scale = self.norm
        return math.log(found / middle) / scale if scale > 0 and found > 0 and middle > 0 else math.nan


def look(run: Run, step: int) -> Quiet:
    """Read what there is about one step."""
    window = run.config.stability.window
    rows = rows_between(run, max(1, step - window), step + window)
    here = next((row for row in rows if row["step"] == step), None)
    newest = last_row(run)
    if here is None or newest is None:
        done = (
            f"the run has done {newest['step']:,} of {run.total_steps:,} steps"
            if newest
            else "it has no steps"
        )
        every = "" if every_step(run) else f", and has a row only every {run.config.log.every:,}"
        raise UserError(
            f"{run.folder}: there is no row for step {step:,}: {done}{every}; give a step of its rows"
        )
    before = [row for row in rows if row["step"] < step and not row.get("spike")]
    losses = [value(row, "loss") for row in before]
    log_norms = [math.log(v) for row in before if (v := value(row, "grad_norm")) > 0 and math.isfinite(v)]
    middle, scale = level(log_norms)
    scale = max(scale, NORM_FLOOR)
    try:
        seen, no_data = data_of(run, order_of(run), [step], step), ""
    except UserError as error:
        seen, no_data = None, str(error)
    return Quiet(
        run=run,
        step=step,
        rows=rows,
        loss=(value(here, "loss"), level(losses[-LATELY:])[0], deviation(before)),
        norm=(value(here, "grad_norm"), math.exp(middle) if before else math.nan, scale),
        events=[event for event in run.events() if _loud(event, step)],
        norms=norms(run.rows(), rows, step, step),
        seen=seen,
        no_data=no_data,
    )


def _loud(event: Row, step: int) -> bool:
    at = event.get("onset", event.get("step"))
    return event.get("event") in LOUD and isinstance(at, int) and abs(at - step) <= AROUND


def stood_out(quiet: Quiet) -> bool:
    finite = math.isfinite(quiet.loss[0]) and math.isfinite(quiet.norm[0])
    return not finite or stands_out(quiet.loss_z, quiet.norm_z, quiet.run.config.stability.alarm)


def injected(quiet: Quiet) -> bool:
    """Whether its batch was put there on purpose: by its own row, or by the order of the data."""
    own = any(row.get("injected") for row in quiet.rows if row["step"] == quiet.step)
    return own or (quiet.seen is not None and quiet.step in quiet.seen.injected)


def page(quiet: Quiet, picture: str, csv: str) -> str:
    """The whole page."""
    run, step = quiet.run, quiet.step
    verdict = "it stood out" if stood_out(quiet) else "nothing stood out here"
    if injected(quiet):
        verdict = f"an injected batch, which {'stood out' if stood_out(quiet) else 'did not stand out'}"
    parts = [
        f"# Step {step:,} of {run.name}: {verdict}",
        comparison(quiet),
        f"![Loss and gradient norm around step {step:,}]({picture})",
        surroundings(quiet),
        norms_table(quiet.norms),
        *data(quiet, csv),
        SOURCES,
    ]
    return "\n\n".join(wrapped(part) for part in parts if part) + "\n"


def comparison(quiet: Quiet) -> str:
    """The step against the median of the steps before."""
    run, step = quiet.run, quiet.step
    where = f"Step {step:,} ended {human(tokens_after(run, step, run.events()))} tokens into training."
    loss, norm = quiet.loss, quiet.norm
    said = [
        _against("loss", nats(loss[0]), nats(loss[1]), quiet.loss_z),
        _against("gradient norm", number(norm[0]), number(norm[1]), quiet.norm_z),
    ]
    alarm = f"The alarm is at {run.config.stability.alarm:g} deviations of the loss."
    return f"{where} {' '.join(said)} {alarm}"


def _against(what: str, found: str, usual: str, z: float) -> str:
    if not math.isfinite(z):
        return f"Its {what} was {found}; too few steps before it to compare with."
    side = "above" if z >= 0 else "below"
    return f"Its {what} was {found}, {abs(z):.1f} deviations {side} the median before ({usual})."


def surroundings(quiet: Quiet) -> str:
    """The highest values near it, and what else happened."""
    near = [row for row in quiet.rows if abs(row["step"] - quiet.step) <= AROUND]
    loss, norm = peak(near, "loss"), peak(near, "grad_norm")
    told = f"Within {AROUND} steps of it the loss was highest at step {loss[1]:,} with {nats(loss[0])}"
    if norm[1] is not None:
        told += f", the gradient norm at step {norm[1]:,} with {number(norm[0])}"
    if not quiet.events:
        return f"{told}. Nothing else is on record for these steps."
    notes = [
        f"{code(str(event['event']))} at step {event.get('onset', event['step']):,}" for event in quiet.events
    ]
    return f"{told}. On record nearby: {joined(notes)}."


def data(quiet: Quiet, csv: str) -> Sequence[str]:
    if quiet.seen is None:
        return [f"{sentence(f'its data can not be told: {quiet.no_data}')}"]
    return documents_and_sources(quiet.seen, patterns(quiet.seen), csv)
