"""What torch finds here, and how fast the device really computes and copies; in a process that may crash.

Parts, in this order: torch, devices, threads, arithmetic, rate <n>, load, attention. Each is said as soon as
it is known, so that a crash later takes nothing back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from x1_pretrain.doctor import gpu
from x1_pretrain.doctor.trial import Facts, Voice, answered

GPU_SIDE, CPU_SIDE = 8192, 1024  # of the square matrices
TOKENS = 8192  # rows of the model's own products on a GPU; on a CPU an eighth
SECONDS = 0.25  # of each measurement
REPEATS = 5  # of which the median counts


def answer(task: Facts, voice: Voice) -> None:
    """`task`: device ("auto", "cpu", "cuda"), gpus, and the model's products as [name, n, k]."""
    try:
        import torch
    except Exception as error:  # a broken install raises anything
        voice.say("torch", error=f"{type(error).__name__}: {error}"[:300])
        return
    voice.say("torch", **versions(torch))
    cuda = task["device"] != "cpu" and torch.cuda.is_available()
    voice.say("devices", **(devices(torch) if task["device"] != "cpu" else {"count": 0, "names": []}))
    voice.say("threads", threads=torch.get_num_threads())
    count = min(task["gpus"], torch.cuda.device_count()) if cuda else 1
    for number in range(count):
        place = f"cuda:{number}" if cuda else "cpu"
        voice.say("arithmetic", **arithmetic(torch, place))
        shapes = task["products"] if number == 0 else []
        voice.say(f"rate {number}", **rates(torch, place, shapes))
    if cuda:
        voice.say("load", **under_load(torch))
    voice.say("attention", which=attention_line(torch, cuda, task["attention"]))


def versions(torch: Any) -> Facts:
    from x1_pretrain.errors import UserError
    from x1_pretrain.runtime.world import require_torch

    try:
        require_torch()
        problem = None
    except UserError as error:
        problem = str(error)
    built = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    return {**built, "problem": problem}


def devices(torch: Any) -> Facts:
    """The GPUs that torch sees; asking a broken driver may raise."""
    try:
        count = torch.cuda.device_count()
        found = [torch.cuda.get_device_properties(n) for n in range(count)]
    except Exception as error:
        return {"count": 0, "names": [], "error": f"{type(error).__name__}: {error}"[:300]}
    return {
        "count": count if torch.cuda.is_available() else 0,
        "names": [one.name for one in found],
        "memory_bytes": [one.total_memory for one in found],
        "capability": [f"{one.major}.{one.minor}" for one in found],
        "kernels": torch.cuda.get_arch_list(),
    }


def arithmetic(torch: Any, place: str) -> Facts:
    """Whether a product comes out right: a build without kernels for this GPU fails here."""
    try:
        ones = torch.ones(64, 64, device=place)
        right = bool(((ones @ ones) == 64).all())
    except Exception as error:
        return {"works": False, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {"works": right, "error": None if right else "a product of ones came out wrong"}


def rates(torch: Any, place: str, products: list[list[Any]]) -> Facts:
    """Multiply-adds count two. FLOP/s of big squares and of the model's own shapes; bytes/s of a copy."""
    side = GPU_SIDE if place != "cpu" else CPU_SIDE
    rows = TOKENS if place != "cpu" else TOKENS // 8
    found: Facts = {"side": side, "rows": rows}
    found["bf16"] = product_rate(torch, place, torch.bfloat16, side, side, side)
    if place in ("cpu", "cuda:0"):
        found["fp32"] = product_rate(torch, place, torch.float32, side, side, side)
    found["products"] = {
        name: product_rate(torch, place, torch.bfloat16 if place != "cpu" else torch.float32, rows, n, k)
        for name, n, k in products
    }
    found["copy_bytes_per_sec"] = copy_rate(torch, place)
    if place != "cpu":
        found["upload_bytes_per_sec"] = upload_rate(torch, place)
    return found


def product_rate(torch: Any, place: str, dtype: Any, m: int, n: int, k: int) -> float:
    a = torch.randn(m, k, device=place).to(dtype)  # (m, k); random: a GPU draws less power on zeros
    b = torch.randn(n, k, device=place).to(dtype)  # (n, k)
    return 2.0 * m * n * k / seconds_of(torch, place, lambda: torch.nn.functional.linear(a, b))


def copy_rate(torch: Any, place: str) -> float:
    """Read and written bytes of a copy within the memory."""
    size = 1 << 28 if place == "cpu" else min(1 << 30, int(torch.cuda.mem_get_info(place)[0]) // 8)
    source = torch.ones(size, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    return 2.0 * size / seconds_of(torch, place, lambda: target.copy_(source))


def upload_rate(torch: Any, place: str) -> float:
    """From pinned memory to the GPU: PCIe with fewer lanes shows here."""
    source = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty(1 << 28, dtype=torch.uint8, device=place)
    return (1 << 28) / seconds_of(torch, place, lambda: target.copy_(source, non_blocking=True))


def seconds_of(torch: Any, place: str, work: Callable[[], object]) -> float:
    """Median over a few rounds of the time of one call, each round long enough for the clock."""

    def timed(calls: int) -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        if place != "cpu":
            torch.cuda.synchronize(place)
        return (time.perf_counter() - begun) / calls

    timed(1)  # the first call allocates and chooses a kernel
    calls = max(1, round(SECONDS / REPEATS / max(timed(1), 1e-6)))
    return sorted(timed(calls) for _ in range(REPEATS))[REPEATS // 2]


def under_load(torch: Any) -> Facts:
    """The driver's reading while every GPU is busy: links and clocks sleep when it is idle."""
    squares = [a for n in range(torch.cuda.device_count()) if (a := square(torch, n)) is not None]
    if not squares:
        return {"cards": [], "loaded": 0, "error": "no GPU has room for the load"}
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        multiply(torch, squares, 1)
        for a in squares:
            torch.cuda.synchronize(a.device)
    slowest_s = max(seconds_of(torch, str(a.device), lambda a=a: torch.matmul(a, a)) for a in squares)  # type: ignore[misc]
    multiply(torch, squares, int(1.5 / slowest_s))  # queued: the GPUs work on while the driver is asked
    try:
        return {"cards": [card.to_json() for card in gpu.cards()], "loaded": len(squares)}
    except (OSError, RuntimeError) as error:
        return {"cards": [], "error": str(error)[:200]}


def square(torch: Any, number: int) -> Any | None:
    """None: this GPU has no room for it, or does not answer."""
    try:
        return torch.randn(GPU_SIDE, GPU_SIDE, device=f"cuda:{number}", dtype=torch.bfloat16)
    except Exception:  # a GPU that others fill, or that is broken, must not hide the others
        return None


def multiply(torch: Any, squares: list[Any], calls: int) -> None:
    for _ in range(calls):
        for a in squares:
            torch.matmul(a, a)


def attention_line(torch: Any, cuda: bool, requested: str) -> str:
    from typing import cast

    from x1_pretrain.model import attention

    wanted = cast(attention.Requested, requested)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    return attention.choose(wanted, device, torch.bfloat16 if cuda else torch.float32)[1]


if __name__ == "__main__":
    answered(answer)
