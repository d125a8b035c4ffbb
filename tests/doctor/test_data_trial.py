"""The data as the doctor opens it, whole and damaged in one way after another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.corpora import tiny_config, write_corpus

from x1_pretrain.config_reading import parse_config
from x1_pretrain.corpus.shards import open_corpus
from x1_pretrain.doctor import data_trial, judge_run
from x1_pretrain.doctor.trial import Trial
from x1_pretrain.runtime import session


class Heard:
    """Stands for the voice: keeps what is said."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def say(self, part: str, **facts: Any) -> None:
        self.parts[part] = json.loads(json.dumps(facts))


def examined(folder: Path | None = None, full_hash: bool = False, **sections: Any) -> Trial:
    tree = tiny_config(**({"data": {"dir": str(folder)}} | sections)) if sections or folder else None
    task = {"config": tree, "folders": {}, "gpus": 1, "limit_s": 5.0, "full_hash": full_hash}
    heard = Heard()
    data_trial.answer(task, heard)  # type: ignore[arg-type]
    return Trial(heard.parts)


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "web"))


def test_good_data_pass_every_check(copied: Path) -> None:
    found = examined(copied)
    assert set(found.parts) == {"open", "order", "reading", "hash web", "ids web"}
    assert judge_run.corpora(found).status == "ok"
    assert judge_run.hashes(found).status == "ok"
    assert judge_run.plan(found.part("order")).status == "ok"
    assert found.part("reading")["tokens_per_sec"] > 1000
    tokens = len(np.fromfile(copied / "train.bin", "<u2"))
    assert found.part("open")["corpora"][0]["train_tokens"] == tokens
    assert sum(found.part("open")["corpora"][0]["domains"].values()) > 0


def test_the_order_is_the_one_of_the_run(copied: Path) -> None:
    config = parse_config(tiny_config(data={"dir": str(copied)}), "test")
    corpora = {"web": open_corpus(copied, "web")}
    ours = data_trial.make_order(config, corpora)
    theirs = session.make_order(config, corpora, session.Past([], []))
    assert all(ours.step_blocks(step) == theirs.step_blocks(step) for step in (0, 7, 29))


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_a_changed_byte_is_found(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    place = 100 if name != "tokenizer.json" else data.index(b"hills")
    data[place] ^= 1
    (copied / name).write_bytes(bytes(data))
    found = judge_run.hashes(examined(copied))
    assert found.status == "broken"
    assert f"web/{name}" in found.found


def test_a_large_file_is_hashed_only_when_asked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_trial, "FULL_HASH_BYTES", 1000)
    (copied / "train.bin").write_bytes(bytes((copied / "train.bin").stat().st_size))  # another text
    unread = judge_run.hashes(examined(copied))
    assert unread.status == "ok"
    assert "the size alone of web/train.bin" in unread.found
    assert judge_run.hashes(examined(copied, full_hash=True)).status == "broken"


def test_an_id_outside_the_vocabulary_is_found(copied: Path) -> None:
    found = examined(copied, data={"dir": str(copied)}, model={"vocab_size": 10})
    assert judge_run.hashes(found).status == "broken"
    assert "outside the vocabulary of 10" in judge_run.hashes(found).found


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such corpus folder"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
        (lambda folder: (folder / "train.bin").write_bytes(b"12"), "train.bin: 2 bytes"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda folder: (folder / "train.idx.npy").write_bytes(b""), "train.idx.npy"),
    ],
)
def test_damage_is_one_line(copied: Path, damage: Any, words: str) -> None:
    damage(copied)
    found = judge_run.corpora(examined(copied))
    assert found.status == "broken"
    assert words in found.found
    assert "\n" not in found.found


def test_two_names_for_one_corpus_and_two_tokenizers_are_refused(copied: Path, tmp_path: Path) -> None:
    twins = {"a": {"dir": str(copied)}, "b": {"dir": str(copied)}}
    assert "same data" in judge_run.corpora(examined(data={"corpora": twins})).found
    other = write_corpus(tmp_path / "other", seed=3)
    (other / "manifest.json").write_text(
        (other / "manifest.json").read_text().replace('"sha256"', '"sha256": "0", "was"', 1)
    )
    pair = {"a": {"dir": str(copied)}, "b": {"dir": str(other)}}
    assert "tokenized differently" in judge_run.corpora(examined(data={"corpora": pair})).found


def test_a_mixture_and_more_epochs_than_are_good(copied: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", documents=40, seed=3)
    pair = {"a": {"dir": str(copied)}, "b": {"dir": str(other), "weight": 3.0}}
    found = examined(data={"corpora": pair}, training={"total_steps": 300, "batch_tokens": 256})
    facts = found.part("order")
    assert facts["epochs"]["b"] > 4 > facts["epochs"]["a"]
    assert judge_run.plan(facts).status == "slow"


def test_one_block_is_not_enough_for_a_long_context(copied: Path) -> None:
    found = examined(data={"dir": str(copied)}, model={"context": 65536}, training={"batch_tokens": 65536})
    assert "less than one block" in judge_run.corpora(found).found


def test_a_run_of_one_step_has_no_reading_rate(copied: Path) -> None:
    sections = {"training": {"total_steps": 1}, "optimizer": {"warmup_steps": 0}}
    found = examined(data={"dir": str(copied)}, **sections)
    assert judge_run.reading(found.part("reading"), 1.0).status == "-"
