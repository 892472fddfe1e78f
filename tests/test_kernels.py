"""The compiler, its files, and kernels at the edges of what their registers hold."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest
from kernel_calls import pack_rows

from edgellama.gguf.synthetic import random_blocks
from edgellama.kernels import layout, targets, team
from edgellama.kernels.blocks import FORMATS, STRIP
from edgellama.kernels.compiler import BuildError, Pack, build, missing_objects, object_path
from edgellama.kernels.image import ExecutableMemory
from edgellama.kernels.link import LinkError, flatten
from edgellama.runtime.packs import load_pack

HOST = targets.detect()
SMALL = "norm.rms_norm"


# --- objects --------------------------------------------------------------------------------------
def test_damaged_and_foreign_objects_are_built_again(tmp_path: Path) -> None:
    build([SMALL], HOST, tmp_path, n_processes=1)
    path = object_path(SMALL, HOST, tmp_path)
    whole = path.read_bytes()
    for at in (0, 70, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert missing_objects([SMALL], HOST, tmp_path) == [SMALL]
        with pytest.raises(BuildError, match="damaged"):
            Pack(HOST, tmp_path).load([SMALL])
    for size in (0, 10, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert missing_objects([SMALL], HOST, tmp_path) == [SMALL]
    path.write_bytes(whole)
    assert missing_objects([SMALL], HOST, tmp_path) == []
    if hasattr(ctypes, "pythonapi") and path.stat().st_mode:
        path.chmod(0o622)  # others may write
        assert missing_objects([SMALL], HOST, tmp_path) == [SMALL]


def test_two_builders_at_once(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=build, args=([SMALL], HOST, tmp_path), kwargs={"n_processes": 1})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pack = Pack(HOST, tmp_path)
    pack.load([SMALL])
    assert pack[SMALL].address
    assert [p.suffix for p in path_of_tier(tmp_path).iterdir()] == [".bin"]


def path_of_tier(folder: Path) -> Path:
    return folder / HOST.name


def test_an_unknown_operation_is_one_error(tmp_path: Path) -> None:
    for name in ("matmul.project[q9]", "matmul.nothing", "nowhere.f"):
        with pytest.raises(BuildError, match=name.partition("[")[0].partition(".")[0]):
            build([name], HOST, tmp_path, n_processes=1)


def test_images_refuse_what_they_cannot_resolve() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(HOST.triple).create_target_machine(reloc="pic")

    def elf(text: str) -> bytes:
        return machine.emit_object(llvm.parse_assembly(f'target triple = "{HOST.triple}"\n{text}'))

    with pytest.raises(LinkError, match="needed from outside"):
        flatten(
            elf("declare void @elsewhere()\ndefine void @f() { call void @elsewhere() ret void }"),
            "f",
        )
    with pytest.raises(LinkError, match="writable"):
        flatten(elf("@state = global i64 7\ndefine ptr @f() { ret ptr @state }"), "f")
    image, entry = flatten(elf("define i64 @f(i64 %a) { %b = mul i64 %a, 3 ret i64 %b }"), "f")
    memory = ExecutableMemory([b"", image, image])
    for address in memory.addresses[1:]:
        assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address + entry)(14) == 42


# --- arithmetic -----------------------------------------------------------------------------------
def project(
    format_name: str,
    raw: np.ndarray,
    x: np.ndarray,
    residual: np.ndarray | None = None,
    per_part: int = 1,
) -> np.ndarray:
    """x (T, n_cols) times the rows of `raw` (n_rows, row bytes), plus a residual, by the kernels."""
    format_ = FORMATS[format_name]
    (n_tokens, n_cols), n_rows = x.shape, len(raw)
    names = [f"repack.repack[{format_name}]", f"matmul.project[{format_name}]"]
    if format_.activation != "f32":
        names.append(f"quantize.quantize[{format_.activation}]")
    pack = load_pack([*names, *team.NAMES], HOST)
    packed = pack_rows(pack, format_name, raw, n_cols)
    n_blocks = n_cols // 32
    y = np.zeros((n_tokens, n_blocks * layout.ACTIVATION_NBYTES[format_.activation]), np.uint8)
    out = np.zeros((n_tokens, n_rows), np.float32) if residual is None else residual.copy()
    table = np.zeros((2, layout.RECORD_NBYTES // 8), np.int64)
    if len(names) == 3:
        team.fill_record(
            table[0], pack[names[2]],
            {"out": y.ctypes.data, "out_stride": y.strides[0], "x": x.ctypes.data,
             "x_stride": x.strides[0], "n_blocks": n_blocks}, tokens=8,
        )  # fmt: skip
    source = y if len(names) == 3 else x
    team.fill_record(
        table[1], pack[names[1]],
        {"out": out.ctypes.data, "out_stride": out.strides[0], "x": source.ctypes.data,
         "x_stride": source.strides[0], "w": packed.ctypes.data, "bias": 0, "n_blocks": n_blocks,
         "n_strips": n_rows // STRIP, "per_part": per_part,
         "residual": int(residual is not None)},
        parts=-(-n_rows // STRIP // per_part), tokens=1 << 30, wait=1,
    )  # fmt: skip
    step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
    step[layout.STEP_N_TOKENS // 8] = n_tokens
    threads = team.Team(pack, 2, 1 << 20)
    threads.use(table)
    threads.run(step, 0 if len(names) == 3 else 1, 2)
    threads.close()
    return out


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("code", [0xFF, 0x00])
def test_codes_and_activations_at_their_ends(format_name: str, code: int, sign: float) -> None:
    """Nothing saturates: every code at its largest or smallest, every activation at an end of its range."""
    import gguf

    n_rows, n_cols = STRIP, 512
    raw = random_blocks(format_name, n_rows, n_cols, np.random.default_rng(0))
    kind = gguf.GGMLQuantizationType(FORMATS[format_name].type_id)
    if FORMATS[format_name].n_weights > 1:
        blocks = raw.reshape(-1, FORMATS[format_name].nbytes)
        scales = {"q2_k": slice(80, 84), "q3_k": slice(108, 110), "q6_k": slice(192, 210)}
        kept = scales.get(format_name, slice(0, 16 if format_name[-1] == "k" else 4))
        codes = np.ones(blocks.shape[1], bool)
        codes[kept] = False
        blocks[:, codes] = code ^ 0x80 if format_name == "q8_0" else code
    weights = gguf.quants.dequantize(raw, kind).astype(np.float64)
    x = np.full((13, n_cols), sign, np.float32)
    out = project(format_name, raw, x)
    exact = x.astype(np.float64) @ weights.T
    scale = np.abs(weights).sum(axis=1)
    assert (np.abs(out - exact) <= 3e-6 * scale).all()
    assert (out == out[0]).all()  # tiles and tails alike
    assert np.array_equal(project(format_name, raw, x[:1])[0], out[0])


@pytest.mark.parametrize("format_name", ["q4_1", "q6_k"])
def test_rounds_of_tokens_chunks_of_columns_and_many_strips(format_name: str) -> None:
    """More tokens, columns and rows than byte kernels take at a time, and not a multiple of it."""
    rng = np.random.default_rng(2)
    n_cols = {"q4_1": 544, "q6_k": 768}[format_name]
    raw = random_blocks(format_name, 11 * STRIP, n_cols, rng)
    x = rng.standard_normal((523, n_cols)).astype(np.float32)
    out = project(format_name, raw, x, per_part=10)
    for t in (0, 5, 515, 516, 517, 522):
        assert np.array_equal(project(format_name, raw, x[t : t + 1])[0], out[t]), t


@pytest.mark.parametrize("format_name", ["f16", "q8_0", "q4_1"])
def test_rests_of_tiles_take_the_residual_once(format_name: str) -> None:
    rng = np.random.default_rng(1)
    raw = random_blocks(format_name, 2 * STRIP, 512, rng)
    x = rng.standard_normal((19, 512)).astype(np.float32)
    residual = rng.standard_normal((19, 2 * STRIP)).astype(np.float32)
    each = np.vstack(
        [project(format_name, raw, x[i : i + 1], residual[i : i + 1]) for i in range(19)]
    )
    for n in (5, 6, 7, 8, 11, 19):
        assert np.array_equal(project(format_name, raw, x[:n], residual[:n]), each[:n]), n
