"""What fits and what compiles is found by trying, bounded, and said."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.corpora import tiny_config
from x1_pretrain.config import ModelConfig, RunConfig
from x1_pretrain.config_reading import parse_config
from x1_pretrain.model.decoder import Decoder
from x1_pretrain.runtime import assemble, fit
from x1_pretrain.runtime.signals import Signals
from x1_pretrain.runtime.world import World

CPU = torch.device("cpu")


def config(mode: str, limit_s: float = 120.0) -> RunConfig:
    tree = tiny_config(training={"compile": mode, "compile_timeout_s": limit_s, "deterministic": False})
    tree["model"]["vocab_size"] = 300
    return parse_config(tree, "test")


@given(blocks=st.integers(1, 600), limit=st.integers(1, 700))
def test_micro_batches_divide_exactly(blocks: int, limit: int) -> None:
    found = fit.divisors_up_to(blocks, limit)
    assert found == [n for n in range(blocks, 0, -1) if blocks % n == 0 and n <= limit]


@given(
    blocks=st.integers(1, 600),
    base=st.floats(0.1, 20),
    each=st.floats(0.01, 5),
    limit=st.floats(1, 80),
    once=st.floats(0, 10),
)
def test_the_largest_micro_batch_that_fits_is_found(
    blocks: int, base: float, each: float, limit: float, once: float
) -> None:
    """Against brute force, for memory with one-off costs and steps, and a device that runs out."""

    def used(n: int) -> float:
        return base + each * n + (once if n > 1 else 0) + (1.0 if n >= 4 else 0)

    found, said = fit.largest_fitting(blocks, lambda n: None if used(n) > limit * 1.05 else used(n), limit)
    fitting = [n for n in range(1, blocks + 1) if blocks % n == 0 and used(n) <= limit]
    assert found == (max(fitting) if fitting else None)
    assert ("not even one" in said) == (found is None)
    assert ("more did not fit" in said) == (found is not None and found < blocks)


def test_cpu_micro_batches_stay_within_memory_and_caches() -> None:
    model = ModelConfig(
        layers=8, d_model=768, heads=12, kv_heads=4, d_ff=2048, context=1024, vocab_size=50257
    )
    assert fit.cpu_micro_batch(model, 512, "fp32", 64 << 30)[0] == 8  # 8192 tokens
    assert fit.cpu_micro_batch(model, 512, "fp32", 1 << 30)[0] == 1
    assert fit.cpu_micro_batch(model, 6, "fp32", 64 << 30)[0] == 6


def test_precision_is_measured_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = config("off").model
    for ratio, expected in ((4.0, "bf16"), (0.5, "fp32")):
        times = {torch.float32: ratio, torch.bfloat16: 1.0}
        monkeypatch.setattr(fit, "matmul_seconds", lambda _, dtype, times=times: times[dtype])
        chosen, said = fit.choose_precision("auto", CPU, model)
        assert chosen == expected
        assert "measured" in said
    assert fit.choose_precision("fp32", CPU, model)[0] == "fp32"


def test_the_measurement_itself_is_a_time() -> None:
    model = config("off").model
    assert 0 < fit.matmul_seconds(model, torch.float32) < 1


def test_compilation_works_here() -> None:
    found = fit.choose_compilation(config("default"), CPU, "fp32", 4, lambda: False)
    if found.mode == "off":
        pytest.skip(f"no working compiler on this machine: {found.message}")
    assert found.message.startswith("compile: default")


def test_a_compiler_that_fails_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = fit.choose_compilation(config("default"), CPU, "fp32", 4, lambda: False)
    assert found.mode == "off"
    assert "default failed: " in found.message
    assert "Error" in found.message


@pytest.mark.slow
def test_a_compiler_that_hangs_is_ended_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nsleep 600\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    begun = time.monotonic()
    found = fit.choose_compilation(config("max-autotune", limit_s=8.0), CPU, "fp32", 4, lambda: False)
    assert time.monotonic() - begun < 300  # it would sleep for twice 600
    assert found.mode == "off"
    assert "max-autotune failed: still compiling after 8 s" in found.message  # and then the next mode
    assert "default failed: still compiling after 8 s" in found.message


def test_a_compiler_that_fails_only_in_the_run_itself_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the compiler has gone between the trial and the run."""

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler any more")

    def compile_blocks(decoder: Decoder, mode: str) -> None:
        for layer in decoder.model.layers:
            layer.compile(backend=broken)

    monkeypatch.setattr(fit, "try_compile", lambda *_: None)
    monkeypatch.setattr(Decoder, "compile_blocks", compile_blocks)
    whole = config("default")
    here = World(0, 1, CPU)
    decoder, optimizer, machine = assemble.build_model(whole, here, None)
    with Signals() as signals:
        assemble.fit_machine(whole, here, decoder, optimizer, machine, signals)
    assert machine.compile_mode == "off"
    assert "compile: off after all (" in machine.said[-1]
    assert "no compiler any more" in machine.said[-1]
    assemble.dry_run(decoder, 2, machine.terms)  # and it works
    assert all(p.grad is not None for p in decoder.parameters())


def test_a_deterministic_run_compiles_without_timing_kernels() -> None:
    assert fit.compile_modes("max-autotune", CPU) == ["max-autotune", "default"]
    assert fit.compile_modes("max-autotune", CPU, deterministic=True) == ["default"]
