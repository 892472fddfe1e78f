"""The paged KV cache: which pages a sequence has, and which of them can be used again.

A sequence has a table of pages for every layer group (`pages.py`).  Full pages are known by a hash
that chains over all tokens before them, so that a later sequence with the same beginning takes them
instead of computing them; of one that begins like it only up to the middle of a page, it takes a copy.
Layers with a sliding window give pages behind it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from edgellama.kernels.layout import PAGE

from .pages import Pages

_BACK = 128  # positions by which a sequence can be cut back without computing a window anew
_N_WINDOWS = 8  # sequences whose windows there is room for


class Sequence:
    """One text in the cache: its tokens, and the pages that hold their keys and values."""

    def __init__(self, tables: np.ndarray) -> None:
        self.tables = tables  # i32 (groups, pages): -1 where there is none
        self.address = tables.ctypes.data
        self.tokens: list[int] = []
        self.keys: list[bytes] = []  # of full pages
        self.n_pages = 0
        self.n_reused = 0
        self.is_shifted = (
            False  # then its pages are not what an evaluation of its tokens would give
        )
        self.n_before = 0  # tokens to which the running step goes back when it fails

    @property
    def n_cached(self) -> int:
        """Positions that have been evaluated."""
        return len(self.tokens)


class Layer(NamedTuple):
    """Where kernels find a layer: its pages (n_kv_heads, n_pages, page), and its row of the tables."""

    pages: int
    stride: int  # from one head to the next
    page_nbytes: int
    table_offset: int


class KVCache:
    """Pages of `kv_type` ("f16", "f32" or "q8_0") for layers with these windows (0: they see all).

    There are enough for two texts of `n_ctx` tokens, one of them to remember earlier prefixes by.
    """

    def __init__(
        self,
        *,
        windows: SequenceOf[int],
        n_kv_heads: int,
        head_size: int,
        kv_type: str,
        n_ctx: int,
        n_batch: int,
    ) -> None:
        self.n_ctx = n_ctx
        self.n_kv_heads = n_kv_heads
        kinds = [window if window < n_ctx else 0 for window in windows]
        self.groups: list[Pages] = []
        self._layers: list[tuple[int, int]] = []  # group, and which of its layers
        distinct = sorted(set(kinds))
        n_all = 2 * -(-n_ctx // PAGE)
        for window in distinct:
            n_pages = n_most_idle = n_all
            if window:
                one = (window + _BACK) // PAGE + 2
                step = (window + n_batch) // PAGE + 1
                n_pages = min(n_all, _N_WINDOWS * one + step)
                n_most_idle = one + step
            self.groups.append(
                Pages(
                    window=window,
                    n_layers=kinds.count(window),
                    n_kv_heads=n_kv_heads,
                    head_size=head_size,
                    kv_type=kv_type,
                    n_pages=n_pages,
                    n_most_idle=n_most_idle,
                    on_forget=self._on_forget,
                )
            )
        for layer, window in enumerate(kinds):
            self._layers.append((distinct.index(window), kinds[:layer].count(window)))
        self._parents: dict[bytes, bytes] = {}
        self._followers: dict[bytes, dict[bytes, list[int]]] = {}  # tokens of the next page, by key

    # --- where things are -------------------------------------------------------------------------
    @property
    def table_shape(self) -> tuple[int, int]:
        """Groups, and pages of the longest text."""
        return len(self.groups), -(-self.n_ctx // PAGE)

    @property
    def n_pages(self) -> int:
        """Pages of the group that has the fewest."""
        return min(group.n_pages for group in self.groups)

    def layer(self, layer: int) -> Layer:
        """Where kernels find a layer."""
        g, i = self._layers[layer]
        group = self.groups[g]
        pages = group.address + i * group.layer_nbytes
        return Layer(pages, group.head_nbytes, group.page_nbytes, g * self.table_shape[1] * 4)

    def group_of(self, layer: int) -> int:
        """Which group a layer belongs to."""
        return self._layers[layer][0]

    def new_sequence(self) -> Sequence:
        """Begin an empty sequence."""
        return Sequence(np.full(self.table_shape, -1, np.int32))

    def _rows(self, sequence: Sequence) -> Iterator[tuple[Pages, np.ndarray]]:
        """Every group, with the sequence's table for it."""
        return zip(self.groups, sequence.tables, strict=True)

    # --- beginnings that are known ----------------------------------------------------------------
    def reuse_prefix(self, sequence: Sequence, ids: SequenceOf[int]) -> int:
        """Give an empty sequence what is known of the beginning of `ids`; return how many tokens.

        At least the last token stays to be evaluated, because its logits are wanted.
        Raises: ContextOverflowError.
        """
        keys, n = self._known(ids)
        for group, table in self._rows(sequence):
            for i in range(group.first_seen(n * PAGE), n):
                page = group.find(keys[i])
                assert page is not None, "a page that was found is gone"
                table[i] = group.use(page)
        sequence.n_pages = n
        sequence.keys = keys[:n]
        n_tokens = n * PAGE
        key, n_more = self._alike(keys[n - 1] if n else b"", ids[n_tokens:-1])
        if n_more:
            sequence.n_pages += 1
            for group, table in self._rows(sequence):
                page = group.find(key)
                assert page is not None, "a page that was found is gone"
                table[n] = group.copy(page)
        sequence.tokens = list(ids[: n_tokens + n_more])
        sequence.n_reused = len(sequence.tokens)
        return sequence.n_reused

    def _known(self, ids: SequenceOf[int]) -> tuple[list[bytes], int]:
        """Hashes of full pages that begin `ids`, and how many of these every group can give.

        A group with a window can if it has the last ones, which the next token sees.
        """
        keys: list[bytes] = []
        n = 0
        n_last = [0] * len(self.groups)  # pages up to here that a group has without a gap
        key = b""
        for first in range(0, len(ids) - PAGE, PAGE):
            key = _page_key(key, ids[first : first + PAGE])
            keys.append(key)
            for g, group in enumerate(self.groups):
                n_last[g] = 0 if group.find(key) is None else n_last[g] + 1
            missing = [
                n_here < len(keys) - group.first_seen(len(keys) * PAGE)
                for group, n_here in zip(self.groups, n_last, strict=True)
            ]
            if not any(missing):
                n = len(keys)
            elif missing[0] and self.groups[0].window == 0:
                break
        return keys, n

    def _alike(self, parent: bytes, ids: SequenceOf[int]) -> tuple[bytes, int]:
        """The known page after `parent` that begins most like `ids`, and how many tokens it shares."""
        best, n_best = b"", 0
        for key, tokens in self._followers.get(parent, {}).items():
            pairs = zip(tokens, ids, strict=False)
            n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if n > n_best:
                best, n_best = key, n
        return best, n_best

    def _know(self, sequence: Sequence, i: int) -> bytes:
        """Make the sequence's page `i` known by its hash, which is returned."""
        tokens = sequence.tokens[i * PAGE : (i + 1) * PAGE]
        parent = sequence.keys[i - 1] if i else b""
        key = _page_key(parent, tokens)
        for group, table in self._rows(sequence):
            if table[i] >= 0:
                group.know(int(table[i]), key)
        if all(group.find(key) is not None for group in self.groups):
            self._parents[key] = parent
            self._followers.setdefault(parent, {})[key] = tokens
        return key

    def _on_forget(self, key: bytes) -> None:
        """One group no longer has the page: none is taken a copy of."""
        parent = self._parents.pop(key, None)
        if parent is not None:
            followers = self._followers[parent]
            del followers[key]
            if not followers:
                del self._followers[parent]

    # --- growing and shrinking --------------------------------------------------------------------
    def reserve(self, sequence: Sequence, n_tokens: int) -> None:
        """Make room for positions up to `n_tokens`.

        What other sequences see of a page, or what is known of it by its hash, never changes: if the
        tokens end within such a page, this sequence takes a copy, or the page is no longer known.
        Raises: ContextOverflowError.
        """
        if len(sequence.tokens) % PAGE:
            i = len(sequence.tokens) // PAGE
            for group, table in self._rows(sequence):
                table[i] = group.own(int(table[i]))
        while sequence.n_pages * PAGE < n_tokens:
            sequence.n_pages += 1
            for group, table in self._rows(sequence):
                table[sequence.n_pages - 1] = group.take()

    def commit(self, sequence: Sequence, ids: SequenceOf[int]) -> None:
        """Note that `ids` have been evaluated; full pages become known."""
        sequence.tokens.extend(ids)
        n_full = 0 if sequence.is_shifted else len(sequence.tokens) // PAGE
        while len(sequence.keys) < n_full:
            sequence.keys.append(self._know(sequence, len(sequence.keys)))
        self.slide(sequence)

    def slide(self, sequence: Sequence) -> None:
        """Give back pages that no token sees any more: neither the next one, nor one after a cut."""
        for group, table in self._rows(sequence):
            if group.window:
                n_behind = group.first_seen(len(sequence.tokens) - _BACK)
                kept = range(
                    group.first_seen(sequence.n_before - _BACK), -(-sequence.n_before // PAGE)
                )
                for i in np.flatnonzero(table[:n_behind] >= 0):
                    if i not in kept:
                        group.release(int(table[i]))
                        table[i] = -1

    def holds(self, sequence: Sequence, n_tokens: int) -> bool:
        """Say whether what a token after the first `n_tokens` sees is still there."""
        return all(
            (table[group.first_seen(n_tokens) : -(-n_tokens // PAGE)] >= 0).all()
            for group, table in self._rows(sequence)
        )

    def truncate(self, sequence: Sequence, n_tokens: int) -> None:
        """Forget positions from `n_tokens` on, and give back the pages that held only those."""
        n_pages = -(-n_tokens // PAGE)
        for group, table in self._rows(sequence):
            # The last ones first: of what stays known, a beginning is worth more than an end.
            for page in table[n_pages : sequence.n_pages][::-1].tolist():
                if page >= 0:
                    group.release(page)
            table[n_pages : sequence.n_pages] = -1
        sequence.n_pages = min(n_pages, sequence.n_pages)
        if n_tokens <= len(sequence.keys) * PAGE:
            sequence.is_shifted = False
        del sequence.keys[n_tokens // PAGE :]
        del sequence.tokens[n_tokens:]

    def shift(self, sequence: Sequence, first: int, n: int) -> list[np.ndarray]:
        """Drop pages [first, first + n) of a sequence; those behind move up, and are no longer known.

        Returns these for every group, i32 (pages,): their keys are to be turned.
        Raises: ContextOverflowError when others share them and there is no room for copies.
        """
        stop = sequence.n_pages
        for group, table in self._rows(sequence):
            for i in range(first + n, stop):
                if table[i] >= 0:
                    table[i] = group.own(int(table[i]))
        moved = []
        for group, table in self._rows(sequence):
            for page in table[first : first + n].tolist():
                if page >= 0:
                    group.release(page)
            table[first : stop - n] = table[first + n : stop].copy()
            table[stop - n : stop] = -1
            moved.append(table[first : stop - n][table[first : stop - n] >= 0])
        sequence.n_pages -= n
        sequence.is_shifted = True
        del sequence.tokens[first * PAGE : (first + n) * PAGE]
        del sequence.keys[first:]
        return moved

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a sequence of the same tokens on the same pages."""
        fork = Sequence(sequence.tables.copy())
        fork.tokens, fork.keys = sequence.tokens.copy(), sequence.keys.copy()
        fork.n_pages, fork.n_reused = sequence.n_pages, sequence.n_reused
        fork.is_shifted = sequence.is_shifted
        for group, table in self._rows(fork):
            for page in table[table >= 0].tolist():
                group.use(page)
        return fork

    def free(self, sequence: Sequence) -> None:
        """Forget a sequence; its pages, also the last one, stay known until their room is needed."""
        n, rest = divmod(len(sequence.tokens), PAGE)
        last = [(group, int(table[n])) for group, table in self._rows(sequence)] if rest else []
        if last and not sequence.is_shifted and all(g.is_free_to_know(page) for g, page in last):
            self._know(sequence, n)
        self.truncate(sequence, 0)

    # --- session files ----------------------------------------------------------------------------
    def saved_shapes(self, n: int) -> list[tuple[int, int, int]]:
        """Of every layer, the shape (K, pages, bytes) of what `save` returns for a text of n full pages."""
        return [
            (self.n_kv_heads, n - group.first_seen(n * PAGE), group.page_nbytes)
            for group in (self.groups[g] for g, _ in self._layers)
        ]

    def save(self, sequence: Sequence) -> list[np.ndarray]:
        """Return copies of the full pages that the next token sees, u8 (K, pages, bytes) per layer."""
        return [np.take(rows, pages, 1) for rows, pages in self._saved(sequence)]

    def restore(self, tokens: SequenceOf[int], saved: SequenceOf[np.ndarray]) -> None:
        """Make the full pages of a text known, for texts that begin with it.

        Raises: ContextOverflowError when there is no room; then no sequence has changed.
        """
        sequence = self.new_sequence()
        try:
            sequence.n_pages = n = len(tokens) // PAGE
            for group, table in self._rows(sequence):
                for i in range(group.first_seen(n * PAGE), n):
                    table[i] = group.take()
            sequence.tokens = list(tokens[: n * PAGE])
            for (rows, pages), data in zip(self._saved(sequence), saved, strict=True):
                rows[:, pages] = data
            for i in range(n):
                sequence.keys.append(self._know(sequence, i))
        finally:
            self.truncate(sequence, 0)

    def _saved(self, sequence: Sequence) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of every layer, all its pages u8 (K, n_pages, bytes), and which of them are saved."""
        n = len(sequence.tokens) // PAGE
        for g, i in self._layers:
            group = self.groups[g]
            rows = group.bytes[i * self.n_kv_heads : (i + 1) * self.n_kv_heads]
            yield rows, sequence.tables[g, group.first_seen(n * PAGE) : n]


def _page_key(parent: bytes, ids: SequenceOf[int]) -> bytes:
    return hashlib.blake2b(parent + np.array(ids, np.int32).tobytes(), digest_size=16).digest()
