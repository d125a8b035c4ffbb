"""What the machine's numbers mean: plain values in, one `Finding` out. Touches nothing.

The thresholds are choices of ours, each beside what it rests on. Where something was measured to work, no
rule about versions overrules it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from x1_pretrain.doctor.disk import Disk, is_network
from x1_pretrain.doctor.findings import Finding, size
from x1_pretrain.doctor.gpu import Card, Driver, at_power_cap, throttled
from x1_pretrain.doctor.machine import Host
from x1_pretrain.doctor.trial import ENDED, Facts
from x1_pretrain.model.gpus import Kind
from x1_pretrain.numbers import human

GIB = 2**30

OLDEST_PYTHON = (3, 11)
# Of the data sheet's bf16 peak, for a square product of 8192. Large products reach 0.65 to 0.9 of it on
# boards that are well; held-down clocks or another tenant leave less.
MATMUL_OK, MATMUL_BROKEN = 0.55, 0.15
# Of the data sheet's bandwidth, for a copy within the memory: usually 0.8 to 0.93.
COPY_OK, COPY_BROKEN = 0.7, 0.2
STRAGGLER = 0.85  # the slowest GPU against the fastest: every step waits for it
UPLOAD_OK_GB = 5.0  # a PCIe x16 of generation 3 gives about 12 GB/s, x4 of it 3
IDLE_GPU_MIB = 1024  # more in use before a run starts: someone else's
DISK_SLOW = 100e6  # bytes/s; a checkpoint of a 100M model, 1.2 GB, then takes 12 s
SHM_NEEDED = 1 << 30  # containers have 64 MiB unless told; NCCL's buffers between ranks lie there
FILES_NEEDED = 1024
CLOCK_OFF_S = 60.0  # budget.json from further in the future is no reading
JUMP_S = 2.0  # of the wall clock while the doctor works
BUSY = 0.75  # load by others
CPU_TOGETHER = 1.5  # threads a core that may really be used: more only wait for each other


def python(version: tuple[int, int], system: str) -> Finding:
    shown, oldest = ".".join(map(str, version)), ".".join(map(str, OLDEST_PYTHON))
    if version < OLDEST_PYTHON:
        fix = f"make an environment with Python {oldest} or newer (`make setup`)"
        return Finding("Python", "broken", f"{shown}, {oldest} or newer is needed", fix)
    return Finding("Python", "ok", f"{shown} on {system}")


def torch(facts: Facts, trouble: str | None) -> Finding:
    """`facts`: version, cuda, problem; or error."""
    if error := facts.get("error") or (None if "version" in facts else trouble or "no answer"):
        fix = (
            "`make setup` installs the pinned torch into .venv; `python -c 'import torch'` shows all it says"
        )
        return Finding("torch", "broken", f"torch can't be imported: {error}", fix)
    if facts.get("problem"):
        found, _, fix = facts["problem"].partition(": ")
        return Finding("torch", "broken", found, fix, {"version": facts["version"]})
    build = (
        f"CUDA {facts['cuda']}"
        if facts.get("cuda")
        else f"ROCm {facts['hip']}"
        if facts.get("hip")
        else "CPU"
    )
    measured = {"version": facts["version"], "cuda": facts.get("cuda")}
    return Finding("torch", "ok", f"{facts['version']}, built for {build}", measured=measured)


def driver(found: Driver | None, torch_cuda: str | None, works: bool | None) -> Finding:
    """The rule: a driver runs the CUDA versions up to its own. `works`: a product on the GPU came out right;
    None: not tried."""
    if found is None:
        return Finding("CUDA driver", "-", "no NVIDIA driver here (no nvidia-smi)")
    if found.trouble:
        fix = "reboot the machine or take another: nvidia-smi has to answer before anything can train"
        return Finding("CUDA driver", "broken", found.trouble, fix)
    shown = f"driver {found.version or 'of unknown version'} runs CUDA up to {found.cuda or '(not said)'}"
    measured = {"driver": found.version, "driver_cuda": found.cuda, "torch_cuda": torch_cuda}
    if torch_cuda is None:
        fix = f"install a torch built for CUDA {found.cuda} or older: `make setup`, or docs/machines.md"
        return Finding("CUDA driver", "broken", f"{shown}; this torch has no CUDA", fix, measured)
    new_enough = found.cuda is None or _version(found.cuda) >= _version(torch_cuda)
    if works:
        how = (
            ""
            if new_enough
            else f"; older than torch's {torch_cuda}, but a product on the GPU came out right"
        )
        return Finding(
            "CUDA driver", "ok", shown + (how or f", torch is built for {torch_cuda}"), measured=measured
        )
    if not new_enough:
        fix = f"a torch built for CUDA {found.cuda} or older (docs/machines.md), or a newer driver"
        return Finding("CUDA driver", "broken", f"{shown}, torch needs {torch_cuda}", fix, measured)
    if works is None:
        return Finding(
            "CUDA driver", "-", f"{shown}; not tried, the run computes elsewhere", measured=measured
        )
    return Finding("CUDA driver", "ok", f"{shown}, torch is built for {torch_cuda}", measured=measured)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def gpus(
    host: Host, found: Driver | None, devices: Facts, torch_cuda: str | None, wanted: int | None
) -> Finding:
    """How many GPUs torch sees, against how many the driver shows and the run wants (None: any number)."""
    there, seen = len(found.cards) if found else 0, int(devices.get("count", 0))
    visible = host.environment.get("CUDA_VISIBLE_DEVICES")
    measured = {"torch": seen, "driver": there, "wanted": wanted, "CUDA_VISIBLE_DEVICES": visible}
    if seen and seen >= (wanted or 1):
        names = sorted(set(devices["names"]))
        idle = f"; {seen - (wanted or seen)} idle" if wanted and seen > wanted else ""
        return Finding("GPUs", "ok", f"{seen} x {', '.join(names)}{idle}", measured=measured)
    short = f"torch sees {seen}, the driver shows {there}" + (f", {wanted} wanted" if wanted else "")
    if not there and not host.nvidia_driver and not wanted:
        return Finding("GPUs", "-", "none; the run computes on the CPU", measured=measured)
    return Finding("GPUs", "broken", short, _why_none(host, there, seen, torch_cuda, devices), measured)


def _why_none(host: Host, there: int, seen: int, torch_cuda: str | None, devices: Facts) -> str:
    visible = host.environment.get("CUDA_VISIBLE_DEVICES")
    if there > seen and visible is not None:
        return (
            f"CUDA_VISIBLE_DEVICES={visible!r} hides GPUs: unset it, or name those that the run should have"
        )
    if not there and host.container:
        return "the container has no GPU: start it with `--gpus all` (Docker) or `--nv` (Apptainer)"
    if not there and host.nvidia_driver:
        return "the driver is loaded but shows no GPU: see `dmesg`, reboot, or take another machine"
    if there and torch_cuda is None:
        return "this torch is a CPU build: install a CUDA build (docs/machines.md)"
    if error := devices.get("error"):
        return f"torch says: {error}"
    if there > seen:
        return "torch sees fewer than the driver: reboot, or take another machine"
    return "rent a machine with that many GPUs, or give a smaller --gpus"


def kind(names: Sequence[str], found: Sequence[Kind | None]) -> Finding:
    """Whether the GPU table knows them: without a peak there is no MFU and nothing to compare with."""
    if not names:
        return Finding("GPU kind", "-", "no GPU")
    unknown = [name for name, one in zip(names, found, strict=True) if one is None]
    if unknown:
        why = "a slice of a GPU (MIG)" if "MIG" in unknown[0].upper() else "not in model/gpus.toml"
        return Finding("GPU kind", "slow", f"{unknown[0]}: {why}; no peak to compare with, no MFU")
    kinds = {one.name: one for one in found if one}
    if len(kinds) > 1:
        fix = "train on GPUs of one kind (CUDA_VISIBLE_DEVICES): every step waits for the slowest"
        return Finding("GPU kind", "slow", f"mixed: {', '.join(kinds)}", fix)
    only = next(iter(kinds.values()))
    peak = f"{only.peak_bf16_tflops:g} bf16 TFLOP/s" if only.peak_bf16_tflops else "no peak known"
    return Finding("GPU kind", "ok", f"{only.label}: {peak}, {only.memory_gib:g} GiB ({only.source})")


def health(idle: Sequence[Card], busy: Sequence[Card], processes: int) -> Finding:
    """Before the doctor used them, and under load: errors, other tenants, clocks held down, lanes missing."""
    if not idle:
        return Finding("GPU health", "-", "nothing to ask")
    broken = [
        f"GPU {n}: {c.ecc_errors:.0f} uncorrected memory errors" for n, c in enumerate(idle) if c.ecc_errors
    ]
    if broken:
        return Finding("GPU health", "broken", "; ".join(broken), "return this machine: its memory fails")
    slow, fixes = _held_down(idle, busy, processes)
    hot = max((c.temperature_c for c in (*idle, *busy) if c.temperature_c is not None), default=None)
    power = [c.power_w for c in busy if c.power_w is not None]
    calm = f"{hot:.0f} C" if hot is not None else "temperature not said"
    calm += f", {_range(power)} W under load" if power else ""
    calm += (
        "" if any(c.persistence for c in idle) else ", persistence mode off (a start takes seconds longer)"
    )
    measured = {"idle": [c.to_json() for c in idle], "busy": [c.to_json() for c in busy]}
    if slow:
        return Finding("GPU health", "slow", "; ".join([*slow, calm]), "; ".join(fixes), measured)
    seen = "no throttling" if busy else "throttling not looked at under load"
    only = f" on the {len(busy)} of {len(idle)} under load" if 0 < len(busy) < len(idle) else ""
    return Finding("GPU health", "ok", f"no errors, nobody else, {seen}{only}; {calm}", measured=measured)


def _range(values: Sequence[float]) -> str:
    """70, or 65 to 70."""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _held_down(idle: Sequence[Card], busy: Sequence[Card], processes: int) -> tuple[list[str], list[str]]:
    slow, fixes = [], []
    used = [c.used_mib for c in idle if c.used_mib is not None and c.used_mib > IDLE_GPU_MIB]
    if used or processes:
        gib = f", {max(used) / 1024:.1f} GiB in use" if used else ""
        slow.append(f"{processes or 'unseen'} other process(es){gib}")
        fixes.append("end them (`nvidia-smi` lists them), or take a machine of your own")
    if reasons := sorted({words for card in busy for words in throttled(card.reasons)}):
        slow.append(f"clocks held down: {', '.join(reasons)}")
        fixes.append("the provider's cooling or power: ask for another machine")
    if any(c.mig for c in idle):
        slow.append("MIG is on: each device is a slice of a GPU")
        fixes.append("ask the provider to turn MIG off")
    narrow = [c for c in busy if c.pcie_width and c.pcie_width_max and c.pcie_width < c.pcie_width_max]
    if narrow:
        slow.append(f"PCIe x{narrow[0].pcie_width:.0f} of x{narrow[0].pcie_width_max:.0f}")
        fixes.append("a board not seated well, or a shared slot: ask for another machine")
    return slow, fixes


def product(
    rates: Sequence[Facts],
    peak: float | None,
    works: Facts,
    trouble: str | None = None,
    busy: Sequence[Card] = (),
    gpu: bool = True,
) -> Finding:
    """Measured FLOP/s of a big square product against the data sheet's; on a CPU the number alone. `busy`:
    the cards under load, whose power cap may be why."""
    if works and not works.get("works"):
        fix = "this torch has no kernels for this GPU, or the GPU is broken: another build (docs/machines.md)"
        return Finding("matmul", "broken", str(works.get("error")), fix)
    if not rates and trouble:
        if works and not gpu and trouble.startswith(ENDED):
            busy_cpu = "the CPU is busy, or slow: end what else runs here (`top`)"
            return Finding("matmul", "slow", f"not measured: {trouble}", busy_cpu)
        if works and not gpu:
            return Finding("matmul", "broken", f"not measured: {trouble}", "another build of torch")
        fix = "a GPU that hangs: reboot, or take another machine" if works else "see the line of torch"
        return Finding("matmul", "broken" if works else "-", f"not measured: {trouble}", fix)
    if not rates:
        return Finding("matmul", "-", "not measured")
    low, high = (pick(rate["bf16"] for rate in rates) for pick in (min, max))
    shapes = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in rates[0]["products"].items())
    first = rates[0]
    shown = (
        f"{low / 1e12:.3g} TFLOP/s in bf16, {first['fp32'] / 1e12:.3g} in fp32 (square of {first['side']:,})"
    )
    shown += f"; the model's own products: {shapes}" if shapes else ""
    measured = {"bf16_flops_per_sec": [rate["bf16"] for rate in rates], "rates": list(rates)}
    fix = "see GPU health; if nothing is wrong there, ask for another machine"
    if low < STRAGGLER * high:
        return Finding("matmul", "slow", f"{shown}; the fastest GPU does {high / 1e12:.3g}", fix, measured)
    found = _share("matmul", shown, low, peak, MATMUL_OK, MATMUL_BROKEN, fix, measured)
    return _capped(found, busy) if found.status == "slow" else found


def _capped(found: Finding, busy: Sequence[Card]) -> Finding:
    """Less than expected, where nothing holds the clocks down but the power cap: a board of 72 W (L4) or 150
    W (A10) can't do more when it is well. A cap below the one it was sold with is somebody's choice."""
    if not busy or not all(map(at_power_cap, busy)):
        return found
    limits = [c.power_limit_w for c in busy if c.power_limit_w is not None]
    watts = f" of {_range(limits)} W" if limits else ""
    lowered = [
        c for c in busy if c.power_limit_w and c.power_default_w and c.power_limit_w < c.power_default_w
    ]
    if lowered:
        told = (
            f"{found.found}; held down by a power cap{watts}, lowered from {lowered[0].power_default_w:.0f} W"
        )
        fix = "`nvidia-smi -pl` as root sets it back, or ask the provider"
        return replace(found, found=told, fix=fix)
    told = f"{found.found}; the board's own power cap{watts} holds the clock down, and nothing else does"
    return replace(found, status="ok", found=told, fix="")


def copy(rates: Sequence[Facts], peak: float | None) -> Finding:
    """Bytes read and written a second, within the device's memory."""
    if not rates:
        return Finding("memory bandwidth", "-", "not measured")
    low = min(rate["copy_bytes_per_sec"] for rate in rates)
    fix = "see GPU health; if nothing is wrong there, ask for another machine"
    shown = f"{low / 1e9:,.0f} GB/s"
    return _share("memory bandwidth", shown, low, peak, COPY_OK, COPY_BROKEN, fix, {"bytes_per_sec": low})


def _share(
    check: str,
    shown: str,
    measured: float,
    peak: float | None,
    ok: float,
    broken: float,
    fix: str,
    numbers: dict[str, Any],
) -> Finding:
    """A rate against its peak; without a peak the rate is all there is to say."""
    if peak is None:
        return Finding(check, "ok", f"{shown}; nothing to compare with", measured=numbers)
    share = measured / peak
    shown = f"{shown}; {share:.0%} of the data sheet, {ok:.0%} expected at least"
    numbers = {**numbers, "share": share}
    if share >= ok:
        return Finding(check, "ok", shown, measured=numbers)
    return Finding(check, "broken" if share < broken else "slow", shown, fix, numbers)


def upload(rates: Sequence[Facts]) -> Finding:
    """From the host's memory to the GPU."""
    found = [rate["upload_bytes_per_sec"] for rate in rates if "upload_bytes_per_sec" in rate]
    if not found:
        return Finding("host to GPU", "-", "no GPU")
    low = min(found) / 1e9
    shown, measured = f"{low:.1f} GB/s from pinned memory", {"bytes_per_sec": min(found)}
    if low >= UPLOAD_OK_GB:
        return Finding("host to GPU", "ok", shown, measured=measured)
    fix = "PCIe with few lanes or of an old generation: no harm to training, checkpoints take longer"
    return Finding("host to GPU", "slow", f"{shown}, {UPLOAD_OK_GB:g} expected at least", fix, measured)


def cpu(host: Host, count: int | None) -> Finding:
    """torch's threads against the cores that it may really use, and who else uses them."""
    cores = min(host.cores, host.cpu_quota or host.cores)
    if count is None:
        return Finding("CPU", "-", f"{cores:g} cores; torch was not asked")
    shown = f"torch uses {count}, {cores:g} cores are ours"
    measured = {"threads": count, "cores": cores, "load": host.load}
    if count > max(1.0, CPU_TOGETHER * cores):
        fix = f"export OMP_NUM_THREADS={max(1, int(cores))}: more threads than cores wait for each other"
        return Finding("CPU", "slow", shown, fix, measured)
    if host.load > BUSY:
        shown += (
            f"; others keep {host.load:.0%} of the machine's cores busy, every rate here is the lower for it"
        )
        return Finding("CPU", "slow", shown, "end what else runs here (`top`)", measured)
    return Finding("CPU", "ok", shown, measured=measured)


def memory(available: int, needed: float | None, what: str) -> Finding:
    """The host's memory against what the run holds there."""
    shown, measured = f"{size(available)} available", {"available": available, "needed": needed}
    if needed is None:
        return Finding("host memory", "ok", shown, measured=measured)
    shown += f", about {size(needed)} needed ({what})"
    if available >= needed:
        return Finding("host memory", "ok", shown, measured=measured)
    fix = "a machine with more memory, or a smaller model or micro-batch"
    return Finding("host memory", "broken" if available < 0.7 * needed else "slow", shown, fix, measured)


def shared_memory(host: Host, ranks: int) -> Finding:
    if ranks < 2 or host.shm_bytes is None:
        return Finding("/dev/shm", "-", "used between GPUs only, and the run has one")
    shown, measured = f"{size(host.shm_bytes)} free", {"free": host.shm_bytes}
    if host.shm_bytes >= SHM_NEEDED:
        return Finding("/dev/shm", "ok", shown, measured=measured)
    fix = "start the container with `--shm-size=8g` or `--ipc=host`"
    return Finding(
        "/dev/shm", "slow", f"{shown}: NCCL may fail with 'No space left on device'", fix, measured
    )


def limits(host: Host, ranks: int) -> Finding:
    """ulimit -n and, where InfiniBand is used, -l."""
    files = host.open_files
    measured = {"open_files": files, "locked_bytes": host.locked_bytes}
    shown = f"{files if files is not None else 'unlimited'} open files"
    if files is not None and files < FILES_NEEDED:
        return Finding("limits", "slow", shown, f"`ulimit -n {64 * FILES_NEEDED}` before the run", measured)
    if ranks > 1 and host.infiniband and host.locked_bytes is not None and host.locked_bytes < GIB:
        fix = "start the container with `--ulimit memlock=-1`, or `ulimit -l unlimited`"
        shown += f", {host.locked_bytes >> 10} KiB of locked memory, and there is InfiniBand"
        return Finding("limits", "slow", shown, fix, measured)
    return Finding("limits", "ok", shown, measured=measured)


def disk_rate(disk: Disk, checkpoint_bytes: int | None = None) -> Finding:
    """A slow disk is none for a run whose checkpoint it writes and reads within a second."""
    where = f"{disk.folder}{f' ({disk.file_system})' if disk.file_system else ''}"
    if disk.trouble:
        return Finding(
            "disk", "broken", f"{where}: {disk.trouble}", "another --ckpt-dir, or mend its permissions"
        )
    if disk.write_bytes_per_sec is None or disk.read_bytes_per_sec is None:
        return Finding("disk", "broken", f"{where}: too full to try", "free some space")
    write, read = disk.write_bytes_per_sec, disk.read_bytes_per_sec
    network = ", a network mount" if is_network(disk.file_system) else ""
    tried = f"{disk.tried_bytes >> 20} MiB, {disk.uncached}"
    shown = f"{where}{network}: writes {_mib(write)}, reads {_mib(read)} ({tried})"
    measured = {"write_bytes_per_sec": write, "read_bytes_per_sec": read}
    if min(write, read) >= min(DISK_SLOW, checkpoint_bytes or DISK_SLOW):  # the whole of it in a second
        return Finding("disk", "ok", shown, measured=measured)
    fix = "put checkpoints and data on a local disk (--ckpt-dir, --data-dir)"
    return Finding("disk", "slow", f"{shown}; {_mib(DISK_SLOW)} expected at least", fix, measured)


def _mib(rate: float) -> str:
    return f"{rate / 2**20:,.0f} MiB/s"


def disk_space(free: int, needed: float | None, what: str) -> Finding:
    shown, measured = f"{size(free)} free", {"free": free, "needed": needed}
    if needed is None:
        return Finding("disk space", "ok", shown, measured=measured)
    shown += f", {size(needed)} needed ({what})"
    if free >= needed:
        return Finding("disk space", "ok", shown, measured=measured)
    return Finding("disk space", "broken", shown, "free some space, or another --ckpt-dir", measured)


def clock(
    drift_s: float, watched_s: float, ahead: tuple[float, str] | None, behind_file: tuple[float, str] | None
) -> Finding:
    """`drift_s`: wall against monotonic over `watched_s`. `ahead`: of a server's date. `behind_file`: by how
    much the newest file lies in the future, where no server answered."""
    fix = "set the clock (`chronyc makestep`, `timedatectl set-ntp true`), or ask the provider"
    measured = {"drift_s": drift_s, "ahead_s": ahead[0] if ahead else None}
    if abs(drift_s) > JUMP_S:
        return Finding(
            "clock", "broken", f"it jumped by {drift_s:+.1f} s within {watched_s:.0f} s", fix, measured
        )
    if ahead is not None:
        shown = f"{abs(ahead[0]):.0f} s {'ahead of' if ahead[0] >= 0 else 'behind'} {ahead[1]}"
        if abs(ahead[0]) > CLOCK_OFF_S:
            return Finding("clock", "broken", f"{shown}, {CLOCK_OFF_S:.0f} s allowed", fix, measured)
        return Finding("clock", "ok", f"{shown}, steady", measured=measured)
    if behind_file is not None and behind_file[0] > CLOCK_OFF_S:
        shown = f"{human(behind_file[0])} s behind {behind_file[1]}, which exists already"
        return Finding("clock", "broken", shown, fix, measured)
    return Finding("clock", "ok", "steady; not compared with a server: offline", measured=measured)
