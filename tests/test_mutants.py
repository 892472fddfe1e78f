# ruff: noqa: F403, F405
"""Files changed at random, by bytes and by pieces: only `EdgeLlamaError` may come out of them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import config_of, make_checkpoint, random_weights, write_gguf
from make_gguf import make_model
from raw_gguf import *

from edgellama.convert.families import plan
from edgellama.errors import EdgeLlamaError
from edgellama.gguf import open_gguf
from edgellama.models.config import read_config
from edgellama.tokenizer import load_tokenizer

N_MUTANTS = 700
INTEGERS = (0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 512, 1025, 1 << 16, (1 << 31) - 1, 1 << 31,
            (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 2.0, 1e-6, 1e-30, 1e30, 3e38, float("nan"), float("inf"))
TEXTS = ("", "\0", " ", "a b", "llama", "gpt2", "gemma3", "yarn", "linear", "model", "<0x41>",
         "<0xZZ>", "\x1b[2J\n", "世界", "x" * 300, "{% if %}")  # fmt: skip


def flipped(rng: random.Random, whole: bytes) -> bytes:
    """Bytes changed, cut off, repeated or left out, mostly where the header is."""
    raw = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(raw) if rng.random() < 0.1 else min(len(raw), 9000))
        n = rng.choice((1, 2, 4, 8, 40))
        match rng.randrange(6):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at] = rng.randrange(256)
            case 2:
                raw[at : at + 8] = u64(rng.choice(INTEGERS))
            case 3:
                del raw[at:]
                return bytes(raw)
            case 4:
                del raw[at : at + n]
            case 5:
                raw[at:at] = raw[at : at + n]
    return bytes(raw)


def rebuilt(rng: random.Random, pieces: tuple[list[Pair], list[Tensor], bytes]) -> bytes:
    """A file whose structure is sound, or nearly, and whose contents are not."""
    pairs, tensors, data = list(pieces[0]), list(pieces[1]), pieces[2]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(pairs)), rng.randrange(len(tensors))
        key, kind, payload = pairs[i]
        name, shape, type_id, offset = tensors[j]
        match rng.randrange(10):
            case 0 | 1:
                given = rng.choice(rng.choice(((*INTEGERS, -1, True), FLOATS, TEXTS)))
                pairs[i] = (key, *value(given))
            case 2:
                raw = bytearray(payload)
                raw[rng.randrange(len(raw))] = rng.choice((0, 1, 2, 6, 8, 32, 255))
                pairs[i] = (key, kind, bytes(raw))
            case 3:
                n = rng.choice((0, 1, 2, 327, 328, 329))
                element = rng.choice((U8, I32, F32, F64, STRING))
                filler = text(rng.choice(TEXTS)) if element == STRING else bytes(8)
                pairs[i] = (key, ARRAY, array(element, filler * n, n))
            case 4:
                del pairs[i]
            case 5:
                pairs.append((rng.choice(pairs)[0] + rng.choice((b"", b"x")), kind, payload))
            case 6:
                sizes = [rng.choice((*shape, *INTEGERS)) for _ in range(rng.choice((1, 2, 2, 3)))]
                tensors[j] = (name, sizes, type_id, offset)
            case 7:
                tensors[j] = (
                    name,
                    shape,
                    rng.choice((0, 1, 2, 8, 12, 24, 28, 30, 39, 137)),
                    offset,
                )
            case 8:
                tensors[j] = (name, shape, type_id, rng.choice((0, offset + 1, *INTEGERS)))
            case 9:
                other = rng.choice((tensors[rng.randrange(len(tensors))][0], b"", b"blk.1.x"))
                tensors[j] = (other, shape, type_id, offset)
    return build(pairs, tensors, data)


def survive(path: Path, *, run: bool) -> str:
    """Do all that `run` and `verify` do; only one of our errors may come out. Return how far it got."""
    from edgellama.runtime.engine import Engine

    stage, message = "opened", ""
    try:
        with open_gguf(path) as gguf:
            config = read_config(gguf)
            stage = "configured"
            tokenizer = load_tokenizer(gguf.metadata)
            ids = tokenizer.encode("the\n世 <s>", parse_special=True)
            tokenizer.decode(ids)
            for name in gguf.tensors:
                gguf.bytes_of(name).check()
            stage = "sound"
            if run:
                engine = Engine(gguf, config, n_ctx=32, n_batch=8, n_threads=1)
                engine.logits([i % config.n_vocab for i in ids[:12]])
                engine.close()
                stage = "run"
    except EdgeLlamaError as error:
        message = str(error)
    assert len(message) < 1500
    assert "\n" not in message
    return stage


@pytest.mark.parametrize(
    ("arch", "vocabulary", "seed"), [("llama", "bpe", 1), ("gemma3", "spm", 2), ("llama", "spm", 3)]
)
def test_mutants(arch, vocabulary, seed, tmp_path):
    """Longer hunts: other seeds, and more of them."""
    rng = random.Random(seed)
    path = make_model(
        tmp_path / "m.gguf", arch, format_name="q8_0", vocabulary=vocabulary, n_layers=1, width=64,
        n_heads=2, n_kv_heads=1, head_size=32, ffn=64, biases=vocabulary == "bpe",
    )  # fmt: skip
    whole, pieces = path.read_bytes(), dismantle(path)
    assert build(*pieces) == whole
    assert survive(path, run=True) == "run"
    stages = Counter()
    for i in range(N_MUTANTS):
        path.write_bytes(flipped(rng, whole) if i % 2 else rebuilt(rng, pieces))
        stages[survive(path, run=i % 10 == 0)] += 1
    assert stages["opened"] > N_MUTANTS // 4  # the rest was read and refused later, or is sound
    assert stages["sound"] + stages["run"] > N_MUTANTS // 20


@pytest.mark.parametrize("family", ["phi4-mini", "stablelm-12b", "olmo3", "granite"])
def test_mutants_of_families(family, tmp_path):
    """What their files hold beside Llama's: stacks, divisors, norms of heads, patterns, multipliers."""
    rng = random.Random(family)
    config = config_of(family) | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    checkpoint = make_checkpoint(config, random_weights(config))
    path = write_gguf(tmp_path / "m.gguf", plan(checkpoint))
    whole, pieces = path.read_bytes(), dismantle(path)
    assert survive(path, run=True) == "run"
    for i in range(N_MUTANTS // 4):
        path.write_bytes(flipped(rng, whole) if i % 2 else rebuilt(rng, pieces))
        survive(path, run=i % 10 == 0)
