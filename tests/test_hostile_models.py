# ruff: noqa: F403, F405
"""Sound containers of models that are none: hyper-parameters, tensors, numbers, tokenizers, templates."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from command_line import command, refused
from make_gguf import make_model
from raw_gguf import *

from edgellama.errors import ModelFileError
from edgellama.gguf import open_gguf, reader
from edgellama.kernels.blocks import FORMATS
from edgellama.models.config import read_config

NAN, INF = float("nan"), float("inf")
EPS = "attention.layer_norm_rms_epsilon"
KEYS: list[tuple[dict, str]] = [
    *[({"block_count": n}, "block_count") for n in (0, 513, (1 << 32) - 1, None, -1, 2.0, True)],
    *[({"attention.head_count": n}, "head_count") for n in (0, 1025, None, "4")],
    *[({"attention.head_count_kv": n}, "head_count_kv") for n in (0, 3, 8, (1 << 32) - 1)],
    ({"attention.head_count_kv": [1, 2]}, "head_count_kv is an array of 2"),
    *[({"embedding_length": n}, "embedding_length") for n in (0, None, "wide", (1 << 20) + 1)],
    ({"embedding_length": 264}, "token_embd.weight"),
    ({"embedding_length": 258, "attention.key_length": None, "attention.value_length": None},
     "embedding_length 258 is no multiple of 4"),
    ({"attention.key_length": None, "attention.value_length": None, "attention.head_count": 256,
      "attention.head_count_kv": 1}, "heads of 1"),
    ({"attention.key_length": None, "attention.value_length": None, "attention.head_count": 1,
      "attention.head_count_kv": 1, "embedding_length": 2048}, "key_length is 2048"),
    *[({"attention.key_length": n}, "key_length") for n in (0, 1025, -64)],
    ({"attention.key_length": 32}, "heads of 32"),
    ({"attention.key_length": 60, "attention.value_length": 60}, "heads of 60"),
    ({"attention.key_length": 32, "attention.value_length": 32}, "attn_q"),
    *[({"feed_forward_length": n}, "feed_forward_length") for n in (0, None, (1 << 32) - 1)],
    ({"feed_forward_length": 500}, "ffn_gate"),
    ({"feed_forward_length": [512, 512]}, "feed_forward_length is an array of 2"),
    *[({"context_length": n}, "context_length") for n in (0, 1 << 31, -1, None)],
    *[({"rope.dimension_count": n}, "dimension_count") for n in (0, 1, 63, 66, -2)],
    *[({"rope.freq_base": x}, "freq_base") for x in (0.0, -1.0, 1.0, 1e-30, NAN, INF, "1")],
    *[({"rope.scaling.factor": x}, "factor") for x in (0.0, -1.0, NAN, INF, 1e-30)],
    *[({"rope.scale_linear": x}, "scale_linear") for x in (0.0, NAN, INF)],
    *[({"rope.scaling.type": x}, "scaling.type") for x in ("strange", 1, ["yarn"], [1, 2])],
    *[({"rope.scaling.original_context_length": n}, "original_context") for n in (0, -1, 1 << 31)],
    *[({f"rope.scaling.{key}": x}, key) for key in ("yarn_ext_factor", "attn_factor",
      "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow") for x in (NAN, INF, -2.0, 1e30)],
    *[({EPS: x}, "epsilon") for x in (0.0, -1.0, NAN, INF, -INF, None, 2.0, "0")],
    *[({"attention.sliding_window": n}, "sliding_window") for n in (-1, 1 << 31)],
    ({"expert_count": 8, "expert_used_count": 2}, "experts"),
    ({"expert_count": 8, "expert_used_count": 9}, "expert_used_count is 9"),
    ({"expert_used_count": 2}, "expert_used_count is 2"),
    *[({"vocab_size": n}, "vocab_size") for n in (0, 327, 329, (1 << 32) - 1)],
    ({"tokenizer.ggml.tokens": ["a"] * 327}, "tokens has 327 .* token_embd.weight has 328"),
    ({"general.architecture": "mamba"}, "mamba"),
    ({"general.architecture": "\x1b[2J" * 99}, r"'\\x1b\[2J"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "named"), KEYS, ids=lambda given: str(given)[:40])
def test_hyper_parameters(keys, named, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    architecture = keys.get("general.architecture")
    if architecture:
        make_model(path, architecture)
    else:
        make_model(path, keys=keys)
    with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=named) as error:
        read_config(gguf)
    for arguments in (["verify", path], ["run", path, "-p", "x"]):
        assert refused(capsys, *arguments) == f"edgellama: {error.value}\n"


@pytest.mark.parametrize("x", [0.0, NAN, INF, -1.0])
@pytest.mark.parametrize(
    "key", ["rope.freq_base_swa", "attn_logit_softcapping", "final_logit_softcapping"]
)
def test_hyper_parameters_of_gemma(key, x, tmp_path):
    path = make_model(tmp_path / "m.gguf", "gemma3", keys={key: x})
    with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=key):
        read_config(gguf)


LAYOUTS: list[tuple[dict, str]] = [
    *[({"drop": (name,)}, f"{name} is missing") for name in (
        "token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_up.weight")],
    ({"tied": False, "shapes": {"output.weight": (327, 256)}}, "output.weight has shape"),
    ({"tied": False, "shapes": {"output.weight": (328, 512)}}, "output.weight has shape"),
    ({"shapes": {"token_embd.weight": (327, 256)}}, "token_embd.weight has 327 rows"),
    ({"shapes": {"token_embd.weight": (328, 512)}}, "token_embd.weight has shape"),
    ({"shapes": {"blk.1.ffn_up.weight": (480, 256)}}, "blk.1.ffn_up.weight has shape"),
    ({"shapes": {"blk.0.attn_k.weight": (256, 256)}}, "blk.0.attn_k.weight has shape"),
    ({"shapes": {"blk.0.attn_output.weight": (256, 512)}}, "blk.0.attn_output.weight has shape"),
    ({"keys": {"block_count": 1}}, "'blk.1.attn_q.weight' has no place"),
    ({"keys": {"block_count": 3}}, "blk.2.attn_q.weight is missing"),
    ({"rope_freqs": True, "keys": {"rope.dimension_count": 32}}, "rope_freqs.weight is f32"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "named"), LAYOUTS, ids=lambda given: str(given)[:40])
def test_tensors_that_do_not_fit(options, named, tmp_path, capsys):
    path = make_model(tmp_path / "m.gguf", **options)
    with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=named):
        read_config(gguf)
    refused(capsys, "verify", path)
    refused(capsys, "run", path, "-p", "x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: (t[0], [*t[1], 1], *t[2:]), r"has shape \[.*, 1\]"),
        (lambda t: (t[0], [t[1][0] * t[1][-1]], *t[2:]), "has shape"),
        (lambda t: (t[0], t[1][::-1], *t[2:]), "token_embd.weight has 256 rows"),
        (lambda t: (t[0], t[1], 27, t[3]), "is i64, which no kernel reads"),
    ],
)
def test_one_tensor_changed(change, named, tmp_path, capsys):
    """As the last tensor, so that its size may change and the offsets still be right."""
    path = make_model(tmp_path / "m.gguf", format_name="f32", n_layers=1, n_vocab=264)
    pairs, tensors, data = dismantle(path)
    i = next(i for i, t in enumerate(tensors) if t[0] == b"token_embd.weight")
    sizes = [4 * int(np.prod(t[1])) for t in tensors]
    parts = [data[t[3] : t[3] + n] for t, n in zip(tensors, sizes, strict=True)]
    tensors.append(tensors.pop(i))
    parts.append(parts.pop(i))
    offsets = np.cumsum([0, *map(len, parts)])
    moved = [(t[0], t[1], t[2], int(at)) for t, at in zip(tensors, offsets, strict=False)]
    path.write_bytes(build(pairs, moved, b"".join(parts) + bytes(1 << 20)))
    assert command(capsys, "verify", path)[0] == 0
    path.write_bytes(
        build(pairs, [*moved[:-1], change(moved[-1])], b"".join(parts) + bytes(1 << 20))
    )
    assert re.search(named, refused(capsys, "run", path, "-p", "x"))
    refused(capsys, "verify", path)


def test_one_tensor_more(tmp_path, capsys):
    path = make_model(tmp_path / "m.gguf", n_layers=1)
    pairs, tensors, data = dismantle(path)
    for name in ("blk.0.attn_sinks.weight", "blk.0.attn_q_norm.weight", "\x1b[2J"):
        path.write_bytes(build(pairs, [*tensors, (name, [0], 0, len(data))], data))
        for arguments in (["verify", path], ["run", path, "-p", "x"]):
            line = refused(capsys, *arguments)
            assert "has no place in a llama model of 1 layers" in line
            assert name in line or "x1b" in line


def test_no_vocabulary_at_all(tmp_path, capsys):
    path = make_model(tmp_path / "m.gguf", n_layers=1)
    pairs, tensors, data = dismantle(path)
    for shape in ([256, 0], [0, 0], [0]):
        empty = [(b"token_embd.weight", shape, 0, 0)]
        path.write_bytes(build(pairs, empty))
        assert "token_embd.weight has shape" in refused(capsys, "run", path, "-p", "x")
    kept = [p for p in pairs if not p[0].startswith(b"tokenizer.")]
    path.write_bytes(build(kept, tensors, data))
    assert "tokenizer.ggml.model is missing" in refused(capsys, "run", path, "-p", "x")
    assert "tokenizer.ggml.model is missing" in refused(capsys, "verify", path)


# --- numbers --------------------------------------------------------------------------------------
NOT_FINITE = {
    "f32": (b"\0\0\xc0\x7f", b"\0\0\x80\xff"),
    "bf16": (b"\xc0\x7f", b"\x80\xff"),
    "mxfp4": (b"\xff",),
}
SCALES_AT = {"q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2),
             "q5_k": (0, 2), "q6_k": (208,)}  # fmt: skip


@pytest.mark.parametrize("format_name", FORMATS)
def test_scales_that_are_no_numbers(format_name, tmp_path, capsys):
    """In the last block of a tensor of several chunks, which a check by samples would miss."""
    path = make_model(tmp_path / "m.gguf", format_name=format_name, n_layers=1, n_vocab=16384)
    name, block = "token_embd.weight", FORMATS[format_name].nbytes
    with open_gguf(path) as gguf:
        info = gguf.tensors[name]
    assert info.nbytes > reader._CHUNK_NBYTES
    assert command(capsys, "verify", path)[0] == 0
    for at in SCALES_AT.get(format_name, (0,)):
        for bad in NOT_FINITE.get(format_name, (b"\0\x7e", b"\0\xfc")):
            with open(path, "r+b") as file:
                file.seek(info.offset + info.nbytes - block + at)
                before = file.read(len(bad))
                file.seek(-len(bad), os.SEEK_CUR)
                file.write(bad)
            assert f"'{name}' holds NaN or infinite" in refused(capsys, "verify", path)
            with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=name):
                gguf.data(name)
            with open(path, "r+b") as file:
                file.seek(info.offset + info.nbytes - block + at)
                file.write(before)
    assert command(capsys, "verify", path)[0] == 0


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.1.attn_v.weight",
     "blk.1.attn_k.bias", "blk.0.ffn_down.weight", "rope_freqs.weight"],
)  # fmt: skip
def test_damaged_numbers_are_not_run(name, tmp_path, capsys):
    path = make_model(tmp_path / "m.gguf", biases=True, rope_freqs=True)
    with open_gguf(path) as gguf:
        info = gguf.tensors[name]
    with open(path, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\0\0\xc0\x7f" if info.type_name == "f32" else b"\0\x7e")
    assert name in refused(capsys, "run", path, "--raw", "-p", "x", "-n", 2)
    assert name in refused(capsys, "verify", path)


def test_scales_of_zero_are_sound(tmp_path, capsys):
    path = make_model(tmp_path / "m.gguf", format_name="q4_1")
    with open_gguf(path) as gguf:
        info = gguf.tensors["blk.0.ffn_up.weight"]
    with open(path, "r+b") as file:
        file.seek(info.offset)
        file.write(bytes(info.nbytes))
    assert command(capsys, "verify", path)[0] == 0
    assert command(capsys, "run", path, "--raw", "-p", "x", "-n", 2)[0] == 0


# --- tokenizers and templates, as a user meets them ----------------------------------------------
VOCABULARIES: list[tuple[str, dict, str]] = [
    ("bpe", {"model": None}, "tokenizer.ggml.model is missing"),
    ("bpe", {"tokens": None}, "tokenizer.ggml.tokens is missing"),
    ("bpe", {"pre": "unheard-of"}, "'unheard-of'.*override"),
    ("bpe", {"eos_token_id": 328}, "eos_token_id is 328"),
    ("bpe", {"eos_token_id": -1}, "eos_token_id is -1"),
    ("bpe", {"merges": ["t h", "zz top"]}, r"merges\[1\]"),
    ("bpe", {"token_type": [1] * 327}, "token_type has 327"),
    ("spm", {"bos_token_id": 1 << 31}, "bos_token_id is 2147483648"),
    ("spm", {"scores": None}, "scores is missing"),
    ("spm", {"scores": [0.0] * 327}, "scores has 327"),
    ("spm", {"scores": [0] * 328}, "scores has the wrong element type"),
    ("spm", {"scores": [NAN] * 328}, "scores holds"),
    ("spm", {"token_type": [6] * 328}, r"tokens\[0\] is a byte token"),
]


@pytest.mark.parametrize(("kind", "keys", "named"), VOCABULARIES, ids=lambda given: str(given)[:30])
def test_vocabularies(kind, keys, named, tmp_path, capsys):
    keys = {f"tokenizer.ggml.{key}": given for key, given in keys.items()}
    path = make_model(tmp_path / "m.gguf", vocabulary=kind, keys=keys)
    for arguments in (["verify", path], ["run", path, "-p", "x"]):
        assert re.search(named, refused(capsys, *arguments))


def test_a_token_of_100_megabytes(tmp_path, capsys):
    """First in a file that is too long for it, then within the budget of the metadata."""
    path = make_model(tmp_path / "m.gguf")
    pairs, tensors, data = dismantle(path)
    kept = [p for p in pairs if p[0] != b"tokenizer.ggml.tokens"]
    for n, named in ((100_000_000, "all metadata"), (10_000_000, r"tokens\[327\] has 10000000")):
        tokens = strings([*map(str, range(327)), "x" * n])
        path.write_bytes(build([*kept, (b"tokenizer.ggml.tokens", ARRAY, tokens)], tensors, data))
        for arguments in (["verify", path], ["run", path, "-p", "x"]):
            assert re.search(named, refused(capsys, *arguments))


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ ''.__class__.__mro__[1] }}", "{{ cycler.__init__.__globals__.os.getcwd() }}",
     "{% for i in range(10**9) %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
     "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "{{ raise_exception('no\n\x1b[2J') }}",
     "{{ '\x1b[2J\n' + 1 }}", "x" * 300_000],
    ids=lambda template: template[:30],
)  # fmt: skip
def test_a_bad_template_does_not_stop_plain_completion(template, tmp_path, capsys):
    path = make_model(tmp_path / "m.gguf", keys={"tokenizer.chat_template": template})
    line = refused(capsys, "run", path, "-p", "x", "-n", 2)
    assert line.startswith("edgellama: the chat template")
    status, out, err = command(capsys, "run", path, "-p", "x", "-n", 2, "--raw")
    assert (status, err) == (0, "")
    assert out.endswith("\n")
