"""Where the numbers stopped being finite: one batch run again, slowly, with every layer looked at.

Nothing is changed: no weight, no gradient, no moment, no random number. It never raises: a look that fails
(memory is short, the device is in an error state) says so, and what was seen before it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW

from x1_pretrain.model.attention import sdpa
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import IGNORED, chunk_tokens, summed_loss, token_losses

SEARCHED = 256  # sequences tried one by one for the first that is not finite
LOOKED_AT = 2  # sequences that the slow look takes: memory for the activations of so many


@dataclass(frozen=True)
class Broken:
    """A tensor that holds values that are not finite."""

    name: str
    count: int
    of: int

    def __str__(self) -> str:
        return f"{self.name}: {self.count:,} of {self.of:,} values"


@dataclass(frozen=True)
class Seen:
    """One module's output in the forward pass, and its own weights."""

    name: str
    rms: float
    largest: float
    finite: bool
    weight_norm: float | None


@dataclass
class Diagnosis:
    """What was found, in the order in which it explains."""

    precision: str
    bad_ids: list[tuple[int, int, int]] = field(default_factory=list)  # sequence, position, token id
    weights: list[Broken] = field(default_factory=list)
    moments: list[Broken] = field(default_factory=list)
    sequence: int | None = None  # the first whose loss is not finite
    loss: float | None = None  # per token, of the sequences looked at
    forward: list[Seen] = field(default_factory=list)  # up to the first that is not finite
    largest_logit: float | None = None
    gradient: Broken | None = None  # the first on the way back, when the loss is finite
    gradient_norm: float | None = None
    fp32_loss: float | None = None  # the same in fp32, where the run computes in bf16
    failed: list[str] = field(default_factory=list)  # looks that could not be finished
    deep: bool = True  # whether the batch was run again

    @property
    def first_bad(self) -> Seen | None:
        return next((seen for seen in self.forward if not seen.finite), None)

    def lines(self) -> list[str]:
        """Sentences for a person; the last one is the next step."""
        failed = [f"not looked at: {why}" for why in self.failed]
        return [*_found(self), *failed, f"next: {self.next_step}"]

    @property
    def next_step(self) -> str:
        return _next_step(self)


def diagnose(
    decoder: Decoder, optimizer: AdamW, ids: Tensor, targets: Tensor, precision: str, deep: bool = True
) -> Diagnosis:
    """Of one batch: ids and targets (B, T), on any device. Not `deep`: without running it again."""
    found = Diagnosis(precision, deep=deep)
    _try(
        found,
        "token ids",
        lambda: found.bad_ids.extend(dict.fromkeys(_bad_ids(ids, targets, decoder.config.vocab))),
    )
    _try(found, "weights", lambda: found.weights.extend(_broken(_weights(decoder))))
    _try(found, "moments", lambda: found.moments.extend(_broken(_moments(decoder, optimizer))))
    if found.bad_ids or not deep:  # on a GPU such an id ends the process
        return found
    with _plain(decoder):
        chosen: list[int] = []
        _try(found, "the sequences", lambda: chosen.extend(_choose(found, decoder, ids, targets)))
        if chosen:
            device = decoder.output_weight.device
            pair = ids[chosen].to(device), targets[chosen].to(device)
            _try(found, "the forward pass", lambda: _look_forward(found, decoder, *pair))
            _try(found, "the backward pass", lambda: _look_backward(found, decoder, *pair))
            if precision != "fp32":
                _try(found, "fp32", lambda: _look_in_fp32(found, decoder, *pair))
    return found


def _try(found: Diagnosis, what: str, look: Callable[[], None]) -> None:
    try:
        look()
    except Exception as error:  # anything: this runs in a process that is already in trouble
        text = " ".join(str(error).split())[:200]
        found.failed.append(f"{what} ({type(error).__name__}: {text})")


# ------------------------------------------------------------------------------------------------------------
# Looks


def _bad_ids(ids: Tensor, targets: Tensor, vocab: int) -> Iterator[tuple[int, int, int]]:
    """The first few token ids beyond the vocabulary. A target is the input one place on."""
    for tokens, shift, lowest in ((ids, 0, 0), (targets, 1, IGNORED)):
        bad = ((tokens < lowest) | (tokens >= vocab)).nonzero()[:3].tolist()
        for row, column in bad:
            yield row, column + shift, int(tokens[row, column])


def _weights(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in decoder.named_parameters():
        yield name, parameter.detach()


def _moments(decoder: Decoder, optimizer: AdamW) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in decoder.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensor = optimizer.state.get(parameter, {}).get(moment)
            if tensor is not None:
                yield f"{moment} of {name}", tensor


def _broken(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Broken]:
    for name, tensor in tensors:
        bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if bad:
            yield Broken(name, bad, tensor.numel())


@contextmanager
def _plain(decoder: Decoder) -> Iterator[None]:
    """Uncompiled, whatever mode the caller is in."""
    with torch.compiler.set_stance("force_eager"), torch.enable_grad():
        yield


def _choose(found: Diagnosis, decoder: Decoder, ids: Tensor, targets: Tensor) -> list[int]:
    """The first sequence whose loss is not finite; else the first ones: the trouble is on the way back."""
    device = decoder.output_weight.device
    with torch.no_grad():
        for row in range(min(len(ids), SEARCHED)):
            loss = _loss(decoder, ids[row : row + 1].to(device), targets[row : row + 1].to(device))
            if not math.isfinite(float(loss)):
                found.sequence = row
                return [row]
    return list(range(min(len(ids), LOOKED_AT)))


def _loss(decoder: Decoder, ids: Tensor, targets: Tensor) -> Tensor:
    """The summed loss, as training has it."""
    hidden = decoder.hidden(ids).flatten(0, 1)  # (B T, d)
    weight, vocab, flat = decoder.output_weight, decoder.config.vocab, targets.reshape(-1)
    chunk = chunk_tokens(ids.device)
    if torch.is_grad_enabled():
        return summed_loss(hidden, weight, flat, vocab, chunk)
    return token_losses(hidden, weight, flat, vocab, chunk).sum()


def _look_forward(found: Diagnosis, decoder: Decoder, ids: Tensor, targets: Tensor) -> None:
    """Every module's output, in the order they are computed, up to the first that is not finite."""
    with ExitStack() as hooks, torch.no_grad():
        for name, module in decoder.named_modules():
            if _is_watched(name):
                handle = module.register_forward_hook(_watcher(found, name, module))
                hooks.callback(handle.remove)
        hidden = decoder.hidden(ids).flatten(0, 1)  # (B T, d)
        weight = decoder.output_weight[: decoder.config.vocab].to(hidden.dtype)
        parts = torch.split(hidden, chunk_tokens(ids.device))
        found.largest_logit = max(float((part @ weight.T).abs().max()) for part in parts)
    counted = max(1, int((targets != IGNORED).sum()))
    with torch.no_grad():
        found.loss = float(_loss(decoder, ids, targets)) / counted


def _is_watched(name: str) -> bool:
    """Embedding, the matrices and norms of each layer, each layer, the last norm; not the containers."""
    return name not in ("", "model", "model.layers", "lm_head")


def _watcher(found: Diagnosis, name: str, module: torch.nn.Module) -> Callable[..., None]:
    def look(_: torch.nn.Module, __: Any, output: Tensor) -> None:
        if found.first_bad is not None:
            return  # what follows is poisoned by it
        values = output.detach().float()
        finite = bool(torch.isfinite(values).all())
        own = [w.detach().float() for w in module.parameters(recurse=False)]
        norm = float(torch.stack([w.norm() for w in own]).norm()) if own else None
        rms, largest = float(values.square().mean().sqrt()), float(values.abs().max())
        found.forward.append(Seen(name, rms, largest, finite, norm))

    return look


def _look_backward(found: Diagnosis, decoder: Decoder, ids: Tensor, targets: Tensor) -> None:
    """The gradient of every weight, from the output back; the weights' own `.grad` stays as it is."""
    if found.loss is None or not math.isfinite(found.loss):
        return  # then no gradient is finite, and none is the cause
    named = list(decoder.named_parameters())
    counted = max(1, int((targets != IGNORED).sum()))
    loss = _loss(decoder, ids, targets) / counted
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    present = [(name, g) for (name, _), g in zip(named, gradients, strict=True) if g is not None]
    backwards = ((f"gradient of {name}", g) for name, g in reversed(present))  # as they are computed
    found.gradient = next(_broken(backwards), None)
    found.gradient_norm = float(torch.stack([g.float().norm() for _, g in present]).norm())


def _look_in_fp32(found: Diagnosis, decoder: Decoder, ids: Tensor, targets: Tensor) -> None:
    """The same sequences in fp32: finite there means that bf16 was too coarse."""
    with _computing_in_fp32(decoder), torch.no_grad():
        counted = max(1, int((targets != IGNORED).sum()))
        found.fp32_loss = float(_loss(decoder, ids, targets)) / counted


@contextmanager
def _computing_in_fp32(decoder: Decoder) -> Iterator[None]:
    trunk = decoder.model
    attentions = [cast(Any, layer).self_attn for layer in trunk.layers]
    before, kernels = trunk.compute_dtype, [a.attention for a in attentions]
    try:
        trunk.compute_dtype = torch.float32
        for one in attentions:
            one.attention = sdpa  # flash_attn does not compute in fp32
        yield
    finally:
        trunk.compute_dtype = before
        for one, kernel in zip(attentions, kernels, strict=True):
            one.attention = kernel


# ------------------------------------------------------------------------------------------------------------
# Words


def _found(d: Diagnosis) -> Iterator[str]:
    for sequence, position, token in d.bad_ids:
        yield f"token id {token} at position {position} of sequence {sequence} is not in the vocabulary"
    if d.weights:
        yield f"weights that are not finite: {_few(d.weights)}"
    if d.moments:
        yield f"moments of the optimizer that are not finite: {_few(d.moments)}"
    if d.sequence is not None:
        yield f"sequence {d.sequence} of the batch is the first whose loss is not finite"
    if bad := d.first_bad:
        yield from _forward_trouble(d, bad)
    elif d.forward:
        top = max(d.forward, key=lambda seen: seen.largest)
        yield f"forward pass: all activations are finite; the largest is {top.largest:.3g}, of {top.name}"
        if d.largest_logit is not None and d.loss is not None:
            yield f"largest logit {d.largest_logit:.3g}, loss {d.loss:.4g} a token"
    if d.gradient:
        yield f"the first value that is not finite is on the way back: {d.gradient}"
    elif d.gradient_norm is not None:
        yield f"backward pass: all gradients are finite, norm {d.gradient_norm:.3g}"
    if d.fp32_loss is not None:
        yield f"in fp32 the same sequences have loss {d.fp32_loss:.4g} a token"


def _few(broken: list[Broken]) -> str:
    more = f", and {len(broken) - 3} more" if len(broken) > 3 else ""
    return "; ".join(map(str, broken[:3])) + more


def _forward_trouble(d: Diagnosis, bad: Seen) -> Iterator[str]:
    own = f" (norm of its weights {bad.weight_norm:.3g})" if bad.weight_norm is not None else ""
    yield f"forward pass: the output of {bad.name}{own} is the first that is not finite"
    before = [seen for seen in d.forward if seen.finite][-3:]
    if before:
        told = ", ".join(f"{s.name} rms {s.rms:.3g} largest {s.largest:.3g}" for s in before)
        yield f"before it: {told}"


def _next_step(d: Diagnosis) -> str:
    """What to do about the first cause."""
    if d.bad_ids:
        return "the corpus was changed after it was checked; tokenize it again, then relaunch to resume"
    if d.weights or d.moments:
        return (
            "the state in memory is broken, the last checkpoint is not; relaunch to resume from it. If it "
            "comes back with the same weights, suspect the GPU's memory"
        )
    if not d.deep:
        return (
            "weights, moments and token ids are good; after three such steps in a row the batch is looked at"
        )
    spoilt = d.first_bad is not None or d.gradient is not None or not math.isfinite(d.loss or 0.0)
    if spoilt and d.fp32_loss is not None and math.isfinite(d.fp32_loss):
        return f"{d.precision} is too coarse here; in a new --run-dir, --set training.precision=fp32"
    if spoilt:
        return (
            "it has diverged; in a new --run-dir a lower optimizer.lr, or a branch off an earlier checkpoint"
        )
    if d.failed:
        return "relaunch to resume"
    return (
        "this rank's part is finite when computed again: another rank's is not, or the machine erred; "
        "relaunch to resume"
    )
