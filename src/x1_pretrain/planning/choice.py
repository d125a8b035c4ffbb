"""Which model, and how many tokens: the size that does best with what can be paid for. Pure.

A budget gives every candidate its own number of tokens, by what a token of it really costs: on a machine that
is PaLM's count at the speed of the machine, for a budget in FLOPs it is the work that has to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from x1_pretrain.config import ModelConfig
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.model.flops import flops_per_token
from x1_pretrain.planning.belief import Belief, parameters_for
from x1_pretrain.planning.data_check import Data


@dataclass(frozen=True)
class Serving:
    """What a smaller model, trained longer, spares its users."""

    tokens: float  # to be served
    extra_flops: float  # of training, against the compute-optimal model of the same loss
    saved_flops: float  # of serving, against the same
    instead_of: ModelConfig
    instead_tokens: float


@dataclass(frozen=True)
class Choice:
    model: ModelConfig
    tokens: float
    serving: Serving | None = None


@dataclass(frozen=True)
class Candidates:
    """Architectures of all sizes with what a token of each costs; (M,) arrays."""

    models: tuple[ModelConfig, ...]
    n: F64  # as the law counts
    palm: F64
    causal: F64
    forward: F64  # FLOPs a served token: 2 N, the output matrix counted

    @classmethod
    def of(cls, models: Sequence[ModelConfig], belief: Belief) -> Candidates:
        costs = [flops_per_token(model) for model in models]
        dense = [
            cost.six_n / 6.0 + model.vocab * model.d_model for cost, model in zip(costs, models, strict=True)
        ]
        return cls(
            tuple(models),
            np.array([belief.n(model) for model in models]),
            np.array([cost.palm for cost in costs]),
            np.array([cost.causal for cost in costs]),
            2.0 * np.array(dense),
        )


def best(found: Candidates, tokens: F64, belief: Belief, data: Data | None) -> Choice:
    """The candidate of the lowest loss, each with its own number of tokens."""
    chosen = int(np.argmin(belief.loss(found.n, tokens, data)))
    return Choice(found.models[chosen], float(tokens[chosen]))


def best_affordable(
    found: Candidates, tokens: F64, fixed: float, belief: Belief, data: Data | None
) -> Choice | None:
    """The same where the tokens are given; None where not even the smallest can be paid for."""
    losses = belief.loss(found.n, np.full(len(found.n), fixed), data)
    chosen = int(np.argmin(np.where(tokens >= fixed, losses, np.inf)))
    return Choice(found.models[chosen], fixed) if tokens[chosen] >= fixed else None


def size_for(found: Candidates, tokens: float, belief: Belief) -> Choice:
    """The size for which these tokens are the best."""
    gaps = np.abs(np.log(found.n / parameters_for(belief.law, tokens)))
    return Choice(found.models[int(np.argmin(gaps))], tokens)


def best_served(found: Candidates, tokens: F64, belief: Belief, data: Data | None, served: float) -> Choice:
    """The model whose training costs the budget, and which is the cheapest of its loss once it has served.

    Sardana et al. 2024, arXiv 2401.00448: at a given loss, minimise training + 2 N a served token.
    """
    losses = belief.loss(found.n, tokens, data)
    needed = tokens_to_reach(found, losses[:, None], belief, data)  # (target, M)
    training = needed * found.causal
    total = training + found.forward * served
    own = np.arange(len(losses))
    away = np.abs(np.argmin(total, axis=1) - own)
    chosen = int(np.lexsort((losses, away))[0])  # the ladder has steps: of several the best
    plain = int(np.argmin(training[chosen]))
    extra = found.causal[chosen] * tokens[chosen] - training[chosen, plain]
    saved = (found.forward[plain] - found.forward[chosen]) * served
    serving = Serving(served, float(extra), float(saved), found.models[plain], float(needed[chosen, plain]))
    return Choice(found.models[chosen], float(tokens[chosen]), serving)


def tokens_to_reach(found: Candidates, target: F64, belief: Belief, data: Data | None) -> F64:
    """Of every candidate; infinite where it never gets there."""
    fresh = _worth_for(belief.law, found.n, target)
    if data is None:
        return fresh
    repeated = _worth_for(belief.law, belief.useful(found.n, np.array(np.inf), data), target)
    return np.where(fresh <= data.tokens, fresh, data.drawn_for(repeated))


def _worth_for(law: Law, n: F64, target: F64) -> F64:
    """The fresh tokens with which the law gives this loss."""
    left = target - law.E - law.A * np.power(n, -law.alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.power(law.B / np.where(left > 0, left, 1.0), 1.0 / law.beta)
    return np.asarray(np.where(left > 0, worth, np.inf))
