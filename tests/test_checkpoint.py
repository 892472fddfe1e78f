"""What `open_checkpoint` makes of files and folders: one model in many forms, Meta's shards, llama2.c."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from make_checkpoint import safetensors, write_torch
from make_gguf import make_model

from edgellama.convert.checkpoint import open_checkpoint
from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.kernels.blocks import FORMATS

TINY = Path(__file__).parents[2] / "shared" / "data" / "tiny_models" / "stories260K"
RNG = np.random.default_rng(0)


# --- one model in four forms ----------------------------------------------------------------------
HF_NAMES = {
    r"tok_embeddings": "model.embed_tokens",
    r"norm": "model.norm",
    r"layers\.(\d+)\.attention_norm": r"model.layers.\1.input_layernorm",
    r"layers\.(\d+)\.ffn_norm": r"model.layers.\1.post_attention_layernorm",
    r"layers\.(\d+)\.attention\.w(.)": r"model.layers.\1.self_attn.\2_proj",
    r"layers\.(\d+)\.feed_forward\.w1": r"model.layers.\1.mlp.gate_proj",
    r"layers\.(\d+)\.feed_forward\.w2": r"model.layers.\1.mlp.down_proj",
    r"layers\.(\d+)\.feed_forward\.w3": r"model.layers.\1.mlp.up_proj",
}


@pytest.mark.skipif(not TINY.exists(), reason="needs ../shared/data")
def test_a_model_in_three_forms():
    with (
        open_checkpoint(TINY / "stories260K.bin") as ours,
        open_checkpoint(TINY / "hf") as hf,
        open_checkpoint(TINY / "stories260K.f32.gguf") as gguf,
    ):
        assert (ours.kind, hf.kind, gguf.kind) == ("llama2c", "huggingface", "gguf")
        assert (ours.config["dim"], hf.config["hidden_size"]) == (64, 64)
        assert gguf.config["llama.embedding_length"] == 64
        assert ours.config["shared_classifier"]
        names = {}
        for name in ours.tensors:
            base = name.removesuffix(".weight")
            names[name] = next(
                re.sub(pattern, to, base) + ".weight"
                for pattern, to in HF_NAMES.items()
                if re.fullmatch(pattern, base)
            )
        assert set(names.values()) == set(hf.tensors) - {"lm_head.weight"}
        for name, other in names.items():
            mine, its = ours.tensors[name].read(), hf.tensors[other].read()
            if re.search(r"w[qk]\.", name):  # Hugging Face has the halves of a head apart
                heads = 8 if ".wq." in name else 4
                its = its.reshape(heads, 2, 4, 64).swapaxes(1, 2).reshape(mine.shape)
            np.testing.assert_array_equal(mine, its)
        for layer in range(5):
            np.testing.assert_array_equal(
                gguf.tensors[f"blk.{layer}.ffn_down.weight"].read(3, 60),
                ours.tensors[f"layers.{layer}.feed_forward.w2.weight"].read(3, 60),
            )


@pytest.mark.parametrize("format_name", FORMATS)
def test_gguf_of_any_type(tmp_path, format_name):
    import gguf

    path = tmp_path / "m.gguf"
    make_model(path, format_name=format_name)
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["general.architecture"] == "llama"
        assert format_name.upper() in {t.dtype for t in checkpoint.tensors.values()}
        for theirs in reader.tensors:
            tensor = checkpoint.tensors[theirs.name]
            assert tensor.shape == tuple(int(n) for n in reversed(theirs.shape))
            assert tensor.nbytes == theirs.n_bytes
            expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type).reshape(tensor.shape)
            np.testing.assert_array_equal(tensor.read(), expected)
            np.testing.assert_array_equal(tensor.read(3, 7), expected[3:7])


def test_gguf_vectors_of_blocks(tmp_path):
    """Elements of a vector are its rows, and no whole blocks."""
    import gguf

    raw = RNG.integers(0, 100, 3 * 34, dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("v", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    tensor = open_checkpoint(tmp_path / "m.gguf").tensors["v"]
    for start, stop in ((0, None), (0, 0), (5, 40), (64, 65), (95, 96)):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


# --- Meta -----------------------------------------------------------------------------------------
D, F, V = 8, 12, 16


def a_llama(*, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        "tok_embeddings": (V, D), "norm": (D,), "output": (V, D),
        "layers.0.attention.wq": (D, D), "layers.0.attention.wk": (D // 2, D),
        "layers.0.attention.wv": (D // 2, D), "layers.0.attention.wo": (D, D),
        "layers.0.feed_forward.w1": (F, D), "layers.0.feed_forward.w2": (D, F),
        "layers.0.feed_forward.w3": (F, D), "layers.0.attention_norm": (D,),
        "layers.0.ffn_norm": (D,),
    }  # fmt: skip
    tensors = {f"{k}.weight": rng.normal(size=s).astype(np.float16) for k, s in shapes.items()}
    return tensors | {"rope.freqs": rng.normal(size=4).astype(np.float32)}


def shards_of(
    whole: dict[str, np.ndarray], n: int, embedding_axis: int
) -> list[dict[str, np.ndarray]]:
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(n)]
    for name, tensor in whole.items():
        axis = None
        if re.search(r"\.(wq|wk|wv|w1|w3)\.|^output", name):
            axis = 0
        elif re.search(r"\.(wo|w2)\.", name):
            axis = 1
        elif "tok_" in name:
            axis = embedding_axis
        pieces = [tensor] * n if axis is None else np.split(tensor, n, axis)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = np.ascontiguousarray(piece)
    return shards


def write_meta(folder: Path, shards: list[dict[str, np.ndarray]]) -> Path:
    (folder / "params.json").write_text(json.dumps({"dim": D, "n_layers": 1}))
    for i, shard in enumerate(shards):
        write_torch(folder / f"consolidated.{i:02d}.pth", shard)
    return folder


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_shards_of_meta_are_joined(tmp_path, n, embedding_axis):
    whole = a_llama()
    folder = write_meta(tmp_path, shards_of(whole, n, embedding_axis))
    with open_checkpoint(folder) as checkpoint:
        assert (checkpoint.kind, checkpoint.config["n_layers"]) == ("meta", 1)
        assert set(checkpoint.tensors) == set(whole)
        for name, expected in whole.items():
            tensor = checkpoint.tensors[name]
            assert tensor.shape == expected.shape
            assert tensor.dtype == ("F32" if name == "rope.freqs" else "F16")
            for start, stop in ((0, None), (0, 0), (1, 4), (3, len(expected))):
                np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


def test_shards_that_do_not_belong_together(tmp_path):
    shards = shards_of(a_llama(), 4, 1)
    folder = write_meta(tmp_path, shards)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(ModelFileError, match=r"has no consolidated\.02\.pth"):
        open_checkpoint(folder)
    odd = dict(shards[2])
    del odd["output.weight"]
    write_torch(folder / "consolidated.02.pth", odd)
    with pytest.raises(ModelFileError, match=r"consolidated\.02\.pth and .* 'output\.weight'"):
        open_checkpoint(folder)
    write_torch(
        folder / "consolidated.02.pth", shards[2] | {"output.weight": np.ones((5, D), np.float16)}
    )
    with pytest.raises(ModelFileError, match="another shape or type"):
        open_checkpoint(folder)
    for i, shard in enumerate(shards):
        write_torch(
            folder / f"consolidated.{i:02d}.pth", shard | {"new.weight": shard["norm.weight"]}
        )
    with pytest.raises(UnsupportedModelError, match=r"'new\.weight' are joined is not known"):
        open_checkpoint(folder)


# --- llama2.c -------------------------------------------------------------------------------------
COUNTS = (D, F, 2, 4, 2, V, 10)


def layers_of(counts: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
    """Weights by kind, a tensor for each layer."""
    dim, hidden, n_layers, n_heads, n_kv_heads, *_ = counts
    kv = dim // n_heads * n_kv_heads
    shapes = {
        "attention_norm": (dim,), "attention.wq": (dim, dim), "attention.wk": (kv, dim),
        "attention.wv": (kv, dim), "attention.wo": (dim, dim), "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }  # fmt: skip
    return {
        name: [RNG.normal(size=shape).astype(np.float32) for _ in range(n_layers)]
        for name, shape in shapes.items()
    }


def llama2c(version: int, *, shared: bool, group: int = 4) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a file as llama2.c's export.py writes it, and what is in it."""
    layers = layers_of(COUNTS)
    embedding, output = RNG.normal(size=(2, V, D)).astype(np.float32)
    norm = RNG.normal(size=D).astype(np.float32)
    expected = {"tok_embeddings.weight": embedding, "norm.weight": norm}
    expected |= {f"layers.{i}.{n}.weight": w for n, ws in layers.items() for i, w in enumerate(ws)}
    classifier = [] if shared else [output]
    if not shared:
        expected["output.weight"] = output
    if version == 0:
        counts = list(COUNTS)
        counts[5] *= 1 if shared else -1
        tables = np.zeros((2, COUNTS[6], D // COUNTS[3] // 2), np.float32)
        parts = [embedding, *(w for ws in layers.values() for w in ws), norm, tables, *classifier]
        return struct.pack("<7i", *counts) + b"".join(p.tobytes() for p in parts), expected
    head = struct.pack("<I8iB", 0x616B3432, version, *COUNTS, shared)
    head += struct.pack("<i", group) if version == 2 else b""
    norms = [w for name in ("attention_norm", "ffn_norm") for w in layers.pop(name)] + [norm]
    matrices = [embedding, *(w for ws in layers.values() for w in ws), *classifier]
    data = head.ljust(256, b"\0") + b"".join(w.tobytes() for w in norms)
    for matrix in matrices:
        if version == 1:
            data += matrix.tobytes()
            continue
        groups = matrix.reshape(-1, group)
        scales = np.abs(groups).max(axis=1) / np.float32(127)
        codes = np.rint(groups / scales[:, None]).astype(np.int8)
        data += codes.tobytes() + scales.tobytes()
        name = next(name for name, w in expected.items() if w is matrix)
        expected[name] = (codes * scales[:, None]).reshape(matrix.shape)
    return data, expected


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("version", "group"), [(0, 0), (1, 0), (2, 4), (2, 8), (2, 32)])
def test_llama2c(tmp_path, version, group, shared):
    """A group of 32 spans rows."""
    data, expected = llama2c(version, shared=shared, group=group)
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "llama2c"
        assert checkpoint.folder == tmp_path
        names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")
        assert tuple(checkpoint.config[name] for name in names) == COUNTS[:6]
        assert checkpoint.config["max_seq_len"] == COUNTS[6]
        assert checkpoint.config["shared_classifier"] is shared
        assert set(checkpoint.tensors) == set(expected)
        for name, values in expected.items():
            tensor = checkpoint.tensors[name]
            assert tensor.shape == values.shape
            for start, stop in ((0, None), (0, 0), (1, 3), (3, len(values))):
                np.testing.assert_array_equal(tensor.read(start, stop), values[start:stop])


@pytest.mark.parametrize("version", [0, 1, 2])
def test_llama2c_that_is_damaged(tmp_path, version):
    data, _ = llama2c(version, shared=True)
    path = tmp_path / "model.bin"
    for bad in (data[:-1], data + b"\0", data[:20], b"", b"\0" * 300):
        path.write_bytes(bad)
        with pytest.raises(ModelFileError, match=r"model\.bin"):
            open_checkpoint(path)
    start = 8 if version else 0
    for i in range(7):
        for n in (0, -1, 1 << 30, -(1 << 31), 3):
            if version and i == 6 and n == 3:
                continue  # max_seq_len: no size follows from it
            bad = bytearray(data)
            bad[start + 4 * i : start + 4 * i + 4] = struct.pack("<i", n)
            path.write_bytes(bytes(bad))
            with pytest.raises(ModelFileError):
                open_checkpoint(path)


def test_llama2c_of_other_versions(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 3).ljust(256, b"\0"))
    with pytest.raises(UnsupportedModelError, match="version 3; 0 to 2 are read"):
        open_checkpoint(path)
    data = bytearray(llama2c(2, shared=True)[0])
    for group in (0, -4, 7):
        data[37:41] = struct.pack("<i", group)
        path.write_bytes(bytes(data))
        with pytest.raises(ModelFileError, match="groups of"):
            open_checkpoint(path)


# --- what is there --------------------------------------------------------------------------------
ONE = safetensors({"a": np.ones(3, np.float32)})


def test_safetensors_come_before_pickles(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(ONE)
    (tmp_path / "adapter_model.safetensors").write_bytes(ONE)
    write_torch(tmp_path / "pytorch_model.bin", {"b": np.ones(3, np.float32)})
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}
    assert set(open_checkpoint(str(tmp_path / "pytorch_model.bin")).tensors) == {"b"}
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq-4bit.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"b"}
    (tmp_path / "pytorch_model.bin").unlink()
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}
    (tmp_path / "other.safetensors").write_bytes(ONE)
    with pytest.raises(ModelFileError, match=r"2 files like gptq-4bit\.safetensors and no"):
        open_checkpoint(tmp_path)


def test_names_of_mistral(tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 3}')
    (tmp_path / "consolidated.safetensors").write_bytes(ONE)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.config) == ("meta", {"dim": 3})
    assert set(checkpoint.tensors) == {"a"}


@pytest.mark.parametrize("config", [None, "", "[]", "{", '{"a": 1, "a": 2}', "\udc80"])
def test_configurations_that_are_none(tmp_path, config):
    (tmp_path / "model.safetensors").write_bytes(ONE)
    if config is not None:
        (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(
        ModelFileError, match=r"holds no checkpoint; one of these is needed: model\.s"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelFileError, match=r"begins with b'hell'; edgellama converts folders"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_checkpoint(tmp_path)
