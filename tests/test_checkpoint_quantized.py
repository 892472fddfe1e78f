"""Weights that were quantized already: packed here as their writers pack them, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from make_checkpoint import safetensors

from edgellama.convert.checkpoint import Checkpoint, open_checkpoint
from edgellama.errors import ModelFileError, UnsupportedModelError

N_IN, N_OUT, GROUP = 64, 24, 16
RNG = np.random.default_rng(0)
SCALES = RNG.uniform(0.01, 1, (N_IN // GROUP, N_OUT)).astype(np.float16)


def a_folder(
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    how: dict[str, object] | None,
    dtypes: dict[str, str] | None = None,
    **files: dict[str, object],
) -> Path:
    config = {} if how is None else {"quantization_config": how}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(safetensors(tensors, dtypes))
    return tmp_path


def check_rows(checkpoint: Checkpoint, name: str, expected: np.ndarray) -> None:
    tensor = checkpoint.tensors[name]
    assert tensor.shape == expected.shape
    n = len(expected)
    for start, stop in ((0, None), (0, 0), (3, 4), (5, 14), (8, 16), (n - 1, n)):
        rows = tensor.read(start, stop)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows, expected[start:stop])


# --- GPTQ -----------------------------------------------------------------------------------------
def pack(numbers: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Put 32 / bits neighbours along an axis into a word, the first in the lowest bits."""
    n = 32 // bits
    moved = np.moveaxis(numbers, axis, -1).astype(np.uint64)
    words = sum(moved[..., i::n] << np.uint64(bits * i) for i in range(n))
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


def gptq(bits: int, group_of: np.ndarray, zeros: np.ndarray, *, less_one: bool):
    q = RNG.integers(0, 1 << bits, (N_IN, N_OUT))
    weight = (q - zeros[group_of]).astype(np.float32) * SCALES[group_of].astype(np.float32)
    qzeros = pack(zeros, bits, 1)
    if less_one:  # as the writers of today do: from the word, with borrow
        ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
        qzeros = (qzeros.view(np.uint32) - ones).view(np.int32)
    tensors = {
        "m.qweight": pack(q, bits, 0),
        "m.qzeros": qzeros,
        "m.scales": SCALES,
        "m.g_idx": group_of.astype(np.int32),
        "m.bias": np.ones(N_OUT, np.float16),
        "norm.weight": np.ones(N_IN, np.float16),
    }
    return tensors, weight.T


IN_ORDER = np.arange(N_IN) // GROUP
SHUFFLED = np.random.default_rng(1).permutation(IN_ORDER)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("format_", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("group_of", [IN_ORDER, SHUFFLED], ids=["in order", "act order"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(tmp_path, bits, format_, group_of, symmetric):
    shape = (N_IN // GROUP, N_OUT)
    zeros = np.full(shape, 1 << bits - 1) if symmetric else RNG.integers(0, 1 << bits, shape)
    tensors, weight = gptq(bits, group_of, zeros, less_one=format_ != "gptq_v2")
    how = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": format_}
    how = {key: value for key, value in how.items() if value is not None}
    with open_checkpoint(a_folder(tmp_path, tensors, how)) as checkpoint:
        assert set(checkpoint.tensors) == {"m.weight", "m.bias", "norm.weight"}
        assert checkpoint.tensors["m.weight"].dtype == f"I{bits}"
        check_rows(checkpoint, "m.weight", weight)


@pytest.mark.parametrize("g_idx", [None, np.zeros(N_IN, np.int32)], ids=["none", "zeros"])
def test_gptq_without_a_group_index(tmp_path, g_idx):
    tensors, weight = gptq(4, IN_ORDER, np.full(SCALES.shape, 8), less_one=True)
    del tensors["m.g_idx"]
    if g_idx is not None:
        tensors["m.g_idx"] = g_idx
    # Older folders say it in a file of its own.
    folder = a_folder(tmp_path, tensors, None, quantize_config={"bits": 4, "group_size": GROUP})
    check_rows(open_checkpoint(folder), "m.weight", weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m.scales": None}, "no scales beside it"),
        ({"m.qzeros": None}, "no qzeros beside it"),
        ({"m.scales": SCALES[:, :8]}, "do not fit"),
        ({"m.scales": SCALES[:3]}, "do not fit"),
        ({"m.qzeros": np.zeros((4, 2), np.int32)}, "do not fit"),
        ({"m.qzeros": np.zeros((4, 3), np.float32)}, "a matrix is needed"),
        ({"m.qweight": np.zeros(8, np.int32)}, "a matrix is needed"),
        ({"m.g_idx": np.zeros(8, np.int32)}, "do not fit"),
        ({"m.g_idx": np.zeros(N_IN, np.float32)}, "do not fit"),
        ({"m.weight": np.ones((2, 2), np.float32)}, "a weight and a qweight"),
        ({"m.g_idx": np.full(N_IN, 4, np.int32)}, "names groups 4 to 4; there are 4"),
        ({"m.g_idx": np.full(N_IN, -1, np.int32)}, "names groups -1 to -1"),
    ],
)
def test_gptq_that_does_not_fit(tmp_path, change, message):
    tensors, _ = gptq(4, IN_ORDER, np.full(SCALES.shape, 8), less_one=True)
    tensors = {name: array for name, array in (tensors | change).items() if array is not None}
    folder = a_folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(folder).tensors["m.weight"].read()


# --- AWQ ------------------------------------------------------------------------------------------
def pack_awq(numbers: np.ndarray) -> np.ndarray:
    """Put eight neighbours of a row into a word: 0 2 4 6 1 3 5 7, from the lowest bits up."""
    order = [8 * i + k for i in range(numbers.shape[1] // 8) for k in (0, 2, 4, 6, 1, 3, 5, 7)]
    return pack(numbers[:, order], 4, 1)


@pytest.mark.parametrize("older", [False, True])
def test_awq(tmp_path, older):
    q = RNG.integers(0, 16, (N_IN, N_OUT))
    zeros = RNG.integers(0, 16, SCALES.shape)
    weight = (q - zeros[IN_ORDER]).astype(np.float32) * SCALES[IN_ORDER].astype(np.float32)
    tensors = {"m.qweight": pack_awq(q), "m.qzeros": pack_awq(zeros), "m.scales": SCALES}
    how = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    if older:
        old = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
        folder = a_folder(tmp_path, tensors, None, quant_config=old)
    else:
        folder = a_folder(tmp_path, tensors, how)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == {"m.weight"}
        check_rows(checkpoint, "m.weight", weight.T)


# --- 8 bits with scales ---------------------------------------------------------------------------
CODES = RNG.integers(0, 0x70, (200, 300), dtype=np.uint8)


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, mantissa = codes >> 3, (codes & 7).astype(np.float64)
    normal = (8 + mantissa) * 2.0 ** (exponent.astype(int) - 10)
    return np.where(exponent > 0, normal, mantissa * 2.0**-9).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (1,), (200,), (200, 1), (2, 3)])
@pytest.mark.parametrize("name", ["m.weight_scale", "m.weight_scale_inv"])
def test_fp8(tmp_path, shape, name):
    scale = RNG.uniform(0.5, 2, shape).astype(np.float32)
    whole = scale
    if shape == (2, 3):
        whole = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:200, :300]
    elif shape == (200,):
        whole = scale[:, None]
    tensors = {"m.weight": CODES, name: scale, "m.input_scale": np.ones((), np.float32)}
    how = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with open_checkpoint(a_folder(tmp_path, tensors, how, {"m.weight": "F8_E4M3"})) as checkpoint:
        assert set(checkpoint.tensors) == {"m.weight"}
        assert checkpoint.tensors["m.weight"].dtype == "F8_E4M3"
        check_rows(checkpoint, "m.weight", e4m3(CODES) * whole)


def test_int8_a_row(tmp_path):
    q = RNG.integers(-127, 128, (20, 30), dtype=np.int8)
    scale = RNG.uniform(0.5, 2, (20, 1)).astype(np.float16)
    how = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    folder = a_folder(tmp_path, {"m.weight": q, "m.weight_scale": scale}, how)
    check_rows(open_checkpoint(folder), "m.weight", q.astype(np.float32) * scale.astype(np.float32))


def test_scales_without_a_word_in_the_configuration(tmp_path):
    tensors = {"m.weight": CODES, "m.weight_scale": np.float32([2.0]), "x.input_scale": CODES}
    checkpoint = open_checkpoint(a_folder(tmp_path, tensors, None, {"m.weight": "F8_E4M3"}))
    assert set(checkpoint.tensors) == {"m.weight", "x.input_scale"}
    check_rows(checkpoint, "m.weight", 2 * e4m3(CODES))


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({"m.weight_scale": np.ones((2, 2), np.float32)}, {}, "needs one scale, one a row, or"),
        ({"m.weight_scale": np.ones(7, np.float32)}, {}, "needs one scale, one a row, or"),
        ({}, {"weight_block_size": [0, 1]}, "weight_block_size must be two sizes"),
        ({}, {"weight_block_size": "x"}, "weight_block_size must be two sizes"),
        ({"m.weight_zero_point": np.ones(7, np.float32)}, {}, "without zero points"),
    ],
)
def test_scales_that_do_not_fit(tmp_path, change, how, message):
    tensors = {"m.weight": CODES, "m.weight_scale": np.ones((2, 3), np.float32)} | change
    folder = a_folder(tmp_path, tensors, {"quant_method": "fp8"} | how, {"m.weight": "F8_E4M3"})
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized with 'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "quantized with 'mxfp4'"),
        ({"bits": 4}, "quantized with NoneType"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"\('pack-quantized'\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"\('NVFP4'\)"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ weights of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": 1}}, "the same for all"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq"}, "AWQ weights of NoneType bits"),
    ],
)  # fmt: skip
def test_other_methods_are_named(tmp_path, how, message):
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(a_folder(tmp_path, {"m": SCALES}, how))


def test_a_configuration_that_is_none(tmp_path):
    folder = a_folder(tmp_path, {"m": SCALES}, None)
    (folder / "config.json").write_text('{"quantization_config": 3}')
    with pytest.raises(ModelFileError, match="quantization_config is 3"):
        open_checkpoint(folder)
