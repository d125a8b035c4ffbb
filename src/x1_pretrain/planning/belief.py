"""Which law a plan believes, and the loss it expects, with an interval or with the spread of other laws.

A law of one's own (`--fit`) has an interval. A published one is of other text and another tokenizer, where a
nat a token means something else; what can be said of its level is how far the published ones are apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from x1_pretrain.config import ModelConfig
from x1_pretrain.laws import forms
from x1_pretrain.laws.fitted import Band, Fitted, published
from x1_pretrain.laws.forms import F64, Law
from x1_pretrain.model.flops import ParameterCounts, parameter_counts
from x1_pretrain.planning.data_check import Data


@dataclass(frozen=True)
class Belief:
    fitted: Fitted
    own: bool  # from --fit

    @property
    def law(self) -> Law:
        return self.fitted.law

    @property
    def counts(self) -> str:
        """In words."""
        return "all parameters" if self.fitted.counts == "total" else "parameters in matrices"

    @property
    def name(self) -> str:
        return self.fitted.origin if self.own else f"{self.fitted.origin} (published)"

    def n(self, model: ModelConfig) -> float:
        return counted(parameter_counts(model), self.fitted.counts)

    def loss(self, n: F64, tokens: F64, data: Data | None) -> F64:
        """Of candidates; what repeats, of tokens and of parameters, counts for less."""
        worth = tokens if data is None else np.array([data.effective(float(t)) for t in np.ravel(tokens)])
        return np.asarray(forms.loss(self.law, self.useful(n, tokens, data), worth))

    def useful(self, n: F64, tokens: F64, data: Data | None) -> F64:
        """Where data repeat, parameters beyond what the unique tokens call for are worth less (Muennighoff et
        al. 2023)."""
        return n if data is None else np.where(tokens > data.tokens, _faded(self.law, n, data.tokens), n)

    def counted(self, model: ModelConfig, tokens: float, data: Data | None) -> tuple[float, float]:
        """N and D as they enter the law."""
        worth = tokens if data is None else data.effective(tokens)
        return float(self.useful(np.array(self.n(model)), np.array(tokens), data)), worth

    def expected(self, model: ModelConfig, tokens: float, data: Data | None) -> Band:
        """Of one run, with its interval or with the spread of the published laws."""
        n, worth = self.counted(model, tokens, data)
        if self.own:
            return self.fitted.loss(n, worth)
        point = float(forms.loss(self.law, n, worth))
        others = spread(model, tokens, data)
        return Band(point, min(point, *others), max(point, *others))


REFIT = Belief(published(forms.REFIT), own=False)


def spread(model: ModelConfig, tokens: float, data: Data | None) -> list[float]:
    """What each published law says, with either count of parameters."""
    counts: tuple[forms.Counts, ...] = ("matrices", "total")
    beliefs = [
        Belief(replace(published(one), counts=which), own=False)
        for one in forms.PUBLISHED
        for which in counts
    ]
    return [float(forms.loss(one.law, *one.counted(model, tokens, data))) for one in beliefs]


def _faded(law: Law, n: F64, unique: float) -> F64:
    enough = parameters_for(law, unique)
    excess = np.maximum(n / enough - 1.0, 0.0)
    grown = 1.0 + forms.REPEAT_PARAMETERS * (1.0 - np.exp(-excess / forms.REPEAT_PARAMETERS))
    return np.asarray(np.where(n > enough, enough * grown, n))


def counted(counts: ParameterCounts, which: str) -> float:
    return float(counts.total if which == "total" else counts.matrices)


def parameters_for(law: Law, tokens: Any) -> Any:
    """The size for which `forms.tokens_for` gives these tokens."""
    return np.power(law.alpha * law.A * np.power(tokens, law.beta) / (law.beta * law.B), 1.0 / law.alpha)
