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
from edgellama.runtime.pages import Pages


class CheckedCache:
    """A cache whose "keys and values" say which tokens they are of: every read is checked.

    Two groups: one sees all, one a window of 40 positions.  Pages are few.
    """

    def __init__(self) -> None:
        self.cache = KVCache(
            windows=[0, 40, 0],
            n_kv_heads=1,
            head_size=32,
            kv_type="f32",
            n_ctx=4 * PAGE,
            n_batch=20,
        )
        self.content: dict[bytes, list[int]] = {}

    def begin(self) -> Sequence:
        return Sequence(np.full(self.cache.table_shape, -1, np.int32))

    def slots(self, group: Pages, page: int) -> np.ndarray:
        return group.bytes[-1, page].view(np.int64)

    def look(self, sequence: Sequence, position: int) -> None:
        """Read what a token at a position sees."""
        for group, table in zip(self.cache.groups, sequence.tables, strict=True):
            low = max(0, position + 1 - group.window) if group.window else 0
            for i in range(low, position):
                assert table[i // PAGE] >= 0, "what is seen is not there"
                value = self.slots(group, int(table[i // PAGE]))[i % PAGE]
                assert value == hash(tuple(sequence.tokens[: i + 1]))

    def append(self, sequence: Sequence, ids: list[int]) -> bool:
        """Evaluate tokens, or, where there is no room, change nothing and say so."""
        before = len(sequence.tokens)
        try:
            skip = 0 if sequence.tokens else self.cache.reuse_prefix(sequence, ids)
            ids = ids[skip:]
            self.cache.reserve(sequence, len(sequence.tokens) + len(ids))
        except ContextOverflowError:
            self.cache.truncate(sequence, before)
            return False
        self.look(sequence, len(sequence.tokens))
        text = [*sequence.tokens, *ids]
        for group, table in zip(self.cache.groups, sequence.tables, strict=True):
            for i in range(len(sequence.tokens), len(text)):
                page = int(table[i // PAGE])
                assert group.is_free_to_know(page), "what is known or shared was written"
                self.slots(group, page)[i % PAGE] = hash(tuple(text[: i + 1]))
        self.cache.commit(sequence, ids)
        return True

    def check(self, sequences: list[Sequence]) -> None:
        for g, group in enumerate(self.cache.groups):
            used = [p for s in sequences for p in s.tables[g].tolist() if p >= 0]
            assert [used.count(page) for page in range(group.n_pages)] == group._n_users
            assert sorted([*{*used}, *group._free, *group._idle]) == list(range(group.n_pages))
            assert {page: key for key, page in group._by_key.items()} == group._key_of
            assert {*group._idle} <= {*group._key_of}
        known = [{*group._by_key} for group in self.cache.groups]
        assert {*self.cache._parents} == known[0] & known[1]
        for parent, followers in self.cache._followers.items():
            assert followers
            for key, tokens in followers.items():
                assert self.cache._parents[key] == parent
                values = [
                    self.slots(group, group._by_key[key])[: len(tokens)].tolist()
                    for group in self.cache.groups
                ]
                assert values[0] == values[1] == self.content.setdefault(key, values[0])
        for sequence in sequences:
            n = len(sequence.tokens)
            assert sequence.n_pages == -(-n // PAGE)
            assert len(sequence.keys) == n // PAGE
            assert (sequence.tables[:, sequence.n_pages :] == -1).all()
            assert (sequence.tables[0, : sequence.n_pages] >= 0).all()
            self.look(sequence, n)


@pytest.mark.parametrize("seed", range(12))
def test_random_cuts_and_growth_keep_the_cache_true(seed: int, monkeypatch) -> None:
    monkeypatch.setattr("edgellama.runtime.kvcache._BACK", 8)
    rng = np.random.default_rng(seed)
    checked = CheckedCache()
    cache = checked.cache
    sequences = [checked.begin() for _ in range(4)]
    grown: set[int] = set()
    n_cut = n_shared = n_full = n_slid = n_within = 0
    for _ in range(300):
        which = int(rng.integers(4))
        sequence = sequences[which]
        n_before = len(sequence.tokens)
        match rng.choice(["anew", "append", "cut", "fork"], p=[0.25, 0.45, 0.15, 0.15]):
            case "anew":
                cache.free(sequence)
                ids = [0] * int(rng.integers(1, 4 * PAGE))
                if rng.random() < 0.5:
                    ids[rng.integers(len(ids))] = 1
                n_full += not checked.append(sequence, ids)
                n_within += sequence.n_reused % PAGE > 0
            case "append":
                ids = rng.integers(0, 2, min(int(rng.integers(1, 20)), 4 * PAGE - n_before))
                sequence.n_before = n_before
                n_full += not checked.append(sequence, ids.tolist())
                if rng.random() < 0.2:  # the step failed later
                    cache.truncate(sequence, n_before)
                    checked.look(sequence, n_before)
                sequence.n_before = 0
                cache.slide(sequence)
            case "cut":
                keep = n_before - int(rng.integers(0, min(n_before, 40) + 1))
                if which in grown and keep >= max(n_before - 8, sequence.n_reused):
                    assert cache.holds(sequence, keep)
                if cache.holds(sequence, keep):
                    cache.truncate(sequence, keep)
                    n_cut += keep % PAGE > 0
            case "fork":
                cache.truncate(sequence, 0)
                sequences[which] = cache.fork(sequences[which - 1])
        grown = grown | {which} if len(sequence.tokens) > n_before else grown - {which}
        n_shared += max(cache.groups[0]._n_users) > 1
        n_slid += any(s.n_pages and s.tables[1, 0] < 0 for s in sequences)
        checked.check(sequences)
    assert min(n_cut, n_shared, n_slid) > 10
    assert min(n_full, n_within) > 2


def test_a_shared_page_is_copied_and_a_private_one_is_not() -> None:
    checked = CheckedCache()
    first, second = checked.begin(), checked.begin()
    checked.append(first, [0] * (PAGE + 1))
    checked.append(second, [0] * (PAGE + 3))
    shared = first.tables[:, 0].tolist()
    assert second.tables[:, 0].tolist() == shared
    checked.cache.truncate(second, PAGE - 3)
    checked.append(second, [1])
    assert first.tables[:, 0].tolist() == shared != second.tables[:, 0].tolist()
    checked.check([first, second])
    checked.cache.truncate(first, PAGE - 3)
    checked.append(first, [2] * 3)
    assert first.tables[:, 0].tolist() == shared
    checked.check([first, second])


def test_a_beginning_outlives_what_followed_it(monkeypatch) -> None:
    """Room is made from the ends of the least recently used texts."""
    checked = CheckedCache()
    old, new = checked.begin(), checked.begin()
    checked.append(old, [1] * 3 * PAGE)
    checked.cache.free(old)
    checked.append(new, [2] * 3 * PAGE)
    checked.append(checked.begin(), [3] * 3 * PAGE)  # of 8 pages, takes one of the old text
    again = checked.begin()
    assert checked.cache.reuse_prefix(again, [1] * 3 * PAGE) == 2 * PAGE
    with pytest.raises(ContextOverflowError, match="all 256 positions"):
        checked.cache.reserve(again, 3 * PAGE)


def open_small(path: Path, **options) -> Engine:
    with open_gguf(path) as gguf:
        return Engine(gguf, read_config(gguf), **{"n_ctx": 256, "n_threads": 2} | options)


def test_forks_go_on_as_if_alone(tmp_path: Path) -> None:
    """From a page that is half full, in the same step, and after the one they came from was freed."""
    engine = open_small(make_model(tmp_path / "m.gguf"))
    ids = np.random.default_rng(1).integers(0, 256, 120).tolist()
    ends = [[*ids[:75], i, i + 1, i + 2] for i in range(4)]
    expected = [engine.logits(end)[-3:] for end in ends]
    first = engine.new_sequence()
    engine.evaluate(first, ids[:75])
    before = engine._cache.groups[0]._n_users.count(1)
    texts = [first, *(engine.fork(first) for _ in range(3))]
    assert engine._cache.groups[0]._n_users.count(4) == before == 3
    for at in range(3):
        rows = engine.step([(s, [end[75 + at]]) for s, end in zip(texts, ends, strict=True)])
        for row, logits in zip(rows, expected, strict=True):
            assert np.array_equal(row, logits[at])
    engine.free(first)
    again = engine.fork(texts[1])
    assert np.array_equal(engine.evaluate(again, ids[:40]), engine.evaluate(texts[1], ids[:40]))
    for text in (again, *texts[1:]):
        engine.free(text)
    assert not any(engine._cache.groups[0]._n_users)
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


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_second_call_evaluates_only_what_differs(tmp_path: Path, arch: str, monkeypatch) -> None:
    """Also within a page, behind a window, and with other texts in between."""
    path = make_model(tmp_path / "m.gguf", arch, window=72)
    options = {"n_ctx": 2100, "n_batch": 128}
    engine, fresh = open_small(path, **options), open_small(path, **options)
    rng = np.random.default_rng(4)
    prefix = rng.integers(0, 256, 2000).tolist()
    steps: list[int] = []
    fill = engine._step.fill
    monkeypatch.setattr(
        engine._step, "fill", lambda rows, batch: (steps.append(len(rows)), fill(rows, batch))
    )
    for i, length in enumerate((2000, 2000, 1990, 2000, 2037, 1985)):
        sequence = engine.new_sequence()
        ids = [*prefix[:length], *rng.integers(0, 256, 9).tolist()]
        steps.clear()
        row = engine.evaluate(sequence, ids)
        if i:
            assert sum(steps) == len(ids) - sequence.n_reused == len(ids) - min(length, 2000)
            assert np.array_equal(row, fresh.logits(ids)[-1])
        engine.free(sequence)
        engine.logits(ids[5:60])
    engine.close()
    fresh.close()


def test_a_windowed_group_is_small_and_its_prefixes_are_bounded(tmp_path: Path) -> None:
    """A text of 4000 tokens leaves a window's pages, and what is forgotten is computed again."""
    path = make_model(tmp_path / "m.gguf", "gemma3", window=72, n_layers=6)
    engine, fresh = (open_small(path, n_ctx=4096, n_batch=64) for _ in range(2))
    wide, narrow = engine._cache.groups
    assert (wide.window, narrow.window) == (0, 72)
    assert wide.n_pages == 256 > 3 * narrow.n_pages
    ids = np.random.default_rng(2).integers(0, 256, 4000).tolist()
    sequence = engine.new_sequence()
    engine.evaluate(sequence, ids[:2000])
    fork = engine.fork(sequence)
    most = 0
    for at in range(2000, 4000, 10):
        row = engine.evaluate(sequence, ids[at : at + 10])
        most = max(most, int((sequence.tables[1] >= 0).sum()))
    assert most <= (72 + 128 + 10) // PAGE + 2
    expected = fresh.logits(ids)
    assert np.array_equal(row, expected[-1])
    assert np.array_equal(engine.evaluate(fork, ids[2000:2003]), expected[2002])
    engine.truncate(sequence, 3900)
    assert np.array_equal(engine.evaluate(sequence, ids[3900:3903]), expected[3902])
    engine.truncate(sequence, 1000)  # behind all windows that are left
    assert sequence.tokens == ids[:1000]
    assert np.array_equal(engine.evaluate(sequence, ids[1000:1003]), expected[1002])
    other = engine.new_sequence()
    assert np.array_equal(engine.evaluate(other, ids[:3000]), expected[2999])
    for text in (sequence, fork, other):
        engine.free(text)
    assert not any(n for group in engine._cache.groups for n in group._n_users)
    engine.close()
    fresh.close()


def test_a_failed_step_keeps_what_its_window_saw(tmp_path: Path) -> None:
    """The text is much longer than the window when the abort comes."""
    engine = open_small(
        make_model(tmp_path / "m.gguf", "gemma3", window=40), n_ctx=1024, n_batch=64
    )
    ids = np.random.default_rng(2).integers(0, 256, 900).tolist()
    expected = engine.logits(ids)
    sequence = engine.new_sequence()
    engine.evaluate(sequence, [*ids[:300]])
    run, calls = engine._run, iter([0] * 8 + [1])

    def stop(first: int, last: int) -> None:
        if next(calls):
            raise KeyboardInterrupt
        run(first, last)

    engine._run = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.evaluate_each(sequence, ids[300:])
    engine._run = run  # type: ignore[method-assign]
    assert sequence.tokens == ids[:300]
    assert engine._cache.holds(sequence, 300)
    assert np.array_equal(engine.evaluate_each(sequence, ids[300:]), expected[300:])
    engine.close()


def test_many_short_texts_in_few_pages(tmp_path: Path) -> None:
    engine = open_small(make_model(tmp_path / "m.gguf", "gemma3", window=40), n_ctx=128)
    texts = [[i % 250, i % 7, 1 + i % 3] for i in range(60)]
    together = engine.hidden(texts)
    for ids, rows in zip(texts, together, strict=True):
        assert np.array_equal(rows, engine.hidden([ids])[0])
    engine.close()
