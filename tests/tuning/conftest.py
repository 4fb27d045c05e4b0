"""A corpus for all tests of sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small prepared dataset."""
    return make_corpus(tmp_path_factory.mktemp("tuning"))
