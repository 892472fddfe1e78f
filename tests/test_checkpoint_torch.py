"""Files of torch.save, and pickles that want more than tensors."""

from __future__ import annotations

import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from make_checkpoint import (
    Call,
    Global,
    a_pickle,
    a_tensor,
    pickled,
    state_dict,
    write_torch,
    write_zip,
)

from edgellama.convert.checkpoint import open_checkpoint
from edgellama.convert.torch_file import read_torch
from edgellama.convert.torch_pickle import load
from edgellama.errors import ModelFileError, UnsupportedModelError

ONE = {"0": np.arange(12, dtype=np.float32).tobytes()}
VALUES = np.arange(12, dtype=np.float32)


def a_zip(tmp_path: Path, data_pkl: bytes, storages: dict[str, bytes] | None = None) -> Path:
    return write_zip(
        tmp_path / "pytorch_model.bin", data_pkl, ONE if storages is None else storages
    )


def a_view(tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], **more: int) -> Path:
    tensor = a_tensor("0", shape, strides, **({"n_elements": 12} | more))
    return a_zip(tmp_path, a_pickle({"w": tensor}))


# --- what reads right -----------------------------------------------------------------------------
def test_types_and_layouts(tmp_path):
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(4, 6, 5)).astype(np.float32)
    tensors = {
        "plain": wide[0],
        "half": wide[0].astype(np.float16),
        "long": np.arange(6).reshape(2, 3),
        "transposed": np.ascontiguousarray(wide[0]).T,
        "permuted": wide.transpose(2, 0, 1),
        "swapped": wide.transpose(1, 0, 2),
        "nan": np.array([np.nan, np.inf, -0.0], np.float32),
    }
    found = read_torch(write_torch(tmp_path / "pytorch_model.bin", tensors))
    for name, expected in tensors.items():
        tensor = found[name]
        assert tensor.shape == expected.shape
        for start, stop in ((0, None), (0, 0), (1, 2), (1, len(expected))):
            rows = tensor.read(start, stop)
            assert rows.dtype == np.float32
            assert rows.flags.c_contiguous
            np.testing.assert_array_equal(rows, expected[start:stop])


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 3), (4, 1), 1),  # columns of a matrix
        ((3, 2), (4, 2), 1),  # every second column
        ((3,), (4,), 2),  # one column
        ((4, 3), (1, 4), 0),
        ((2, 1, 3), (6, 99, 2), 0),  # an axis of one has any stride
        ((), (), 7),
        ((1, 1), (0, 0), 11),
        ((0, 5), (5, 1), 12),
    ],
)
def test_views_of_a_storage(tmp_path, shape, strides, offset):
    tensor = read_torch(a_view(tmp_path, shape, strides, offset=offset))["w"]
    steps = tuple(4 * n for n in strides)
    expected = np.lib.stride_tricks.as_strided(VALUES[offset:], shape, steps)
    np.testing.assert_array_equal(tensor.read(), expected)
    if shape and shape[0] > 1:
        np.testing.assert_array_equal(tensor.read(1, 2), expected[1:2])


def test_a_transposed_tensor_is_read_by_rows(tmp_path):
    big = np.zeros((2000, 1000), np.float32).T
    tensor = read_torch(write_torch(tmp_path / "pytorch_model.bin", {"w": big}))["w"]
    tracemalloc.start()
    tensor.read(3, 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_tensors_may_share_a_storage(tmp_path):
    tensor = a_tensor("0", (3, 4), (4, 1), n_elements=12)
    found = read_torch(a_zip(tmp_path, a_pickle({"a": tensor, "b": tensor})))
    np.testing.assert_array_equal(found["a"].read(), found["b"].read())


def test_training_checkpoints(tmp_path):
    """The dict of tensors may lie beside an optimizer and numbers of all kinds."""
    content, storages = state_dict({"w": VALUES.reshape(3, 4)})
    extra = {"step": 5, "betas": (1, None, True), "groups": [{"params": [0, 1]}], 3: {}}
    for key in ("model", "state_dict"):
        found = read_torch(a_zip(tmp_path, a_pickle({key: content, **extra}), storages))
        assert list(found) == ["w"]
    ordered = pickled({"_metadata": {"": {"version": 1}}})
    data = b"\x80\x02" + pickled(content) + ordered + b"b."  # attributes of an OrderedDict
    assert list(read_torch(a_zip(tmp_path, data, storages))) == ["w"]


def test_parameters_and_untyped_storages(tmp_path):
    tensor = a_tensor("0", (3, 4), (4, 1), n_elements=12)
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), tensor, True, {})
    np.testing.assert_array_equal(
        read_torch(a_zip(tmp_path, a_pickle({"w": parameter})))["w"].read(), VALUES.reshape(3, 4)
    )
    ids = ("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", 48)
    call = b"".join(
        [Global("torch._utils", "_rebuild_tensor_v3").code, b"(", pickled(ids), b"Q"]
        + [pickled(x) for x in (0, (12,), (1,), False, {}, Global("torch", "float8_e5m2"))]
        + [b"tR"]
    )
    data = b"\x80\x02}" + pickled("w") + call + b"s."
    tensor = read_torch(a_zip(tmp_path, data))["w"]
    assert (tensor.dtype, tensor.nbytes) == ("F8_E5M2", 12)


def test_pickles_of_python_itself(tmp_path):
    """Memo, frames and the opcodes of protocol 4, as Python writes them."""
    value = {"a": [1, 2.5, -300, 1 << 40, None, True, ("x", ()), ""], "b": {}, "a long " * 50: "é"}
    value["again"] = value["a"]
    for protocol in (2, 3, 4, 5):
        content = load(b"junk" + pickle.dumps(value, protocol) + b"more", "here", 4)
        assert content.value == value
        assert content.end == 4 + len(pickle.dumps(value, protocol))


def test_the_stream_of_old(tmp_path):
    """Before PyTorch 1.6: pickles in a row, then every storage behind its count."""
    content, storages = state_dict({"a": VALUES.reshape(3, 4), "b": np.float16([[1, 2]])})
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [0x1950A86A20F9469CFC6C, 1001, system, content, list(storages)]
    data = b"".join(map(a_pickle, parts))
    data += b"".join(
        struct.pack("<q", n) + raw for n, raw in zip((12, 2), storages.values(), strict=True)
    )
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    found = read_torch(path)
    np.testing.assert_array_equal(found["a"].read(), VALUES.reshape(3, 4))
    np.testing.assert_array_equal(found["b"].read(), [[1, 2]])
    for n in range(1, len(data), 7):
        path.write_bytes(data[:n])
        with pytest.raises(ModelFileError):
            read_torch(path)
    path.write_bytes(a_pickle({"a": 1}))
    with pytest.raises(UnsupportedModelError, match="a bare pickle"):
        read_torch(path)
    system["little_endian"] = False
    path.write_bytes(b"".join(map(a_pickle, parts)))
    with pytest.raises(UnsupportedModelError, match="little-endian"):
        read_torch(path)


def test_shards_and_their_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_torch(tmp_path / "pytorch_model-1.bin", {"a": VALUES})
    write_torch(tmp_path / "pytorch_model-2.bin", {"b": VALUES})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}')
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}
    index.write_text('{"weight_map": {"a": "../pytorch_model-1.bin"}}')
    with pytest.raises(ModelFileError, match="only plain names"):
        open_checkpoint(tmp_path)


# --- pickles that want more -----------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.system, ("touch was_here",)


class EvilState:
    def __reduce__(self):
        return dict, (), {"x": 1}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_is_run(tmp_path, monkeypatch, protocol, inside):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"w": Evil()} if inside else Evil(), protocol)
    with pytest.raises(UnsupportedModelError, match=r"'\w+\.system'.*nothing was run"):
        read_torch(a_zip(tmp_path, content))
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("numpy", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"), ("argparse", "Namespace"), ("os", "system"),
        ("collections", "OrderedDict.fromkeys"), ("torch", "__builtins__.eval"), ("", ""),
        ("edgellama.convert.torch_pickle", "load"),
    ],
)  # fmt: skip
def test_names_that_are_not_of_tensors(tmp_path, module, name):
    with pytest.raises(UnsupportedModelError, match="only tensors in dicts are read"):
        read_torch(a_zip(tmp_path, a_pickle(Call(Global(module, name), "x"))))


DICT = Global("collections", "OrderedDict")
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"\x80", b"\x80\x02", b"\x80\x02N", b"q\x00.", b"h\x00.", b"t.", b"u.", b"s.",
        b"R.", b"b.", b"Q.", b"a.", b"e.", b"\x85.", b"N\x86.", b"X\xff\xff\xff\xff.", b"X\x05\0\0\0ab",
        b"\x8a\x09\x01.", b"cos\nsystem", b"c" + b"x" * 400 + b"\n.", b"c\xff\n\xff\n.", b"NN\x93.",
        b"\x96" + bytes(8) + b".", b"(i", b"I1\n.", b"N" * 10 + b"R.", b"}}}s.", b"})Ns.", b"]NNs.",
        pickled((1, 2)) + b"R.", pickled({}) + b")R.", b"X\x01\0\0\0\xff.",
        pickled(Call(DICT, [("a", 1)])) + b".", pickled(Call(Global("torch", "FloatStorage"), 1)) + b".",
        pickled(Call(REBUILD)) + b".", pickled(Call(REBUILD, 1, 2, 3, 4, 5, 6)) + b".",
        pickled(("storage", 1, 2, 3, 4)) + b"Q.", pickled((1, 2)) + b"Q.", pickled("storage") + b"Q.",
        pickled(("storage", Global("torch", "FloatStorage"), "0", "cpu", -1)) + b"Q.",
        pickled(("storage", Global("torch", "FloatStorage"), "0", "cpu", 1, ("0", 0, 1))) + b"Q.",
    ],
    ids=range(43),
)  # fmt: skip
def test_broken_pickles(tmp_path, data):
    with pytest.raises(ModelFileError, match=r"data\.pkl") as caught:
        read_torch(a_zip(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_bombs(tmp_path):
    """Nesting, memo numbers, and structures that unfold, cost what their bytes cost."""
    doubled = b"]q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200))
    bombs = {
        "deep tuples": b")" + b"\x85" * 50_000 + b".",
        "deep lists": b"]" * 50_000 + b"a" * 49_999 + b".",
        "marks": b"(" * 50_000 + b".",
        "a memo number of 2^32 - 1": b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
        "a tuple that unfolds": doubled + b".",
        "a key that unfolds": b"}" + doubled + b"Ns.",
        "a key that nests": b"})" + b"\x85" * 50_000 + b"Ns.",
        "a dict in itself": b"}q\x00X\x01\x00\x00\x00ah\x00s.",
    }
    for name, data in bombs.items():
        start = time.monotonic()
        tracemalloc.start()
        with pytest.raises(ModelFileError):
            read_torch(a_zip(tmp_path, b"\x80\x02" + data))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50_000_000, name
        assert time.monotonic() - start < 30, name


def test_work_is_bounded(tmp_path):
    with pytest.raises(ModelFileError, match="has over 1048576 opcodes"):
        read_torch(a_zip(tmp_path, b"N" * 2_000_000 + b"."))


# --- tensors that do not fit their storage --------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "strides", "more", "message"),
    [
        ((3, 5), (5, 1), {}, r"reaches element 14 of storage '0', which has 12"),
        ((3, 4), (4, 1), {"offset": 1}, "reaches element 12"),
        ((2,), (1 << 70,), {}, "reaches element"),
        ((1 << 40, 1 << 40), (1 << 40, 1), {}, "reaches element"),
        ((), (), {"offset": 12}, "reaches element 12"),
        ((3, 4), (4, 1), {"n_elements": 13}, "needs 52 bytes; the file has 48"),
        ((1 << 20, 12), (0, 1), {}, "elements repeat"),
        ((3, 3), (1, 1), {}, "elements repeat"),
        ((4, 3), (2, 1), {}, "elements repeat"),
        ((3, 4), (4,), {}, "more sizes than strides"),
        ((3, -4), (4, 1), {}, "no list of sizes"),
        ((3, 4), (-4, 1), {}, "no list of sizes"),
        ((3, 4), (4, 1), {"offset": -1}, "no list of sizes"),
        ((3, True), (4, 1), {}, "no list of sizes"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, shape, strides, more, message):
    with pytest.raises(ModelFileError, match=message):
        read_torch(a_view(tmp_path, shape, strides, **more))


def test_storages_that_are_not_there(tmp_path):
    data = a_pickle({"w": a_tensor("1", (2,), (1,), n_elements=2)})
    with pytest.raises(ModelFileError, match=r"has no 'archive/data/1'"):
        read_torch(a_zip(tmp_path, data))
    data = a_pickle({"w": a_tensor("../../x", (2,), (1,), n_elements=2)})
    with pytest.raises(ModelFileError, match=r"has no 'archive/data/\.\./\.\./x'"):
        read_torch(a_zip(tmp_path, data))


@pytest.mark.parametrize("value", [{}, {"a": 1}, [1], 1, None, {"model": {"a": 1}}])
def test_no_tensors(tmp_path, value):
    with pytest.raises(ModelFileError, match="no dict of tensors by name"):
        read_torch(a_zip(tmp_path, a_pickle(value)))


# --- zips -----------------------------------------------------------------------------------------
GOOD = a_pickle({"w": a_tensor("0", (3, 4), (4, 1), n_elements=12)})


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for level in ("archive/data.pkl", "archive/data/0"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/padding", bytes(1000))
            for name, raw in (("archive/data.pkl", GOOD), ("archive/data/0", ONE["0"])):
                deflated = zipfile.ZIP_DEFLATED if name == level else zipfile.ZIP_STORED
                archive.writestr(name, raw, compress_type=deflated)
        with pytest.raises(ModelFileError, match=f"{level}' is compressed"):
            read_torch(path)


def test_a_zip_bomb(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ModelFileError, match="larger than the file"):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_twice_or_not_at_all(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", b"")
    with pytest.raises(ModelFileError, match=r"holds 0 files data\.pkl"):
        read_torch(path)
    for names in (("a/data.pkl", "b/data.pkl"), ("a/data.pkl", "a/data.pkl")):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, GOOD)
        with pytest.raises(ModelFileError, match=r"torch\.save writes one of each"):
            read_torch(path)


def test_big_endian_files_are_refused(tmp_path):
    path = write_zip(tmp_path / "pytorch_model.bin", GOOD, ONE, byteorder=b"big")
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        read_torch(path)


def test_a_large_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("edgellama.convert.torch_file.MAX_PICKLE_NBYTES", 100)
    with pytest.raises(ModelFileError, match=r"data\.pkl has \d+ bytes; 100 are allowed"):
        read_torch(a_zip(tmp_path, GOOD))


def test_members_that_reach_past_the_end(tmp_path):
    """The directory claims a place and a size; what lies there is checked too."""
    path = a_zip(tmp_path, GOOD)
    good = path.read_bytes()
    at = good.rindex(b"PK\x01\x02")  # of the storage
    for offset, message in ((len(good), "cut off"), (7, "no sound header")):
        data = bytearray(good)
        data[at + 42 : at + 46] = struct.pack("<I", offset)
        path.write_bytes(bytes(data))
        with pytest.raises(ModelFileError, match=message):
            read_torch(path)


def test_every_truncation_is_noticed(tmp_path):
    path = a_zip(tmp_path, GOOD)
    good = path.read_bytes()
    for n in range(len(good)):
        path.write_bytes(good[:n])
        with pytest.raises(ModelFileError):
            read_torch(path)


def test_flipped_bytes_never_crash(tmp_path):
    path = a_zip(tmp_path, GOOD)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(data))
        with suppress(ModelFileError):
            for tensor in read_torch(path).values():
                tensor.read()
