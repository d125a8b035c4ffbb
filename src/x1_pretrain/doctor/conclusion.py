"""From facts to the page: every finding, the estimate, and the env file where settings were needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from x1_pretrain.config import RunConfig
from x1_pretrain.doctor import all_reduce, judge_machine, judge_mirror, judge_run, nccl_env
from x1_pretrain.doctor import estimate as sums
from x1_pretrain.doctor.estimate import Estimate, Price
from x1_pretrain.doctor.examination import Examined, Options
from x1_pretrain.doctor.findings import Finding, size
from x1_pretrain.doctor.gpu import Card, kind_of, ours
from x1_pretrain.doctor.trial import Facts, Trial
from x1_pretrain.errors import UserError
from x1_pretrain.model.flops import GPT2_VOCABULARY, parameter_counts
from x1_pretrain.model.gpus import Kind
from x1_pretrain.model.memory import training_memory
from x1_pretrain.money.prices import list_price
from x1_pretrain.records import checkpoint_files
from x1_pretrain.records.metrics import utc_now

ENV_NAME = nccl_env.NAME
RANK_BYTES = 3 << 30  # a process with torch, CUDA's context and pinned buffers, in the host's memory
CPU_BYTES = 1 << 30  # a process with torch, on a CPU
STATE_BYTES = 12  # a parameter in a checkpoint: weight and two moments in fp32
LOG_BYTES = 64 << 20  # beside the checkpoints
SMALL_BYTES = 64 << 10  # config, state and manifest of a checkpoint


@dataclass(frozen=True)
class Page:
    findings: list[Finding]
    estimate: Estimate | None
    estimate_text: str


def conclude(options: Options, facts: Examined, env_file: Path, usd_per_hr: float | None) -> Page:
    """Judge, estimate, and write the env file if the ranks need settings."""
    kinds = [kind_of(name) for name in facts.devices.get("names", [])]
    price = price_of(options.config, facts, kinds, usd_per_hr)
    found = estimate_of(options.config, facts, price) if options.config else None
    rows = about_machine(options, facts, kinds)
    rows += about_ranks(facts, kinds, env_file)
    if options.config or options.data_dir:
        rows += about_data(options, facts, found)
    if options.config:
        rows += about_run(options.config, facts, found)
    rows += about_mirror(options.config, facts, found, price)
    rows.append(judge_run.alerts(facts.alerts, bool(options.config and options.config.budget.cap_usd)))
    text = ""
    if found and options.config:
        text = sums.sentences(found, options.config, facts.ranks, how(facts), facts.cuda)
    return Page(rows, found, text)


# ------------------------------------------------------------------------------------------------------------
# Findings


def about_machine(options: Options, facts: Examined, kinds: list[Kind | None]) -> list[Finding]:
    host, compute = facts.host, facts.compute
    torch = compute.part("torch")
    arithmetic = compute.part("arithmetic")
    works = bool(arithmetic.get("works")) if facts.cuda and arithmetic else None
    names = list(facts.devices.get("names", []))
    rates = [facts_ for name, facts_ in compute.parts.items() if name.startswith("rate ")]
    first = kinds[0] if kinds and facts.cuda else None
    visible = host.environment.get("CUDA_VISIBLE_DEVICES")
    idle = ours(facts.driver.cards, visible) if facts.driver else ()
    busy = under_load(compute.part("load"), visible)
    own = {card.uuid for card in idle}
    others = sum(uuid in own for uuid in facts.driver.processes) if facts.driver else 0
    rows = [
        judge_machine.python(host.python, host.system),
        judge_machine.torch(torch, compute.trouble),
        *about_driver(options, facts, works),
        judge_machine.kind(names, kinds),
        judge_machine.health(idle, busy, others),
        judge_machine.product(
            rates,
            first.peak_flops_per_sec if first else None,
            arithmetic,
            compute.trouble,
            busy,
            gpu=facts.cuda,
        ),
        judge_machine.copy(rates, _bandwidth(first)),
        judge_machine.upload(rates),
        judge_machine.cpu(host, compute.part("threads").get("threads")),
        judge_machine.memory(host.memory_bytes, *memory_needed(options.config, facts)),
        judge_machine.shared_memory(host, facts.ranks if facts.cuda else 1),
        judge_machine.limits(host, facts.ranks),
        *about_disk(options, facts),
        judge_machine.clock(*facts.drift, facts.ahead, facts.behind_file),
    ]
    if not options.config:
        line = compute.part("attention").get("which")
        rows.append(judge_run.attention(line, "auto", facts.cuda))
    return rows


def under_load(load: Facts, visible: str | None) -> Sequence[Card]:
    """The cards that were loaded while the driver was asked. Torch numbers them otherwise than the
    driver: of more cards than were loaded, those that drew the most power."""
    cards = ours([Card(**card) for card in load.get("cards", [])], visible)
    loaded = int(load.get("loaded", len(cards)))
    return sorted(cards, key=lambda card: card.power_w or 0.0, reverse=True)[:loaded]


def about_driver(options: Options, facts: Examined, works: bool | None) -> list[Finding]:
    """Driver and GPUs, where the run may use them and torch could be asked."""
    torch = facts.compute.part("torch")
    if options.device == "cpu" or "version" not in torch:
        why = "--device cpu" if options.device == "cpu" else "torch could not be asked"
        return [Finding(check, "-", why) for check in ("CUDA driver", "GPUs")]
    cuda = torch.get("cuda")
    return [
        judge_machine.driver(facts.driver, cuda, works),
        judge_machine.gpus(facts.host, facts.driver, facts.devices, cuda, options.gpus),
    ]


def _bandwidth(kind: Kind | None) -> float | None:
    return kind.bandwidth_gb_per_sec * 1e9 if kind and kind.bandwidth_gb_per_sec else None


def about_disk(options: Options, facts: Examined) -> list[Finding]:
    if facts.disk is None:
        return []
    needed, what = disk_needed(options.config, facts, options.folder)
    return [
        judge_machine.disk_rate(
            facts.disk, checkpoint_bytes(options.config, facts) if options.config else None
        ),
        judge_machine.disk_space(facts.disk.free_bytes, needed, what),
    ]


def about_ranks(facts: Examined, kinds: list[Kind | None], env_file: Path) -> list[Finding]:
    """The settings that work go into the env file; a file that can't be written is said, not fatal."""
    found, written = all_reduce.best(facts.attempts), None
    problem = ""
    if found and found.settings:
        rates = [judge_run.told(one) for one in facts.attempts]
        try:
            nccl_env.write(env_file, found.settings, [f"{utc_now()}, {facts.ranks} ranks:", *rates])
            written = str(env_file)
        except UserError as error:
            problem = f" ({error})"
    link = kinds[0].link_gb_per_sec if kinds and kinds[0] and facts.cuda else None
    row = judge_run.all_reduce(facts.attempts, link, written)
    return [
        row if not problem else Finding(row.check, row.status, row.found + problem, row.fix, row.measured)
    ]


def about_data(options: Options, facts: Examined, found: Estimate | None) -> list[Finding]:
    data = facts.data or Trial()
    rows = [judge_run.corpora(data), judge_run.hashes(data)]
    if options.config:
        need = found.tokens_per_sec[0] / facts.ranks if found else None
        rows += [judge_run.plan(data.part("order")), judge_run.reading(data.part("reading"), need)]
    return rows


def about_run(config: RunConfig, facts: Examined, found: Estimate | None) -> list[Finding]:
    step = facts.step or Trial()
    eager, compiled = step.part("eager"), step.part("compiled")
    times = [median(part["micro_s"]) if part else None for part in (eager, compiled)]
    if eager and compiled and eager["sequences"] != compiled["sequences"]:
        times = [None, None]
    line = step.part("model").get("attention") or facts.compute.part("attention").get("which")
    return [
        judge_run.dry_run(step),
        judge_run.attention(line, config.training.attention, facts.cuda),
        judge_run.compilation(step.part("compile"), times[0], times[1], step.trouble),
        judge_run.peak_memory(eager),
        judge_run.hub(),
        judge_run.mlflow(facts.store, facts.mlflow),
        judge_run.budget(facts.budget),
        judge_run.cost(found, config.budget.cap_usd),
    ]


def about_mirror(
    config: RunConfig | None, facts: Examined, found: Estimate | None, price: Price | None
) -> list[Finding]:
    """The store, and where there is a run, what its cadence means there."""
    row = judge_mirror.mirror(facts.mirror, bool(config and config.mirror.without_lease))
    if config is None or facts.mirror is None:
        return [row]
    run = judge_mirror.Run(
        checkpoint_bytes(config, facts),
        config.checkpoint.every,
        config.training.total_steps,
        config.training.batch_tokens / found.tokens_per_sec[0] if found else None,
        checkpoint_s(config, facts),
        config.mirror.every_s,
        config.mirror.max_mb_per_s,
        price.usd_per_hr if price else None,
    )
    return [row, judge_mirror.pace(facts.mirror, run)]


# ------------------------------------------------------------------------------------------------------------
# What the run needs


def _resolved(config: RunConfig, facts: Examined) -> RunConfig:
    vocab = config.model.vocab_size or facts.vocab or GPT2_VOCABULARY
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab})})


def checkpoint_bytes(config: RunConfig, facts: Examined) -> int:
    opened = facts.data.part("open").get("corpora", []) if facts.data else []
    tokenizer = max((corpus["tokenizer_bytes"] for corpus in opened), default=0)
    return STATE_BYTES * parameter_counts(_resolved(config, facts).model).total + tokenizer + SMALL_BYTES


def disk_needed(config: RunConfig | None, facts: Examined, folder: Path) -> tuple[float | None, str]:
    """What checkpoints will still take beside those that are there."""
    if config is None:
        return None, ""
    one, most = checkpoint_bytes(config, facts), sums.kept_checkpoints(config)
    try:
        there = len(checkpoint_files.list_checkpoints(folder))
    except OSError:
        there = 0
    still = max(1, most - there)
    beside = f", {there} are there" if there else ""
    return float(still * one + LOG_BYTES), (
        f"at most {most} checkpoints of {size(one)} at once, the one being written among them{beside}; "
        f"{size(LOG_BYTES)} for logs"
    )


def memory_needed(config: RunConfig | None, facts: Examined) -> tuple[float | None, str]:
    """Of the host. On GPUs: the processes, and a checkpoint on its way to the disk."""
    if config is None:
        return None, ""
    model = _resolved(config, facts).model
    if facts.cuda:
        staged = STATE_BYTES * parameter_counts(model).total
        return float(
            facts.ranks * RANK_BYTES + staged
        ), f"{facts.ranks} process(es), a checkpoint being written"
    step = facts.step or Trial()
    sequences = int(step.part("micro_batch").get("sequences", 1))
    bf16 = "bf16" in str(step.part("model").get("precision", ""))
    each = training_memory(model, sequences, bf16).total + CPU_BYTES
    return facts.ranks * each, f"{facts.ranks} process(es), weights, moments, activations"


# ------------------------------------------------------------------------------------------------------------
# The estimate


def price_of(
    config: RunConfig | None, facts: Examined, kinds: list[Kind | None], usd_per_hr: float | None
) -> Price | None:
    """What is really paid first, then what may be paid, then what is listed."""
    if usd_per_hr is not None:
        return Price(usd_per_hr, "--usd-per-hr")
    if facts.budget and facts.budget.usd_per_hr:
        return Price(facts.budget.usd_per_hr, f"{facts.budget.address}, what is paid now")
    if config and config.budget.max_usd_per_hr:
        return Price(config.budget.max_usd_per_hr, "budget.max_usd_per_hr, the most that will be paid")
    if facts.cuda and kinds and kinds[0] and (listed := list_price(kinds[0].name, facts.ranks)):
        whole = float(listed.usd_per_hr) * facts.ranks
        return Price(whole, f"{listed.provider}'s list price of {listed.date}, {facts.ranks} GPU(s)")
    return None


def estimate_of(config: RunConfig, facts: Examined, price: Price | None) -> Estimate | None:
    """None: no step could be measured."""
    step = facts.step or Trial()
    measured = step.part("compiled") or step.part("eager")
    blocks = step.part("micro_batch").get("blocks")
    if not measured or not blocks:
        return None
    resolved = _resolved(config, facts)
    best = all_reduce.best(facts.attempts)
    pace = sums.pace(
        measured["micro_s"],
        measured["sequences"],
        measured["update_s"],
        blocks if facts.cuda else blocks * facts.ranks,  # ranks on one CPU share its cores
        parameter_counts(resolved.model).total,
        facts.ranks,
        best.bus_bytes_per_sec if best else None,
    )
    return sums.estimate(
        resolved, pace, evaluation_s(resolved, measured, facts), checkpoint_s(resolved, facts), price
    )


def evaluation_s(config: RunConfig, measured: Facts, facts: Examined) -> float | None:
    """One evaluation: so many tokens of each domain, forward only, shared by the ranks. None: the data, which
    say how many there are, did not open."""
    opened = facts.data.part("open").get("corpora", []) if facts.data else []
    if not opened:
        return None
    tokens = sum(min(n, config.evaluation.tokens) for corpus in opened for n in corpus["domains"].values())
    forward_tokens = measured["sequences"] * config.model.context
    return float(tokens / forward_tokens * measured["forward_s"] / facts.ranks)


def checkpoint_s(config: RunConfig, facts: Examined) -> float:
    """One checkpoint: written, and read twice for its hashes."""
    disk = facts.disk
    if disk is None or not disk.write_bytes_per_sec or not disk.read_bytes_per_sec:
        return 0.0
    size = checkpoint_bytes(config, facts)
    return size / disk.write_bytes_per_sec + 2 * size / disk.read_bytes_per_sec


def how(facts: Examined) -> str:
    """The machine and the way of computing, in words."""
    step = facts.step or Trial()
    names = facts.devices.get("names") or ["CPU"]
    what = f"{facts.ranks} x {names[0]}" if facts.cuda else f"{facts.ranks} CPU process(es)"
    mode = step.part("compile").get("mode", "off") if step.part("compiled") else "off"
    precision = "bf16" if "bf16" in str(step.part("model").get("precision", ""))[:18] else "fp32"
    return f"{what}, {precision}, compile {mode}"
