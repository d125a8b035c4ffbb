"""One forward and backward of the compiled model at its final shape, in a process that may hang or crash.

Started by `fit.try_compile` with the task as one line of JSON on standard input; it ends when that is closed.
What it compiles stays in the compiler's cache on disk, so the training process compiles the same in a
fraction of the time.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import torch

from x1_pretrain.config_reading import parse_config
from x1_pretrain.model import attention
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.model.loss import compiled_chunk_terms
from x1_pretrain.runtime.assemble import be_deterministic, dry_run, wanted_attention
from x1_pretrain.runtime.fit import DTYPES


def end_with_parent() -> None:
    """The training process holds the other end of standard input: when it dies, so does this one."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    config = parse_config(task["config"], "compile trial")
    device, dtype = torch.device(task["device"]), DTYPES[task["precision"]]
    if config.training.deterministic:
        be_deterministic(device)
    kernel, _ = attention.choose(wanted_attention(config), device, dtype)
    decoder = Decoder(config.model, compute_dtype=dtype, attention=kernel).to(device)
    decoder.compile_blocks(task["mode"])
    dry_run(decoder, task["micro_batch"], compiled_chunk_terms(), config.training.z_loss)
    with torch.no_grad():
        dry_run(decoder, task["micro_batch"])  # evaluation is another program
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    os._exit(0)  # the thread above still waits on standard input


if __name__ == "__main__":
    main()
