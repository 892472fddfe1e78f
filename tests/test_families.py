"""Every family: a checkpoint is planned, written and run, and compared with its papers in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIGS, config_of, make_checkpoint, random_weights, write_gguf
from naive_hf import NaiveCheckpoint

from edgellama.convert.families import plan
from edgellama.gguf import open_gguf
from edgellama.models.config import read_config
from edgellama.runtime.engine import Engine

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 100)]


def open_engine(path, **options) -> Engine:
    defaults: dict[str, Any] = {"n_ctx": 1024, "n_threads": 2, "kv_type": "f32"}
    with open_gguf(path) as gguf:
        return Engine(gguf, read_config(gguf), **defaults | options)


def convert(path, family: str, n_rows: int = 1000):
    config = config_of(family)
    weights = random_weights(config)
    write_gguf(path, plan(make_checkpoint(config, weights)), n_rows)
    return NaiveCheckpoint(config, weights)


@pytest.mark.parametrize("family", CONFIGS)
def test_family_matches_its_papers(family, tmp_path):
    oracle = convert(tmp_path / "m.gguf", family)
    engine = open_engine(tmp_path / "m.gguf")
    logits = engine.logits(IDS)
    expected = oracle.logits(IDS)
    assert np.abs(logits - expected).max() < 3e-5 * np.abs(expected).max()
    engine.close()
