"""Importance matrices, collected while a model reads a text.

For every projection: the sum of the squares of what each of its columns was multiplied with.  The text is
cut into chunks that are read on their own, as llama.cpp does, and the file is what its quantizer takes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgellama.convert.importance import Sums, write_importance
from edgellama.errors import UsageError
from edgellama.gguf import open_gguf
from edgellama.gguf.new_file import check_absent
from edgellama.models.config import read_config
from edgellama.progress import progress
from edgellama.runtime.engine import Engine
from edgellama.tokenizer import Tokenizer, load_tokenizer

HEAD = ("output.weight", "token_embd.weight")


def collect_importance(
    model: Path,
    text: Path,
    out: Path,
    *,
    chunk_size: int = 512,
    n_chunks: int | None = None,
    with_head: bool = False,
    n_threads: int | None = None,
    force: bool = False,
) -> int:
    """Write the importance matrix of `model` over a text file; return the number of chunks read.

    Raises: UsageError for a text shorter than a chunk or not UTF-8, and as `GGUFWriter`; ModelFileError.
    """
    check_absent(out, force)
    with open_gguf(model) as gguf:
        names = set(gguf.tensors)
        config = read_config(gguf)  # which may list stacked tensors by their parts
        chunks = _chunks(text, load_tokenizer(gguf.metadata), chunk_size, n_chunks)
        engine = Engine(gguf, config, n_ctx=chunk_size, n_batch=chunk_size, n_threads=n_threads)
    squares: dict[str, np.ndarray] = {}

    def visit(weight: str, rows: np.ndarray) -> None:
        if weight in HEAD and not with_head:
            return
        name = weight if weight in names else _stack_of(weight)
        if name in visited:
            return
        visited.add(name)
        sums = squares.setdefault(name, np.zeros(rows.shape[1], np.float64))
        sums += np.square(rows, dtype=np.float64).sum(0)

    try:
        with progress("chunks", len(chunks), unit="") as advance:
            for ids in chunks:
                visited: set[str] = set()
                sequence = engine.new_sequence()
                engine.observe(sequence, ids, visit)
                engine.free(sequence)
                advance(1)
    finally:
        engine.close()
    n_rows = {name: len(chunks) * (1 if name in HEAD else chunk_size) for name in squares}
    sums = {name: Sums(total.astype(np.float32), n_rows[name]) for name, total in squares.items()}
    write_importance(
        out, sums, dataset=text.name, n_chunks=len(chunks), chunk_size=chunk_size, force=force
    )
    return len(chunks)


def _stack_of(weight: str) -> str:
    """The tensor of the file in which a projection is stacked with others."""
    layer, _, _ = weight.rpartition(".attn_")
    return f"{layer}.attn_qkv.weight" if layer else weight.replace("ffn_gate", "ffn_up")


def _chunks(path: Path, tokenizer: Tokenizer, size: int, n_most: int | None) -> list[list[int]]:
    """Cut a text into whole chunks; each begins with BOS where the model wants it."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start}; give a text file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    ids = tokenizer.encode(text, add_special=False)
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    step = size - len(bos)
    chunks = [bos + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    if not chunks:
        raise UsageError(
            f"{path} has {len(ids)} tokens; a chunk needs {size}: give more text, or a smaller -c"
        )
    return chunks[:n_most]
