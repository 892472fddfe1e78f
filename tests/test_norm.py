"""Normalisation against NumPy: whole rows with columns of padding, and heads with weights of their own."""

from __future__ import annotations

import numpy as np
import pytest

from edgellama.kernels import layout, targets, team
from edgellama.kernels.blocks import padded
from edgellama.runtime.engine import load_pack

EPS = 1e-3


def normalised(kind: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Over the last axis of (T, groups, width), in f64."""
    x = x.astype(np.float64)
    if kind == "layer_norm":
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight + bias


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize(("n_groups", "width"), [(1, 33), (1, 64), (1, 100), (4, 8), (3, 40)])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norm_matches_numpy(kind, n_groups, width, offset):
    """Also of rows far from 0, where the difference of two squares would lose everything."""
    rng = np.random.default_rng(1)
    n_tokens, n_cols = 5, padded(n_groups * width)
    per_group = n_groups if kind == "layer_norm" else 1
    weight = rng.standard_normal((per_group, width)).astype(np.float32)
    bias = rng.standard_normal(width).astype(np.float32) * (kind == "layer_norm")
    x = np.zeros((n_tokens, n_cols), np.float32)
    x[:, : n_groups * width] = rng.standard_normal((n_tokens, n_groups * width)) + offset
    out = np.zeros_like(x)
    i8 = np.zeros((n_tokens, n_cols // 32 * layout.I8_NBYTES), np.uint8)
    room = {"weight": np.zeros(n_cols, np.float32), "bias": np.zeros(n_cols, np.float32)}
    room["weight"][: weight.size], room["bias"][:width] = weight.reshape(-1), bias
    arguments = {
        "out": out.ctypes.data, "out_stride": n_cols * 4, "i8": i8.ctypes.data,
        "i8_stride": i8.shape[1], "i16": 0, "i16_stride": 0, "x": x.ctypes.data,
        "x_stride": n_cols * 4, "n_groups": n_groups, "width": width, "eps": EPS,
        "weight": room["weight"].ctypes.data,
    }  # fmt: skip
    if kind == "layer_norm":
        arguments |= {"weight_stride": width * 4, "bias": room["bias"].ctypes.data}
    else:
        arguments["add"] = 0
    pack = load_pack([f"norm.{kind}", *team.NAMES], targets.detect())
    table = np.zeros((1, layout.RECORD_NBYTES // 8), np.int64)
    team.fill_record(table[0], pack[f"norm.{kind}"], arguments, tokens=2)
    step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
    step[layout.STEP_N_TOKENS // 8] = n_tokens
    threads = team.Team(pack, 2, 4096)
    threads.use(table)
    threads.run(step, 0, 1)
    threads.close()
    rows = x[:, : n_groups * width].reshape(n_tokens, n_groups, width)
    expected = normalised(kind, rows, weight, bias).reshape(n_tokens, -1)
    error = np.abs(out[:, : n_groups * width] - expected).max()
    assert error < 1e-5 * (1 + offset) * np.abs(weight).max()
    assert not out[:, n_groups * width :].any()
    assert i8.any()
