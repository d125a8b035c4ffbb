"""What the checks of whole runs share: the run that nothing happens to."""

from pathlib import Path

import pytest
from tests.end_to_end.processes import Training


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config: Path, corpus: Path) -> Path:
    """Of the file's `config`."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    code, output = Training("--config", config, "--data-dir", corpus, "--run-dir", run).end()
    assert code == 0, output
    return run
