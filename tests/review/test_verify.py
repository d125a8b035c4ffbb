"""Every check of `x1 verify`: seen to pass on a sound run, seen to fail for its own defect and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.records import builder

from x1_pretrain.command import run as run_app
from x1_pretrain.money.clock import Clock
from x1_pretrain.money.ledger import Ledger
from x1_pretrain.records.data_order import order_of
from x1_pretrain.records.export_folder import export as write_export
from x1_pretrain.records.mirror_state import MirrorState, write_state
from x1_pretrain.records.run_folder import open_run
from x1_pretrain.review.command import FAILED, NOT_APPLICABLE, PASSED, Check, app, verify
from x1_pretrain.review.rows import blocks_in_order

MANIFEST, CONFIG, READABLE = "manifest complete", "config is the recorded one", "records readable"
STEPS, SESSIONS, LOSS = "no gap or overlap in steps", "sessions agree with events", "final loss in the band"
BLOCKS = "blocks read in order"
CHECKPOINTS, WEIGHTS, CEILING = "checkpoints verify", "final weights sound", "below the ceiling"
EXPORT = "export equals the final checkpoint"
EVERY, RELOAD, GONE = "every step on record", "final weights reload byte for byte", "machine confirmed gone"
POSTMORTEM, MIRROR = "post-mortem written", "nothing left to mirror"


def results(folder: Path, export: Path | None = None) -> dict[str, tuple[str, str]]:
    return {check.name: (check.result, check.evidence) for check in verify(open_run(folder), export)}


def failed(folder: Path, export: Path | None = None) -> dict[str, str]:
    return {
        name: evidence for name, (result, evidence) in results(folder, export).items() if result == "failed"
    }


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return builder.build_run(tmp_path / "tiny", verify__loss_band=[2.0, 2.5])


def unreadable_rows(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()


def test_a_sound_finished_run_passes_all(folder: Path) -> None:
    found = results(folder)
    assert {name for name, (result, _) in found.items() if result != "passed"} == {
        *(EXPORT, BLOCKS, CEILING),
        *(EVERY, POSTMORTEM, GONE, MIRROR),
    }
    assert "val/loss 2.1214 at step 42" in found[LOSS][1]
    assert "resumed from step 20" in found[SESSIONS][1]


def rent(folder: Path, spent: str, gone: bool) -> None:
    ledger = Ledger(folder / "ledger.jsonl", Clock())
    ledger.append("ceiling", ceiling_usd="35")
    ledger.append("intent", tag="x1-a", provider="runpod", usd_per_hr="1.19")
    ledger.append("launched", tag="x1-a", machine_id="pod-7")
    ledger.append("reading", spent_usd=spent)
    if gone:
        ledger.append("terminate_confirmed", tag="x1-a", machine_id="pod-7")


@pytest.mark.parametrize(("spent", "said"), [("34.99", None), ("35.01", "$35.01 spent, above")])
def test_a_run_with_a_ceiling_kept_it(spent: str, said: str | None, folder: Path) -> None:
    rent(folder, spent, gone=True)
    result, evidence = results(folder)[CEILING]
    assert result == ("passed" if said is None else "failed")
    assert said is None or said in evidence


def test_no_machine_is_left_behind(folder: Path) -> None:
    rent(folder, "20", gone=False)
    assert set(failed(folder)) == {GONE}
    assert "pod-7 at runpod was not seen to end" in failed(folder)[GONE]
    row = {"event": "terminate_confirmed", "tag": "x1-a", "machine_id": "pod-7"}
    with (folder / "ledger.jsonl").open("a") as stream:
        stream.write(json.dumps({"seq": 9, "time_utc": "2026-11-21T12:00:00Z"} | row) + "\n")
    (folder / "termination.json").write_text("{}")
    result, evidence = results(folder)[GONE]
    assert result == "passed"
    assert "pod-7 at runpod on 2026-11-21T12:00:00Z; proof in termination.json" in evidence


def test_a_launch_that_made_no_machine_left_none(folder: Path) -> None:
    ledger = Ledger(folder / "ledger.jsonl", Clock())
    ledger.append("intent", tag="x1-a", provider="runpod", usd_per_hr="1.19")
    ledger.append("launch_failed", tag="x1-a")
    assert results(folder)[GONE][0] == "not applicable"


def mirror(folder: Path, **changes: Any) -> None:
    """What the mirror's process wrote last: by default that it has all."""
    told = {"uri": "/disk/runs", "label": "/disk/runs/tiny", "name": "tiny", "folder": "ab12", "epoch": 2}
    told |= {"state": "released", "why": "finished", "mirrored": [20, 42]}
    write_state(folder, MirrorState(**(told | changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"state": "writing"}, None),  # its machine died after all was sent
        ({"lag_bytes": 700, "lag_s": 9.0}, "700 bytes are not mirrored: `x1 push"),
        ({"mirrored": [0, 20]}, "step-000000042 is not mirrored: `x1 push"),
        ({"mirrored": [], "trouble": "403"}, "step-000000042 is not mirrored (403): `x1 push"),
        ({"state": "lost", "why": "host b has it"}, "another writer has the run: host b has it"),
    ],
)
def test_a_run_with_a_mirror_has_nothing_left_to_send(
    folder: Path, changes: dict[str, Any], said: str | None
) -> None:
    mirror(folder, **changes)
    result, evidence = results(folder)[MIRROR]
    assert result == ("passed" if said is None else "failed")
    assert (said or "/disk/runs/tiny has all of it, as epoch 2") in evidence
    assert set(failed(folder)) == ({MIRROR} if said else set())


def test_a_run_that_goes_on_may_be_behind(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny", steps=30)
    mirror(folder, state="writing", mirrored=[20], lag_s=12.0, lag_bytes=700)
    assert results(folder)[MIRROR][0] == "not applicable"
    assert "behind by 12 s, 700 bytes" in results(folder)[MIRROR][1]
    mirror(folder, state="released", mirrored=[20, 30], lag_bytes=700)  # nobody sends it by itself
    assert set(failed(folder)) == {MIRROR}


def test_a_mirrors_word_that_cant_be_read_is_no_proof(folder: Path) -> None:
    (folder / "mirror.json").write_text('{"schema_version": 1}')
    assert failed(folder) == {MIRROR: f"{folder / 'mirror.json'} can't be read"}
    mirror(folder)
    edit_json(folder / "mirror.json", lambda m: m.update(schema_version=99))
    assert "schema version 99" in failed(folder)[MIRROR]


def test_an_unfinished_run_is_not_a_failed_one(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "tiny", steps=30, verify__loss_band=[0.1, 0.2])
    assert failed(folder) == {}
    assert results(folder)[LOSS] == ("not applicable", "not finished: step 30 of 42")


def test_without_a_band_the_final_loss_is_not_judged(tmp_path: Path) -> None:
    assert results(builder.build_run(tmp_path / "tiny"))[LOSS][0] == "not applicable"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("hardware"), "hardware is missing"),
        (lambda m: m["versions"].pop("flash_attn"), "versions.flash_attn is missing"),
        (lambda m: m["hardware"].pop("ram_gib"), "hardware.ram_gib is missing"),
        (lambda m: m["hardware"].update(device="NVIDIA A100"), "hardware.gpu_memory_gib is missing"),
        (lambda m: m["data"][0].pop("train_tokens"), "data[0].train_tokens is missing"),
        (lambda m: m.update(precision=None), "precision is null"),
    ],
)
def test_a_key_missing_from_the_manifest_is_named(
    folder: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    edit_json(folder / "manifest.json", change)
    found = failed(folder)
    assert set(found) == {MANIFEST}
    assert said in found[MANIFEST]


def test_a_config_edited_after_the_run_does_not_match_its_hash(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("lr: 0.0003", "lr: 0.0004"))
    assert set(failed(folder)) == {CONFIG}


def test_other_data_than_recorded_does_not_match_the_hash(folder: Path) -> None:
    edit_json(folder / "manifest.json", lambda m: m["data"][0].update(fingerprint="0" * 64))
    assert set(failed(folder)) == {CONFIG}


def test_a_harmless_field_may_change(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("keep_last: 2", "keep_last: 5"))
    assert failed(folder) == {}


def test_another_seed_in_the_manifest_is_said(folder: Path) -> None:
    edit_json(folder / "manifest.json", lambda m: m.update(seed=7))
    assert "seed: manifest.json says 7, config.yaml 42" in failed(folder)[CONFIG]


def test_a_damaged_line_is_named_and_a_torn_last_one_is_not_damage(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 4')
    assert failed(folder) == {}
    assert "torn last line" in results(folder)[READABLE][1]
    with (folder / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\n{"no": "step"}\n')
    assert "line 13 is not a JSON object" in failed(folder)[READABLE]
    assert "1 row(s) without a step" in failed(folder)[READABLE]


def change_rows(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = builder.read_lines(folder / "metrics.jsonl")
    change(rows)
    builder.write_lines(folder / "metrics.jsonl", rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.pop(1), "no training row for step 10"),
        (lambda rows: rows.insert(2, rows[1]), "2 training rows for step 10"),
        (lambda rows: rows.insert(5, rows[4]), "2 evaluation rows for step 20"),
        (lambda rows: rows[0].update(tokens=321), "step 5 says 321 tokens, x 64 it is 320"),
        (lambda rows: rows[-2].pop("train/loss"), "no training row for step 42"),
    ],
)
def test_a_gap_an_overlap_and_a_wrong_count_are_seen(
    folder: Path, change: Callable[[list[dict[str, Any]]], Any], said: str
) -> None:
    change_rows(folder, change)
    found = failed(folder)
    assert set(found) == {STEPS}
    assert said in found[STEPS]


def test_rows_out_of_order_are_seen(folder: Path) -> None:
    change_rows(folder, lambda rows: rows.reverse())
    assert "step 40 comes after step 42" in failed(folder)[STEPS]


def test_another_log_interval_in_an_earlier_session_is_no_gap(folder: Path) -> None:
    change_rows(folder, lambda rows: [rows.remove(r) for r in list(rows) if r["step"] in (5, 15)])
    assert set(failed(folder)) == {STEPS}
    events = builder.read_lines(folder / "events.jsonl")
    events[0]["log_every"] = 10
    builder.write_lines(folder / "events.jsonl", events)
    assert failed(folder) == {}


def change_events(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    events = builder.read_lines(folder / "events.jsonl")
    change(events)
    builder.write_lines(folder / "events.jsonl", events)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda events: events.pop(0), "no start event"),
        (lambda events: events.pop(2), "of session 2, which events.jsonl never opened"),
        (
            lambda events: events[2].update(step=30),
            "step 25 is of session 2, which covers the steps 30 to the end",
        ),
        (lambda events: events[2].update(step=10), "step 15 is of session 1, which covers the steps 0 to 10"),
        (lambda events: events[2].update(session=1), "session 1 is opened after session 1"),
        (lambda events: events.pop(), "no finish event"),
    ],
)
def test_sessions_that_contradict_the_events_are_seen(
    folder: Path, change: Callable[[list[dict[str, Any]]], Any], said: str
) -> None:
    change_events(folder, change)
    found = failed(folder)
    assert set(found) == {SESSIONS}
    assert said in found[SESSIONS]


def test_training_time_never_runs_backward(folder: Path) -> None:
    change_rows(folder, lambda rows: rows[6].update(elapsed_s=0.0))
    assert "time runs backward" in failed(folder)[SESSIONS]


@pytest.mark.parametrize(("band", "passes"), [([2.0, 2.2], True), ([2.2, 2.5], False), ([1.0, 2.1], False)])
def test_the_final_validation_loss_is_held_against_the_band(
    tmp_path: Path, band: list[float], passes: bool
) -> None:
    folder = builder.build_run(tmp_path / "tiny", verify__loss_band=band)  # ends at 2 + 3/42 + 0.05 = 2.1214
    assert set(failed(folder)) == (set() if passes else {LOSS})


def test_a_nan_loss_is_outside_any_band(folder: Path) -> None:
    change_rows(folder, lambda rows: rows[-1].update({"val/loss": "nan"}))
    assert set(failed(folder)) == {LOSS}


def test_an_old_evaluation_does_not_stand_for_the_final_one(folder: Path) -> None:
    change_rows(folder, lambda rows: rows.pop())
    assert "last evaluation is of step 40, the run ended at 42" in failed(folder)[LOSS]


def test_one_flipped_byte_in_any_checkpoint_is_found(folder: Path) -> None:
    file = folder / "checkpoints" / "step-000000020" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = failed(folder)
    assert set(found) == {CHECKPOINTS}
    assert "step-000000020: model.safetensors does not match its hash" in found[CHECKPOINTS]


def test_a_finished_run_must_have_its_last_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints" / "step-000000042")
    assert "no checkpoint of step 42" in failed(folder)[CHECKPOINTS]


def test_a_checkpoint_of_another_run_is_a_stranger(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints" / "step-000000020")
    builder.build_checkpoint(folder, 20, run_id="other")
    assert "its run_id is other" in failed(folder)[CHECKPOINTS]


def test_sealed_but_bad_weights_are_found(folder: Path) -> None:
    weights = builder.build_weights(42)
    weights["model.norm.weight"][0] = np.nan
    shutil.rmtree(folder / "checkpoints" / "step-000000042")
    builder.build_checkpoint(folder, 42, weights=weights)
    found = failed(folder)
    assert set(found) == {WEIGHTS}  # they reload as they are, bad as they are
    assert "step-000000042: model.norm.weight holds values that are not finite" in found[WEIGHTS]


def exported(folder: Path, output: Path) -> Path:
    from x1_pretrain.export_run import from_folder

    write_export(from_folder(open_run(folder)), output)
    return output


def test_an_export_passes_until_a_byte_of_it_changes(folder: Path, tmp_path: Path) -> None:
    output = exported(folder, tmp_path / "out")
    assert results(folder, output)[EXPORT][0] == "passed"
    with (output / "final.safetensors").open("ab") as stream:
        stream.write(b"\0")
    assert "final.safetensors differs from step-000000042/model.safetensors" in failed(folder, output)[EXPORT]


def test_an_export_of_an_older_checkpoint_is_not_equal(folder: Path, tmp_path: Path) -> None:
    output = exported(folder, tmp_path / "out")
    shutil.copy(folder / "checkpoints" / "step-000000020" / "model.safetensors", output / "final.safetensors")
    assert "final.safetensors differs" in failed(folder, output)[EXPORT]


def test_an_exported_file_edited_later_does_not_match_its_hash(folder: Path, tmp_path: Path) -> None:
    output = exported(folder, tmp_path / "out")
    text = (output / "metrics.csv").read_text()
    (output / "metrics.csv").write_text(text.replace("2.1", "1.9"))
    assert failed(folder, output) == {EXPORT: "metrics.csv does not match its hash"}


def test_a_missing_exported_file_and_a_folder_that_is_no_export_are_said(
    folder: Path, tmp_path: Path
) -> None:
    output = exported(folder, tmp_path / "out")
    (output / "metrics.csv").unlink()
    assert "metrics.csv is in its manifest but not there" in failed(folder, output)[EXPORT]
    assert "is not an export" in failed(folder, tmp_path)[EXPORT]


def test_the_command_exits_0_or_1_and_prints_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, [str(folder)]) == 0
    assert "9 passed, 0 failed, 7 not applicable" in capsys.readouterr().out
    change_rows(folder, lambda rows: rows.pop(1))
    assert run_app(app, [str(folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["good"] is False
    assert [check["name"] for check in told["checks"] if check["result"] == "failed"] == [STEPS]


def test_the_command_says_in_one_line_that_there_is_no_such_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["no-such-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_blocks_that_are_not_those_of_the_order_are_found(tmp_path: Path) -> None:
    folder = builder.build_run(tmp_path / "run")
    run = open_run(folder)
    order = order_of(run)
    rows = [{"step": s, "ranks": 1, "blocks": [list(d) for d in order.step_blocks(s - 1)]} for s in (1, 2, 3)]
    file = folder / "blocks.jsonl"

    def result() -> Check:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return blocks_in_order(run)

    assert blocks_in_order(run).result == NOT_APPLICABLE
    assert result().result == PASSED
    rows[1]["blocks"][0][2] += 1
    assert "step 2 read other blocks" in result().evidence
    rows[1]["blocks"][0][2] -= 1
    rows.append(rows[-1])
    assert result().result == FAILED


def odd_blocks(row: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: builder.write_lines(folder / "blocks.jsonl", [row])


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda f: change_events(f, lambda events: events[0].update(log_every=0)), {STEPS}),
        (lambda f: change_events(f, lambda events: events[0].update(log_every="a")), {STEPS}),
        (lambda f: change_rows(f, lambda rows: rows[3].update(elapsed_s=None)), {SESSIONS}),
        (odd_blocks({"step": 999, "ranks": 1, "blocks": []}), {BLOCKS}),
        (odd_blocks({"step": 1, "ranks": 0, "blocks": []}), {BLOCKS}),
        (
            lambda f: edit_json(f / "manifest.json", lambda m: m.update(data=[{"name": 1}])),
            {MANIFEST, CONFIG},
        ),
        (lambda f: edit_json(f / "manifest.json", lambda m: m.update(data=None)), {MANIFEST, CONFIG}),
        (lambda f: edit_json(f / "manifest.json", lambda m: m.update(data=5)), {MANIFEST, CONFIG}),
        (unreadable_rows, {READABLE, STEPS, SESSIONS, LOSS, CHECKPOINTS}),
    ],
)
def test_odd_records_fail_their_check_in_one_line(
    folder: Path, damage: Callable[[Path], None], names: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    found = failed(folder)
    assert set(found) == names
    assert all(evidence and "\n" not in evidence for evidence in found.values())
    assert run_app(app, [str(folder)]) == 1
    assert f"{len(names)} failed" in capsys.readouterr().out
