"""How fast and how exact is the fit of a scaling law? The solver of `x1_pretrain.laws` against scipy.

    python benchmarks/laws.py                     240 synthetic points, under a minute
    python benchmarks/laws.py --points FILE.csv   columns N, D, loss (or val_loss); used_in_fit chooses rows

Both minimise the same objective in the same run: the sum of Huber(1e-3) losses on ln L of
E + A/N^alpha + B/D^beta. scipy gets the analytic gradient, centred logarithms, an objective scaled to about
100 and one start, the optimum of all points: the recipe that is kindest to it. Its time for 4000 replicates
is extrapolated from a sample, and marked so. The times are of one core with OMP_NUM_THREADS=1.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

# This folder leaves the path before anything else: its `tokenize` would hide the standard library's.
sys.path[:] = [folder for folder in sys.path if not folder.endswith("benchmarks")]

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.optimize import minimize

from x1_pretrain.laws import bootstrap, forms, solver
from x1_pretrain.laws.points import Points, points
from x1_pretrain.laws.results import Estimate

Floats = NDArray[np.float64]

REPLICATES = 4000
STARTS = 64
DELTA = 1e-3
SCALE = 1e5  # scipy's tolerances are absolute below 1
SYNTHETIC_POINTS = 240
MOST_SPREAD = np.array(
    [0.2, 0.2, 0.05, 0.04, 0.04]
)  # of the reference's further starts: u, v, e, alpha, beta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=Path, help="a CSV with N, D and loss (synthetic points without)")
    parser.add_argument(
        "--sample", type=int, default=100, help="replicates that scipy solves for its time (100)"
    )
    parser.add_argument("--checked", type=int, default=60, help="replicates held against tight optima (60)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began_s = time.perf_counter()
    measured = read(args.points) if args.points else synthetic(args.seed)
    print(hardware())
    print(f"{len(measured)} points from {args.points or 'a known law with 0.5 % noise'}")
    for line in (
        *time_table(measured, args.sample, args.seed),
        *accuracy_table(measured, args.checked, args.seed),
    ):
        print(line, flush=True)
    print(f"\n{time.perf_counter() - began_s:.0f} s")


def hardware() -> str:
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} CPUs, OMP_NUM_THREADS {threads}, {versions}"


def read(file: Path) -> Points:
    rows = np.genfromtxt(file, delimiter=",", names=True)
    columns = rows.dtype.names or ()
    if "used_in_fit" in columns:
        rows = rows[rows["used_in_fit"] == 1]
    return points(rows["N"], rows["D"], rows["loss" if "loss" in columns else "val_loss"])


def synthetic(seed: int) -> Points:
    """As many points as the published data have, over the same sizes, with noise of the same width."""
    random = np.random.default_rng(seed)
    flops = np.exp(random.uniform(np.log(6e18), np.log(3e21), SYNTHETIC_POINTS))
    best, _ = forms.optimum(forms.REFIT.law, flops)
    n = best * np.exp(random.normal(0, 0.9, SYNTHETIC_POINTS))
    d = flops / 6.0 / n
    noise = 0.005 * random.standard_t(4, SYNTHETIC_POINTS)
    return points(n, d, forms.loss(forms.REFIT.law, n, d) * np.exp(noise))


# ------------------------------------------------------------------------------------------------------------
# scipy's side


@dataclass(frozen=True)
class Reference:
    """The objective once more, one replicate at a time, in the plainest numpy."""

    x: Floats
    z: Floats
    log_loss: Floats
    start: Floats  # the optimum of all points

    @classmethod
    def of(cls, measured: Points, best: Estimate) -> Reference:
        log_n, log_d = np.log(measured.n), np.log(measured.d)
        law = best.law
        u = np.log(law.A) - law.alpha * log_n.mean()
        v = np.log(law.B) - law.beta * log_d.mean()
        start = np.array([u, v, np.log(law.E), law.alpha, law.beta])
        return cls(log_n - log_n.mean(), log_d - log_d.mean(), np.log(measured.loss), start)

    def value(self, q: Floats, weights: Floats) -> tuple[float, Floats]:
        a, b, e = np.exp(q[0] - q[3] * self.x), np.exp(q[1] - q[4] * self.z), np.exp(q[2])
        total = a + b + e
        residual = np.log(total) - self.log_loss
        size = np.abs(residual)
        huber = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA))
        pull = weights * np.clip(residual, -DELTA, DELTA) / total
        slope = [pull @ a, pull @ b, pull.sum() * e, -(pull * a) @ self.x, -(pull * b) @ self.z]
        return SCALE * float(weights @ huber), SCALE * np.array(slope)

    def one_start(self, weights: Floats, method: str) -> Floats:
        tight = {"BFGS": {"gtol": 1e-7}, "L-BFGS-B": {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 5000}}[method]
        found = minimize(self.value, self.start, args=(weights,), jac=True, method=method, options=tight)
        return np.asarray(found.x)

    def tight(self, weights: Floats, random: np.random.Generator, starts: int = 6) -> tuple[Floats, float]:
        """The best of several starts, each restarted until BFGS finds nothing more."""
        best, least = self.start, np.inf
        for k in range(starts):
            q = self.start + (MOST_SPREAD * random.standard_normal(5) if k else 0.0)
            for _ in range(5):
                options = {"gtol": 1e-13, "maxiter": 2000}
                found = minimize(self.value, q, args=(weights,), jac=True, method="BFGS", options=options)
                q = found.x
            if found.fun < least:
                best, least = q, float(found.fun)
        return best, least / SCALE


# ------------------------------------------------------------------------------------------------------------
# The tables


def timed(work: Callable[[], object], times: int) -> tuple[float, float]:
    """Best and median seconds."""
    seconds = []
    for _ in range(times):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds), statistics.median(seconds)


def time_table(measured: Points, sample: int, seed: int) -> Iterator[str]:
    best = solver.estimate(measured, starts=STARTS)
    weights = bootstrap.cluster_weights(measured, REPLICATES, seed)
    reference = Reference.of(measured, best)
    yield "\n| job | best | median of 3 |"
    yield "|---|---|---|"
    fit_s = timed(lambda: solver.estimate(measured, starts=STARTS), 3)
    many_s = timed(lambda: solver.replicates(measured, best, weights), 3)
    yield f"| ours: {STARTS}-start fit ({best.agreeing:.0%} agree) | {fit_s[0]:.3f} s | {fit_s[1]:.3f} s |"
    yield f"| ours: {REPLICATES} exact replicates | {many_s[0]:.3f} s | {many_s[1]:.3f} s |"
    yield f"| **ours: both** | **{fit_s[0] + many_s[0]:.3f} s** | **{fit_s[1] + many_s[1]:.3f} s** |"
    for method in ("BFGS", "L-BFGS-B"):
        seconds = timed(lambda m=method: [reference.one_start(w, m) for w in weights[:sample]], 3)
        whole = [s * REPLICATES / sample for s in seconds]
        job = f"scipy {method}, one start: {REPLICATES} replicates, extrapolated from {sample}"
        yield f"| {job} | {whole[0]:.1f} s | {whole[1]:.1f} s |"


def accuracy_table(measured: Points, checked: int, seed: int) -> Iterator[str]:
    best = solver.estimate(measured, starts=STARTS)
    weights = bootstrap.cluster_weights(measured, REPLICATES, seed)
    laws, objectives = solver.replicates(measured, best, weights)
    reference = Reference.of(measured, best)
    random = np.random.default_rng(seed + 1)
    rows = random.choice(REPLICATES, checked, replace=False)
    optima = [reference.tight(weights[row], random) for row in rows]
    least = np.array([value for _, value in optima])
    alpha = np.array([q[3] for q, _ in optima])
    yield f"\n{checked} replicates against the best of 6 tight scipy starts each"
    yield "\n| solver | worst objective / best known - 1 | largest difference in alpha |"
    yield "|---|---|---|"
    yield compared("ours", objectives[rows], laws[rows, 2], least, alpha)
    for method in ("BFGS", "L-BFGS-B"):
        found = [reference.one_start(weights[row], method) for row in rows]
        reached = [reference.value(q, weights[row])[0] / SCALE for q, row in zip(found, rows, strict=True)]
        one = np.array([q[3] for q in found])
        yield compared(f"scipy {method}, one start", np.array(reached), one, least, alpha)


def compared(name: str, value: Floats, alpha: Floats, least: Floats, best_alpha: Floats) -> str:
    least = np.minimum(least, value)
    return f"| {name} | {np.max(value / least - 1):.1e} | {np.abs(alpha - best_alpha).max():.1e} |"


if __name__ == "__main__":
    main()
