"""What the numbers mean for this run: plain values in, one `Finding` out. Touches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from x1_pretrain.doctor.all_reduce import Attempt, best
from x1_pretrain.doctor.estimate import Estimate, dollars
from x1_pretrain.doctor.findings import Finding, size
from x1_pretrain.doctor.services import Alerts, Budget, Store
from x1_pretrain.doctor.trial import Facts, Trial
from x1_pretrain.money.channels import SUCCESS
from x1_pretrain.money.channels import VARIABLE as ALERTS
from x1_pretrain.numbers import human

EPOCHS_OK = 4.0  # repeated text counts nearly like fresh text up to about here (Muennighoff et al. 2023)
READING_OK = 2.0  # times the need: reading shares the machine with training
BUS_OK = 0.25  # of the link's rate in the GPU table, for a sum of 256 MiB
NO_GAIN = 1.05  # compiled steps this much longer than plain ones: compiling costs, and brings nothing
MEMORY_OFF = 0.25  # predicted and measured peak may differ by so much


# ------------------------------------------------------------------------------------------------------------
# Data


def corpora(trial: Trial) -> Finding:
    """Whether every corpus opens."""
    opened = trial.part("open").get("corpora")
    refused = trial.part("refused").get("message")
    if (
        refused
        and "order" not in trial.parts
        and (not opened or not any(p.startswith("hash") for p in trial.parts))
    ):
        return Finding("data", "broken", str(refused), _data_fix(str(refused)))
    if not opened:
        return Finding(
            "data", "broken", f"not opened: {trial.trouble or 'no answer'}", "see the disk that holds it"
        )
    each = [
        f"{c['name']}: {human(c['train_tokens'])} tokens to train on, {human(c['val_tokens'])} to validate, "
        f"tokenizer {c['tokenizer']} ({c['vocab_size']:,} ids)"
        for c in opened
    ]
    return Finding("data", "ok", "; ".join(each), measured={"corpora": opened})


def _data_fix(message: str) -> str:
    return (
        ""
        if "tokenize_data" in message or "pass --data-dir" in message
        else "see docs/corpus.md, or --data-dir"
    )


def hashes(trial: Trial) -> Finding:
    """The token files and the tokenizer against the manifest, and every id against the vocabulary."""
    opened = trial.part("open").get("corpora")
    if not opened:
        return Finding("data hashes", "-", "the data did not open")
    wrong, unread, compared = [], [], 0
    for corpus in opened:
        for row in trial.part(f"hash {corpus['name']}").get("files", []):
            where = f"{corpus['name']}/{row['file']}"
            compared += row["same"] is True
            wrong += [where] if row["same"] is False else []
            unread += [f"{where} ({size(row['bytes'])})"] if row["same"] is None else []
    if wrong:
        fix = "copy the corpus again, or tokenize again: these are not the data its manifest describes"
        return Finding("data hashes", "broken", f"not as in the manifest: {', '.join(wrong)}", fix)
    if message := trial.part("refused").get("message"):
        return Finding("data hashes", "broken", str(message))
    checked = [c["name"] for c in opened if f"ids {c['name']}" in trial.parts]
    shown = f"{compared} files as in the manifest"
    shown += f"; the size alone of {', '.join(unread)} (--full-hash reads it all)" if unread else ""
    shown += "; ids inside the vocabulary" if len(checked) == len(opened) else "; ids not checked"
    if trial.trouble:
        return Finding("data hashes", "-", f"{shown}; not finished: {trial.trouble}")
    return Finding("data hashes", "ok", shown)


def plan(facts: Facts) -> Finding:
    """The tokens asked for against those that are there."""
    if not facts:
        return Finding("plan against data", "-", "the data did not open")
    each = [f"{epochs:.2f} epochs of {name}" for name, epochs in facts["epochs"].items()]
    asked, there = human(facts["asked_tokens"]), human(facts["there_tokens"])
    shown = f"{asked} tokens asked, {there} there: {', '.join(each)}"
    most = max(facts["epochs"].values())
    if most <= EPOCHS_OK:
        return Finding("plan against data", "ok", shown, measured=facts)
    fix = f"more text, or fewer steps: beyond about {EPOCHS_OK:g} epochs repeated text teaches less and less"
    return Finding("plan against data", "slow", shown, fix, facts)


def reading(facts: Facts, need_tokens_per_sec: float | None) -> Finding:
    """What one rank's reader delivers against what one rank uses."""
    rate = facts.get("tokens_per_sec")
    if rate is None:
        return Finding("data reading", "-", "not measured")
    shown, measured = f"{human(rate)} tokens/s a rank", {**facts, "need_tokens_per_sec": need_tokens_per_sec}
    if need_tokens_per_sec is None:
        return Finding("data reading", "ok", shown, measured=measured)
    shown += f", {human(need_tokens_per_sec)} needed: {rate / need_tokens_per_sec:,.1f} times"
    if rate >= READING_OK * need_tokens_per_sec:
        return Finding("data reading", "ok", shown, measured=measured)
    fix = "put the corpus on a local disk: the GPU will wait for data"
    return Finding("data reading", "slow", f"{shown}, {READING_OK:g} expected at least", fix, measured)


# ------------------------------------------------------------------------------------------------------------
# The step


def attention(line: str | None, requested: str, gpu: bool) -> Finding:
    """Which kernel. `flash` asked for and not to be had is worth a word; PyTorch's own is no fault."""
    if line is None:
        return Finding("attention", "-", "not tried")
    shown = line.removeprefix("attention: ")
    if requested == "flash" and gpu and not shown.startswith("flash"):
        return Finding("attention", "slow", shown, "install a flash-attn built for this torch, or use sdpa")
    return Finding("attention", "ok", shown)


def compilation(
    facts: Facts, eager_s: float | None, compiled_s: float | None, trouble: str | None
) -> Finding:
    """`eager_s`, `compiled_s`: a micro-batch each way."""
    if not facts and not (trouble and eager_s):
        return Finding("compile", "-", "not tried")
    if not facts:
        fix = "--set training.compile=default, or off; x1 train falls back by itself"
        return Finding("compile", "slow", f"not finished: {trouble}", fix)
    shown, mode, wanted = facts["message"].removeprefix("compile: "), facts["mode"], facts["wanted"]
    if compiled_s and eager_s:
        shown += f"; a micro-batch takes {compiled_s * 1e3:,.0f} ms, {eager_s * 1e3:,.0f} without"
    if compiled_s and eager_s and compiled_s > NO_GAIN * eager_s:
        return Finding("compile", "slow", shown, "--set training.compile=off is faster here", facts)
    if "failed" not in shown and "after all" not in shown:
        return Finding("compile", "ok", shown, measured=facts)
    easier = f"--set training.compile={_easier(wanted, mode)}"
    if "still compiling" in shown:
        fix = f"nothing, if training.compile_timeout_s gives it the time it lacked here; else {easier}"
    else:
        fix = f"{easier} saves the attempt; compiling needs a C compiler"
    return Finding("compile", "slow", shown, fix, facts)


def _easier(wanted: str, mode: str) -> str:
    return mode if mode != wanted else "off"


def dry_run(trial: Trial) -> Finding:
    """The final shape, forward, backward and update."""
    if message := trial.part("refused").get("message"):
        return Finding("dry run", "broken", str(message))
    facts, micro = trial.part("eager"), trial.part("micro_batch")
    if not facts:
        fix = "see the line of torch above; if that is well, a smaller model or micro-batch"
        return Finding("dry run", "broken", f"no step was made: {trial.trouble or 'no answer'}", fix)
    wanted = micro["sequences"]
    shown = f"{micro['said'].removeprefix('micro-batch: ')}, x {micro['blocks'] // wanted} accumulated"
    if facts["sequences"] != wanted:
        shown += f"; measured with {facts['sequences']} at a time"
    return Finding("dry run", "ok", shown, measured={**facts, "micro_batch": wanted})


def peak_memory(facts: Facts) -> Finding:
    """Measured on the GPU against what arithmetic says before anything runs."""
    peak, predicted = facts.get("peak_bytes"), facts.get("predicted_bytes")
    if not predicted:
        return Finding("step memory", "-", "no step was made")
    if not peak:
        found = f"{size(predicted)} predicted, {size(facts['resident_bytes'])} the whole process"
        return Finding("step memory", "ok", f"{found} (a CPU's allocator does not tell)", measured=facts)
    off = peak / predicted - 1
    shown = f"peak {size(peak)}, {size(predicted)} predicted ({off:+.0%})"
    if abs(off) <= MEMORY_OFF:
        return Finding("step memory", "ok", shown, measured=facts)
    return Finding(
        "step memory", "slow", shown, "plans for this model are off by as much: trust the dry run", facts
    )


# ------------------------------------------------------------------------------------------------------------
# Between GPUs


def all_reduce(attempts: Sequence[Attempt], link_gb_per_sec: float | None, written: str | None) -> Finding:
    """`written`: the env file that the working settings went to."""
    if not attempts:
        return Finding("all-reduce", "-", "one GPU")
    first, found = attempts[0], best(attempts)
    measured = {"attempts": [{**vars(a), "settings": dict(a.settings)} for a in attempts]}
    tried = "; ".join(told(a) for a in attempts)
    if found is None:
        fix = "no known setting helps: NCCL_DEBUG=INFO shows where it stops; take another machine"
        return Finding("all-reduce", "broken", tried, fix, measured)
    if found is not first:
        fix = f"{written}: x1 train picks it up" if written else f"export {found.named}"
        return Finding("all-reduce", "slow", f"{tried}. Best: {found.named}", fix, measured)
    rate = (first.bus_bytes_per_sec or 0.0) / 1e9
    shown = f"works as it is, {rate:.1f} GB/s (bus)"
    if link_gb_per_sec and rate < BUS_OK * link_gb_per_sec:
        fix = "`nvidia-smi topo -m` shows how the GPUs are joined; a machine with NVLink"
        return Finding("all-reduce", "slow", f"{shown} of {link_gb_per_sec:g} GB/s links", fix, measured)
    return Finding("all-reduce", "ok", shown, measured=measured)


def told(attempt: Attempt) -> str:
    rate = f", {attempt.bus_bytes_per_sec / 1e9:.1f} GB/s" if attempt.bus_bytes_per_sec else ""
    why = f" ({attempt.reason})" if attempt.reason else ""
    return f"{attempt.named}: {attempt.outcome}{rate}{why}"


# ------------------------------------------------------------------------------------------------------------
# What the run talks to


def alerts(found: Alerts, capped: bool) -> Finding:
    if found.trouble:
        return Finding("alerts", "broken", found.trouble)
    if not found.channels:
        fix = (
            f"export {ALERTS}='ntfy://...' (docs/alerts.md): a run with a ceiling should be able to call you"
        )
        return Finding("alerts", "-", f"no channel: {ALERTS} is not set", fix if capped else "")
    listed = ", ".join(found.channels)
    failed = [f"{c}: {r}" for c, r in zip(found.channels, found.results, strict=False) if r != SUCCESS]
    if failed:
        fix = f"correct the address in {ALERTS} (docs/alerts.md)"
        return Finding("alerts", "broken", f"the test did not arrive: {'; '.join(failed)}", fix)
    sent = (
        "a test message was taken by each"
        if found.results
        else "known forms; nothing sent (--alerts sends a test)"
    )
    return Finding("alerts", "ok", f"{listed}: {sent}")


def hub() -> Finding:
    """A config names corpus folders; only the commands that fetch text talk to the Hub."""
    return Finding("Hub token", "-", "this config reads folders, not the Hub")


def mlflow(store: Store | None, trial: Trial | None) -> Finding:
    if store is None:
        return Finding("MLflow", "-", "off (mlflow.uri is not set)")
    if not store.installed:
        return Finding("MLflow", "broken", "mlflow is not installed", "pip install 'x1-pretrain[mlflow]'")
    if not store.writable:
        return Finding("MLflow", "broken", f"{store.address}: no permission to write", "another --mlflow-uri")
    if trial is None:
        return Finding("MLflow", "ok", f"{store.address}: not there yet, and its folder can be written")
    facts = trial.part("store")
    if problem := facts.get("trouble") or trial.trouble:
        fix = (
            "start the server or correct --mlflow-uri; the run goes on without MLflow, metrics.jsonl has all"
        )
        return Finding("MLflow", "broken", f"{store.address}: {problem}", fix)
    how = "can be read and written" if store.file else "answers; writing was not tried"
    return Finding("MLflow", "ok", f"{store.address}: {how}")


def budget(found: Budget | None) -> Finding:
    if found is None:
        return Finding("budget file", "-", "none named (budget.curr_cost_uri)")
    if found.absent:
        return Finding("budget file", "-", f"{found.address}: not there yet; `x1 supervise` writes it")
    if found.trouble:
        fix = "see docs/budget.md for what the file must say; a run without readings is stopped"
        return Finding("budget file", "broken", f"{found.address}: {found.trouble}", fix)
    rate = f", {found.usd_per_hr:.2f} $/h" if found.usd_per_hr else ""
    return Finding("budget file", "ok", f"{found.address}: ${found.spent_usd:.2f} spent{rate}")


def cost(found: Estimate | None, cap_usd: float | None) -> Finding:
    """The estimate against the ceiling."""
    if cap_usd is None:
        return Finding("cost", "-", "no ceiling (budget.cap_usd)")
    usd = found.usd if found else None
    if usd is None:
        return Finding("cost", "-", f"not known, against a ceiling of ${cap_usd:,.2f}")
    low, high = dollars(usd[1]), dollars(usd[2])
    shown = f"{dollars(usd[0])} for the whole run [{low}, {high}], the ceiling is ${cap_usd:,.2f}"
    measured: Mapping[str, float] = {"usd": usd[0], "high_usd": usd[2], "cap_usd": cap_usd}
    if usd[2] <= cap_usd:
        return Finding("cost", "ok", shown, measured=dict(measured))
    fix = "fewer steps, a smaller model or a cheaper machine: `x1 plan --dollars` shows the choices"
    return Finding("cost", "broken" if usd[0] > cap_usd else "slow", shown, fix, dict(measured))
