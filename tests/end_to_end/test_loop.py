"""What a step is, whatever computes it: micro-batches, ranks, trouble on the way."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.corpora import write_config
from tests.end_to_end.in_process import train_here
from tests.end_to_end.processes import REPOSITORY, Training, curve, rows

from x1_pretrain import train

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml")


def losses(run: Path) -> list[float]:
    return [r["train/loss"] for r in rows(run / "metrics.jsonl") if "train/loss" in r]


def test_the_loss_of_the_first_step_is_that_of_a_plain_computation(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    """Read the blocks that were used, run Transformers on them, average: the same number."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    outcome = train_here(
        capfd,
        *(
            "--config",
            config,
            "--data-dir",
            corpus,
            "--run-dir",
            run,
            "--total-steps",
            "5",
            "--ckpt-every",
            "1",
        ),
        *("--set", "checkpoint.keep_last=9", "--set", "training.micro_batch=2"),
    )
    assert outcome.code == 0, outcome.err
    tokens = np.fromfile(corpus / "train.bin", "<u2").astype(np.int64)
    for row in rows(run / "blocks.jsonl"):
        model = AutoModelForCausalLM.from_pretrained(run / f"checkpoints/step-{row['step'] - 1:09d}")
        blocks = torch.tensor(np.stack([tokens[b * 32 : b * 32 + 33] for _, _, b in row["blocks"]]))
        with torch.no_grad():
            logits = model(blocks[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        assert losses(run)[row["step"] - 1] == pytest.approx(float(expected), abs=2e-6)


def test_it_learns(tmp_path: Path, config: Path, corpus: Path, capfd: Capture) -> None:
    run = tmp_path / "run"
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run)
    assert train_here(capfd, *command, "--total-steps", "150").code == 0
    first, last = [r["val/loss"] for r in rows(run / "metrics.jsonl") if "val/loss" in r][::15]
    assert first == pytest.approx(math.log(300), abs=0.2)  # uniform over the vocabulary
    assert last < 3.2  # 18 words in any order: about ln 18 a word


def test_micro_batches_do_not_change_the_curve(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    found = []
    for micro in (8, 4, 1):
        run = tmp_path / f"run{micro}"
        command = ("--config", config, "--data-dir", corpus, "--run-dir", run)
        assert train_here(capfd, *command, "--set", f"training.micro_batch={micro}").code == 0
        found.append((losses(run), rows(run / "blocks.jsonl")))
    for other, blocks in found[1:]:
        assert other == pytest.approx(found[0][0], abs=2e-5)
        assert blocks == found[0][1]


def torchrun(ranks: int, *args: str | Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += [
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "-m",
        "x1_pretrain.train",
        *map(str, args),
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


def test_two_ranks_have_the_curve_of_one_and_a_run_may_change_ranks(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", alone).code == 0
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run)
    done = torchrun(2, *command)
    assert "2 rank(s) x" in done.stdout, done.stderr
    assert losses(run) == pytest.approx(losses(alone), abs=5e-5)
    for name in ("val/loss", "val/code/loss", "val/prose/bpb"):
        pick = lambda r, name=name: [x[name] for x in rows(r / "metrics.jsonl") if name in x]  # noqa: E731
        assert pick(run) == pytest.approx(pick(alone), abs=5e-5)
    # the last third again, on one rank
    import shutil

    shutil.rmtree(run / "checkpoints" / "step-000000030")
    assert train_here(capfd, *command).code == 0
    assert losses(run) == pytest.approx(losses(alone), abs=5e-5)
    assert [r["step"] for r in rows(run / "metrics.jsonl") if "train/loss" in r] == list(range(1, 31))


def test_a_refusal_ends_all_ranks(tmp_path: Path, config: Path, corpus: Path) -> None:
    command = ("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run")
    done = torchrun(2, *command, "--set", "training.batch_tokens=32")
    assert done.returncode != 0
    assert "1 blocks of 32, which 2 ranks can't share evenly" in done.stderr


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", plain).code == 0
    forward = train.forward

    calls: list[int] = []

    def small_memory(run: Any, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(run.step)
        if run.step >= 7 and len(tokens) > 1 and calls.count(run.step) % 2 == 0:  # half-way through the step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(run, tokens)

    monkeypatch.setattr(train, "forward", small_memory)
    command = ("--config", config, "--data-dir", corpus, "--run-dir", run, "--set", "training.micro_batch=4")
    outcome = train_here(capfd, *command)
    assert outcome.code == 0, outcome.err
    assert "out of memory with a micro-batch of 4: going on with 2 x 4 accumulated" in outcome.out
    assert "out of memory with a micro-batch of 2: going on with 1 x 8 accumulated" in outcome.out
    assert losses(run) == pytest.approx(losses(plain), abs=2e-5)
    assert rows(run / "blocks.jsonl") == rows(plain / "blocks.jsonl")


def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = train.forward
    broken = {11}

    def sometimes_nan(run: Any, tokens: torch.Tensor) -> torch.Tensor:
        loss = forward(run, tokens)
        return loss * math.nan if run.step in broken else loss

    monkeypatch.setattr(train, "forward", sometimes_nan)
    run = tmp_path / "run"
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", run)
    assert outcome.code == 0, outcome.err
    assert "step 12: loss nan, gradient norm nan: not finite, this update was not made" in outcome.out
    assert [math.isnan(float(x)) for x in losses(run)] == [step == 12 for step in range(1, 31)]
    assert all(
        t.isfinite().all() for t in load_file(run / "checkpoints/step-000000030/model.safetensors").values()
    )
    # a streak stops the run, with the weights of before
    broken |= set(range(15, 30))
    stopped = tmp_path / "stopped"
    outcome = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", stopped)
    assert outcome.code == 1
    assert "3 steps in a row were not finite" in outcome.one_line
    assert "the last checkpoint is step-000000017" in outcome.one_line


def test_sigkill_of_the_trainer_leaves_no_lock(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    command = ("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run")
    first = Training(*command)
    first.wait_for_line("step  3/")
    first.kill()
    assert train_here(capfd, *command).code == 0


def test_a_run_without_validation_tokens_says_so(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    import json
    import shutil

    import numpy as np

    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    (data / "val.bin").write_bytes(b"")
    np.save(data / "val.idx.npy", np.load(data / "val.idx.npy")[:0])
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["val"] = {"tokens": 0, "documents": 0, "bytes": 0, "sha256": "e3b0c44298fc1c14"}
    manifest["val_spans"] = {}
    (data / "manifest.json").write_text(json.dumps(manifest))
    outcome = train_here(capfd, "--config", config, "--data-dir", data, "--run-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "there will be no validation loss" in outcome.out
    assert not [r for r in curve(tmp_path / "run") if "val/loss" in r]


def test_odd_prompts_and_spare_ids_are_no_trouble(
    tmp_path: Path, config: Path, corpus: Path, capfd: Capture
) -> None:
    prompts = f'evaluation.prompts=["", "{"the cat " * 200}"]'
    command = ("--config", config, "--data-dir", corpus, "--run-dir", tmp_path / "run")
    more = ("--set", prompts, "--set", "model.vocab_size=1000", "--set", "evaluation.temperature=0.0")
    outcome = train_here(capfd, *command, *more)
    assert outcome.code == 0, outcome.err
    assert len(rows(tmp_path / "run" / "samples.jsonl")) == 2 * 4


def test_data_that_go_while_training_cost_no_checkpoint(tmp_path: Path, config: Path, capfd: Capture) -> None:
    """The tokenizer is saved from memory, and tokens are read through files that are open."""
    import shutil

    from tests.corpora import write_corpus

    data, run = write_corpus(tmp_path / "data"), tmp_path / "run"
    command = ("--config", config, "--data-dir", data, "--run-dir", run)
    training = Training(*command, "--total-steps", "2000")
    training.wait_for_line("step    5/")
    shutil.move(data, tmp_path / "moved")
    output = training.wait_for_line("step   60/")
    training.kill()
    assert "not saved" not in output
    newest = max((run / "checkpoints").glob("step-*"))
    assert (newest / "tokenizer.json").read_text() == (tmp_path / "moved" / "tokenizer.json").read_text()


def test_validation_data_cut_while_training_is_one_line(
    tmp_path: Path, config: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.corpora import write_corpus

    data = write_corpus(tmp_path / "data")
    forward = train.forward

    def cut_at_step_five(run: Any, tokens: torch.Tensor) -> torch.Tensor:
        if run.step == 5:
            (data / "val.bin").write_bytes(b"")
        return forward(run, tokens)

    monkeypatch.setattr(train, "forward", cut_at_step_five)
    outcome = train_here(capfd, "--config", config, "--data-dir", data, "--run-dir", tmp_path / "run")
    assert outcome.code == 2
    assert "val.bin" in outcome.one_line


def test_a_run_never_writes_into_a_corpus(tmp_path: Path, config: Path, corpus: Path, capfd: Capture) -> None:
    before = (corpus / "manifest.json").read_bytes()
    for flag in ("--run-dir", "--ckpt-dir"):
        outcome = train_here(capfd, "--config", config, "--data-dir", corpus, flag, corpus)
        assert outcome.code == 78
        assert "is a corpus folder" in outcome.one_line
    assert (corpus / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_a_compiled_run_has_the_curve_of_an_eager_one(tmp_path: Path, config: Path, corpus: Path) -> None:
    """The real compiler, the real trial process, training and evaluation."""
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    command = ("--config", config, "--data-dir", corpus)
    assert Training(*command, "--run-dir", eager).end()[0] == 0
    code, output = Training(*command, "--run-dir", compiled, "--set", "training.compile=default").end(300)
    assert code == 0, output
    assert "compile: default (tried in" in output
    assert losses(compiled) == pytest.approx(losses(eager), abs=2e-4)
