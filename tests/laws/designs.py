"""Points of known laws, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from x1_pretrain.laws import forms
from x1_pretrain.laws.forms import Law
from x1_pretrain.laws.points import Points, points

Floats = NDArray[np.float64]

TRUTH = Law(1.69337368, 406.401018, 0.33917084, 410.722827, 0.2849083)  # Hoffmann et al., unrounded


def measured(n: Floats, d: Floats, law: Law = TRUTH, noise: float = 0.0, seed: int = 0) -> Points:
    """What runs of these sizes would show, with noise of so much of L."""
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return points(n, d, forms.loss(law, n, d) * scatter)


def isoflops(
    budgets: list[float], sizes: int = 5, spread: float = 16.0, noise: float = 0.005, seed: int = 0
) -> Points:
    """On each budget so many sizes about the best one, the largest `spread` times the smallest."""
    best = forms.optimum(TRUTH, np.asarray(budgets))[0]
    n = np.outer(best, np.geomspace(spread**-0.5, spread**0.5, sizes))
    d = np.asarray(budgets)[:, None] / 6.0 / n
    return measured(n.ravel(), d.ravel(), noise=noise, seed=seed)


def cloud(count: int = 240, noise: float = 0.006, seed: int = 0) -> Points:
    """Sizes and tokens over factors of 300 and 100, as many as the published fit had."""
    random = np.random.default_rng(seed)
    n = 5e7 * np.exp(random.uniform(0, np.log(300), count))
    d = 2e9 * np.exp(random.uniform(0, np.log(100), count))
    return measured(n, d, noise=noise, seed=seed + 1)


def chinchilla(shared: Path) -> Points:
    """The 240 points that Besiroglu et al. fitted."""
    rows = np.genfromtxt(shared / "scaling/chinchilla_ndl.csv", delimiter=",", names=True)
    rows = rows[rows["used_in_fit"] == 1]
    return points(rows["N"], rows["D"], rows["loss"])


def multinomial(count: int, replicates: int, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    return random.multinomial(count, np.full(count, 1 / count), size=replicates).astype(float)
