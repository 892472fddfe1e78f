# ruff: noqa: F403, F405
"""Hostile containers, class by class: one line that names the place, status 2, soon, in little memory.

What is wrong inside a sound container is in test_hostile_models.py, and at random in test_mutants.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from command_line import command, refused
from make_gguf import make_model
from raw_gguf import *

from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.gguf import cursor, open_gguf
from edgellama.models.config import read_config

MAX_64 = (1 << 64) - 1
ONE = [("x", [32], 0, 0)]  # a tensor of 32 floats
DATA = bytes(128)


def bomb(depth: int) -> bytes:
    return (u32(ARRAY) + u64(1)) * depth + u32(U8) + u64(0)


def one_pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return header(0, 1) + pair(key, kind, payload)


def one_tensor(*changed: object) -> bytes:
    name, shape, type_id, offset = (*changed, *ONE[0][len(changed) :])
    return build(tensors=[(name, shape, type_id, offset)], data=DATA)  # type: ignore[list-item]


def two_tensors(second: int, first: int = 0) -> bytes:
    return build(tensors=[("x", [32], 0, first), ("y", [32], 0, second)], data=bytes(512))


# --- the container: name of the case, bytes, what the message must say ---------------------------
HEADERS = {
    "empty": (b"", "0 bytes"),
    "magic-only": (b"GGUF", "4 bytes"),
    "23-bytes": (header()[:23], "23 bytes"),
    "magic": (header(magic=b"GGML"), r"b'GGML'.*byte 0"),
    "magic-swapped": (header(magic=b"FUGG"), r"b'FUGG'.*byte 0"),
    "version-0": (header(version=0), r"version 0.*byte 4"),
    "version-1": (header(version=1), r"version 1.*byte 4"),
    "version-next": (header(version=4), r"version 4.*byte 4"),
    "version-max": (header(version=-1), r"version 4294967295.*byte 4"),
    "big-endian-2": (header(version=2 << 24), r"big-endian.*byte 4"),
    "big-endian-3": (header(version=3 << 24), r"big-endian.*byte 4"),
    "tensors-max": (header(MAX_64), r"18446744073709551615 tensors.*byte 8"),
    "tensors-2^63": (header(1 << 63), r"9223372036854775808 tensors.*byte 8"),
    "tensors-many": (header(65537), r"65537 tensors.*byte 8"),
    "tensors-too-many": (header(1000), r"tensor 0 needs 8 bytes but 0 are left.*byte 24"),
    "keys-max": (header(0, MAX_64), r"18446744073709551615 metadata keys.*byte 16"),
    "keys-2^63": (header(0, 1 << 63), r"9223372036854775808 metadata keys.*byte 16"),
    "keys-many": (header(0, 65537), r"65537 metadata keys.*byte 16"),
    "keys-too-many": (header(0, 1000), r"key 0 needs 8 bytes but 0 are left.*byte 24"),
}
PAIRS = {
    "key-length-max": (header(0, 1) + u64(MAX_64), r"key 0 claims 18446744073709551615.*byte 24"),
    "key-length-2^62": (header(0, 1) + u64(1 << 62), r"key 0 claims 4611686018427387904.*byte 24"),
    "key-too-long": (one_pair("k" * 65537, U8, b"\0"), r"key 0 claims 65537 bytes.*byte 24"),
    "key-cut": (header(0, 1) + text("abc", 99), r"needs 99 bytes but 3 are left.*byte 32"),
    "key-empty": (one_pair("", U8, b"\0"), r"key 0 is empty.*byte 24"),
    "key-not-utf-8": (one_pair(b"\xff\xfe", U8, b"\0"), r"key 0 is not UTF-8.*byte 24"),
    "key-surrogate": (one_pair(b"\xed\xa0\x80", U8, b"\0"), r"key 0 is not UTF-8.*byte 24"),
    "key-twice": (
        header(0, 2) + pair("k", U8, b"\0") + pair("k", U8, b"\0"), r"'k' appears twice.*byte 38"
    ),
    "key-of-a-terminal": (one_pair("\x1b[2J\n", 13, b""), r"'\\x1b\[2J\\n' has value type 13"),
    "type-13": (one_pair("k", 13, b"\0"), r"'k' has value type 13.*byte 33"),
    "type-minus-1": (one_pair("k", -1, b"\0"), r"'k' has value type 4294967295.*byte 33"),
    "value-cut": (one_pair("k", U64, b"\0"), r"'k' needs 8 bytes but 1 are left.*byte 37"),
    "bool-2": (one_pair("k", BOOL, b"\2"), r"'k' is a bool with value 2.*byte 37"),
    "bools-2": (one_pair("k", ARRAY, array(BOOL, b"\0\2", 2)), r"'k' is an array of bools"),
    "string-2^62": (one_pair("k", STRING, u64(1 << 62)), r"'k' claims 4611686018427387904.*byte 37"),
    "string-max": (one_pair("k", STRING, u64(MAX_64)), r"'k' claims 18446744073709551615.*byte 37"),
    "string-1-GiB": (one_pair("k", STRING, u64(1 << 30)), r"'k' claims 1073741824.*byte 37"),
    "string-cut": (one_pair("k", STRING, text("ab", 3)), r"'k' needs 3 bytes but 2 are left"),
    "string-not-utf-8": (one_pair("k", STRING, text(b"a\x80")), r"'k' is not UTF-8.*byte 37"),
    "array-of-arrays": (one_pair("k", ARRAY, bomb(1)), r"'k' is an array of arrays.*byte 37"),
    "array-bomb": (one_pair("k", ARRAY, bomb(100_000)), r"'k' is an array of arrays.*byte 37"),
    "array-element-13": (one_pair("k", ARRAY, array(13, b"", 0)), r"'k' has element type 13"),
    "array-element-max": (one_pair("k", ARRAY, array(-1, b"", 0)), r"element type 4294967295"),
    **{
        f"array-{name}-{kind}": (one_pair("k", ARRAY, array(kind, b"\0", count)), r"'k'.*byte 49")
        for name, count in (("2^62", 1 << 62), ("2^63", 1 << 63), ("max", MAX_64), ("2^61", 1 << 61))
        for kind in (U8, U32, BOOL, F64, STRING)
    },
    "array-string-2^62": (
        one_pair("k", ARRAY, array(STRING, u64(1 << 62), 1)),
        r"'k'\[0\] needs 4611686018427387904 bytes but 0 are left",
    ),
    "alignment-i32": (one_pair("general.alignment", I32, u32(32)), r"alignment has value type 5"),
    "alignment-u64": (one_pair("general.alignment", U64, u64(32)), r"alignment has value type 10"),
    "alignment-string": (one_pair("general.alignment", STRING, text("32")), "value type 8"),
    **{
        f"alignment-{n}": (one_pair("general.alignment", U32, u32(n)), f"alignment is {n};.*byte")
        for n in (0, 3, 33, 1 << 31, (1 << 32) - 1)
    },
}  # fmt: skip
TENSORS = {
    "name-64": (one_tensor("n" * 64), r"tensor 0 claims 64 bytes; at most 63.*byte 24"),
    "name-max": (header(1) + u64(MAX_64), r"tensor 0 claims 18446744073709551615.*byte 24"),
    "name-not-utf-8": (one_tensor(b"\xc3"), r"tensor 0 is not UTF-8.*byte 24"),
    "name-twice": (build(tensors=ONE * 2, data=DATA), r"'x' appears twice.*byte 57"),
    "dims-0": (one_tensor("x", []), r"'x' has 0 dimensions.*byte 24"),
    "dims-5": (one_tensor("x", [1] * 5), r"'x' has 5 dimensions.*byte 24"),
    "dims-max": (header(1) + text("x") + u32(-1), r"'x' has 4294967295 dimensions.*byte 24"),
    "shape-negative": (one_tensor("x", [-32]), r"'x' has shape \[18446744073709551584\].*byte 24"),
    "shape-2^63": (one_tensor("x", [32, 1 << 63]), r"'x' has shape .*byte 24"),
    "shape-int32-max": (one_tensor("x", [4 * 0x7FFFFFFF] * 4), r"'x' has shape .*byte 24"),
    "shape-wraps": (
        one_tensor("x", [4194305, 4194305, 211106198978564]), r"'x' has shape .*byte 24"
    ),
    "nbytes-too-big": (one_tensor("x", [1 << 31, 1 << 31]), r"'x' ends at byte 184467440737"),
    "nbytes-exabytes": (one_tensor("x", [1 << 60], 28), r"'x' ends at byte 92233720368"),
    "row-no-block": (one_tensor("x", [33], 2), r"'x' has rows of 33.*q4_0.*multiple of 32.*byte 24"),
    "row-no-super-block": (one_tensor("x", [32], 12), r"'x' has rows of 32.*q4_k.*of 256.*byte 24"),
    **{f"type-{n}": (one_tensor("x", [32], n), rf"'x' has type {n}, a type that was removed")
       for n in (4, 5, 31, 32, 33, 36, 37, 38)},
    **{f"type-{n}": (one_tensor("x", [32], n), rf"'x' has type {n}, a private type of ik_llama")
       for n in (97, 99, 133, 137, 158, 202, 230, 399)},
    **{f"type-{n}": (one_tensor("x", [32], n), rf"'x' has type {n}, no type of GGUF")
       for n in (43, 96, 100, 132, 159, 201, 400, (1 << 32) - 1)},
    "offset-max": (one_tensor("x", [32], 0, MAX_64), r"'x' has offset 18446744073709551615.*byte 24"),
    "offset-beyond": (one_tensor("x", [32], 0, 1 << 40), r"'x' has offset 1099511627776.*byte 24"),
    "offset-unaligned": (one_tensor("x", [32], 0, 4), r"'x' has offset 4;.*byte 24"),
    "offset-overlaps": (two_tensors(96), r"'y' has offset 96;.*belongs at 128"),
    "offset-same": (two_tensors(0), r"'y' has offset 0;.*belongs at 128"),
    "offset-gap": (two_tensors(160), r"'y' has offset 160;.*belongs at 128"),
    "offset-order": (two_tensors(0, 128), r"'x' has offset 128;.*belongs at 0"),
    "alignment-of-others": (
        build([(b"general.alignment", U32, u32(64))], [*ONE, ("y", [8], 0, 128), ("z", [8], 0, 160)],
              bytes(512), 64),
        r"'z' has offset 160;.*aligned to 64 bytes.*belongs at 192",
    ),
    "alignment-past-the-end": (
        build([(b"general.alignment", U32, u32(1 << 30))], ONE, DATA), r"'x' ends at byte 10737419"
    ),
    "sum-overflows": (
        build(tensors=[("x", [0x7FFFFFFFFFFFFFC0], 24, 0),
                       ("y", [0x7FFFFFFFFFFFFFC0], 24, 0x7FFFFFFFFFFFFFC0)], data=DATA),
        r"'x' ends at byte 92233720368547758",
    ),
    "cut-by-1": (build(tensors=ONE, data=DATA[:-1]), r"'x' ends at byte 192 but the file has 191"),
    "no-data": (build(tensors=ONE), r"'x' ends at byte 192 but the file has 64"),
}  # fmt: skip
CONTAINERS = HEADERS | PAIRS | TENSORS


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name, tmp_path, capsys):
    raw, message = CONTAINERS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=message) as error:
        open_gguf(path)
    assert "\n" not in str(error.value)
    foreign = name.startswith(("version", "big-endian", "type-")) and name not in PAIRS
    assert isinstance(error.value, UnsupportedModelError) == foreign
    lines = {
        refused(capsys, "info", path),
        refused(capsys, "verify", path),
        refused(capsys, "run", path, "-p", "x"),
    }
    assert lines == {f"edgellama: {error.value}\n"}


def test_no_files(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = [tmp_path, tmp_path / "loop", tmp_path / "absent"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        places += [tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")]
    for place in places:
        for arguments in (["info", place], ["verify", place], ["run", place, "-p", "x"]):
            assert place.name in refused(capsys, *arguments)


GOOD = {
    "empty": build(),
    "no-tensors": build([(b"k", STRING, text("v"))]),
    "no-keys": build(tensors=ONE, data=DATA),
    "longer-than-needed": build(tensors=ONE, data=DATA + b"more"),
    "zero-columns": build(tensors=[("x", [0], 0, 0), ("y", [32], 0, 0)], data=DATA),
    "zero-rows": build(tensors=[("x", [32, 0], 2, 0), ("y", [0, 1 << 62], 12, 0)]),
    "alignment-1": build([(b"general.alignment", U32, u32(1))], [("x", [1], 24, 0), ("y", [1], 0, 1)],
                         bytes(5), 1),
    "alignment-64": build([(b"general.alignment", U32, u32(64))], ONE, DATA, 64),
    "alignment-2^16": build([(b"general.alignment", U32, u32(1 << 16))], ONE, DATA, 1 << 16),
    "alignment-2^30-unused": build([(b"general.alignment", U32, u32(1 << 30))]),
    "version-2": header(0, 1, version=2) + pair("k", U8, b"\1"),
    "empty-array": build([(b"k", ARRAY, array(F32, b"", 0)), (b"l", ARRAY, strings([]))]),
    "tokens-not-utf-8": build([(b"k", ARRAY, array(STRING, text(b"\xff") * 2, 2))]),
    "nan-in-metadata": build([(b"k", F32, f32(float("nan"))),
                              (b"l", ARRAY, array(F32, f32(float("inf")), 1))]),
    "terminal": build([(b"\x1b[2J\n\xc2\x9b", STRING, text("\x1b[2J\n\x9b\u202e"))],
                      [("\x1b[2J\n", [32], 0, 0)], DATA),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_sound(name, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD[name])
    for arguments in (["info", path, "--tensors"], ["verify", path], ["info", path, "--json"]):
        status, out, err = command(capsys, *arguments)
        assert (status, err) == (0, "")
        assert all(c == "\n" or c.isprintable() for c in out) or "--json" in arguments
        assert "\x1b" not in out
        assert "NaN" not in out
    assert "this is no model" in refused(capsys, "run", path, "-p", "x")


def test_info_on_a_narrow_terminal(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(build([("世".encode(), STRING, text("héllo"))]))
    done = subprocess.run(
        [sys.executable, "-m", "edgellama", "info", str(path)],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert done.returncode == 0
    assert b'\\u4e16 = "h\xe9llo"' in done.stdout


def test_pieces_of_any_size_read_the_same(tmp_path, monkeypatch):
    path = make_model(tmp_path / "m.gguf", vocabulary="spm")
    with open_gguf(path) as whole:
        for first in (1, 5, 64, 1000, 4096):
            monkeypatch.setattr(cursor, "_FIRST_READ", first)
            with open_gguf(path) as gguf:
                assert gguf.tensors == whole.tensors
                assert repr(gguf.metadata) == repr(whole.metadata)


# --- memory ---------------------------------------------------------------------------------------
def test_memory_follows_the_file(tmp_path):
    """Reading takes a few times the bytes of the file, whatever the file claims."""
    path = tmp_path / "m.gguf"
    large = [
        header(0, 1) + pair("k", ARRAY, array(STRING, text("ab") * 30_000, 30_000)),
        header(0, 8_000) + b"".join(pair(f"{i:05}", U8, b"\0") for i in range(8_000)),
        header(8_000) + b"".join(tensor(f"{i:05}", [0]) for i in range(8_000)),
        header(0, 1) + pair("k", STRING, text("世" * 100_000)),
    ]
    for raw in [*(raw for raw, _ in CONTAINERS.values()), *large]:
        path.write_bytes(raw)
        tracemalloc.start()
        with contextlib.suppress(ModelFileError):
            open_gguf(path).close()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20 * len(raw) + 100_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
def test_bombs_under_a_limit(tmp_path):
    """Files of a few bytes that claim the most, in a process that may have 64 MB more."""
    names = [
        n for n in CONTAINERS if any(s in n for s in ("max", "2^6", "GiB", "bomb", "many", "big"))
    ]
    for i, name in enumerate(names):
        (tmp_path / f"{i}.gguf").write_bytes(CONTAINERS[name][0])
    code = f"""
import resource
from pathlib import Path
from edgellama.errors import ModelFileError
from edgellama.gguf import open_gguf
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        open_gguf(path)
    except ModelFileError:
        continue
    raise SystemExit(f"{{path}} was opened")
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10


def test_no_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def open_gguf(_: Path) -> None:
        raise MemoryError

    monkeypatch.setattr("edgellama.cli.inspect.open_gguf", open_gguf)
    assert "memory ran out" in refused(capsys, "info", tmp_path)


def test_metadata_has_a_budget(tmp_path, capsys, monkeypatch):
    """Files with holes take no disk; nothing of them is read past the budget."""
    path = tmp_path / "m.gguf"
    path.write_bytes(header(0, 1) + pair("k", STRING, u64(1 << 26)))
    os.truncate(path, 1 << 30)
    message = "'k' needs 67108864 bytes; all metadata may have 67108864 bytes"
    assert message in refused(capsys, "info", path)
    monkeypatch.setattr(cursor, "MAX_HEADER_NBYTES", 1 << 20)
    for start, message in (
        (array(U8, b"", 100_000_000), "'k' needs 100000000 bytes; all"),
        (array(STRING, u64(100_000_000), 2), "'k'[0] needs 100000000 bytes; all"),
        (array(STRING, b"", 1 << 40), "'k'[131065] needs 8 bytes; all"),
    ):
        path.write_bytes(header(0, 1) + pair("k", ARRAY, start))
        os.truncate(path, 1 << 30)
        assert message in refused(capsys, "info", path)


# --- files that change ----------------------------------------------------------------------------
def test_shrinks_while_the_header_is_read(tmp_path, monkeypatch):
    path = make_model(tmp_path / "m.gguf", n_vocab=2000)
    whole = path.stat().st_size
    read = cursor.Part.read

    def cut_after(part, out, start, what):
        read(part, out, start, what)
        os.truncate(path, start + len(out))

    monkeypatch.setattr(cursor, "_FIRST_READ", 64)
    monkeypatch.setattr(cursor.Part, "read", cut_after)
    with pytest.raises(ModelFileError, match=f"shrank from {whole} to 64 bytes"):
        open_gguf(path)


def test_shrinks_while_weights_load(tmp_path):
    from edgellama.runtime.engine import Engine

    path = make_model(tmp_path / "m.gguf")
    with open_gguf(path) as gguf:
        config = read_config(gguf)
        os.truncate(path, 90000)
        with pytest.raises(
            ModelFileError, match=r"shrank from \d+ to 90000 bytes .*'[\w.]+' is gone"
        ):
            Engine(gguf, config, n_threads=2)
        with pytest.raises(ModelFileError, match="shrank"):
            gguf.bytes_of("blk.1.ffn_norm.weight").check()


def test_a_file_that_is_replaced_is_still_read(tmp_path):
    path = make_model(tmp_path / "m.gguf")
    with open_gguf(path) as gguf:
        before = gguf.data("token_embd.weight")
        path.unlink()
        path.write_bytes(b"GGUF")
        assert np.array_equal(gguf.data("token_embd.weight"), before)
