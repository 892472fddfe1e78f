"""The GGUF writer: what it writes is read back by our reader and by the gguf package."""

from __future__ import annotations

import errno
import io
import shutil
from contextlib import suppress

import gguf
import numpy as np
import pytest

from edgellama.errors import UsageError
from edgellama.gguf import open_gguf
from edgellama.gguf.writer import GGUFWriter, NewTensor, encode_value
from edgellama.kernels.blocks import FORMATS

METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.count": 7,
    "a.negative": -7,
    "a.large": 1 << 40,
    "a.float": 0.5,
    "a.text": "h\u00e9\u4f60",
    "a.strings": ["", "x", "\u4f60\u597d"],
    "a.floats": np.array([1.5, -2.5], np.float32),
    "a.integers": np.array([1, -2], np.int32),
    "a.bools": [True, False],
}
TENSORS = [
    NewTensor("f", (5,), FORMATS["f32"]),
    NewTensor("q", (64, 3), FORMATS["q8_0"]),
    NewTensor("h", (3, 2), FORMATS["f16"]),
]


def payloads() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    q = rng.integers(0, 256, (3, 68), np.uint8)
    q[:, 0::34] = 0
    q[:, 1::34] = 0x3C
    return [rng.random(5, np.float32), q, rng.random((2, 3)).astype(np.float16)]


def write(path, force=False):
    with GGUFWriter(path, METADATA, TENSORS, force=force) as writer:
        for data in payloads():
            for row in np.atleast_2d(data):  # in pieces
                writer.append(row)
        assert writer.path == path
    return path


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path / "m.gguf")
    with open_gguf(path) as file:
        for key, value in METADATA.items():
            got = file.metadata[key]
            assert list(got) == list(value) if hasattr(value, "__len__") else got == value
            assert encode_value(file.raw_value(key)) == encode_value(value)
        for tensor, data in zip(TENSORS, payloads(), strict=True):
            info = file.tensors[tensor.name]
            assert (info.shape, info.format) == (tensor.shape, tensor.format)
            assert file.data(tensor.name).tobytes() == data.tobytes()


def test_the_gguf_package_reads_it(tmp_path):
    path = write(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        got = reader.fields[key].contents()
        assert list(got) == list(value) if isinstance(value, list | np.ndarray) else got == value
    for tensor, data in zip(reader.tensors, payloads(), strict=True):
        assert np.asarray(tensor.data).tobytes() == data.tobytes()
    assert path.stat().st_size % 32 == 0


def test_nothing_is_left_of_a_file_that_is_not_finished(tmp_path):
    path = tmp_path / "m.gguf"
    for error in (KeyboardInterrupt, ValueError):
        with suppress(error), GGUFWriter(path, METADATA, TENSORS) as writer:
            writer.append(payloads()[0])
            raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="tensor 1 is not whole"):
        with GGUFWriter(path, METADATA, TENSORS) as writer:
            writer.append(payloads()[0])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_kept(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists; give another name, or --force"):
        write(path)
    assert path.read_text() == "mine"
    write(path, force=True)
    assert open_gguf(path).metadata["a.count"] == 7
    with pytest.raises(UsageError, match="is a folder"):
        write(tmp_path)
    with pytest.raises(UsageError, match="is no folder; make it"):
        write(tmp_path / "none" / "m.gguf")


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="are free; make room") as error:
        write(tmp_path / "m.gguf")
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"

    def write_to_full(writer: GGUFWriter) -> None:
        assert writer._new is not None
        writer._new.file.close()
        monkeypatch.setattr(writer._new, "file", Full())
        writer.append(payloads()[0])

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        with GGUFWriter(path, METADATA, TENSORS) as writer:
            write_to_full(writer)
    assert list(tmp_path.iterdir()) == []


def test_values_that_no_type_holds():
    with pytest.raises(TypeError, match="no value type of GGUF holds a dict"):
        encode_value({})
