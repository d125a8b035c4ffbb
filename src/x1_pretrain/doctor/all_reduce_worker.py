"""One rank of the timed all-reduce: joins the others, sums a tensor a few times, checks the sum. May hang.

Its place comes from torchrun's variables. It says how far it is, one JSON object a line, so that whoever
watches knows a slow start from a hang.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

ROUNDS = 10
PATIENCE_S = 600.0  # whoever watches is less patient


def say(**facts: Any) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def main(backend: str, mib: int) -> None:
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    say(stage="torch is imported")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE_S))
    say(stage="the ranks have met")
    numbers = torch.arange((mib << 20) // 4, device=device) % 251  # exact in fp32
    one = numbers.float()  # (n,)

    def summed() -> Any:
        tensor = one * (rank + 1)
        dist.all_reduce(tensor)
        return tensor

    expected = one * (size * (size + 1) // 2)
    right = bool(torch.equal(summed(), expected))  # also makes the connections
    say(stage="the first sum is there")
    tensor, times = torch.zeros_like(one), []
    for _ in range(ROUNDS):
        _wait(device)
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(device)
        times.append(time.perf_counter() - begun)
    right = right and bool(torch.equal(summed(), expected))
    bus = 2 * (size - 1) / size * tensor.nbytes / sorted(times)[len(times) // 2]
    say(stage="done", bus_bytes_per_sec=bus, right=right)
    os._exit(0)  # leaving in order can hang as well, and has nothing to tell


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def end_with_parent() -> None:
    """A rank that hangs must not outlive its watchdog: it would hold the GPU."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main(sys.argv[1], int(sys.argv[2]))
