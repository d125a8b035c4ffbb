"""Checkpoint folders are published whole, and what is not whole is not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from x1_pretrain.records import checkpoint_files as files


def content(data: bytes = b"weights") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(data)
        step = int(folder.name.rpartition("-")[2])
        (folder / "state.json").write_text(json.dumps({"step": step, "run_id": "run"}))

    return write


def test_a_published_checkpoint_verifies_and_is_listed(tmp_path: Path) -> None:
    for step in (0, 5, 10):
        files.publish(tmp_path, step, "run", content())
    assert [p.name for p in files.list_checkpoints(tmp_path)] == [
        "step-000000010",
        "step-000000005",
        "step-000000000",
    ]
    assert files.verify_folder(tmp_path / "step-000000010") is None
    assert files.newest_good(tmp_path) == (tmp_path / "step-000000010", [])
    assert (tmp_path / "latest").readlink() == Path("step-000000010")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    files.publish(tmp_path, 1, "run", content())

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(files.CheckpointFailedError, match="No space left"):
        files.publish(tmp_path, 2, "run", fails)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000000001"]


def test_too_little_room_is_known_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(files.CheckpointFailedError, match="free, a checkpoint needs"):
        files.publish(tmp_path, 1, "run", content(), needed_bytes=1 << 60)
    assert not list(tmp_path.iterdir())


def test_a_good_checkpoint_of_the_same_step_stays(tmp_path: Path) -> None:
    files.publish(tmp_path, 1, "run", content(b"first"))
    files.publish(tmp_path, 1, "run", content(b"second"))
    assert (tmp_path / "step-000000001" / "model.safetensors").read_bytes() == b"first"


def test_a_bad_one_is_put_aside_and_replaced(tmp_path: Path) -> None:
    path = files.publish(tmp_path, 1, "run", content(b"first"))
    (path / "model.safetensors").write_bytes(b"spoil")
    files.publish(tmp_path, 1, "run", content(b"second"))
    assert files.verify_folder(path) is None
    assert (tmp_path / "bad-step-000000001" / "model.safetensors").read_bytes() == b"spoil"


def test_a_newer_format_is_named_not_guessed(tmp_path: Path) -> None:
    path = files.publish(tmp_path, 1, "run", content())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    assert "newer version (schema 99" in str(files.verify_folder(path))


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(0, 60, 10):
        files.publish(tmp_path, step, "run", content())
    newest = tmp_path / "step-000000050"
    removed = files.prune(tmp_path, newest, keep_last=2, keep_every=20)
    assert [files.step_of(p) for p in removed] == [30, 10]
    assert [files.step_of(p) for p in files.list_checkpoints(tmp_path)] == [50, 40, 20, 0]
    files.prune(tmp_path, newest, keep_last=0, keep_every=None)
    assert [files.step_of(p) for p in files.list_checkpoints(tmp_path)] == [50]  # never the last one


def test_order_on_disk_is_files_then_manifest_then_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes a power cut harmless: every file is flushed before the folder gets its name."""
    done: list[str] = []
    sync_file, sync_directory, rename = files.sync_file, files.sync_directory, Path.rename

    def noted_file(file: Path) -> None:
        done.append(f"sync {file.name}")
        sync_file(file)

    def noted_directory(folder: Path) -> None:
        done.append(f"sync {'new folder' if folder.name.startswith('.writing') else 'parent'}")
        sync_directory(folder)

    def noted_rename(self: Path, target: Path) -> Path:
        done.append(f"rename to {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(files, "sync_file", noted_file)
    monkeypatch.setattr(files, "sync_directory", noted_directory)
    monkeypatch.setattr(Path, "rename", noted_rename)
    files.publish(tmp_path, 3, "run", content())
    assert done == [
        "sync model.safetensors",
        "sync state.json",
        "sync manifest.json",
        "sync new folder",
        "rename to step-000000003",
        "sync parent",
    ]


def test_pruning_never_removes_the_one_just_saved(tmp_path: Path) -> None:
    """Also when newer folders lie there, damaged, from before a resume."""
    for step in (0, 20, 30, 5):
        files.publish(tmp_path, step, "run", content())
    for step in (20, 30):
        (tmp_path / files.folder_name(step) / "state.json").write_text("damaged")
    files.prune(tmp_path, tmp_path / "step-000000005", keep_last=2, keep_every=30)
    assert files.newest_good(tmp_path)[0] == tmp_path / "step-000000005"
    assert (tmp_path / "step-000000000").exists()


@pytest.mark.parametrize("listed", [{}, ["a"], {"model.safetensors": 1}, {"state.json": {}}, None, "x"])
def test_an_odd_manifest_is_a_bad_checkpoint_not_a_crash(tmp_path: Path, listed: object) -> None:
    good, odd = files.publish(tmp_path, 1, "run", content()), files.publish(tmp_path, 2, "run", content())
    manifest = json.loads((odd / "manifest.json").read_text())
    (odd / "manifest.json").write_text(json.dumps({**manifest, "files": listed}))
    found, skipped = files.newest_good(tmp_path)
    assert found == good
    assert [path for path, _ in skipped] == [odd]


@pytest.mark.parametrize("state", ['{"step": 1, "run_id": "run"}', '{"step": 2}', "[]", "nonsense"])
def test_a_state_of_another_step_is_a_bad_checkpoint(tmp_path: Path, state: str) -> None:
    path = files.publish(tmp_path, 2, "run", content())
    (path / "state.json").write_text(state)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(state), "sha256": files.sha256(path / "state.json")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert files.verify_folder(path) is not None


def test_each_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are gigabytes: a resume reads them once to trust them."""
    path, hashed, real = files.publish(tmp_path, 1, "run", content()), [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda file: hashed.append(file.name) or real(file))
    assert files.verify_folder(path) is None
    assert sorted(hashed) == ["model.safetensors", "state.json"]


def test_steps_that_were_asked_for_are_neither_removed_nor_counted_as_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 4):
        files.publish(tmp_path, step, "run", content())
    newest = tmp_path / "step-000000004"
    each = sum(file.stat().st_size for file in newest.iterdir())
    nothing_free = SimpleNamespace(free=files.SAFETY_BYTES)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: nothing_free)
    room = [files.room_for(tmp_path, count * each, newest, keep_at=[2]) for count in (2, 3)]
    assert (room, files.room_for(tmp_path, 3 * each, newest)) == ([True, False], True)
    removed = files.prune(tmp_path, newest, 1, None, keep_at=[2])
    assert [path.name[-1] for path in removed] == ["3", "1"]
    assert [path.name[-1] for path in files.list_checkpoints(tmp_path)] == ["4", "2"]
