"""Good files read as the gguf package reads them; the malformed ones of llama.cpp's tests are refused.

More of what a file can do wrong is in test_hostile.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DATA
from make_gguf import make_model

from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.gguf import open_gguf

BAD = json.loads((DATA / "gguf_bad" / "index.json").read_text())
GOOD = json.loads((DATA / "gguf_ok" / "expected.json").read_text())


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["file"])
def test_malformed_classes(case):
    path = DATA / "gguf_bad" / case["file"]
    if case["expect"] == "ok":
        with open_gguf(path) as gguf:
            assert gguf.version == 3
    else:
        with pytest.raises(ModelFileError) as error:
            open_gguf(path)
        assert "\n" not in str(error.value)
        assert "byte" in str(error.value) or "'" in str(error.value)


@pytest.mark.parametrize("name", [name for name in GOOD if not name.startswith("be_")])
def test_good_files(name):
    expected = GOOD[name]
    with open_gguf(DATA / "gguf_ok" / name) as gguf:
        for key, value in expected["kv"].items():
            ours = gguf.metadata[key]
            ours = ours.tolist() if isinstance(ours, np.ndarray) else ours
            assert ours == pytest.approx(value) if isinstance(value, float) else ours == value
        assert gguf.alignment == int(expected["alignment"])
        assert len(gguf.tensors) == len(expected["tensors"])
        for tensor in expected["tensors"]:
            info = gguf.tensors[tensor["name"]]
            assert info.shape == tuple(tensor["ne"])
            assert (info.nbytes, info.offset) == (tensor["nbytes"], tensor["data_offset_abs"])


def test_big_endian_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        open_gguf(DATA / "gguf_ok" / "be_default.gguf")


def test_truncated_anywhere(tmp_path):
    whole = make_model(tmp_path / "m.gguf", n_layers=1).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(1024), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError):
            open_gguf(path)


def test_split_file_with_a_missing_part(tmp_path):
    path = make_model(
        tmp_path / "m-00001-of-00002.gguf", keys={"general.x": "y", "general.split": "z"}
    )
    import gguf as package

    writer = package.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is missing"):
        open_gguf(path)
