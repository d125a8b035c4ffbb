"""From dollars, hours or tokens to a run. Pure: dataclasses in, a dataclass out.

Money becomes hours by the price and the reserve of `money.gate`, hours become tokens by a speed in FLOP/s,
and the law says which size makes the most of them. Every step of it is a field of the `Plan`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property

import numpy as np

from x1_pretrain.config import EvaluationConfig, MirrorConfig, ModelConfig
from x1_pretrain.errors import UserError
from x1_pretrain.laws.fitted import Band
from x1_pretrain.laws.forms import regret, tokens_for
from x1_pretrain.learning.recipe import Recipe, recipe
from x1_pretrain.model.flops import FlopsPerToken, ParameterCounts, flops_per_token, mfu, parameter_counts
from x1_pretrain.model.memory import Memory, largest_micro_batch, training_memory
from x1_pretrain.money import gate
from x1_pretrain.money.guard import ZERO
from x1_pretrain.money.storage import (
    CHECKPOINT_BYTES,
    GIB,
    Planned,
    Rates,
    bytes_per_token,
    history,
    keeps_all,
    rows_gib,
)
from x1_pretrain.numbers import human
from x1_pretrain.planning import cadence
from x1_pretrain.planning.belief import Belief
from x1_pretrain.planning.choice import (
    Candidates,
    Choice,
    Serving,
    best,
    best_affordable,
    best_served,
    size_for,
)
from x1_pretrain.planning.cluster import Shared
from x1_pretrain.planning.data_check import Data
from x1_pretrain.planning.losing import Rates as Pace
from x1_pretrain.planning.losing import Timing

OFF = (2.0, 4.0, 10.0)  # tokens per parameter wrong by so much
BUFFER = 0.10  # of the dollars, kept for restarts and for hours that are slower than thought
LAST_EPOCH = 40  # of the data; by then a repeated token is worth 8 % of a fresh one (arXiv 2305.16264)
EVALUATION_SHARE = 0.01  # of the arithmetic, at most
EVALUATION_TOKENS = EvaluationConfig().tokens


@dataclass(frozen=True)
class Machine:
    """What runs it, and its price. What is not known of a GPU is None."""

    label: str
    gpus: int
    price: gate.Price  # of all GPUs together
    reserve_h: Decimal
    peak_flops_per_sec: float | None = None  # of one GPU
    memory_gib: float | None = None
    link_gb_per_sec: float | None = None
    disk_gib: int | None = None  # that the price includes


@dataclass(frozen=True)
class Speed:
    """Of all GPUs together, in FLOP/s by PaLM's count: what one model reached says what another will."""

    flops_per_sec: float
    said: str
    measured: bool

    def tokens_per_sec(self, model: ModelConfig) -> float:
        return self.flops_per_sec / flops_per_token(model).palm


@dataclass(frozen=True)
class Mirror:
    """Where copies of the run go."""

    uri: str
    rates: Rates
    kept: int | None = None  # checkpoints at once, at most; None: as many as the plan will keep
    data: bool = False
    look_s: float = MirrorConfig().every_s  # between two looks at what is new
    most_mb_per_s: float | None = None  # that may be sent


@dataclass(frozen=True)
class Ask:
    """What was asked for. `models`: one that is wanted, or a ladder to choose from."""

    machine: Machine
    speed: Speed
    belief: Belief
    models: tuple[ModelConfig, ...]
    dollars: Decimal | None = None
    hours: float | None = None  # of training
    tokens: float | None = None
    flops: float | None = None  # the true ones: `causal`
    ratio: float | None = None  # tokens per parameter in matrices
    steps: int | None = None  # with a batch of `batch_tokens`
    data: Data | None = None
    inference_tokens: float = 0.0
    batch_tokens: int | None = None
    buffer: float = BUFFER
    asked_n: float | None = None  # in matrices, before the nearest architecture was taken
    every: tuple[int, int] | None = None  # steps between checkpoints and evaluations, of a plan that exists
    mirror: Mirror | None = None
    mirror_usd: Decimal = ZERO  # of the dollars, for it

    @property
    def tokens_wanted(self) -> float | None:
        if self.tokens is None and self.steps is not None:
            return float(self.steps * (self.batch_tokens or 0))
        return self.tokens


@dataclass(frozen=True)
class Disk:
    corpus_bytes: float
    checkpoint_bytes: float  # one of them
    export_bytes: float
    checkpoints: int  # at once, at most

    @property
    def total_bytes(self) -> float:
        return self.corpus_bytes + self.checkpoints * self.checkpoint_bytes + self.export_bytes


@dataclass(frozen=True)
class Plan:
    ask: Ask
    model: ModelConfig
    recipe: Recipe
    binding: str  # what decided the tokens
    serving: Serving | None = None
    left_out: ModelConfig | None = None  # would do better, and does not fit one GPU

    @property
    def tokens(self) -> int:
        return self.recipe.tokens

    @cached_property
    def counts(self) -> ParameterCounts:
        return parameter_counts(self.model)

    @cached_property
    def cost(self) -> FlopsPerToken:
        return flops_per_token(self.model)

    @property
    def tokens_per_sec(self) -> float:
        return self.ask.speed.tokens_per_sec(self.model)

    @property
    def seconds(self) -> float:
        return self.tokens / self.tokens_per_sec

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def mfu(self) -> float | None:
        """PaLM's count; None where the GPU's peak is not known."""
        machine = self.ask.machine
        if machine.peak_flops_per_sec is None:
            return None
        return mfu(self.tokens_per_sec, self.cost.palm, machine.peak_flops_per_sec, machine.gpus)

    @property
    def six_nd(self) -> float:
        """N in matrices."""
        return self.cost.six_n * self.tokens

    @property
    def six_nd_total(self) -> float:
        """N with all parameters."""
        return 6.0 * self.counts.total * self.tokens

    @property
    def flops(self) -> float:
        return self.cost.causal * self.tokens

    @cached_property
    def quote(self) -> gate.Quote:
        """The gate's own."""
        return self.quote_for(self.tokens)

    def quote_for(self, tokens: int) -> gate.Quote:
        """Without --dollars the ceiling is the total, up to the next dollar."""
        basis = f"{self.tokens_per_sec:,.0f} tokens/s, {self.ask.speed.said}"
        work = gate.Work(tokens, self.tokens_per_sec, basis)
        machine = self.ask.machine
        quote = gate.Quote(machine.price, work, self.ask.dollars or ZERO, machine.reserve_h)
        if self.mirror is not None:
            quote = replace(quote, mirror_usd=gate.cents(self.mirror.usd(float(quote.hours))))
        if self.ask.dollars is None:
            return replace(quote, ceiling_usd=Decimal(math.ceil(quote.total_usd)))
        return quote

    @cached_property
    def expected(self) -> Band:
        """The loss at the end, nats a token."""
        return self.ask.belief.expected(self.model, self.tokens, self.ask.data)

    @property
    def six_nd_of_law(self) -> float:
        """C = 6ND as the law in use counts N."""
        return 6.0 * self.ask.belief.n(self.model) * self.tokens

    def regrets(self) -> tuple[tuple[float, float, float], ...]:
        """Factor, nats lost, share of the compute wasted."""
        law = self.ask.belief.law
        found = [(off, *regret(law, self.six_nd_of_law, off)) for off in OFF]
        return tuple((off, float(nats), float(share)) for off, nats, share in found)

    @property
    def blocks_per_rank(self) -> int:
        return self.recipe.batch_tokens // (self.model.context * self.ask.machine.gpus)

    @cached_property
    def micro_batch(self) -> int | None:
        """Sequences at a time on one GPU; None where not one fits, or the memory is not known."""
        memory_gib = self.ask.machine.memory_gib
        if memory_gib is None:
            return None
        return largest_micro_batch(self.model, max(1, self.blocks_per_rank), memory_gib)

    @cached_property
    def memory(self) -> Memory:
        return training_memory(self.model, self.micro_batch or 1)

    @property
    def product(self) -> str:
        """Tokens a step, never without its factors."""
        micro, gpus, context = self.micro_batch, self.ask.machine.gpus, self.model.context
        rows = micro or self.blocks_per_rank
        pieces = self.recipe.batch_tokens / (rows * gpus * context) if rows else 0
        return (
            f"{_many(rows, 'sequence')} x {context:,} context x {_many(gpus, 'rank')} x {pieces:,.0f} "
            f"accumulated = {self.recipe.batch_tokens:,} tokens"
        )

    @property
    def step_s(self) -> float:
        return self.seconds / self.recipe.steps

    @property
    def pace(self) -> Pace | None:
        """What its mirror can follow; None without one."""
        asked = self.ask.mirror
        if asked is None:
            return None
        return cadence.rates(self.step_s, self.disk.checkpoint_bytes, asked.look_s, asked.most_mb_per_s)

    @property
    def losing(self) -> Timing | None:
        """What a lost machine takes with it; None without a mirror: all of the run."""
        pace = self.pace
        return None if pace is None else pace.timing(self.checkpoint_every)

    @property
    def checkpoint_every(self) -> int:
        """Steps."""
        if self.ask.every:
            return self.ask.every[0]
        if self.pace:
            return cadence.every_mirrored(self.pace, self.recipe.steps)
        return cadence.every_alone(self.step_s, self.recipe.steps)

    @property
    def evaluation_every(self) -> int:
        """Steps: at checkpoints, or fewer of them where evaluating (forward only: a third) costs more."""
        if self.ask.every:
            return self.ask.every[1]
        batch, steps = self.recipe.batch_tokens, self.recipe.steps
        cheap = math.ceil(EVALUATION_TOKENS / 3 / (EVALUATION_SHARE * batch))
        times = -(-cheap // self.checkpoint_every)  # at every so many checkpoints
        return min(times * self.checkpoint_every, steps)

    @property
    def disk(self) -> Disk:
        kept = float(CHECKPOINT_BYTES * self.counts.total)
        data = self.ask.data
        corpus = data.disk_bytes if data else float(self.tokens * bytes_per_token(self.model.vocab))
        return Disk(corpus, kept, kept, self.most_kept)

    @property
    def most_kept(self) -> int:
        """Checkpoints at once, in the mirror, and on this disk while the mirror is away."""
        asked = self.ask.mirror
        if asked is None:
            return cadence.KEPT
        return asked.kept or cadence.KEEP_LAST + 1

    @property
    def mirror(self) -> Planned | None:
        """What is held in the store, all the time, and one fetch."""
        asked, disk, steps = self.ask.mirror, self.disk, self.recipe.steps
        if asked is None:
            return None
        held = history(self.checkpoint_every, steps) if keeps_all(asked.uri) else self.most_kept
        corpus_gib = disk.corpus_bytes / GIB if asked.data else 0.0
        each_gib = disk.checkpoint_bytes / GIB
        return Planned(asked.rates, asked.uri, held, each_gib, rows_gib(steps), corpus_gib)

    @cached_property
    def shared(self) -> Shared:
        machine = self.ask.machine
        return Shared(
            self.model,
            self.recipe.batch_tokens,
            self.recipe.steps,
            self.recipe.batch_tokens * machine.gpus / self.tokens_per_sec,
            machine.link_gb_per_sec,
            machine.memory_gib,
            float(machine.price.all_in_usd_per_hr) / machine.gpus,
            float(machine.reserve_h),
        )


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def plan(ask: Ask) -> Plan:
    """The run that makes the most of what was asked for; `UserError` for what can't be had."""
    if ask.mirror is None or ask.dollars is None:
        return _plan(ask)
    alone = _plan(replace(ask, mirror=None))  # its store's bill comes out of the dollars too
    return _plan(replace(ask, mirror_usd=replace(alone, ask=ask).quote.mirror_usd + gate.CENT))


def _plan(ask: Ask) -> Plan:
    seconds, binding = allowed_seconds(ask)
    models, left_out = trainable(ask)
    found = Candidates.of(models, ask.belief)
    choice, binding = choose(ask, found, seconds, binding)
    model = choice.model
    done = recipe(model, choice.tokens, ask.batch_tokens, ask.machine.gpus)
    made = Plan(ask, model, done, binding, choice.serving)
    refuse_too_small(made, choice.tokens)
    refuse_too_dear(made)
    return replace(made, left_out=bigger(left_out, made, seconds))


def allowed_seconds(ask: Ask) -> tuple[float | None, str]:
    """Of training, by the dollars and by the hours; what binds."""
    limits = []
    if ask.dollars is not None:
        limits.append((bought_seconds(ask, ask.dollars * (1 - Decimal(str(ask.buffer)))), "--dollars"))
    if ask.hours is not None:
        limits.append((ask.hours * 3600, "--hours"))
    return min(limits) if limits else (None, "")


def bought_seconds(ask: Ask, dollars: Decimal) -> float:
    """Of training, after disk, tax, and the hours that are paid but not trained."""
    machine = ask.machine
    hourly = machine.price.all_in_usd_per_hr
    if hourly <= 0:
        raise UserError("--usd-per-hr 0: then dollars decide nothing; give --hours or --tokens instead")
    left = dollars - ask.mirror_usd - 3 * gate.CENT  # three amounts are rounded up
    hours = left / hourly - machine.reserve_h
    if hours <= 0:
        needed = gate.cents(machine.reserve_h * hourly)
        mirror = f", its mirror about {gate.exact(ask.mirror_usd)}" if ask.mirror_usd else ""
        raise UserError(
            f"--dollars {amount(ask.dollars or ZERO)}: setting up and ending {machine.price.what} takes "
            f"{machine.reserve_h:.2f} h = {gate.exact(needed)}{mirror}, and {ask.buffer:.0%} is kept as a "
            "buffer; nothing is left to train with"
        )
    return float(hours * 3600)


def trainable(ask: Ask) -> tuple[tuple[ModelConfig, ...], tuple[ModelConfig, ...]]:
    """What one GPU can hold, and what not: every rank has the whole model."""
    if len(ask.models) == 1 or ask.machine.memory_gib is None:
        return ask.models, ()
    room = ask.machine.memory_gib
    fits = [largest_micro_batch(model, 1, room) is not None for model in ask.models]
    inside = tuple(model for model, fit in zip(ask.models, fits, strict=True) if fit)
    if not inside:
        raise UserError(
            f"--gpu: not even the smallest model of the ladder fits {room:g} GiB; choose another GPU"
        )
    return inside, tuple(model for model, fit in zip(ask.models, fits, strict=True) if not fit)


def choose(ask: Ask, found: Candidates, seconds: float | None, binding: str) -> tuple[Choice, str]:
    """The model and its tokens, and what decided the tokens."""
    tokens = ask.tokens_wanted
    if tokens is not None:
        return _for_tokens(ask, found, tokens, seconds), "--tokens" if ask.tokens else "--steps"
    if ask.flops is not None:
        return best(found, ask.flops / found.causal, ask.belief, ask.data), "--flops"
    if ask.ratio is not None and len(ask.models) == 1:
        return Choice(ask.models[0], ask.ratio * parameter_counts(ask.models[0]).matrices), "--ratio"
    if seconds is None:
        if len(ask.models) > 1:
            raise UserError("--dollars: is needed, or --hours, --tokens or --n; for example --dollars 35")
        return Choice(ask.models[0], float(tokens_for(ask.belief.law, found.n[0]))), "the law's optimum"
    bought = ask.speed.flops_per_sec * seconds / found.palm
    worth = worth_drawing(ask)
    if ask.inference_tokens and len(ask.models) > 1:
        return best_served(found, bought, ask.belief, ask.data, ask.inference_tokens), binding
    choice = best(found, np.minimum(bought, worth), ask.belief, ask.data)
    return choice, f"the data: {LAST_EPOCH} epochs" if choice.tokens == worth else binding


def worth_drawing(ask: Ask) -> float:
    """Tokens, before repeats of the data are worth next to nothing."""
    return LAST_EPOCH * ask.data.tokens if ask.data else math.inf


def _for_tokens(ask: Ask, found: Candidates, tokens: float, seconds: float | None) -> Choice:
    if len(ask.models) == 1:
        return Choice(ask.models[0], tokens)
    if seconds is None:
        return size_for(found, tokens, ask.belief)
    bought = ask.speed.flops_per_sec * seconds / found.palm
    choice = best_affordable(found, bought, tokens, ask.belief, ask.data)
    if choice is None:
        raise UserError(
            f"--tokens {human(tokens)}: not even the smallest model gets there within the dollars and hours"
        )
    return choice


def refuse_too_small(made: Plan, tokens: float) -> None:
    batch = made.recipe.batch_tokens
    if tokens < batch:
        raise UserError(
            f"{made.binding} gives {human(tokens)} tokens, less than one step of {batch:,}; ask for more, or "
            "for a smaller --batch-tokens"
        )


def refuse_too_dear(made: Plan) -> None:
    """What is given outright must be within what is paid for; of the dollars, the buffer may go too."""
    ask = made.ask
    given = made.binding in ("--tokens", "--steps", "--flops", "--ratio")
    if ask.dollars is not None and made.quote.total_usd > ask.dollars:
        fits = human(bought_seconds(ask, ask.dollars) * made.tokens_per_sec)
        raise UserError(
            f"{made.binding}: {human(made.tokens)} tokens of {human(made.counts.matrices)} parameters cost "
            f"{gate.exact(made.quote.total_usd)} ({made.hours:,.1f} h), above --dollars "
            f"{amount(ask.dollars)}; that buys {fits}"
        )
    if given and ask.hours is not None and made.hours > ask.hours:
        fits = human(ask.hours * 3600 * made.tokens_per_sec)
        raise UserError(
            f"{made.binding}: {human(made.tokens)} tokens take {made.hours:,.1f} h, more than --hours "
            f"{ask.hours:g}; in that time it can be {fits}"
        )


def bigger(left_out: tuple[ModelConfig, ...], made: Plan, seconds: float | None) -> ModelConfig | None:
    """The best of those that do not fit, where it would do better than the plan."""
    ask = made.ask
    if not left_out or (seconds is None and ask.flops is None):
        return None
    found = Candidates.of(left_out, ask.belief)
    bought = (
        ask.flops / found.causal if ask.flops else ask.speed.flops_per_sec * (seconds or 0.0) / found.palm
    )
    choice = best(found, np.minimum(bought, worth_drawing(ask)), ask.belief, ask.data)
    there = ask.belief.expected(choice.model, choice.tokens, ask.data).point
    return choice.model if there < made.expected.point - 0.005 else None  # nats: less is rounding


def amount(dollars: Decimal) -> str:
    """As one types it: 35, 35.5."""
    return f"{dollars.normalize():f}"
