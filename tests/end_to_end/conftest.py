"""What the checks of whole runs share: the run that nothing happens to, and a bucket."""

from pathlib import Path

import pytest
from tests.end_to_end.processes import Training
from tests.mirror.conftest import s3, s3_server

__all__ = ["s3", "s3_server"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config: Path, corpus: Path) -> Path:
    """Of the file's `config`."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    code, output = Training("--config", config, "--data-dir", corpus, "--run-dir", run).end()
    assert code == 0, output
    return run
