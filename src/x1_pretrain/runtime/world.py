"""Ranks and devices: one process, or several (`--ranks`, torchrun). One process pays for none of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from x1_pretrain.errors import UserError
from x1_pretrain.runtime import ranks
from x1_pretrain.runtime.ranks import MEETING

T = TypeVar("T")
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class World:
    """Who this process is among how many, and what it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes the files and speaks."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients_(self, parameters: list[torch.nn.Parameter]) -> None:
        """Gradients summed over ranks, in buckets of about 64 MiB, once a step."""
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
            if parameter.grad is not None:
                bucket.append(parameter.grad)
            if sum(g.numel() * g.element_size() for g in bucket) > 64 << 20:
                _sum_bucket(bucket)
                bucket = []
        _sum_bucket(bucket)

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def minimum(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return cast(T, box[0])

    def neighbours(self) -> list[int]:
        """The process ids of all ranks on this host."""
        mine = (os.uname().nodename, os.getpid())
        if self.size == 1:
            return [mine[1]]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return [pid for host, pid in found if host == mine[0]]

    def close(self) -> None:
        """Only on the way out of a run that went well: after a fault a rank may wait for ever."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def require_torch() -> None:
    """Older containers bring an older torch: said at once, not by a missing function an hour later."""
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise UserError(
            f"torch {torch.__version__} is too old, {needed} or newer is needed: `make setup` installs the "
            f"pinned one into .venv, or `pip install 'torch>={needed}'`"
        )


def join(device: str | None = None, patience_s: float = 1800.0) -> World:
    """This process's place: from the variables of `ranks` or torchrun if there are any, else alone. A rank
    that waits longer than `patience_s` for the others gives up; it must cover what the first rank does alone,
    such as compiling."""
    require_torch()
    rank, size = ranks.place()
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)) if size > 1 else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        backend, patience = "nccl" if chosen.type == "cuda" else "gloo", timedelta(seconds=patience_s)
        if MEETING in os.environ:
            dist.init_process_group(
                backend, timeout=patience, store=_meeting(rank, size, patience), rank=rank, world_size=size
            )
        else:
            dist.init_process_group(backend, timeout=patience)
    return World(rank, size, chosen)


def _meeting(rank: int, size: int, patience: timedelta) -> Any:
    """Where our own ranks meet: at a socket that their parent opened for the first of them."""
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opened = int(os.environ[MEETING]) if rank == 0 else None
    stores: Any = dist  # a torch without distributed has none
    return stores.TCPStore(where, port, size, rank == 0, patience, master_listen_fd=opened)


def ranks_wanted(text: str, device: str | None) -> int:
    """`--ranks N` or `auto`: as many processes as GPUs."""
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise UserError(f"--ranks {text}: expected a number of processes, 1 or more, or auto")
    if MEETING in os.environ:
        return 1
    if (size := ranks.place()[1]) > 1:
        if text not in ("1", "auto"):
            raise UserError(f"--ranks {text}: WORLD_SIZE={size} says that this is one of several (torchrun?)")
        return 1
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if text == "auto":
        return max(1, gpus)
    if 0 < gpus < int(text):
        raise UserError(f"--ranks {text}: this machine has {gpus} GPU(s), and each rank needs one")
    if int(text) == 1 < gpus:
        print(f"1 of the {gpus} GPUs here is used; --ranks {gpus} uses them all", flush=True)
    return int(text)


def _device(wanted: str | None, local_rank: int) -> torch.device:
    if wanted in (None, "auto"):
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in ("cuda", "cpu"):
        raise UserError(f"--device {wanted}: expected cpu or cuda")
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this torch sees no CUDA device (`nvidia-smi` shows whether the driver does)"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; give --ranks of at "
            "most that"
        )
    return torch.device("cuda", local_rank)
