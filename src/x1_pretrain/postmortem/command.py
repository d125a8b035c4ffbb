"""The post-mortem of a run's loss spikes, from its files alone: what happened, why, what it cost, what to do.

    x1 postmortem x1-50m-a100
    x1 postmortem x1-50m-a100 --step 12000        that step, spike or not
    python -m x1_pretrain.postmortem.command runs/x1-50m-a100

Writes spike-postmortem.md, a picture for each spike and spike-postmortem-data.csv into the run folder. The
training loop starts it when a spike ends. Exit code 0 also when there was no spike: it says so.
"""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import FINISHED, UserError
from x1_pretrain.money.clock import Clock
from x1_pretrain.postmortem import page, page_step
from x1_pretrain.postmortem.data import CSV_COLUMNS, Seen, csv_rows
from x1_pretrain.postmortem.episodes import Spike, episodes
from x1_pretrain.postmortem.findings import Findings, gather
from x1_pretrain.postmortem.picture import View, draw
from x1_pretrain.records.run_folder import POSTMORTEM, Run, find_run, open_run

STEM = POSTMORTEM.removesuffix(".md")
PICTURE, DATA = f"{STEM}.png", f"{STEM}-data.csv"
MOST_SECTIONS = 5  # spikes with a section and a picture of their own: the highest, and the newest
NEAR = 20  # steps from a spike that a --step still means it
LEAST_SHOWN = 64  # steps on either side in a picture


def write(folder: Path, step: int | None = None, output: Path | None = None) -> list[Path]:
    """Write the post-mortem of the run in `folder`; the files, the page first. None: there was no spike."""
    run, clock = open_run(folder), Clock.from_environment()
    spikes = episodes(run)
    if step is not None and not any(_near(spike, step) for spike in spikes):
        return _write_step(run, step, output or folder)
    if not spikes:
        return []
    metrics = run.rows()
    found = [gather(run, spike, spikes, metrics, clock) for spike in chosen(spikes, step)]
    names = picture_names([one.spike for one in found], spikes)
    with _into(output or folder) as files:
        for one, name in zip(found, names, strict=True):
            draw(view(one), files.new(name))
        files.text(DATA, as_csv((one.seen, one.spike.onset) for one in found))
        files.text(POSTMORTEM, page.page(run, spikes, found, names, DATA))
    return files.written


def _write_step(run: Run, step: int, folder: Path) -> list[Path]:
    quiet, stem = page_step.look(run, step), f"postmortem-step-{step}"
    with _into(folder) as files:
        draw(step_view(quiet), files.new(f"{stem}.png"))
        files.text(f"{stem}-data.csv", as_csv([(quiet.seen, step)]))
        files.text(f"{stem}.md", page_step.page(quiet, f"{stem}.png", f"{stem}-data.csv"))
    return files.written


def _near(spike: Spike, step: int) -> bool:
    return spike.onset - NEAR <= step <= spike.last + NEAR


def chosen(spikes: Sequence[Spike], step: int | None = None) -> list[Spike]:
    """The spikes with a section of their own, in order: the highest, the newest, and the one asked for."""
    highest = sorted(spikes[:-1], key=lambda spike: spike.height, reverse=True)[: MOST_SECTIONS - 1]
    asked = [spike for spike in spikes if step is not None and _near(spike, step)]
    keep = [*highest, spikes[-1], *asked]
    return [spike for spike in spikes if any(spike is one for one in keep)]


def picture_names(shown: Sequence[Spike], spikes: Sequence[Spike]) -> list[str]:
    """One picture: the plain name. The run's first spike has it; later ones carry their onset."""
    names: list[str] = []
    for spike in shown:
        name = PICTURE if spike is spikes[0] or len(shown) == 1 else f"{STEM}-{spike.onset}.png"
        twin = sum(other.onset == spike.onset for other in spikes[: spikes.index(spike)])
        names.append(f"{name.removesuffix('.png')}-{twin + 1}.png" if twin else name)
    return names


# -----------------------------------------------------------------------------------------------------------
# Views


def view(found: Findings) -> View:
    """The picture of a spike: as many steps before it as it took, and after, within reason."""
    spike = found.spike
    around = min(max(LEAST_SHOWN, 2 * (spike.last - spike.onset)), 4 * LEAST_SHOWN)
    rows = [*found.before, *found.during, *found.after]
    return View(
        title=f"{found.run.name}: spike at step {spike.onset:,}",
        rows=[row for row in rows if spike.onset - around <= row["step"] <= spike.last + around],
        loss_before=spike.loss_before,
        loss_scale=spike.loss_scale,
        grad_norm_before=spike.grad_norm_before,
        alarm=found.run.config.stability.alarm,
        span=(spike.onset, spike.last),
        recovered=spike.recovered,
        injected=found.seen.injected if found.seen else (),
        again=found.again,
    )


def step_view(quiet: page_step.Quiet) -> View:
    return View(
        title=f"{quiet.run.name}: around step {quiet.step:,}",
        rows=[row for row in quiet.rows if abs(row["step"] - quiet.step) <= LEAST_SHOWN],
        loss_before=quiet.loss[1],
        loss_scale=quiet.loss[2],
        grad_norm_before=quiet.norm[1],
        alarm=quiet.run.config.stability.alarm,
        injected=quiet.seen.injected if quiet.seen else (),
        marked=quiet.step,
    )


# -----------------------------------------------------------------------------------------------------------
# Files: each whole or not at all, the page last


def as_csv(seen: Iterable[tuple[Seen | None, int]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one, onset in seen:
        writer.writerows(csv_rows(one, onset) if one else [])
    return text.getvalue()


class _into:
    """Files that appear in `folder` together, once all of them are made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, list[Path]()

    def __enter__(self) -> _into:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._aside = Path(tempfile.mkdtemp(prefix=".postmortem-", dir=self.folder))
        except OSError as error:
            raise _unwritten(self.folder, error) from None
        return self

    def new(self, name: str) -> Path:
        self.written.insert(0, self.folder / name)
        return self._aside / name

    def text(self, name: str, content: str) -> None:
        self.new(name).write_text(content, encoding="utf-8")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                for file in reversed(self.written):
                    (self._aside / file.name).replace(file)
        except OSError as problem:
            raise _unwritten(self.folder, problem) from None
        finally:
            shutil.rmtree(self._aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritten(self.folder, error) from None


def _unwritten(folder: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or folder}: can't be written ({error.strerror}); see --output")


# -----------------------------------------------------------------------------------------------------------
# The command


def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or the name of a run under runs/")],
    step: Annotated[
        int | None, typer.Option(min=1, help="what happened around this step, spike or not")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write there [default: the run folder]")] = None,
) -> int:
    """Write the post-mortem of a run's loss spikes, or of any step."""
    folder = find_run(run)
    files = write(folder, step, output)
    if not files:
        print(f"{folder}: {page.none(open_run(folder))}")
        return FINISHED
    first = files[0].read_text(encoding="utf-8").splitlines()
    for line in (line for line in first if line.startswith("#") and not line.startswith("###")):
        print(line.lstrip("# "))
    print(f"written: {', '.join(map(str, files))}")
    return FINISHED


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.postmortem.command"))
