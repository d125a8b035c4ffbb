"""The description of what runs on a rented machine: which code, which data, under which cap."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from x1_pretrain.errors import UserError

# Python 3.12, torch 2.13.0a0 and CUDA 13.3, which a data-center GPU with a 580 driver or newer runs.
# Releases before 26.04 hold a pre-release of torch 2.11 or older: pip would replace it.
NGC_IMAGE = "nvcr.io/nvidia/pytorch:26.07-py3"
CONFIG_END = "X1_CONFIG_END"  # closes the config inside the start script

_FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TAG = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FOLDER = re.compile(r"/[A-Za-z0-9._/-]+")


@dataclass(frozen=True)
class Job:
    """A run, complete enough for a bare machine to start it without a person."""

    run_name: str
    tag: str  # unique to this launch: the supervisor finds its own machine by it
    config_text: str  # the resolved YAML
    source: str  # what pip installs: `x1-pretrain @ git+https://...@<commit>`, or a wheel's path or address
    provider: str
    rate_usd_per_hr: Decimal
    cap_usd: Decimal
    data_commands: tuple[str, ...] = ()  # bash, one after the other; skipped where the corpus is there
    train_flags: tuple[str, ...] = ()
    supervise_flags: tuple[str, ...] = ()  # more for the supervisor: --disk-gib 200, --tax 0.10, ...
    workspace: str = "/workspace"
    corpus: str = ""  # the folder that data_commands make; "" = <workspace>/data/tokenized
    image: str = NGC_IMAGE
    passed_variables: tuple[str, ...] = ()  # names only: X1_ALERTS, HF_TOKEN, ...
    gpus: int = 1  # fewer found: the start fails. 0: runs on the CPU, on purpose
    data_disk_gib: int = 60  # free before data_commands: sample/10BT takes 29 GB raw and 20 GB as tokens
    data_timeout_s: int = 6 * 3600
    data_from_mirror: bool = False  # the trainer fetches the corpus: data_commands are not run
    stop_s: int = 60  # from SIGTERM to SIGKILL under systemd: saving, and what the mirror still lacks

    def __post_init__(self) -> None:
        for check in (self._check_names, self._check_places, self._check_numbers, self._check_text):
            check()

    @property
    def corpus_dir(self) -> str:
        return self.corpus or f"{self.workspace}/data/tokenized"

    @property
    def venv(self) -> str:
        return f"{self.workspace}/venv"

    @property
    def config_path(self) -> str:
        return f"{self.workspace}/{self.run_name}.yaml"

    def supervise_command(self) -> list[str]:
        """What is started in the end: the supervisor, and after `--` what the trainer gets."""
        return [
            *(f"{self.venv}/bin/x1", "supervise", "--provider", self.provider),
            *("--rate-usd-per-hr", str(self.rate_usd_per_hr), "--tag", self.tag, *self.supervise_flags, "--"),
            *("--config", self.config_path, "--data-dir", self.corpus_dir),
            *("--run-dir", f"{self.workspace}/runs/{self.run_name}"),
            *("--budget-cap-usd", str(self.cap_usd)),
            *("--budget-curr-cost-uri", f"{self.workspace}/budget.json"),
            *self.train_flags,
        ]

    def _check_names(self) -> None:
        _require(_NAME, self.run_name, "run_name", "letters, digits, `.`, `_` and `-`, at most 63")
        _require(_TAG, self.tag, "tag", "a-z, 0-9 and `-`, at most 64")
        _require(_TAG, self.provider, "provider", "a name such as lambda, runpod or local")
        for name in self.passed_variables:
            _require(_VARIABLE, name, "passed_variables", "names of variables, never NAME=value")

    def _check_places(self) -> None:
        _require(_FOLDER, self.workspace, "workspace", "an absolute path of letters, digits and `._-/`")
        _require(_FOLDER, self.corpus_dir, "corpus", "an absolute path of letters, digits and `._-/`")
        tag = self.image.rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest"):
            raise UserError(f"image {self.image}: expected a pinned tag, such as {NGC_IMAGE}")

    def _check_numbers(self) -> None:
        if not (self.cap_usd.is_finite() and self.cap_usd > 0):
            raise UserError(f"cap_usd {self.cap_usd}: expected more than 0")
        if not (self.rate_usd_per_hr.is_finite() and self.rate_usd_per_hr >= 0):
            raise UserError(f"rate_usd_per_hr {self.rate_usd_per_hr}: expected 0 or more")
        if self.gpus < 0 or self.data_disk_gib < 0 or min(self.data_timeout_s, self.stop_s) <= 0:
            raise UserError("gpus and data_disk_gib are 0 or more, data_timeout_s and stop_s more than 0")

    def _check_text(self) -> None:
        if CONFIG_END in self.config_text.splitlines():
            raise UserError(
                f"the config has a line {CONFIG_END}, which ends it in the start script: remove it"
            )
        if several := [text for text in (*self.train_flags, *self.supervise_flags) if "\n" in text]:
            raise UserError(f"the flag {several[0]!r}: expected one line")
        if "--" in self.supervise_flags:
            raise UserError(
                "supervise_flags has `--`, which begins the trainer's: put those into train_flags"
            )
        if not self.source.strip() or "\n" in self.source:
            raise UserError(f"source {self.source!r}: expected one pip requirement or a wheel")


def fineweb_edu_commands(workspace: str = "/workspace") -> tuple[str, ...]:
    """Fetch FineWeb-Edu's 10 B token sample and tokenize it with GPT-2's vocabulary."""
    name, raw, tokens = _FINEWEB_EDU, f"{workspace}/data/fineweb-edu", f"{workspace}/data/tokenized"
    return (
        f"hf download {name} --repo-type dataset --include 'sample/10BT/*.parquet' --local-dir {raw}",
        (
            f"python -m x1_pretrain.tokenize_data --input-dir {raw}/sample/10BT --output-dir {tokens} "
            "--tokenizer gpt2 --val-fraction 0.001"
        ),
    )


def _require(form: re.Pattern[str], value: str, name: str, expected: str) -> None:
    if not form.fullmatch(value):
        raise UserError(f"{name} {value!r}: expected {expected}")
