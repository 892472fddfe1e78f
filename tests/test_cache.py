"""What the cache holds is what its tokens say, whoever shares it: cuts, forks, reuse, aborts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_gguf import make_model

from edgellama.errors import ContextOverflowError
from edgellama.gguf import open_gguf
from edgellama.models.config import read_config
from edgellama.runtime.engine import Aborted, Engine
from edgellama.runtime.kvcache import PAGE, KVCache, Sequence


class CheckedCache:
    """A cache whose "keys and values" say which tokens they are of: every read can be checked."""

    def __init__(self) -> None:
        self.cache = KVCache(n_layers=2, n_kv_heads=1, head_size=32, n_pages=6, kv_type="f32")
        self.content: dict[bytes, list[int]] = {}

    def slots(self, page: int) -> np.ndarray:
        return self.cache._bytes[1, page].view(np.int64)

    def append(self, sequence: Sequence, ids: list[int]) -> bool:
        """Evaluate tokens, or, where there is no room, change nothing and say so."""
        before = len(sequence.tokens)
        skip = 0 if sequence.tokens else self.cache.reuse_prefix(sequence, ids)
        ids = ids[skip:]
        try:
            self.cache.reserve(sequence, len(sequence.tokens) + len(ids))
        except ContextOverflowError:
            self.cache.truncate(sequence, before)
            return False
        text = [*sequence.tokens, *ids]
        for i in range(len(sequence.tokens), len(text)):
            page = int(sequence.table[i // PAGE])
            assert page not in self.cache._key_of, "what is known was written"
            assert self.cache._n_users[page] == 1, "what is shared was written"
            self.slots(page)[i % PAGE] = hash(tuple(text[: i + 1]))
        self.cache.commit(sequence, ids)
        for i, key in enumerate(sequence.keys):
            ends = range(i * PAGE + 1, (i + 1) * PAGE + 1)
            self.content[key] = [hash(tuple(text[:end])) for end in ends]
        return True

    def check(self, sequences: list[Sequence]) -> None:
        cache = self.cache
        used = [page for sequence in sequences for page in sequence.pages]
        assert [used.count(page) for page in range(cache.n_pages)] == cache._n_users
        assert sorted({*used, *cache._free, *cache._idle}) == list(range(cache.n_pages))
        assert len({*used}) + len(cache._free) + len(cache._idle) == cache.n_pages
        assert {page: key for key, page in cache._by_key.items()} == cache._key_of
        assert {*cache._idle} <= {*cache._key_of}
        for page, key in cache._key_of.items():
            assert self.slots(page)[:PAGE].tolist() == self.content[key]
        for sequence in sequences:
            n = len(sequence.tokens)
            assert len(sequence.pages) == -(-n // PAGE)
            assert len(sequence.keys) == n // PAGE
            assert sequence.table[: len(sequence.pages)].tolist() == sequence.pages
            for i in range(n):
                value = self.slots(sequence.pages[i // PAGE])[i % PAGE]
                assert value == hash(tuple(sequence.tokens[: i + 1]))


@pytest.mark.parametrize("seed", range(12))
def test_random_cuts_and_growth_keep_the_cache_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    checked = CheckedCache()
    sequences = [Sequence(4 * PAGE) for _ in range(3)]
    n_cut = n_shared = n_full = 0
    for _ in range(150):
        sequence = sequences[rng.integers(3)]
        kinds = ["anew", "append", "cut back", "cut", "fork"]
        kind = rng.choice(kinds, p=[0.2, 0.35, 0.2, 0.1, 0.15])
        if kind == "anew":
            checked.cache.truncate(sequence, 0)
        if kind == "fork":
            other = int(rng.integers(3))
            if sequences[other] is not sequence:
                checked.cache.truncate(sequences[other], 0)
                sequences[other] = checked.cache.fork(sequence)
            checked.check(sequences)
            continue
        n_before = len(sequence.tokens)
        if kind in ("anew", "append"):
            n = int(rng.integers(1, 4 * PAGE if kind == "anew" else 9))
            ids = [0] * min(n, 4 * PAGE - n_before)
            if rng.random() < 0.3 and ids:
                ids[rng.integers(len(ids))] = 1
            n_full += not checked.append(sequence, ids)
            n_shared += max(checked.cache._n_users) > 1
        else:
            most = min(n_before, 7) if kind == "cut back" else n_before
            keep = n_before - int(rng.integers(0, most + 1))
            checked.cache.truncate(sequence, keep)
            n_cut += keep % PAGE > 0
            assert len(sequence.tokens) == keep
        checked.check(sequences)
    assert n_cut > 10
    assert n_shared > 5
    assert n_full > 0


def test_a_shared_page_is_copied_and_a_private_one_is_not() -> None:
    checked = CheckedCache()
    first, second = Sequence(4 * PAGE), Sequence(4 * PAGE)
    checked.append(first, [0] * (PAGE + 1))
    checked.append(second, [0] * (PAGE + 3))
    assert first.pages[0] == second.pages[0]
    shared = first.pages[0]
    checked.cache.truncate(second, PAGE - 3)
    checked.append(second, [1])
    assert second.pages[0] != shared == first.pages[0]
    checked.check([first, second])
    checked.cache.truncate(first, PAGE - 3)
    assert first.pages == [shared]
    checked.append(first, [2] * 3)
    checked.check([first, second])


def test_forks_go_on_as_if_alone(tmp_path: Path) -> None:
    """From a page that is half full, in the same step, and after the one they came from was freed."""
    with open_gguf(make_model(tmp_path / "m.gguf")) as gguf:
        engine = Engine(gguf, read_config(gguf), n_ctx=256, n_threads=2)
    ids = np.random.default_rng(1).integers(0, 256, 120).tolist()
    ends = [[*ids[:75], i, i + 1, i + 2] for i in range(4)]
    expected = [engine.logits(end)[-3:] for end in ends]
    first = engine.new_sequence()
    engine.evaluate(first, ids[:75])
    before = engine._cache._n_users.count(1)
    texts = [first, *(engine.fork(first) for _ in range(3))]
    assert engine._cache._n_users.count(4) == before == 3
    for at in range(3):
        rows = engine.step([(s, [end[75 + at]]) for s, end in zip(texts, ends, strict=True)])
        for row, logits in zip(rows, expected, strict=True):
            assert np.array_equal(row, logits[at])
    engine.free(first)
    again = engine.fork(texts[1])
    assert np.array_equal(engine.evaluate(again, ids[:40]), engine.evaluate(texts[1], ids[:40]))
    for text in (again, *texts[1:]):
        engine.free(text)
    assert not any(engine._cache._n_users)
    engine.close()


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_random_cuts_against_a_fresh_engine(tmp_path: Path, arch: str) -> None:
    path = make_model(tmp_path / "m.gguf", arch, window=40)
    with open_gguf(path) as gguf:
        engine, fresh = (
            Engine(gguf, read_config(gguf), n_ctx=96, n_batch=48, n_threads=2) for _ in range(2)
        )
    rng = np.random.default_rng(7)
    sequences = [engine.new_sequence() for _ in range(2)]
    for _ in range(60):
        sequence = sequences[rng.integers(2)]
        n = int(rng.integers(1, 20))
        if len(sequence.tokens) + n > 96 or rng.random() < 0.3:
            engine.truncate(sequence, int(rng.integers(0, len(sequence.tokens) + 1)))
            continue
        ids = rng.integers(0, 3, n).tolist()
        if rng.random() < 0.2:
            engine.abort()
            with pytest.raises(Aborted):
                engine.evaluate_each(sequence, ids)
        expected = fresh.logits([*sequence.tokens, *ids])[-n:]
        if rng.random() < 0.5:
            assert np.array_equal(engine.evaluate_each(sequence, ids), expected)
        else:
            assert np.array_equal(engine.evaluate(sequence, ids), expected[-1])
    engine.close()
    fresh.close()


def test_an_abort_in_a_later_chunk_forgets_what_the_first_made_known(tmp_path: Path) -> None:
    with open_gguf(make_model(tmp_path / "m.gguf")) as gguf:
        engine = Engine(gguf, read_config(gguf), n_ctx=128, n_batch=64, n_threads=1)
    ids = [1] * 10 + [2] * 100
    expected = engine.logits(ids)[-1]
    sequence = engine.new_sequence()
    engine.evaluate(sequence, ids[:10])
    run, calls = engine._run, iter([0, 1])

    def stop_second(first: int, last: int) -> None:
        if next(calls):
            raise KeyboardInterrupt
        run(first, last)

    engine._run = stop_second  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.evaluate(sequence, ids[10:])
    engine._run = run  # type: ignore[method-assign]
    engine.evaluate(sequence, [3] * 40)
    other = engine.new_sequence()
    assert np.array_equal(engine.evaluate(other, ids), expected)
    engine.close()
