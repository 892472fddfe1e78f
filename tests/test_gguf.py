"""Good files read as the gguf package reads them; bad ones are one clear error."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import DATA
from make_gguf import make_model

from edgellama.errors import EdgeLlamaError, ModelFileError, UnsupportedModelError
from edgellama.gguf import open_gguf
from edgellama.models.config import read_config

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


def test_things_that_are_no_files(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = [tmp_path, tmp_path / "absent", tmp_path / "loop"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        places += [tmp_path / "fifo", "/dev/zero"]
    for place in places:
        with pytest.raises(ModelFileError):
            open_gguf(place)


def test_every_flipped_header_byte_is_survived(tmp_path):
    whole = bytearray(make_model(tmp_path / "m.gguf", n_layers=1, n_vocab=257).read_bytes())
    path = tmp_path / "flipped.gguf"
    for at in range(0, 700):
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        path.write_bytes(flipped)
        try:
            with open_gguf(path) as gguf:
                read_config(gguf)
        except EdgeLlamaError:
            pass


def test_shrunk_after_open(tmp_path):
    path = make_model(tmp_path / "m.gguf")
    with open_gguf(path) as gguf:
        os.truncate(path, 1000)
        with pytest.raises(ModelFileError, match="shrank"):
            gguf.data("token_embd.weight")


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


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"block_count": 0}, "block_count"),
        ({"block_count": 513}, "block_count"),
        ({"block_count": (1 << 32) - 1}, "block_count"),
        ({"attention.head_count": 0}, "head_count"),
        ({"attention.head_count_kv": 0}, "head_count_kv"),
        ({"attention.head_count_kv": 3}, "head_count_kv"),
        ({"attention.head_count_kv": 8}, "head_count_kv"),
        ({"context_length": 0}, "context_length"),
        ({"context_length": 1 << 31}, "context_length"),
        ({"rope.dimension_count": 0}, "dimension_count"),
        ({"rope.dimension_count": 63}, "dimension_count"),
        ({"rope.dimension_count": 66}, "dimension_count"),
        ({"rope.freq_base": 0.0}, "freq_base"),
        ({"rope.scaling.type": "strange"}, "scaling.type"),
        ({"rope.scaling.factor": float("inf")}, "factor"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "epsilon"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "epsilon"),
        ({"attention.layer_norm_rms_epsilon": None}, "epsilon"),
        ({"attention.sliding_window": 0}, "sliding_window"),
        ({"embedding_length": 264}, "token_embd.weight"),
        ({"embedding_length": "wide"}, "embedding_length"),
        ({"feed_forward_length": 500}, "ffn_gate"),
        ({"attention.key_length": 32, "attention.value_length": 32}, "attn_q"),
        ({"vocab_size": 999}, "vocab_size"),
        ({"expert_count": 8}, "experts"),
        ({"general.architecture": "mamba"}, "mamba"),
    ],
)
def test_bad_hyper_parameters_are_named(tmp_path, keys, named):
    if "general.architecture" in keys:
        path = make_model(tmp_path / "m.gguf", "mamba")
    else:
        path = make_model(tmp_path / "m.gguf", keys=keys)
    with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=named):
        read_config(gguf)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    for options in (
        {"drop": ("blk.1.ffn_up.weight",)},
        {"shapes": {"blk.1.ffn_up.weight": (480, 256)}},
    ):
        with open_gguf(make_model(tmp_path / "m.gguf", **options)) as gguf:
            with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.weight"):
                read_config(gguf)
