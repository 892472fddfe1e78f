"""Hostile and unlucky input of `convert`, `quantize` and `gguf`: one line, status 2, nothing left."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command_line import command, refused
from make_gguf import make_model
from test_convert import make_folder

from edgellama.gguf import open_gguf
from edgellama.gguf.new_file import NewFile
from edgellama.gguf.writer import GGUFWriter, NewTensor
from edgellama.kernels.blocks import FORMATS

A_TOKEN = {"id": 3, "content": "x", "special": True}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hostile") / "llama", "llama")


@pytest.fixture
def folder(shared, tmp_path) -> Path:
    """A sound checkpoint of which a test may change the small files."""
    copy = tmp_path / "llama"
    copy.mkdir()
    for path in shared.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def rejected(capsys, folder: Path, *options: object) -> str:
    """Convert a folder, which must be refused and leave nothing."""
    out = folder.parent / "out.gguf"
    message = refused(capsys, "convert", folder, "-o", out, *options)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    return message


def deep(n: int) -> bytes:
    """A tokenizer.json with a pre-tokenizer in n others."""
    return b'{"pre_tokenizer": %s{}%s}' % (
        b'{"type": "Sequence", "pretokenizers": [' * n, b"]}" * n
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", deep(200), "recursion limit exceeded"),
        ("tokenizer.json", deep(100_000), "nested too deep"),
        ("tokenizer.json", b"[" * 100_000, "nested too deep"),
        ("tokenizer.json", b"\xff{}", "is not sound JSON"),
        ("added_tokens.json", b'{"x": "y"}', "'x' has the id 'y'; a number is needed"),
        ("added_tokens.json", b'{"x": -3}', "has id -3; the model has 300 rows"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
        ("generation_config.json", b'{"top_k": 1e400}', "top_k is inf; a number is needed"),
        ("generation_config.json", b'{"temperature": 1e300}', "temperature is 1e+300"),
        ("generation_config.json", b'{"top_p": "much"}', "top_p is 'much'; a number is needed"),
        ("generation_config.json", b'{"eos_token_id": ["x"]}', "eos_token_id is an array of 1"),
        ("generation_config.json", b'{"top_k": NaN}', "NaN is not JSON"),
    ],
)  # fmt: skip
def test_a_file_beside_the_weights(capsys, folder, file, content, message):
    (folder / file).write_bytes(content)
    assert message in rejected(capsys, folder)


def in_model(**changes: object):
    return lambda document: document["model"].update(changes)


def in_vocab(text: str, token: object):
    return lambda document: document["model"]["vocab"].update({text: token})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer.json", in_vocab("a", -1), "cannot be used"),
        ("tokenizer.json", in_vocab("a", "1"), "cannot be used"),
        ("tokenizer.json", in_vocab("new", 5), "gives the id 5 to"),
        ("tokenizer.json", in_vocab("new", 10**9), "300 rows of embeddings"),
        ("tokenizer.json", in_vocab("\ud800", 289), "cannot be used"),
        ("tokenizer.json", in_model(vocab={}, merges=[]), "has an empty vocabulary"),
        ("tokenizer.json", in_model(merges=[[1, 2]]), "cannot be used"),
        ("tokenizer.json", in_model(merges=["zz yy"]), "out of vocabulary"),
        ("tokenizer.json", in_model(continuing_subword_prefix="####"), "no place"),
        ("tokenizer.json", {"model": [1]}, "cannot be used"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "used"),
        ("tokenizer.json", {"added_tokens": ["x"]}, "cannot be used"),
        ("tokenizer.json", {"added_tokens": [A_TOKEN | {"id": -1}]}, "cannot be used"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat template 'default' is 5"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "or a list of texts with names"),
        ("tokenizer_config.json", {"chat_template": "\ud800"}, "no text that UTF-8 can hold"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "ids are needed"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": A_TOKEN}}, "ids are needed"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {}}}, "a content for each"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: A_TOKEN}}, "ids are"),
        ("tokenizer_config.json", {"bos_token": [1]}, "bos_token is an array of 1"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "it is true or false"),
        ("config.json", {"text_config": 5}, "text_config is 5; it is an object"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind(capsys, folder, file, change, message):
    document = json.loads((folder / file).read_text())
    change(document) if callable(change) else document.update(change)
    (folder / file).write_text(json.dumps(document))
    assert message in rejected(capsys, folder)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"rope_theta": 1.0}, "rope_theta", "llama.rope.freq_base is 1.0; it must be 2 to 1e+12"),
        ({"rope_theta": 1e300}, "rope_theta", "llama.rope.freq_base is 1e+300"),
        ({"rms_norm_eps": 1.5}, "rms_norm_eps", "layer_norm_rms_epsilon is 1.5"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor", "it must be 2 to 32"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor", "it must be even"),
        ({"rope_scaling": {"type": "linear", "factor": 1e9}}, "factor", "it must be 1e-06 to 1e+06"),
        ({"rope_scaling": YARN | {"beta_fast": 1e9}}, "beta_fast", "it must be 1e-06 to 1e+06"),
        ({"rope_scaling": YARN | {"attention_factor": 1e9}}, "attention_factor", "1e-06 to 1e+06"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor", "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"factor": 1e-300}}, "", "a divisor that is not above 0"),
    ],
)  # fmt: skip
def test_a_setting_that_edgellama_does_not_open(capsys, folder, change, key, message):
    """Refused before anything is written, by the key that a person can look up."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    said = rejected(capsys, folder)
    assert message in said
    assert f"config.json: {key}" in said if key else "edgellama cannot run" in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes of POSIX")
@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja"])
def test_a_link_that_leads_outside(capsys, folder, name):
    secret = folder.parent.parent / f"secret-{name}"
    secret.write_text("mine")
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    message = rejected(capsys, folder)
    assert "is a link to a file outside its folder" in message


def test_names_that_are_taken(capsys, folder, tmp_path):
    """No option makes convert overwrite what it reads, or what is no file."""
    weights = (folder / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "tokenizer.json"):
        said = refused(capsys, "convert", folder, "-o", folder / name, "--force")
        assert "is a file to be read" in said
    assert (folder / "model.safetensors").read_bytes() == weights
    assert "is a folder" in refused(capsys, "convert", folder, "-o", tmp_path, "--force")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        said = refused(capsys, "convert", folder, "-o", tmp_path / "pipe", "--force")
        assert "is a device or a pipe" in said
        assert (tmp_path / "pipe").is_fifo()
        assert "not a regular file" in refused(
            capsys, "convert", tmp_path / "pipe", "-o", tmp_path / "x"
        )


def test_options_that_fit_nothing(capsys, folder, tmp_path):
    say = partial(rejected, capsys, folder)
    assert "fits no matrix of this model" in say("--tensor-type", "ffn_upp=q8_0")
    assert "'(' is no regular expression" in say("--tensor-type", "(=q8_0")
    assert "no format is called 'q9'" in say("--tensor-type", "ffn_up=q9")
    said = say("--tensor-type", "ffn_down=q4_k")
    assert "blk.0.ffn_down.weight has 160 columns; q4_k needs a multiple of 256" in said
    assert "a file in a folder that exists" in say("--report", tmp_path / "no" / "r.json")
    assert "no such file" in say("--imatrix", tmp_path / "none").lower()
    assert "cannot be written: 'a\\udcff' is no text" in say("--name", "a\udcff")


def test_damaged_importance(capsys, folder):
    """Of every length; llama.cpp's older form, whose last bytes are a name in newer ones."""
    path = folder / "m.dat"
    name, values = b"blk.0.ffn_up.weight", np.ones(128, np.float32)
    whole = struct.pack("<ii19sii", 1, len(name), name, 4, len(values)) + values.tobytes()
    for n in (0, 3, 6, 30, 100, len(whole) - 1):
        path.write_bytes(whole[:n])
        message = rejected(capsys, folder, "--imatrix", path)
        assert "is no importance matrix, or damaged" in message or "is cut off in" in message
    path.write_bytes(whole[:35].replace(b"blk", b"\xff\n!") + whole[35:])
    assert "is of another model" in rejected(capsys, folder, "--imatrix", path)


def test_a_long_name(capsys, folder, tmp_path):
    name = "x" * 250 + ".gguf"
    assert command(capsys, "convert", folder, "-o", tmp_path / name)[0] == 0


# --- quantize and the tools -----------------------------------------------------------------------
def write(path: Path, metadata: dict, shapes: dict[str, tuple[int, ...]]) -> Path:
    tensors = [NewTensor(name, shape, FORMATS["f32"]) for name, shape in shapes.items()]
    with GGUFWriter(path, metadata, tensors) as writer:
        for tensor in tensors:
            if tensor.nbytes:
                writer.append(np.ones(tensor.shape, np.float32))
    return path


def test_what_is_no_model(capsys, tmp_path):
    out = tmp_path / "out.gguf"
    empty = write(tmp_path / "empty.gguf", {"general.architecture": "llama"}, {})
    assert "holds no tensors" in refused(capsys, "quantize", empty, out, "q4_0")
    for kind in ("adapter", "imatrix"):
        path = write(tmp_path / kind, {"general.type": kind}, {"blk.0.x.weight": (32, 2)})
        said = refused(capsys, "quantize", path, out, "q4_0")
        assert f"is of type '{kind}'; a model is needed" in said
    assert not out.exists()


def test_tensors_without_weights(capsys, tmp_path):
    shapes = {"none.weight": (32, 0), "blk.0.attn_q.weight": (32, 2), "no.columns": (0, 4)}
    path, out = write(tmp_path / "m.gguf", {}, shapes), tmp_path / "out.gguf"
    assert command(capsys, "quantize", path, out, "q8_0")[0] == 0
    with open_gguf(out) as gguf:
        assert {name: t.shape for name, t in gguf.tensors.items()} == shapes
    assert command(capsys, "gguf", "diff", out, out)[0] == 0


def test_parts_are_not_overwritten(capsys, tmp_path):
    model = make_model(tmp_path / "m.gguf", format_name="q4_0")
    say = partial(refused, capsys)
    assert command(capsys, "gguf", "split", model, tmp_path / "p", "--max-tensors", "10")[0] == 0
    first, second = (tmp_path / f"p-0000{i}-of-00002.gguf" for i in (1, 2))
    before = first.read_bytes(), second.read_bytes()
    assert "is a file to be read" in say("quantize", first, second, "q8_0", "--force")
    assert "is a file to be read" in say("gguf", "merge", first, second, "--force")
    assert "is a file to be read" in say("gguf", "set", first, "a=1")
    options = ["--max-tensors", "10", "--force"]
    assert "is a file to be read" in say("gguf", "split", first, tmp_path / "p", *options)
    assert before == (first.read_bytes(), second.read_bytes())
    assert "'0' is no size" in say("gguf", "split", model, tmp_path / "q", "--max-size", "0")


def test_values_and_keys_that_cannot_be_set(capsys, tmp_path):
    model = make_model(tmp_path / "m.gguf", format_name="q4_0")
    before = model.read_bytes()
    for pair, message in (
        ("x=1e300", "'x' cannot be written: 1e+300 is beyond what f32 holds"),
        (f"x={10**30}", "an integer needs at most 64 bits"),
        ("x=\udcff", "no text that UTF-8 can hold"),
        ("general.alignment=64", "follows from how the file is written"),
        ("split.count=2", "follows from how the file is written"),
    ):
        assert message in refused(capsys, "gguf", "set", model, pair)
    assert model.read_bytes() == before


def test_another_alignment(capsys, tmp_path):
    """A file aligned to 64 bytes is copied to one aligned to 32 that says so."""
    import gguf as package

    writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(64)
    for i in range(3):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", np.full((3, 4), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (
        command(capsys, "gguf", "set", tmp_path / "m.gguf", "a=1", "-o", tmp_path / "n.gguf")[0]
        == 0
    )
    with open_gguf(tmp_path / "n.gguf") as new:
        assert [new.data(f"blk.{i}.ffn_up.weight").view(np.float32)[0] for i in range(3)] == [
            0,
            1,
            2,
        ]


# --- processes that end or meet -------------------------------------------------------------------
QUANTIZE = "from edgellama.cli import process; process()"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_signal_leaves_nothing(tmp_path, number):
    """What is killed outright leaves a hidden file, which the next run removes."""
    model, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    write(model, {"general.architecture": "llama"}, {"blk.0.ffn_up.weight": (4096, 8192)})
    arguments = [sys.executable, "-c", QUANTIZE, "quantize", model, out, "q4_k_s", "-t", "1"]
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".out.gguf.*.part")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(getattr(signal, number))
    start = time.monotonic()
    _, said = child.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert "Traceback" not in said
    status = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}[number]
    assert child.returncode == status
    left = [p.name for p in tmp_path.iterdir() if p != model]
    assert len(left) == (number == "SIGKILL")
    NewFile(out).discard()
    assert [*tmp_path.iterdir()] == [model]


def test_the_file_of_a_living_process_is_left_alone(tmp_path):
    other = tmp_path / ".m.gguf.1.part"  # as process 1 would call it
    mine = NewFile(tmp_path / "m.gguf")
    os.rename(mine._temporary, other) if os.name == "posix" else other.touch()
    again = NewFile(tmp_path / "m.gguf")
    assert other.exists() or os.name == "nt"
    again.finish()
    again.discard()
    mine.discard()
    assert NewFile(tmp_path / "n.gguf").discard() is None
    assert other.exists() or os.name == "nt"
    NewFile(tmp_path / "m.gguf", force=True).discard()
    assert [*tmp_path.iterdir()] == [tmp_path / "m.gguf"]
