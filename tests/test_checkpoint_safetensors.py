"""Safetensors: files of others, rows, and every way a file can lie."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from make_checkpoint import framed, safetensors

from edgellama.convert.checkpoint import open_checkpoint
from edgellama.convert.safetensors import read_safetensors
from edgellama.errors import ModelFileError, UnsupportedModelError

CASES = Path(__file__).parents[2] / "shared" / "data" / "safetensors_cases"
needs_cases = pytest.mark.skipif(not CASES.exists(), reason="needs ../shared/data")


def write(tmp_path: Path, data: bytes, name: str = "model.safetensors") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def a_file(tmp_path: Path, *entries: tuple[str, str, list[int], int, int], nbytes: int) -> Path:
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for name, dtype, shape, begin, end in entries
    }
    return write(tmp_path, framed(json.dumps(header).encode(), bytes(nbytes)))


@needs_cases
def test_the_cases_of_the_format():
    for case in json.loads((CASES / "index.json").read_text()):
        path = CASES / case["file"]
        if case["expect"] == "ok":
            for tensor in read_safetensors(path).values():
                assert tensor.read().shape == tensor.shape, path
        else:
            with pytest.raises(ModelFileError, match=path.name):
                read_safetensors(path)


def test_every_type_and_any_rows(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 5)).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -0.0
    arrays = {
        "f32": values,
        "f16": values.astype(np.float16),
        "f64": values.astype(np.float64),
        "bf16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "i32": rng.integers(-9, 9, (7, 5), dtype=np.int32),
        "i8": rng.integers(-9, 9, (7, 5), dtype=np.int8),
    }
    expected = {name: a.astype(np.float32) for name, a in arrays.items()}
    expected["bf16"] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    path = write(tmp_path, safetensors(arrays, {"bf16": "BF16"}, format="pt"))
    tensors = read_safetensors(path)
    assert set(tensors) == set(arrays)
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.nbytes) == ((7, 5), arrays[name].nbytes)
        for start, stop in ((0, None), (0, 0), (2, 5), (6, 7)):
            rows = tensor.read(start, stop)
            assert rows.dtype == np.float32
            assert rows.flags.c_contiguous
            np.testing.assert_array_equal(rows, expected[name][start:stop])
        with pytest.raises(ValueError, match="rows 5 to 8"):
            tensor.read(5, 8)


def test_eight_bit_floats(tmp_path):
    """Sign, exponent and mantissa, taken apart here and not by a table."""

    def value(code: int, exponent_bits: int, bias: int) -> float:
        mantissa_bits = 7 - exponent_bits
        sign = -1.0 if code & 128 else 1.0
        exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
        fraction = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
        if exponent_bits == 4 and code & 127 == 127:
            return np.nan
        if exponent_bits == 5 and exponent == 31:
            return np.nan if fraction else sign * np.inf
        return sign * (2.0 ** max(exponent - bias, 1 - bias) * (fraction + (exponent > 0)))

    codes = np.arange(256, dtype=np.uint8)
    path = write(tmp_path, safetensors({"a": codes, "b": codes}, {"a": "F8_E4M3", "b": "F8_E5M2"}))
    tensors = read_safetensors(path)
    np.testing.assert_array_equal(tensors["a"].read(), [value(c, 4, 7) for c in range(256)])
    np.testing.assert_array_equal(tensors["b"].read(), [value(c, 5, 15) for c in range(256)])


def test_scalars_and_nothing(tmp_path):
    arrays = {"one": np.array(3, np.float32), "none": np.zeros((3, 0, 2), np.float32)}
    tensors = read_safetensors(write(tmp_path, safetensors(arrays)))
    assert tensors["one"].read() == 3
    assert tensors["one"].read().shape == ()
    assert tensors["none"].read(1).shape == (2, 0, 2)
    assert read_safetensors(write(tmp_path, framed(b"{}"))) == {}


def test_rows_are_all_that_is_read(tmp_path):
    tensor = read_safetensors(
        write(tmp_path, safetensors({"big": np.zeros((1000, 5000), np.float32)}))
    )["big"]
    tracemalloc.start()
    tensor.read(10, 12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes"),
        (bytes(7), "has 7 bytes"),
        (framed(b"", b"", 1 << 63), "claims a header of 9223372036854775808 bytes"),
        (framed(b"{}", b"", 3), "claims a header of 3 bytes"),
        (framed(b'{"a":'), "not sound JSON"),
        (framed(b"[]"), "a JSON object is needed"),
        (framed(b'"abc"'), "a JSON object is needed"),
        (framed(b"\xff\xfe{}"), "not sound JSON"),
        (framed(b"[" * 200_000), "nested too deep"),
        (framed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deep"),
        (framed(b'{"a": NaN}'), "NaN is not JSON"),
        (framed(b'{"a": ' + b"9" * 5000 + b"}"), "not sound JSON"),
        (framed(b'{"a": 1}'), "needs dtype, shape and data_offsets"),
        (framed(b'{"a": {"dtype": "F32", "shape": [1]}}'), "needs dtype, shape and data_offsets"),
        (framed(b'{"__metadata__": {"a": 1}}'), "must map strings to strings"),
        (framed(b'{"__metadata__": []}'), "must map strings to strings"),
        (
            framed(
                b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, '
                b'"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
                b"x",
            ),
            "'a' appears twice",
        ),
    ],
    ids=range(17),
)
def test_bad_headers(tmp_path, data, message):
    with pytest.raises(ModelFileError, match=message) as caught:
        read_safetensors(write(tmp_path, data))
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "nbytes", "message"),
    [
        ([("a", "F32", [2], 0, 8), ("b", "F32", [2], 4, 12)], 12, "'b' begins at byte 4.* 8 was"),
        ([("a", "F32", [2], 0, 8), ("b", "F32", [2], 12, 20)], 20, "'b' begins at byte 12.* 8 was"),
        ([("a", "F32", [2], 4, 12)], 12, "begins at byte 4"),
        ([("a", "F32", [2], 0, 8)], 12, "has 12 bytes of data, its tensors 8"),
        ([("a", "F32", [2], 0, 8)], 7, "has 7 bytes of data, its tensors 8"),
        ([("a", "F32", [3], 0, 8)], 8, "needs 12"),
        ([("a", "F32", [1 << 62, 4], 0, 0)], 0, "no file could hold"),
        ([("a", "F32", [1 << 32, 1 << 32, 0], 0, 0)], 0, "no file could hold"),
        ([("a", "F32", [4194305, 4194305, 211106198978564], 0, 16)], 16, "no file could hold"),
        ([("a", "F32", [-1, -2], 0, 8)], 8, "no file could hold"),
        ([("a", "F32", [2.0], 0, 8)], 8, "no file could hold"),
        ([("a", "F32", [True, 2], 0, 8)], 8, "no file could hold"),
        ([("a", "F32", [1] * 33, 0, 4)], 4, "no file could hold"),
        ([("a", "F32", [2], 8, 0)], 8, "no sound data_offsets"),
        ([("a", "F32", [2], -8, 0)], 8, "no sound data_offsets"),
        ([("a", "F31", [2], 0, 8)], 8, "has type 'F31'"),
        ([("a", ["F32"], [2], 0, 8)], 8, "has type an array of 1"),
    ],
)
def test_bad_tensors(tmp_path, entries, nbytes, message):
    with pytest.raises(ModelFileError, match=message) as caught:
        read_safetensors(a_file(tmp_path, *entries, nbytes=nbytes))
    assert "\n" not in str(caught.value)


def test_types_that_are_not_read_are_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match="has type F4"):
        read_safetensors(a_file(tmp_path, ("a", "F4", [2], 0, 1), nbytes=1))


def test_every_truncation_is_noticed(tmp_path):
    data = safetensors({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float16)})
    for n in range(len(data)):
        with pytest.raises(ModelFileError):
            read_safetensors(write(tmp_path, data[:n]))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = write(tmp_path, safetensors({"a": np.ones((2, 3), np.float32)}))
    tensor = read_safetensors(path)["a"]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(ModelFileError, match="shrank"):
        tensor.read()


# --- shards ---------------------------------------------------------------------------------------
A, B = np.ones((2, 2), np.float32), np.full((3, 2), 2, np.float32)


def a_folder(tmp_path: Path, weight_map: object, **shards: dict[str, np.ndarray]) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    for name, tensors in shards.items():
        write(tmp_path, safetensors(tensors), f"{name}.safetensors")
    return tmp_path


def test_shards_are_one_model(tmp_path):
    folder = a_folder(
        tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": A}, two={"b": B}
    )
    for path in (folder, folder / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.kind == "huggingface"
            assert checkpoint.folder == folder
            assert checkpoint.config == {"model_type": "llama"}
            np.testing.assert_array_equal(checkpoint.tensors["b"].read(1, 3), B[1:])
            assert checkpoint.tensors["a"].shape == (2, 2)
        assert not checkpoint.tensors


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "'b' in one.safetensors, but it is in two"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "'c' in two.safetensors, but it is not"),
        ({"a": "one.safetensors", "b": "none.safetensors"}, "has no none.safetensors"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "only plain names"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "only plain names"),
        ({"a": "one.safetensors", "b": "C:two.safetensors"}, "only plain names"),
        ({"a": "one.safetensors", "b": "..\\two.safetensors"}, "only plain names"),
        ({"a": "one.safetensors", "b": ".."}, "only plain names"),
        ({"a": "one.safetensors", "b": ""}, "only plain names"),
        ({"a": "one.safetensors", "b": "x\0y"}, "only plain names"),
        ({"a": "one.safetensors", "b": 1}, "a name is needed"),
        ({"a": "one.safetensors", "b": "twice.safetensors"}, "'a' is in one.safetensors and in twice"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)  # fmt: skip
def test_bad_indexes(tmp_path, weight_map, message):
    if isinstance(weight_map, dict) and weight_map.get("b") == "one.safetensors":
        weight_map["z"] = "two.safetensors"
    folder = a_folder(
        tmp_path, weight_map, one={"a": A}, two={"b": B, "z": B}, twice={"a": A, "b": B}
    )
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(folder)


def test_links_stay_in_the_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    write(outside, safetensors({"b": B}), "two.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    a_folder(folder, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": A})
    link = folder / "two.safetensors"
    try:
        link.symlink_to(outside / "two.safetensors")
    except OSError:
        pytest.skip("this user may not make links")
    with pytest.raises(ModelFileError, match="a link to a file outside"):
        open_checkpoint(folder)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(ModelFileError, match=r"has no two\.safetensors"):
        open_checkpoint(folder)


def test_the_cache_of_hugging_face_links_to_its_blobs(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    a_folder(folder, {"a": "one.safetensors", "b": "two.safetensors"}, one={"a": A})
    write(blobs, safetensors({"b": B}), "0123")
    try:
        (folder / "two.safetensors").symlink_to(Path("../../blobs/0123"))
    except OSError:
        pytest.skip("this user may not make links")
    np.testing.assert_array_equal(open_checkpoint(folder).tensors["b"].read(), B)
