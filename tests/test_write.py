"""Writing a model piece by piece: beside encoding, in little memory, and all of it or nothing."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from math import prod
from pathlib import Path

import pytest
from checkpoints import SIZES, shapes
from command_line import command, refused
from make_gguf import make_model
from make_tokenizer import byte_level

from edgellama.convert import write
from edgellama.convert.encoder import Encoder
from edgellama.gguf.writer import GGUFWriter


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces of a small model, each of which is synced."""
    monkeypatch.setattr(write, "PIECE_NBYTES", 1 << 14)
    monkeypatch.setattr(write, "_SYNC_NBYTES", 1 << 12)


def test_pieces_do_not_show(capsys, tmp_path, monkeypatch):
    model = make_model(tmp_path / "m.gguf", format_name="f32")
    assert command(capsys, "quantize", model, tmp_path / "a.gguf", "q4_0")[0] == 0
    monkeypatch.setattr(write, "PIECE_NBYTES", 1 << 14)
    assert command(capsys, "quantize", model, tmp_path / "b.gguf", "q4_0")[0] == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_encoding_goes_on_while_a_piece_is_written(capsys, tmp_path, monkeypatch, small_pieces):
    """The first piece is written only once a second one is encoded."""
    model = make_model(tmp_path / "m.gguf", format_name="f32")
    n_encoded, enough = 0, threading.Event()
    encode, append = Encoder.encode, GGUFWriter.append

    def counted(*arguments):
        nonlocal n_encoded
        n_encoded += 1
        if n_encoded == 2:
            enough.set()
        return encode(*arguments)

    def waiting(writer, data):
        assert enough.wait(10), "nothing else was encoded meanwhile"
        append(writer, data)

    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr(GGUFWriter, "append", waiting)
    assert command(capsys, "quantize", model, tmp_path / "q.gguf", "q8_0")[0] == 0


@pytest.mark.parametrize("method", ["append", "sync"])
@pytest.mark.parametrize("n_good", [0, 3, 1000])
def test_a_disk_that_fills_is_one_line(
    capsys, tmp_path, monkeypatch, small_pieces, method, n_good
):  # fmt: skip
    """At the first piece, later on, and where the last one is written."""
    model = make_model(tmp_path / "m.gguf", format_name="f32")
    calls: list[int] = []
    original = getattr(GGUFWriter, method)

    def counted(writer, *arguments):
        calls.append(len(calls))
        if len(calls) - 1 == n_good:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(writer, *arguments)

    monkeypatch.setattr(GGUFWriter, method, counted)
    if n_good == 1000:
        assert command(capsys, "quantize", model, tmp_path / "q.gguf", "q8_0")[0] == 0
        (tmp_path / "q.gguf").unlink()
        n_good = len(calls) - 1
        calls.clear()
    assert (
        "no space left" in refused(capsys, "quantize", model, tmp_path / "q.gguf", "q8_0").lower()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("write", "read"))]


# --- memory ---------------------------------------------------------------------------------------
def make_sparse_folder(folder: Path, config: dict) -> dict[str, tuple[int, ...]]:
    """A checkpoint of BF16 zeros that takes no disk; returns the shapes of its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    byte_level(folder, "llama3", 290)
    sizes, at, header = shapes(config), 0, {}
    for name, shape in sizes.items():
        end = at + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return sizes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak from Linux")
def test_memory_holds_a_few_pieces(tmp_path):
    """At most three times the largest tensor in f32, and 300 MB: half of what all would take."""
    config = SIZES | {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096,
                      "num_hidden_layers": 12, "num_attention_heads": 16}  # fmt: skip
    sizes = make_sparse_folder(tmp_path / "m", config)
    largest, all_of_them = (4 * f(map(prod, sizes.values())) for f in (max, sum))
    program = (
        "import sys; from edgellama.cli import main\n"
        "try: main()\n"
        "finally: print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", program, "convert", tmp_path / "m", "-o", tmp_path / "q.gguf"]
    done = subprocess.run(
        [*map(str, command), "--type", "q8_0"], check=True, capture_output=True, text=True
    )
    (peak,) = (int(line.split()[1]) << 10 for line in done.stdout.splitlines() if "VmHWM" in line)
    assert 50e6 < peak < 3 * largest + 300e6 < 0.6 * all_of_them
