"""The file of settings: only what it is for, and never over a person's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.doctor import nccl_env
from x1_pretrain.errors import UserError

KEYS = st.from_regex(r"\A(NCCL|GLOO)_[A-Z0-9_]{1,20}\Z")
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=50)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str]) -> None:
    file = tmp_path_factory.mktemp("env") / "x1-nccl.env"
    nccl_env.write(file, settings, ["tried on a day", "two\nlines"])
    assert nccl_env.read(file) == settings


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("PATH=/bin", "'PATH=/bin'"),
        ("LD_PRELOAD=x.so", "LD_PRELOAD"),
        ("export NCCL_NET=Socket", "export"),
        ("NCCL_NET", "KEY=VALUE"),
        ("NCCL_NET=", "1 to 200 characters"),
        ("NCCL_NET=a b", "no spaces"),
        ("nccl_net=Socket", "NCCL_"),
        ("NCCL_NET=" + "x" * 201, "1 to 200"),
        ("NCCL_NET=Sock\u00e9t", "NCCL_NET"),
    ],
)
def test_a_line_that_is_no_setting_is_named(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "x1-nccl.env"
    file.write_text(f"# a comment\n\nNCCL_IB_DISABLE=1\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        nccl_env.read(file)
    assert f"{file}:4" in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_twice_a_missing_file_and_bytes_are_each_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x1-nccl.env"
    with pytest.raises(UserError, match="can't be read"):
        nccl_env.read(file)
    file.write_bytes(b"NCCL_NET=\xff\n")
    with pytest.raises(UserError, match="not a text file"):
        nccl_env.read(file)
    file.write_text("NCCL_NET=Socket\nNCCL_NET=IB\n")
    with pytest.raises(UserError, match="given twice"):
        nccl_env.read(file)
    file.write_text("# x\n" * 10_000)
    with pytest.raises(UserError, match="KiB"):
        nccl_env.read(file)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    assert nccl_env.pick_up(config, {}) == {}
    nccl_env.write(tmp_path / "x1-nccl.env", {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}, [])
    environment = {"NCCL_NET": "IB", "HOME": "/h"}
    assert nccl_env.pick_up(config, environment) == {"NCCL_IB_DISABLE": "1"}
    assert environment == {"NCCL_NET": "IB", "HOME": "/h", "NCCL_IB_DISABLE": "1"}


def test_a_file_by_a_person_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "x1-nccl.env"
    file.write_text("NCCL_NET=mine\n")
    with pytest.raises(UserError, match="left alone"):
        nccl_env.write(file, {"NCCL_NET": "Socket"}, [])
    assert file.read_text() == "NCCL_NET=mine\n"
    with pytest.raises(UserError, match="can't be written"):
        nccl_env.write(tmp_path / "nowhere" / "x1-nccl.env", {}, [])


def test_our_own_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "x1-nccl.env"
    nccl_env.write(file, {"NCCL_NET": "Socket"}, ["first"])
    nccl_env.write(file, {"NCCL_P2P_DISABLE": "1"}, ["second"])
    assert nccl_env.read(file) == {"NCCL_P2P_DISABLE": "1"}
    assert "second" in file.read_text()
