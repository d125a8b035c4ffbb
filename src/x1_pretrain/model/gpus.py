"""What `--gpu a100-80gb` means: the GPUs that runs are planned for, what they can do, under everyone's names.

The numbers lie in `gpus.toml`, dated and with their sources. A provider names the same board in its own words
("gpu_8x_a100_80gb_sxm4", "NVIDIA A100-SXM4-80GB"): a kind is recognised by the words that must be there and
those that must not.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, field_validator

from x1_pretrain.config import Positive, Section
from x1_pretrain.errors import UserError

FILE = Path(__file__).with_name("gpus.toml")
Text = Annotated[str, Field(min_length=1)]
Date = Annotated[str, Field(pattern=r"^20\d\d-[01]\d-[0-3]\d$")]
Row = TypeVar("Row", bound=Section)


class Kind(Section):
    """One GPU. What isn't known is None: no number is guessed."""

    name: Text  # what a person types
    label: Text  # what a person reads
    device: Text  # as the driver calls it
    pattern: Text  # recognises such a name
    has: frozenset[str]
    lacks: frozenset[str] = frozenset()
    sold_as: Text | None = None  # the kind whose list prices hold for it
    peak_bf16_tflops: Positive | None = None  # dense
    memory_gib: Positive
    bandwidth_gb_per_sec: Positive | None = None  # of the memory
    link_gb_per_sec: Positive | None = None  # to the machine's other GPUs, one direction
    source: Text
    checked: Date

    @field_validator("has", "lacks", mode="before")
    @classmethod
    def _split(cls, words: object) -> object:
        return frozenset(words.split()) if isinstance(words, str) else words

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @property
    def peak_flops_per_sec(self) -> float | None:
        """Dense bf16, from the data sheet."""
        return self.peak_bf16_tflops * 1e12 if self.peak_bf16_tflops else None

    def matches(self, *names: str) -> bool:
        """Whether a provider's names for a machine or a GPU, taken together, are of this kind."""
        words = set(_words(" ".join(names)))
        return self.has <= words and not self.lacks & words


@cache
def kinds(file: Path = FILE) -> tuple[Kind, ...]:
    """Every GPU of the table, in its order."""
    found = read_rows(file, "gpu", Kind)
    names = [known.name for known in found]
    if twins := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{file}: more than one gpu is called {min(twins)!r}; remove all but one")
    return found


def kind(text: str) -> Kind:
    """The kind that a person means by "a100-80gb", "A100 80GB" or "a100_80gb"."""
    wanted = _squeezed(text)
    for known in kinds():
        if wanted in (_squeezed(known.name), _squeezed(known.label)):
            return known
    likely = _likely(wanted)
    hint = (
        f"did you mean {' or '.join(likely)}?" if likely else f"known: {', '.join(k.name for k in kinds())}"
    )
    raise UserError(f"no GPU is called {text!r}; {hint}")


def peak_bf16_flops_per_sec(device_name: str) -> float | None:
    """The data sheet's dense bf16 peak of a GPU by its name, or None: an unknown device has no MFU."""
    name = device_name.upper().replace("_", "-")
    if re.search(r"\bMIG\b", name):  # a slice of a GPU has a slice of its peak
        return None
    for known in kinds():
        if re.search(known.pattern, name):
            return known.peak_flops_per_sec
    return None


def read_rows(file: Path, key: str, row: type[Row], **options: Any) -> tuple[Row, ...]:
    """The entries `[[key]]` of a TOML file; what stands above them holds for each that doesn't say otherwise.

    `options` are tomllib's. Whatever is wrong is one line: the file, the entry, the field.
    """
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"), **options)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: can't be read ({error})") from None
    entries = tree.pop(key, None)
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UserError(f"{file}: expected entries [[{key}]], found none")
    return tuple(_row(f"{file}: {key} {n}", row, tree | entry) for n, entry in enumerate(entries, start=1))


def _row(where: str, row: type[Row], fields: dict[str, Any]) -> Row:
    try:
        return row.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        called = fields.get("name") or fields.get("kind") or "unnamed"
        raise UserError(f"{where} ({called}): {field}: {first['msg']}{found}") from None


def _likely(wanted: str) -> list[str]:
    """Kinds whose name holds what was typed ("a100", "4090") first, else those spelt nearly so. Of boards
    that are sold as one kind, that kind."""
    sold = [k for k in kinds() if k.sold_as is None]
    if holding := [k.name for k in sold if len(wanted) > 1 and wanted in _squeezed(k.name)]:
        return holding
    names = {_squeezed(k.name): k.name for k in kinds()}
    return [names[close] for close in difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)]


def _words(text: str) -> list[str]:
    """gpu_1x_h100_pcie "H100 (80 GB PCIe)" -> GPU 1X H100 PCIE H100 80GB PCIE."""
    return re.sub(r"\b(\d+) GB\b", r"\1GB", re.sub(r"[^A-Z0-9]+", " ", text.upper())).split()


def _squeezed(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())
