"""Fit a scaling law to measured runs: fit.json, iso-flop.png and prediction.md.

python -m x1_pretrain.fit_scaling_law --input runs.csv --output fit.json --bootstrap 1000

The input needs run_id, N, D and val_loss a row; `x1 isoflop` writes it from run folders.
"""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import typer

from x1_pretrain.command import run as run_app
from x1_pretrain.command import single
from x1_pretrain.errors import UserError
from x1_pretrain.laws import fit_file, prose
from x1_pretrain.laws.fitted import KEPT_DRAWS
from x1_pretrain.laws.fitting import report
from x1_pretrain.laws.points import Points
from x1_pretrain.laws.posterior import PRIORS, prior_for
from x1_pretrain.laws.reading import read_points
from x1_pretrain.numbers import parse_amount

FEWEST_REPLICATES = 100  # the ends of a 95 % interval are then two or three replicates each
MOST_REPLICATES = KEPT_DRAWS
FEWEST_POINTS = 3
USUAL_N = 1e9

Flag = typer.Option


def main(
    input: Annotated[Path, Flag(help="runs.csv: run_id, N, D, val_loss, ... a row", show_default=False)],
    output: Annotated[Path, Flag(help="fit.json; the picture and the page go beside it", show_default=False)],
    bootstrap: Annotated[int, Flag(help="replicates; whole runs are drawn, not points")] = 4000,
    n: Annotated[
        str | None, Flag(help="predict D_opt for this many parameters [1B, or ten times the largest N]")
    ] = None,
    count: Annotated[
        Literal["matrices", "total"] | None, Flag(help="what N counts [default: the column N as it is]")
    ] = None,
    prior: Annotated[
        str | None, Flag(help=f"for the posterior, where one is needed: {', '.join(PRIORS)} or wide")
    ] = None,
    bayesian: Annotated[bool, Flag("--bayesian", help="the posterior also where the points suffice")] = False,
    bits: Annotated[bool, Flag("--bits", help="the losses are in bits per token")] = False,
    allow_undecayed: Annotated[
        bool, Flag("--allow-undecayed", help="take losses from the middle of a schedule, which are too high")
    ] = False,
    picture: Annotated[bool, Flag("--picture/--no-picture", help="draw iso-flop.png")] = True,
    seed: Annotated[int, Flag(min=0, help="of the bootstrap and of the sampler")] = 0,
) -> None:
    """Fit a scaling law to measured runs: fit.json, iso-flop.png and prediction.md."""
    if bootstrap > MOST_REPLICATES:
        raise UserError(
            f"--bootstrap {bootstrap}: {MOST_REPLICATES} are the most: fit.json keeps each of them"
        )
    if bootstrap < FEWEST_REPLICATES:
        raise UserError(
            f"--bootstrap {bootstrap}: too few for a 95 % interval, whose ends are the outermost fortieths; "
            f"give {FEWEST_REPLICATES} or more (4000 take a quarter of a second)"
        )
    refuse_overwriting(input, output)
    points = read_points(input, count, allow_undecayed, bits)
    if len(points) < FEWEST_POINTS:
        raise UserError(
            f"--input {input}: {len(points)} point{'s' * (len(points) != 1)}, and a law needs at least "
            f"{FEWEST_POINTS} to say anything (five numbers; 15 runs on three budgets pin it down)"
        )
    believed = prior_for(points, prior) if prior else None
    target = parse_amount(n, "--n") if n else nearby(points)
    found = report(points, bootstrap, seed, target, believed, bayesian)
    fit_file.write(found, output)
    page = beside(output, "prediction.md")
    fit_file.whole(page, lambda new: new.write_text(prose.page(found), encoding="utf-8"))
    written = [output, page]
    if picture:
        from x1_pretrain.laws.picture import draw

        written.append(beside(output, "iso-flop.png"))
        fit_file.whole(written[-1], lambda new: draw(found, new))
    width = min(110, shutil.get_terminal_size((110, 24)).columns)
    for line in prose.summary(found).splitlines():
        print(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False))
    print(f"\nwritten: {', '.join(map(str, written))}; next: x1 predict --fit {output} --n {target:.12g}")


def refuse_overwriting(input: Path, output: Path) -> None:
    if output.suffix in (".csv", ".md", ".png") or output.resolve() == input.resolve():
        raise UserError(f"--output {output}: is for the fit, a file such as {output.with_name('fit.json')}")


def nearby(points: Points) -> float:
    """A billion, as everybody asks; where that is a thousand times what was measured, ten times that."""
    largest = float(points.n.max())
    return USUAL_N if largest * 1000 >= USUAL_N else float(f"{10 * largest:.1g}")


def beside(output: Path, name: str) -> Path:
    """Next to fit.json as the labs have it; next to another fit under its name."""
    return output.with_name(name if output.stem == "fit" else f"{output.stem}-{name}")


app = single(main)

if __name__ == "__main__":
    raise SystemExit(run_app(app, prog="python -m x1_pretrain.fit_scaling_law"))
