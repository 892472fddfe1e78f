"""The paged KV cache: who owns which page, and which pages can be used again.

A page holds 32 positions of every layer and KV head. A sequence has a table of pages; full pages are
known by a hash that chains over all tokens before them, so that a later sequence with the same
beginning takes them instead of computing them.  Bytes and their layout: `kernels/kv.py`.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

import numpy as np

from edgellama.errors import ContextOverflowError, OutOfMemoryError
from edgellama.kernels.layout import PAGE, kv_page_nbytes

from .memory import small_pages


class Sequence:
    """One text in the cache: its tokens, and the pages that hold their keys and values."""

    def __init__(self, n_ctx: int) -> None:
        self.tokens: list[int] = []
        self.n_reused = 0
        self.pages: list[int] = []
        self.table = np.zeros(-(-n_ctx // PAGE), np.int32)
        self.keys: list[bytes] = []

    @property
    def n_cached(self) -> int:
        """Positions that have been evaluated."""
        return len(self.tokens)


class KVCache:
    """Pages of `kv_type` ("f16", "f32" or "q8_0") for all layers."""

    def __init__(
        self, *, n_layers: int, n_kv_heads: int, head_size: int, n_pages: int, kv_type: str
    ) -> None:
        self.kv_type = kv_type
        self.n_pages = n_pages
        self.page_nbytes = kv_page_nbytes(kv_type, head_size)  # of one head
        self.head_nbytes = n_pages * self.page_nbytes
        self._layer_nbytes = n_kv_heads * self.head_nbytes
        nbytes = n_layers * self._layer_nbytes
        try:
            self._memory = small_pages(nbytes)
        except (OSError, MemoryError) as error:
            raise OutOfMemoryError(
                f"a KV cache of {nbytes / 1e6:.0f} MB could not be had; use a smaller context (-c)"
            ) from error
        self._bytes = self._memory.reshape(-1, n_pages, self.page_nbytes)  # (L * K, n_pages, page)
        self._free = list(range(n_pages - 1, -1, -1))
        self._n_users = [0] * n_pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages nobody uses, oldest first

    def layer_address(self, layer: int) -> int:
        """Where the pages of a layer begin: (n_kv_heads, n_pages, page)."""
        return self._memory.ctypes.data + layer * self._layer_nbytes

    def _take_page(self) -> int:
        if self._free:
            return self._free.pop()
        if self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            return page
        raise ContextOverflowError(
            f"all {self.n_pages * PAGE} positions of the KV cache are in use; "
            "close other sequences or open the model with a larger n_ctx"
        )

    def _use(self, sequence: Sequence, page: int) -> None:
        self._n_users[page] += 1
        self._idle.pop(page, None)
        sequence.table[len(sequence.pages)] = page
        sequence.pages.append(page)

    def reuse_prefix(self, sequence: Sequence, ids: SequenceOf[int]) -> int:
        """Give an empty sequence the known pages that begin `ids`; return how many tokens they hold.

        At least the last token stays to be evaluated, because its logits are wanted.
        """
        key = b""
        for first in range(0, len(ids) - PAGE, PAGE):
            key = _page_key(key, ids[first : first + PAGE])
            page = self._by_key.get(key)
            if page is None:
                break
            self._use(sequence, page)
            sequence.keys.append(key)
        n = len(sequence.pages) * PAGE
        sequence.tokens = list(ids[:n])
        sequence.n_reused = n
        return n

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a sequence of the same tokens on the same pages."""
        fork = copy.copy(sequence)
        fork.tokens, fork.keys = sequence.tokens.copy(), sequence.keys.copy()
        fork.pages, fork.table = [], np.zeros_like(sequence.table)
        for page in sequence.pages:
            self._use(fork, page)
        return fork

    def reserve(self, sequence: Sequence, n_tokens: int) -> None:
        """Make room for positions up to `n_tokens`.

        What other sequences see of a page, or what is known of it by its hash, never changes: if the
        tokens end within such a page, this sequence takes a copy, or the page is no longer known.
        Raises: ContextOverflowError.
        """
        if len(sequence.tokens) % PAGE:
            self._own(sequence, len(sequence.tokens) // PAGE)
        while len(sequence.pages) * PAGE < n_tokens:
            self._use(sequence, self._take_page())

    def commit(self, sequence: Sequence, ids: SequenceOf[int]) -> None:
        """Note that `ids` have been evaluated; full pages become known."""
        sequence.tokens.extend(ids)
        while (len(sequence.keys) + 1) * PAGE <= len(sequence.tokens):
            n = len(sequence.keys)
            parent = sequence.keys[-1] if n else b""
            key = _page_key(parent, sequence.tokens[n * PAGE : (n + 1) * PAGE])
            sequence.keys.append(key)
            page = sequence.pages[n]
            if key not in self._by_key and page not in self._key_of:
                self._by_key[key] = page
                self._key_of[page] = key

    def truncate(self, sequence: Sequence, n_tokens: int) -> None:
        """Forget positions from `n_tokens` on, and give back the pages that held only those."""
        n_pages = -(-n_tokens // PAGE)
        for page in sequence.pages[n_pages:]:
            self._release(page)
        del sequence.pages[n_pages:]
        del sequence.keys[n_tokens // PAGE :]
        del sequence.tokens[n_tokens:]

    def _own(self, sequence: Sequence, i: int) -> None:
        """Make the sequence's page `i` one that may be written."""
        page = sequence.pages[i]
        if self._n_users[page] == 1:
            if page in self._key_of:
                self._forget(page)
            return
        own = self._take_page()
        self._bytes[:, own] = self._bytes[:, page]
        self._n_users[page] -= 1
        self._n_users[own] = 1
        sequence.pages[i] = sequence.table[i] = own

    def _forget(self, page: int) -> None:
        del self._by_key[self._key_of.pop(page)]

    def _release(self, page: int) -> None:
        self._n_users[page] -= 1
        if self._n_users[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)


def _page_key(parent: bytes, ids: SequenceOf[int]) -> bytes:
    return hashlib.blake2b(parent + np.array(ids, np.int32).tobytes(), digest_size=16).digest()
