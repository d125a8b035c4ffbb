from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x1_pretrain.errors import RefusedError, UserError
from x1_pretrain.money.ledger import find_ledger
from x1_pretrain.records.run_folder import find_run
from x1_pretrain.stores.address import (
    Address,
    is_uri,
    parse,
    refuse_overlap,
    refuse_uri,
    run_address,
    same_disk,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://bucket/runs", Address("s3", "bucket", "runs")),
        ("s3://bucket/runs/", Address("s3", "bucket", "runs")),
        ("  s3://my.bucket-1  ", Address("s3", "my.bucket-1", "")),
        ("s3://bucket/a/b c/d=1", Address("s3", "bucket", "a/b c/d=1")),
        ("gs://a_bucket/x", Address("gs", "a_bucket", "x")),
        ("az://container/x/y", Address("az", "container", "x/y")),
        ("hf://user/repo", Address("hf", "user/repo", "")),
        ("hf://user/repo/runs/a", Address("hf", "user/repo", "runs/a")),
        ("hf://datasets/user/repo/runs", Address("hf", "datasets/user/repo", "runs")),
        ("/mnt/disk2/runs/", Address("file", "", "/mnt/disk2/runs")),
        ("file:///mnt/disk2", Address("file", "", "/mnt/disk2")),
        ("file:/mnt/disk2", Address("file", "", "/mnt/disk2")),
        ("file://localhost/mnt", Address("file", "", "/mnt")),
        ("/a/./b/../c", Address("file", "", "/a/c")),
        ("/a:b/c", Address("file", "", "/a:b/c")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse(text) == address
    assert parse(str(address)) == address


def test_paths_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert parse("~/runs").prefix == f"{tmp_path}/runs"
    for text in ("runs/x", "./runs/x", "runs//x"):
        assert parse(text).prefix == f"{tmp_path}/runs/x"
    with pytest.raises(UserError, match="no home folder of that user"):
        parse("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty address"),
        ("s3:/bucket/x", r"did you mean s3://bucket/x\?"),
        ("s3:bucket/x", r"did you mean s3://bucket/x\?"),
        ("s3//bucket/x", r"did you mean s3://bucket/x\?"),
        ("s3:///bucket/x", r"did you mean s3://bucket/x\?"),
        ("S3://bucket/x", r"did you mean s3://bucket/x\?"),
        ("s4://bucket/x", r"did you mean s3://bucket/x\?"),
        ("gcs://bucket/x", r"did you mean gs://bucket/x\?"),
        ("abfss://container/x", r"did you mean az://container/x\?"),
        ("huggingface://u/r", r"did you mean hf://u/r\?"),
        ("r2://bucket/x", "s3://bucket/x, with the server's address as mirror.endpoint"),
        ("https://bucket.s3.amazonaws.com/x", "a web address; expected s3://BUCKET/FOLDER"),
        ("quux://bucket/x", "'quux' is no store that x1 knows; expected s3://"),
        ("s3://", "'' is no name of a bucket"),
        ("s3://b/x", "'b' is no name of a bucket there; expected 3 to 63"),
        ("s3://My_Bucket/x", "'My_Bucket' is no name of a bucket"),
        ("s3://bucket//x", "'' is no part of a key"),
        ("s3://bucket/../x", "'..' is no part of a key"),
        ("s3://bucket/a%20b", "'a%20b' is no part of a key"),
        ("s3://bucket/a\nb", "characters that no address has"),
        ("hf://user", "expected USER/REPOSITORY"),
        ("hf://spaces/user/repo", "expected USER/REPOSITORY"),
        ("hf://datasets/user", "expected USER/REPOSITORY"),
        ("file://mnt/x", "expected three slashes and a whole path, like file:///mnt/x, or just /mnt/x"),
        ("file://", "expected three slashes"),
        ("/a\0b", "characters that no address has"),
    ],
)
def test_typos_are_named(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAKEY:hunter2secret@bucket/x",
        "https://user:hunter2secret@host/x",
        "S3://user:hunter2secret@bucket/x",
        "quux://user:hunter2secret@bucket/x",
        "s3://bucket/x?X-Amz-Signature=hunter2secret",
        "https://host/x?sig=hunter2secret",
        "az://container/x?sv=1&sig=hunter2secret",
        "s3:/user:hunter2secret@bucket/x",
        "s3//user:hunter2secret@bucket/x",
        "gs://bucket/x#hunter2secret",
    ],
)
def test_no_secret_is_repeated(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert "hunter2" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_one_line(text: str) -> None:
    try:
        address = parse(text)
    except UserError as error:
        said = str(error)
    else:
        said = "fine"
        assert parse(str(address)) == address
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "mirror", "name"),
    [
        ("s3://bucket/runs/x1-50m", "s3://bucket/runs", "x1-50m"),
        ("s3://bucket/x1-50m/", "s3://bucket", "x1-50m"),
        ("hf://user/repo/x1", "hf://user/repo", "x1"),
        ("hf://datasets/user/repo/a/x1", "hf://datasets/user/repo/a", "x1"),
        ("/mnt/disk/x1", "/mnt/disk", "x1"),
        ("/x1", "/", "x1"),
    ],
)
def test_the_address_of_a_run(text: str, mirror: str, name: str) -> None:
    address, found = run_address(text)
    assert (str(address), found) == (mirror, name)
    assert run_address(address.of_run(found)) == (address, found)


@pytest.mark.parametrize("text", ["s3://bucket", "hf://user/repo", "/", "s3://bucket/runs/a b", "/mnt/-x"])
def test_no_run_in_it(text: str) -> None:
    with pytest.raises(UserError, match=r"not a run in it|no name of a run"):
        run_address(text)


def test_a_mirror_in_the_run_folder_itself(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for mirror, run in [(runs, runs / "a"), (runs / "a/mirror", runs / "a"), (runs, runs / "a/deep")]:
        with pytest.raises(RefusedError, match="overlaps"):
            refuse_overlap(parse(str(mirror)), "a", run)
    refuse_overlap(parse(str(tmp_path / "copies")), "a", runs / "a")
    refuse_overlap(parse(str(runs)), "b", runs / "a")
    refuse_overlap(parse("s3://bucket/runs"), "a", runs / "a")


def test_the_same_link_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    with pytest.raises(RefusedError):
        refuse_overlap(parse(str(tmp_path / "link")), "a", tmp_path / "runs/a")


def test_whether_a_mirror_dies_with_the_disk(tmp_path: Path) -> None:
    assert same_disk(parse(str(tmp_path / "not/yet")), tmp_path / "runs/a")
    assert not same_disk(parse("/proc"), tmp_path)
    assert not same_disk(parse("s3://bucket"), tmp_path)


@pytest.mark.parametrize("scheme", ["s3", "s3a", "S3", "gs", "az", "hf", "r2"])
@pytest.mark.parametrize("sep", ["://", ":/"])
@pytest.mark.parametrize("at", ["@", "%40", ""])
def test_a_secret_with_a_slash_is_shown_to_nobody(scheme: str, sep: str, at: str) -> None:
    with pytest.raises(UserError) as told:
        parse(f"{scheme}{sep}AKIA:wJa/K7bP{at}bucket/runs")
    assert "wJa" not in str(told.value)
    assert "K7bP" not in str(told.value)
    assert "AKIA" not in str(told.value)


@pytest.mark.parametrize(
    "text", ["s3://bucket/runs/tiny", "s3:/bucket/runs/tiny", str(Path("s3://bucket/runs/tiny"))]
)
def test_a_command_that_reads_a_folder_names_those_that_take_an_address(text: str) -> None:
    """As it was typed, or as a `Path` leaves it."""
    for refused in (refuse_uri, find_run, lambda one: find_ledger(Path(one), "")):
        with pytest.raises(UserError) as caught:
            refused(text)
        assert "`x1 pull s3://bucket/runs/tiny`" in str(caught.value)
        assert "`x1 runs s3://bucket/runs/tiny`" in str(caught.value)
    with pytest.raises(UserError, match="did you mean s3://bucket/x"):
        refuse_uri("r2://bucket/x")


def test_a_path_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:/bb").mkdir(parents=True)
    for text in ("runs/tiny", "tiny", "/disk2/runs/tiny", "./a:b/c", "runs//old", "s3:/bb", ""):
        refuse_uri(text)
    assert [
        text for text in ("runs/tiny", "./a:b", "s3:/b", "s3//b", "S3://b", "http://b") if is_uri(text)
    ] == [
        "s3:/b",
        "s3//b",
        "S3://b",
        "http://b",
    ]
