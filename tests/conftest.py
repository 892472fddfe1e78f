"""The two real models, fetched once through the catalogue."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgellama import catalog
from edgellama.errors import DownloadError

DATA = Path(__file__).parent / "data"


def _model(name: str) -> Path:
    try:
        return catalog.resolve(name)
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name} could not be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _model("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return _model("gemma3-270m")
