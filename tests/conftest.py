"""What tests share: where the optional real material lies, and a tiny corpus made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.corpora import write_corpus

pytest_plugins = ["tests.stores.servers"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits

BUSY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # a busy machine fails no test
settings.register_profile("x1", derandomize=True, **BUSY)
settings.register_profile("explore", max_examples=1000, **BUSY)  # by hand: --hypothesis-profile explore
settings.load_profile("x1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real texts, vocabularies and tasks beside the checkout; tests that use them skip without."""
    folder = Path(os.environ.get("X1_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (real material is optional)")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
