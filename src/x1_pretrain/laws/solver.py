"""The fit of a law: sum of Huber(ln of the law - ln L) at its least, for many starts or replicates at once.

The residual of a point is ln(exp(u - alpha x) + exp(v - beta z) + exp(e)) - ln L, where x and z are ln N and
ln D about their means: u and v are then the logarithms of the two terms at the centre of the data, and the
five numbers are of one size whatever the units. The objective is the SUM over the points, and every test of
convergence is relative to it: with a mean of Huber losses near 1e-6, an optimiser with absolute tolerances
stops far from the optimum (Besiroglu et al. 2024, arXiv 2404.10102, on the published constants).

One step is Levenberg-Marquardt: Newton's curvature of the points inside Huber's bend, J'J alone, damped by
the curvature of the quadratic that touches the Huber loss from above at the present residuals (what
iteratively reweighted least squares minimises). The damped step can't leave that metric, however badly the
five numbers are scaled. Rows of a batch are solved side by side and leave it as they converge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.laws.points import Points
from x1_pretrain.laws.results import HOFFMANN, TIED, Estimate, Estimator, Form

Flags = npt.NDArray[np.bool_]

HUBER_DELTA = 1e-3  # as Hoffmann et al. 2022, on ln L
# Least absolute deviation is Huber's limit, walked into: each bend starts from the optimum of the one before.
LAD_DELTAS = tuple(10.0**-k for k in range(3, 10))  # each far below the distance between two residuals
CHUNK = 200  # replicates side by side: their arrays of 240 points stay in a core's cache
MOST_STEPS = 200
CONVERGED = 1e-12  # the step's predicted gain, as a share of the objective
PERFECT = 1e-28  # a mean squared residual that is rounding: an exact fit has no smaller objective to find
AGREE = 1e-6  # objectives closer than this are one optimum

# The box that keeps every exponential finite. An optimum on its edge is no optimum: `identify` refuses it.
LEAST_EXPONENT, MOST_EXPONENT = 1e-3, 5.0
LEAST_LN_TERM = -30.0  # a term at the centre, against the smallest loss
LEAST_LN_E = -14.0  # E, against the smallest loss: one millionth of it
MOST_LN_TERM = 3.0  # any term, against the largest loss
LONGEST_STEP = np.array([3.0, 3.0, 3.0, 0.5, 0.5])  # in u, v, e, alpha, beta: the model is linear so far only


def estimate(
    points: Points, form: Form = HOFFMANN, estimator: Estimator = "huber", starts: int = 64
) -> Estimate:
    """The best optimum that the starts reach; of the free form never a worse one than with alpha = beta."""
    problem = _problem(points, form)
    begin = _starts(problem, starts)
    if form == HOFFMANN and starts >= 8:
        begin[-1] = _numbers(problem, estimate(points, TIED, estimator, starts // 4).law)
    found, objective = _solve(problem, begin, np.ones((len(begin), len(points))), estimator)
    best = int(np.argmin(objective))
    same = objective <= objective[best] * (1 + AGREE) + PERFECT * len(points)
    law = Law(*(float(v) for v in _laws(problem, found[best : best + 1])[0]))
    return Estimate(law, form, estimator, float(objective[best]), starts, float(same.mean()))


def replicates(points: Points, best: Estimate, weights: F64) -> tuple[F64, F64]:
    """The optimum for each row of weights (R, n), from the optimum of all points: laws (R, 5) and objectives.

    Exact, not one step: each row is iterated until it converges. Only a row whose sample has no more distinct
    points than the law has numbers, along whose valley the steps are short, may stop at MOST_STEPS before.
    """
    problem = _problem(points, best.form)
    centre = _numbers(problem, best.law)
    parts = [weights[i : i + CHUNK] for i in range(0, len(weights), CHUNK)]
    solved = [_solve(problem, _near(problem, centre, w, best.estimator), w, best.estimator) for w in parts]
    if not solved:
        return np.empty((0, 5)), np.empty(0)
    return _laws(problem, np.concatenate([s[0] for s in solved])), np.concatenate([s[1] for s in solved])


def jacobian(points: Points, best: Estimate) -> F64:
    """How ln L at each point moves with each free number of u, v, e, alpha, beta: (n, k)."""
    problem = _problem(points, best.form)
    return _jacobian(problem, _evaluate(problem, _numbers(problem, best.law)[None]))


# ------------------------------------------------------------------------------------------------------------
# The problem: points about their centre, and which of (u, v, e, alpha, beta) are free


@dataclass(frozen=True)
class _Problem:
    x: F64  # (n,) ln N about its mean
    z: F64  # (n,) ln D about its mean
    log_loss: F64  # (n,)
    centre: tuple[float, float]  # the means
    free: F64  # (5, k): (u, v, e, alpha, beta) = free @ q + fixed
    fixed: F64  # (5,)
    low: F64  # (k,) the box of q
    high: F64


def _problem(points: Points, form: Form) -> _Problem:
    log_n, log_d, log_loss = np.log(points.n), np.log(points.d), np.log(points.loss)
    centre = float(log_n.mean()), float(log_d.mean())
    x, z = log_n - centre[0], log_d - centre[1]
    free, fixed = _freedom(form)
    smallest, largest = log_loss.min(), log_loss.max()
    terms = [smallest + LEAST_LN_TERM] * 2 + [smallest + LEAST_LN_E]
    # alpha x stays below 300 for any spread of sizes, so exp() can't overflow
    steepest = [min(MOST_EXPONENT, 300.0 / max(float(np.abs(v).max()), 1.0)) for v in (x, z)]
    low = np.array([*terms, LEAST_EXPONENT, LEAST_EXPONENT])
    high = np.array([*[largest + MOST_LN_TERM] * 3, *steepest])
    which = free.argmax(axis=0)  # the first of the five that each free number moves
    return _Problem(x, z, log_loss, centre, free, fixed, low[which], high[which])


def _freedom(form: Form) -> tuple[F64, F64]:
    alpha, beta = form.alpha, form.beta
    if form.tied:
        alpha = beta = alpha if alpha is not None else beta
    fixed = np.array([0.0, 0.0, 0.0, alpha or 0.0, beta or 0.0])
    columns = [np.eye(5)[i] for i in range(3)]
    if form.tied and alpha is None:
        columns.append(np.array([0.0, 0.0, 0.0, 1.0, 1.0]))
    else:
        columns += [np.eye(5)[i] for i, value in ((3, alpha), (4, beta)) if value is None]
    return np.stack(columns, axis=1), fixed


def _boxed(problem: _Problem, q: F64) -> F64:
    return np.asarray(np.minimum(np.maximum(q, problem.low), problem.high))


def _laws(problem: _Problem, q: F64) -> F64:
    u, v, e, alpha, beta = (q @ problem.free.T + problem.fixed).T
    at_n, at_d = problem.centre
    return Law(np.exp(e), np.exp(u + alpha * at_n), alpha, np.exp(v + beta * at_d), beta).rows()


def _numbers(problem: _Problem, law: Law) -> F64:
    """The free numbers (k,) of a law."""
    at_n, at_d = problem.centre
    u, v = np.log(law.A) - law.alpha * at_n, np.log(law.B) - law.beta * at_d
    five = np.array([u, v, np.log(law.E), law.alpha, law.beta])
    return _boxed(problem, five[problem.free.argmax(axis=0)])


def _starts(problem: _Problem, count: int) -> F64:
    """Laws that pass near the centre of the points: E a share of the smallest loss, the rest split in two,
    exponents from 0.1 to 1.2. Evenly spread (an additive recurrence), and the same on every machine."""
    ratio = 1.1673039782614187  # the root of r^5 = r + 1: the most even recurrence in four dimensions
    share = (0.5 + np.outer(np.arange(1, count + 1), ratio ** -np.arange(1.0, 5.0))) % 1.0
    middle, smallest = np.exp(np.median(problem.log_loss)), np.exp(problem.log_loss.min())
    e = smallest * (0.05 + 0.9 * share[:, 0])
    split = 0.1 + 0.8 * share[:, 1]
    u, v = np.log((middle - e) * split), np.log((middle - e) * (1.0 - split))
    alpha, beta = 0.1 * 12.0 ** share[:, 2], 0.1 * 12.0 ** share[:, 3]
    five = np.stack([u, v, np.log(e), alpha, beta], axis=1)
    return _boxed(problem, five[:, problem.free.argmax(axis=0)])


def _near(problem: _Problem, centre: F64, weights: F64, estimator: Estimator) -> F64:
    """Where to start each replicate: one Newton step from the optimum of all points.

    Few points lie inside Huber's bend, so the curvature there is noise; it is taken as the same share of J'J
    for all, from how densely the residuals lie about zero.
    """
    here = _evaluate(problem, centre[None])
    delta = np.inf if estimator == "least-squares" else HUBER_DELTA
    half = float(np.median(np.abs(here.residual)))
    inside = 1.0 if half <= delta else 0.5 * delta / half
    j = _jacobian(problem, here)
    curvature = inside * (j.T @ j) * weights.sum(axis=1).mean() / len(j)
    slope = weights @ (np.clip(here.residual[0], -delta, delta)[:, None] * j)
    step = _newton(np.broadcast_to(curvature, (len(weights), *curvature.shape)), slope)
    return _boxed(problem, centre + _shortened(problem, step))


# ------------------------------------------------------------------------------------------------------------
# The solver


@dataclass
class _State:
    """A batch of laws at the points, (B, n) each; the shares of the three terms add up to 1."""

    residual: F64
    share_n: F64
    share_d: F64

    def __getitem__(self, rows: Flags) -> _State:
        return _State(self.residual[rows], self.share_n[rows], self.share_d[rows])

    def __setitem__(self, rows: Flags, other: _State) -> None:
        self.residual[rows] = other.residual[rows]
        self.share_n[rows] = other.share_n[rows]
        self.share_d[rows] = other.share_d[rows]


def _evaluate(problem: _Problem, q: F64) -> _State:
    u, v, e, alpha, beta = (q @ problem.free.T + problem.fixed).T[..., None]
    term_n = np.exp(u - alpha * problem.x)
    term_d = np.exp(v - beta * problem.z)
    total = term_n + term_d
    total += np.exp(e)
    term_n /= total
    term_d /= total
    residual = np.log(total, out=total)
    residual -= problem.log_loss
    return _State(residual, term_n, term_d)


def _jacobian(problem: _Problem, here: _State) -> F64:
    """Of the first row's residuals, (n, k)."""
    n, d = here.share_n[0], here.share_d[0]
    return np.stack([n, d, 1.0 - n - d, -n * problem.x, -d * problem.z], axis=1) @ problem.free


def _objective(residual: F64, weights: F64, delta: float) -> F64:
    size = np.abs(residual)
    bent = np.minimum(size, delta)
    return np.asarray(np.einsum("bn,bn->b", weights, bent * (size - 0.5 * bent)))


def _solve(problem: _Problem, q: F64, weights: F64, estimator: Estimator) -> tuple[F64, F64]:
    if estimator == "least-squares":
        return _descend(problem, q, weights, np.inf)
    if estimator == "huber":
        return _descend(problem, q, weights, HUBER_DELTA)
    for delta in LAD_DELTAS:
        q, _ = _descend(problem, q, weights, delta)
    return q, np.einsum("bn,bn->b", weights, np.abs(_evaluate(problem, q).residual))


def _descend(problem: _Problem, q: F64, weights: F64, delta: float) -> tuple[F64, F64]:
    """Each row of q to the optimum of its weights, and the objective there."""
    found, least = q.copy(), np.empty(len(q))
    row, damping = np.arange(len(q)), np.full(len(q), 1e-2)
    here = _evaluate(problem, q)
    value = _objective(here.residual, weights, delta)
    for _ in range(MOST_STEPS):
        slope, curvature = _model(problem, here, weights, delta, damping)
        stuck = ((q <= problem.low) & (slope > 0)) | ((q >= problem.high) & (slope < 0))
        step = _shortened(problem, _newton(curvature, slope, stuck))
        trial = _boxed(problem, q + step)
        step = trial - q
        gain = -np.einsum("bk,bk->b", step, slope + 0.5 * np.einsum("bij,bj->bi", curvature, step))
        there = _evaluate(problem, trial)
        reached = _objective(there.residual, weights, delta)
        better = reached < value
        q[better], value[better], here[better] = trial[better], reached[better], there
        enough = (np.abs(gain) <= CONVERGED * value) & (
            damping <= 1.0
        )  # a step cut by the box can predict loss
        done = enough | (value <= PERFECT * weights.sum(axis=1)) | (damping > 1e10)
        damping = np.where(better, np.maximum(0.1 * damping, 1e-9), 8.0 * damping)
        if done.any():
            found[row[done]], least[row[done]] = q[done], value[done]
            on = ~done
            row, q, value, here, weights, damping = (
                row[on],
                q[on],
                value[on],
                here[on],
                weights[on],
                damping[on],
            )
            if not len(row):
                break
    found[row], least[row] = q, value
    return found, least


def _model(problem: _Problem, here: _State, weights: F64, delta: float, damping: F64) -> tuple[F64, F64]:
    """Slope (B, k) and damped curvature (B, k, k) of the objective."""
    x, z, n, d = problem.x, problem.z, here.share_n, here.share_d
    e = 1.0 - n - d
    size = np.abs(here.residual)
    pull = np.clip(here.residual, -delta, delta) * weights
    bend = weights * ((size <= delta) + damping[:, None] * np.minimum(1.0, delta / np.maximum(size, 1e-300)))
    one = np.ones_like(x)
    slope = np.empty((len(n), 5))
    slope[:, [0, 3]] = (pull * n) @ np.stack([one, -x], axis=1)
    slope[:, [1, 4]] = (pull * d) @ np.stack([one, -z], axis=1)
    slope[:, 2] = np.einsum("bn,bn->b", pull, e)
    h = np.empty((len(n), 5, 5))
    bend_n, bend_d = bend * n, bend * d
    h[:, 0, 0], h[:, 0, 3], h[:, 3, 3] = ((bend_n * n) @ np.stack([one, -x, x * x], axis=1)).T
    h[:, 1, 1], h[:, 1, 4], h[:, 4, 4] = ((bend_d * d) @ np.stack([one, -z, z * z], axis=1)).T
    both = (bend_n * d) @ np.stack([one, -z, -x, x * z], axis=1)
    h[:, 0, 1], h[:, 0, 4], h[:, 1, 3], h[:, 3, 4] = both.T
    h[:, 0, 2], h[:, 2, 3] = ((bend_n * e) @ np.stack([one, -x], axis=1)).T
    h[:, 1, 2], h[:, 2, 4] = ((bend_d * e) @ np.stack([one, -z], axis=1)).T
    h[:, 2, 2] = np.einsum("bn,bn,bn->b", bend, e, e)
    lower = np.tril_indices(5, -1)
    h[:, lower[0], lower[1]] = h[:, lower[1], lower[0]]
    if problem.free.shape[1] == 5:
        return slope, h
    return slope @ problem.free, problem.free.T @ h @ problem.free


def _newton(curvature: F64, slope: F64, stuck: Flags | None = None) -> F64:
    """The step to the bottom of the model, without the numbers that push against the box."""
    scale = 1.0 / np.sqrt(np.maximum(np.einsum("bii->bi", curvature), 1e-300))
    scaled = curvature * scale[:, :, None] * scale[:, None, :]
    right = slope * scale
    if stuck is not None and stuck.any():
        scaled[stuck] = 0.0
        scaled.swapaxes(1, 2)[stuck] = 0.0
        right[stuck] = 0.0
    diagonal = np.arange(scaled.shape[1])
    scaled[:, diagonal, diagonal] = 1.0 + 1e-12  # positive definite whatever was cancelled
    return np.asarray(-np.linalg.solve(scaled, right[..., None])[..., 0] * scale)


def _shortened(problem: _Problem, step: F64) -> F64:
    longest = LONGEST_STEP[problem.free.argmax(axis=0)]
    over = np.abs(step / longest).max(axis=1, keepdims=True)
    return np.asarray(step / np.maximum(over, 1.0))
