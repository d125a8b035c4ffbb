"""`x1 pull`: a folder that the other commands take, from a mirror that does not notice."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.corpora import write_config
from tests.end_to_end.in_process import train_here
from tests.mirror.published import RUN_ID, Mirrored, content, event, publish, rows
from x1_pretrain import cli
from x1_pretrain.mirror.head import decode, encode
from x1_pretrain.records.checkpoint_files import verify_folder
from x1_pretrain.records.lock import lock_folder
from x1_pretrain.records.mirror_state import read_state
from x1_pretrain.stores.folder_store import FolderStore


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirrored:
    monkeypatch.chdir(tmp_path)
    made = Mirrored(FolderStore(tmp_path / "mirror"), tmp_path / "originals")
    made.checkpoint(100)
    made.checkpoint(200)
    made.records = {
        "metrics.jsonl": rows(1, 260, loss=2.5),
        "events.jsonl": event("start", 0) + event("checkpoint", 100) + event("checkpoint", 200),
    }
    made.files = {
        "config.yaml": b"name: tiny\n",
        "manifest.json": json.dumps({"run_id": RUN_ID, "kind": "run"}).encode(),
        "report.html": b"<html>",
        "spike-postmortem-1.png": b"\x89PNG",
    }
    made.save()
    return made


def pull(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["pull", *words])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out + told.err


def listing(mirror: Path) -> dict[str, tuple[int, int]]:
    found = [p for p in mirror.rglob("*") if p.is_file() and ".x1-mirror" not in p.parts]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def model_of(checkpoint: Path) -> dict[str, bytes]:
    """Without what only a trainer needs to go on."""
    return {
        name: data
        for name, data in content(checkpoint).items()
        if name not in ("optimizer.safetensors", "manifest.json")
    }


def test_everything(run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(tmp_path / "mirror")
    code, told = pull("mirror/tiny", capsys=capsys)
    assert code == 0, told
    folder = tmp_path / "runs" / "tiny"
    for name, data in {**run.records, **run.files}.items():
        assert (folder / name).read_bytes() == data
    path = folder / "checkpoints" / "step-000000200"
    assert content(path) == content(run.originals / path.name)
    assert not (folder / "checkpoints" / "step-000000100").exists()
    assert listing(tmp_path / "mirror") == before  # no lease, no byte
    state = read_state(folder)
    assert state is not None
    assert (state.state, state.epoch) == ("released", 2)


def test_pulling_again_updates(run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pull("mirror/tiny", "--output", "here", capsys=capsys)
    run.checkpoint(300)
    run.records["metrics.jsonl"] = rows(1, 200, loss=2.5) + rows(201, 330, loss=2.4)  # a resume cut rows off
    run.records["metrics.superseded.jsonl"] = rows(201, 260, loss=2.5)
    run.records["events.jsonl"] += event("resume", 200) + event("checkpoint", 300)
    run.files["report.html"] = b"<html>new"
    run.save()
    code, told = pull("mirror/tiny", "--output", "here", capsys=capsys)
    assert code == 0, told
    assert "set aside" not in told
    assert "is not what the mirror has" not in told  # a copy that is behind is no fault
    for name, data in {**run.records, **run.files}.items():
        assert (tmp_path / "here" / name).read_bytes() == data
    found = {p.name for p in (tmp_path / "here" / "checkpoints").iterdir()}
    assert found == {"step-000000200", "step-000000300"}
    run.files["report.html"] = b"<html>newer"  # and nothing else
    run.save()
    pull("mirror/tiny", "--output", "here", capsys=capsys)
    assert (tmp_path / "here" / "report.html").read_bytes() == b"<html>newer"


def test_one_that_broke_off_among_the_records_goes_on(
    run: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("x1_pretrain.mirror.restore.restore_files", Mock(side_effect=KeyboardInterrupt))
        with suppress(KeyboardInterrupt, SystemExit):
            cli.main(["pull", "mirror/tiny"])
    assert (tmp_path / "runs/tiny/metrics.jsonl").is_file()
    code, told = pull("mirror/tiny", capsys=capsys)
    assert code == 0, told
    for name, data in {**run.records, **run.files}.items():
        assert (tmp_path / "runs/tiny" / name).read_bytes() == data
    assert not list((tmp_path / "runs/tiny").glob("*lost*"))


def test_only_the_report(run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = pull("mirror/tiny", "--only", "report", "--output", "r", capsys=capsys)
    assert code == 0, told
    assert not (tmp_path / "r" / "checkpoints").exists()
    assert (tmp_path / "r" / "spike-postmortem-1.png").exists()
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == run.records["metrics.jsonl"]


def test_only_the_model(run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = pull("mirror/tiny", "--only", "final", capsys=capsys)
    assert code == 0, told
    assert "the model of step 200" in told
    assert content(tmp_path / "tiny-final") == model_of(run.originals / "step-000000200")
    assert not list(tmp_path.glob(".pulling*"))
    run.checkpoint(300)
    run.save()
    code, told = pull("mirror/tiny", "--only", "final", capsys=capsys)
    assert code == 0, told
    assert content(tmp_path / "tiny-final") == model_of(run.originals / "step-000000300")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    code, told = pull("mirror/tiny", "--only", "final", "--output", "other", capsys=capsys)
    assert code == 78
    assert "holds something that is no checkpoint" in told
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_a_model_whose_last_step_was_killed(
    run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull("mirror/tiny", "--only", "final", capsys=capsys)[0] == 0
    before = tmp_path / ".pulling-tiny-final" / "before"
    before.mkdir(parents=True)
    (before / "model.safetensors").write_bytes(b"older")
    code, told = pull("mirror/tiny", "--only", "final", capsys=capsys)
    assert code == 0, told
    assert content(tmp_path / "tiny-final") == model_of(run.originals / "step-000000200")
    assert not list(tmp_path.glob(".pulling*"))


@pytest.mark.slow
def test_a_damaged_newest_is_skipped(
    run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.store.delete([run.key(run.published[-1], "model.safetensors")])
    for only in ([], ["--only", "final"]):
        code, told = pull("mirror/tiny", *only, "--output", f"o{len(only)}", capsys=capsys)
        assert code == 0, told
        assert "skipped the checkpoint of step 200: model.safetensors is not in the mirror" in told
    assert verify_folder(tmp_path / "o0" / "checkpoints" / "step-000000100") is None
    assert content(tmp_path / "o2") == model_of(run.originals / "step-000000100")


def test_what_is_refused(run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"run_id": "other-1"}))
    code, told = pull("mirror/tiny", "--output", "taken", capsys=capsys)
    assert (code, told.count("\n")) == (78, 1)
    assert "is the run other-1, and the mirrored one is tiny-2026" in told
    (folder / "manifest.json").write_text("no json")
    code, told = pull("mirror/tiny", "--output", "taken", capsys=capsys)
    assert (code, "holds something that is no run" in told) == (78, True)
    code, told = pull("mirror/tony", capsys=capsys)
    assert (code, told.count("\n")) == (2, 1)
    assert "mirror/tony: there is no such run; `x1 runs" in told
    code, told = pull("mirror", capsys=capsys)
    assert (code, "/mirror: is no run; it holds tiny; `x1 runs " in told) == (2, True)
    code, told = pull("mirror/tiny", "--only", "all", capsys=capsys)
    assert code == 2
    code, told = pull("s4://bucket/x", capsys=capsys)
    assert code == 2
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]


def ledger(*tags: str, first: int = 1) -> bytes:
    made = [{"seq": first + n, "event": "intent", "tag": tag} for n, tag in enumerate(tags)]
    return b"".join(json.dumps(one).encode() + b"\n" for one in made)


def test_the_folder_that_it_was_launched_from(
    run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds a ledger, and what the guard here wrote; both stay, at every pull."""
    home = tmp_path / "runs/tiny"
    home.mkdir(parents=True)
    (home / "ledger.jsonl").write_bytes(ledger("tiny-x"))
    (home / "termination.json").write_text('{"proof": "of the guard here"}')
    run.files["termination.json"] = b'{"proof": "of the machine"}'
    run.records["ledger.jsonl"] = ledger("tiny-y")
    run.save()
    code, told = pull("mirror/tiny", capsys=capsys)
    assert (code, told.count("\n")) == (78, 1)
    assert "runs/tiny: holds the ledger of another run" in told
    run.records["ledger.jsonl"] = ledger("tiny-x", "tiny-y")
    run.save()
    for word in (b"<html>1", b"<html>2"):
        run.files["report.html"] = word
        run.save()
        code, told = pull("mirror/tiny", capsys=capsys)
        assert code == 0, told
        assert (home / "report.html").read_bytes() == word
        assert (home / "termination.json").read_text() == '{"proof": "of the guard here"}'
        tags = [json.loads(line)["tag"] for line in (home / "ledger.jsonl").read_text().splitlines()]
        assert tags == ["tiny-x", "tiny-y"]
        for name in ("metrics.jsonl", "events.jsonl"):
            assert (home / name).read_bytes() == run.records[name]
        assert (home / "config.yaml").read_bytes() == run.files["config.yaml"]
    assert (home / "checkpoints/step-000000200").is_dir()


def test_a_folder_in_which_the_run_is_being_trained(
    run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pull("mirror/tiny", "--output", "here", capsys=capsys)
    run.records["metrics.jsonl"] += rows(261, 300)
    run.save()
    lock = lock_folder(tmp_path / "here")
    try:
        code, told = pull("mirror/tiny", "--output", "here", capsys=capsys)
    finally:
        lock.close()
    assert (code, "is training here" in told) == (78, True)
    assert not (tmp_path / "here" / "metrics.jsonl").read_bytes().endswith(rows(300, 300))


def test_a_run_in_the_trash(run: Mirrored, capsys: pytest.CaptureFixture[str]) -> None:
    head = decode(run.store.get("tiny/head.json")[0], "")
    run.store.put("tiny/head.json", encode(replace(head, writer=replace(head.writer, state="trashed"))))
    code, told = pull("mirror/tiny", capsys=capsys)
    assert (code, "was moved to the trash" in told) == (78, True)


def test_a_run_without_a_checkpoint_yet(
    run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.published = []
    run.save()
    code, told = pull("mirror/tiny", capsys=capsys)
    assert (code, "has no checkpoint in the mirror yet" in told) == (0, True)
    code, told = pull("mirror/tiny", "--only", "final", capsys=capsys)
    assert (code, "has no checkpoint in the mirror yet" in told) == (2, True)
    assert not list(tmp_path.glob("*final"))
    assert not list(tmp_path.glob(".pulling*"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(run: Mirrored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    code, told = pull("mirror/tiny", "--output", "closed/run", capsys=capsys)
    assert (code, told.count("\n"), "can't be written" in told) == (2, 1, True)


@pytest.mark.slow
def test_the_folder_is_a_run_for_the_other_commands(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A real run, put into a mirror by hand, pulled, verified, reported, exported, and loaded."""
    monkeypatch.chdir(tmp_path)
    finished = tmp_path / "trained"
    config = write_config(tmp_path / "tiny.yaml")
    done = train_here(capfd, "--config", config, "--data-dir", corpus, "--run-dir", finished)
    assert done.code == 0, done.err
    made = Mirrored(FolderStore(tmp_path / "mirror"), tmp_path / "unused")
    made.run_id = json.loads((finished / "manifest.json").read_text())["run_id"]
    for path in finished.glob("*.jsonl"):
        made.records[path.name] = path.read_bytes()
    for name in ("config.yaml", "manifest.json"):
        made.files[name] = (finished / name).read_bytes()
    for path in sorted((finished / "checkpoints").glob("step-*")):
        made.published.append(publish(made.store, "tiny", f"e0001-00000001/checkpoints/{path.name}", path))
    made.save()
    code, told = pull("mirror/tiny", capsys=capfd)
    assert code == 0, told
    others = ["verify tiny", "report tiny", "export tiny --output e", "watch tiny --once"]
    for words in map(str.split, others):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert not ended.value.code, (words, capfd.readouterr())
    code, told = pull("mirror/tiny", "--only", "final", capsys=capfd)
    assert code == 0, told
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-final").num_parameters() > 0
