"""The engine: runs steps of token ids and returns logits. It knows nothing of text.

A step takes up to `n_batch` tokens of one or more sequences: their arrays are staged, the body of the
program runs, their pages are committed, and the head runs for the rows whose logits are wanted.  Ctrl-C,
`abort` and `close` end it between two chunks of an operation (`kernels/team.py`); every sequence is
then as it was.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from edgellama.cpu import MAX_THREADS, thread_counts
from edgellama.errors import (
    ContextOverflowError,
    EdgeLlamaError,
    OutOfMemoryError,
    UsageError,
)
from edgellama.gguf import GGUFFile
from edgellama.kernels import targets, team
from edgellama.kernels.layout import PAGE
from edgellama.models.config import ModelConfig
from edgellama.models.rope import RopeConfig
from edgellama.progress import progress

from .kvcache import KVCache, Sequence
from .lowering import compile_program
from .packs import load_pack
from .rope import rope_table
from .session import Identity, Source, identify, read_session, write_session
from .shift import Shift
from .step import StepArrays
from .tuning import N_PREFILL, Threads, Tuning
from .weights import Weights

KV_TYPES = ("f16", "f32", "q8_0")
_N_OUT = 32  # rows of logits that the arena holds; more are asked for in blocks
_TUNING_MACS = (1e8, 1e7)  # of a token, in decode (60 MB of weights) and in prefill


class Aborted(EdgeLlamaError):
    """`abort` or `close` ended a step."""


class Engine:
    """A loaded model: weights, cache, threads.

    `on_loading` is called when the next thing is native: reading and packing the weights.
    Raises: UsageError for an argument out of range, KernelError when kernels cannot be built,
    OutOfMemoryError.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: ModelConfig,
        *,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_threads: int | None = None,
        kv_type: str = "f16",
        fuse: bool = True,
        on_loading: Callable[[], None] = lambda: None,
    ) -> None:
        if kv_type not in KV_TYPES:
            raise UsageError(f"kv_type is {kv_type!r}; it must be one of {', '.join(KV_TYPES)}")
        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch)):
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        counts = thread_counts() if n_threads is None else [n_threads]
        if not 1 <= counts[-1] <= MAX_THREADS:
            raise UsageError(f"n_threads is {n_threads}; it must be between 1 and {MAX_THREADS}")
        self.config = config
        self._source = Source.of(gguf.path)
        self._kv_type = kv_type
        self.n_vocab = config.n_vocab
        self.n_ctx = n_ctx
        self.n_batch = min(n_batch, n_ctx)
        self._lock = threading.Lock()
        self._freed: deque[Sequence] = deque()
        self._owner: int | None = None  # thread that holds the lock
        self._closed = False

        program = compile_program(config, gguf.tensors, kv_type, n_threads=counts[-1], fuse=fuse)
        target = targets.detect()
        self._pack = load_pack([*program.operations, *team.NAMES], target)
        total = sum(gguf.tensors[name].nbytes for name in program.weights)
        self._weights = Weights(gguf, program.weights, program.gathered, self.n_batch)
        scratch_nbytes = max(program.scratch_nbytes, self._weights.scratch_nbytes)
        self._team = team.Team(self._pack, counts[-1], scratch_nbytes)
        weakref.finalize(self, self._team.close)  # for those who forget to
        on_loading()
        with progress("Loading weights", total) as advance:
            self._weights.load(self._pack, self._team, advance)
        self._cache = KVCache(
            windows=config.windows,
            n_kv_heads=config.n_kv_heads,
            head_size=config.head_size,
            kv_type=kv_type,
            n_ctx=n_ctx,
            n_batch=self.n_batch,
        )
        self._table_shape = self._cache.table_shape
        self._ropes: dict[RopeConfig, np.ndarray] = {}
        for rope in (config.rope, config.rope_local):
            if rope is not None:
                self._ropes[rope] = rope_table(rope, gguf, n_ctx)
        try:
            self._bound = program.bind(
                self._pack,
                self._weights,
                self._cache,
                self._ropes,
                n_batch=self.n_batch,
                n_out=min(_N_OUT, self.n_batch),
            )
        except (OSError, MemoryError) as error:
            raise OutOfMemoryError(
                f"memory for a batch of {self.n_batch} tokens could not be had; use a smaller n_batch"
            ) from error
        self._shift = Shift(self._bound, program.rotations, self._ropes, self._cache, kv_type)
        self._target = target
        self.n_macs = sum(r.n_macs for r in program.records)  # of a token, without attention
        self._head_first = program.head_first
        self._n_records = len(program.records)
        self._team.use(self._bound.table)
        self._step = StepArrays(self.n_batch)
        self._macs = np.cumsum([r.n_macs for r in program.records])
        self._tuning = Tuning(program, target.name, counts)
        self._threads = self._tuning.recall()

    # --- sequences --------------------------------------------------------------------------------
    def new_sequence(self) -> Sequence:
        """Begin an empty sequence."""
        return Sequence(np.full(self._table_shape, -1, np.int32))

    def fork(self, sequence: Sequence) -> Sequence:
        """Begin a sequence with the tokens of another one, on its pages; nothing is computed.

        Each goes on as if it were alone: whoever first writes into a page they share takes a copy.
        """
        with self._locked():
            return self._cache.fork(sequence)

    def free(self, sequence: Sequence) -> None:
        """Forget a sequence; its pages stay known until their room is needed.

        This may come from the end of an abandoned generator, which the garbage collector chooses: also
        in the middle of a step of this very thread. So it never waits.
        """
        self._freed.append(sequence)
        if self._lock.acquire(blocking=False):
            try:
                self._forget_freed()
            finally:
                self._lock.release()

    def _forget_freed(self) -> None:
        while self._freed:
            sequence = self._freed.popleft()
            if not self._closed:
                self._cache.free(sequence)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One step, or one change of sequences, at a time, of an open model."""
        with self._lock:
            if self._closed:
                raise UsageError("the model is closed; open it again to use it")
            self._owner = threading.get_ident()
            try:
                self._forget_freed()
                yield
            finally:
                self._owner = None
                if self._closed:
                    self._release()

    def truncate(self, sequence: Sequence, n_tokens: int) -> None:
        """Go back to the first `n_tokens` tokens.

        Nothing is computed, unless a layer with a window has given back what it saw then: it keeps 128
        positions more than it sees.  Raises: UsageError when the sequence is shorter.
        """
        if not 0 <= n_tokens <= len(sequence.tokens):
            raise UsageError(f"the sequence has {len(sequence.tokens)} tokens, not {n_tokens}")
        with self._locked():
            if self._cache.holds(sequence, n_tokens):
                self._cache.truncate(sequence, n_tokens)
                return
            ids = sequence.tokens[:n_tokens]
            self._cache.truncate(sequence, 0)
            self._evaluate([(sequence, ids)])

    def shift(self, sequence: Sequence, n_keep: int) -> int:
        """Make room in a text: drop the older half of what follows its first `n_keep` tokens.

        Whole pages are dropped, and `n_keep` is rounded up to them.  What follows moves up without being
        evaluated: its keys are turned to their new positions, but what it says was computed when it still
        saw the rest.  Returns the number of dropped tokens.
        Raises: ContextOverflowError when nothing can be dropped, or for want of room for pages that others
        share; Aborted, which leaves no more than the kept tokens.
        """
        first = -(-n_keep // PAGE)
        n = (len(sequence.tokens) // PAGE - first + 1) // 2
        if n < 1 or n * PAGE >= len(sequence.tokens):
            raise ContextOverflowError(
                f"{len(sequence.tokens)} tokens leave nothing to drop after {n_keep}; use a larger n_ctx "
                "(-c), or keep less"
            )
        with self._locked():
            self._shift.load(self._pack, self._target, self.config.head_size)
            moved = self._cache.shift(sequence, first, n)
            if self._cache.holds(sequence, len(sequence.tokens)):
                try:
                    self._turn(moved, n * PAGE)
                except BaseException:
                    self._cache.truncate(sequence, first * PAGE)
                    raise
            else:  # the kept tokens are in sight of a window again that had passed them
                ids = sequence.tokens.copy()
                self._cache.truncate(sequence, 0)
                self._evaluate([(sequence, ids)])
        return n * PAGE

    def _turn(self, pages: SequenceOf[np.ndarray], n_positions: int) -> None:
        for words, numbers, records in self._shift.steps(pages, n_positions):
            for i in records if len(numbers) else ():
                at = self._n_records + i
                if not self._team.run(words, at, at + 1):
                    raise Aborted("the shift was aborted")

    def abort(self) -> None:
        """End the running step from another thread, or if none runs, the next one.

        It raises `Aborted`, and every sequence is as it was before.
        """
        self._team.abort()

    def close(self) -> None:
        """Stop the threads and free all memory; a step that runs elsewhere is aborted first."""
        self._closed = True
        self._team.abort()
        # A signal's handler may come in the middle of a step of this very thread, which then frees.
        if self._owner != threading.get_ident():
            with self._lock:
                self._release()

    def _release(self) -> None:
        self._team.close()
        for name in ("_bound", "_weights", "_cache", "_shift"):
            self.__dict__.pop(name, None)

    # --- sessions ---------------------------------------------------------------------------------
    @cached_property
    def _identity(self) -> Identity:
        c = self.config
        is_long = [rope.is_long(self.n_ctx) for rope in self._ropes]
        others = c.rope, c.rope_local, is_long, c.windows, PAGE
        return identify(self._source, self._kv_type, self.n_vocab, self.n_ctx, *others)

    def save_session(self, path: Path, ids: SequenceOf[int]) -> None:
        """Write the keys and values of a text to a file; what is not known of it is evaluated.

        Raises: SessionError, UsageError, ContextOverflowError.
        """
        identity = self._identity
        sequence = self.new_sequence()
        try:
            self.evaluate(sequence, ids)
            with self._locked():
                pages = self._cache.save(sequence)
        finally:
            self.free(sequence)
        write_session(path, identity, list(ids), pages)

    def load_session(self, path: Path) -> list[int]:
        """Return the token ids of a file; the next text that begins with them has them evaluated.

        Raises: SessionError when the file is damaged or does not belong to this model;
        ContextOverflowError.  Then nothing has changed.
        """
        with self._locked():
            shapes_of = self._cache.saved_shapes
        ids, pages = read_session(path, self._identity, shapes_of)
        with self._locked():
            self._cache.restore(ids, pages)
        return ids

    # --- threads ----------------------------------------------------------------------------------
    @property
    def n_threads(self) -> int:
        """Most threads that a step runs on."""
        return max(self._threads or self._tuning.default)

    def tune(self) -> Threads:
        """Measure how many threads are the fastest, and remember it; takes 0.1 to 0.2 s."""
        with self._locked():
            return self._tune()

    def _tune(self) -> Threads:
        sequence = self.new_sequence()

        def run_s(is_prefill: bool, n_threads: int) -> float:
            """Seconds of a step's first operations: of the whole body, or as many as are quick."""
            n_tokens = min(N_PREFILL, self.n_batch) if is_prefill else 1
            self._stage([(sequence, [0] * n_tokens)], [False])
            last = int(np.searchsorted(self._macs, _TUNING_MACS[is_prefill])) + 1
            start = time.perf_counter()
            if not self._team.run(self._step.words, 0, min(last, self._head_first), n_threads):
                raise Aborted("the step was aborted")
            return time.perf_counter() - start

        try:
            self._threads = self._tuning.measure(run_s)
        finally:
            self._cache.truncate(sequence, 0)
        return self._threads

    # --- evaluation -------------------------------------------------------------------------------
    def evaluate(self, sequence: Sequence, ids: SequenceOf[int]) -> np.ndarray:
        """Append tokens to a sequence and return the logits f32 (V,) after the last one.

        An empty sequence first takes the pages that an earlier one with the same beginning left.
        Raises: ContextOverflowError, UsageError for an id outside the vocabulary.
        """
        return self.step([(sequence, ids)])[0]

    def step(self, batch: SequenceOf[tuple[Sequence, SequenceOf[int]]]) -> np.ndarray:
        """Append tokens to several sequences at once; logits f32 (n, V) after each one's last."""
        with self._locked():
            for sequence, ids in batch:
                self._check(sequence, ids)
            with self._all_or_nothing([sequence for sequence, _ in batch]):
                return self._evaluate(batch)

    @contextmanager
    def _all_or_nothing(self, sequences: SequenceOf[Sequence]) -> Iterator[None]:
        """Leave sequences as they were when an exception comes."""
        for sequence in sequences:
            sequence.n_before = len(sequence.tokens)
        try:
            yield
        except BaseException:
            for sequence in sequences:
                self._cache.truncate(sequence, sequence.n_before)
            raise
        finally:
            for sequence in sequences:
                sequence.n_before = 0
                self._cache.slide(sequence)

    def _evaluate(self, batch: SequenceOf[tuple[Sequence, SequenceOf[int]]]) -> np.ndarray:
        logits = np.empty((len(batch), self.n_vocab), np.float32)
        pending: list[tuple[int, Sequence, SequenceOf[int]]] = []
        for i, (sequence, ids) in enumerate(batch):
            skip = 0 if sequence.tokens else self._cache.reuse_prefix(sequence, ids)
            pending.append((i, sequence, ids[skip:]))
        while pending:
            room = self.n_batch
            taken: list[tuple[int, Sequence, SequenceOf[int], bool]] = []
            rest: list[tuple[int, Sequence, SequenceOf[int]]] = []
            for i, sequence, ids in pending:
                now, later = ids[:room], ids[room:]
                room -= len(now)
                if now:
                    taken.append((i, sequence, now, not later))
                if later:
                    rest.append((i, sequence, later))
            wanted = self._stage([(s, ids) for _, s, ids, _ in taken], [t[3] for t in taken])
            self._run(0, self._head_first)
            for _, sequence, ids, _ in taken:
                self._cache.commit(sequence, ids)
            ends = [i for i, _, _, is_end in taken if is_end]
            for first, rows in self._head(wanted):
                for i, row in zip(ends[first:], rows, strict=False):
                    logits[i] = row
            pending = rest
        return logits

    def logits(self, ids: SequenceOf[int]) -> np.ndarray:
        """Return the logits f32 (T, V) after every token of a text of its own."""
        sequence = self.new_sequence()
        try:
            return self.evaluate_each(sequence, ids)
        finally:
            self.free(sequence)

    def evaluate_each(self, sequence: Sequence, ids: SequenceOf[int]) -> np.ndarray:
        """Append tokens to a sequence and return the logits f32 (T, V) after every one of them."""
        with self._locked():
            self._check(sequence, ids)
            out = np.empty((len(ids), self.n_vocab), np.float32)
            with self._all_or_nothing([sequence]):
                for start in range(0, len(ids), self.n_batch):
                    chunk = ids[start : start + self.n_batch]
                    self._stage([(sequence, chunk)], [True])
                    self._run(0, self._head_first)
                    self._cache.commit(sequence, chunk)
                    for first, rows in self._head(list(range(len(chunk)))):
                        out[start + first : start + first + len(rows)] = rows
        return out

    def hidden(self, texts: SequenceOf[SequenceOf[int]]) -> list[np.ndarray]:
        """Return what the head reads after every token of texts of their own, f32 (T, D) for each.

        A step takes as many texts as fit.  Raises: as `evaluate`.
        """
        width = self._bound.inputs[-1].rows.shape[1]
        out = [np.empty((len(ids), width), np.float32) for ids in texts]
        live: dict[int, Sequence] = {}
        with self._locked():
            try:
                for pieces in _packed(map(len, texts), self.n_batch, self._cache.n_pages):
                    batch = [
                        (live.setdefault(i, self.new_sequence()), texts[i][start:stop])
                        for i, start, stop in pieces
                    ]
                    for sequence, ids in batch:
                        self._check(sequence, ids)
                    self._stage(batch, [False] * len(batch))
                    self._run(0, self._head_first)
                    for sequence, ids in batch:
                        self._cache.commit(sequence, ids)
                    n_tokens = sum(len(ids) for _, ids in batch)
                    blocks = self._head(range(n_tokens), hidden=True)
                    rows = np.vstack([block.copy() for _, block in blocks])
                    for i, start, stop in pieces:
                        out[i][start:stop], rows = np.split(rows, [stop - start])
                        if stop == len(texts[i]):
                            self._cache.truncate(live.pop(i), 0)
            finally:
                for sequence in live.values():
                    self._cache.truncate(sequence, 0)
        return out

    def _check(self, sequence: Sequence, ids: SequenceOf[int]) -> None:
        if len(ids) == 0:
            raise UsageError("no tokens were given; a step needs at least one")
        worst = [i for i in ids if not 0 <= i < self.n_vocab]
        if worst:
            raise UsageError(
                f"token id {worst[0]} is outside the vocabulary; ids are 0 to {self.n_vocab - 1}"
            )
        n_tokens = len(sequence.tokens) + len(ids)
        if n_tokens > self.n_ctx:
            raise ContextOverflowError(
                f"{n_tokens} tokens do not fit the context of {self.n_ctx}; "
                "shorten the prompt or open the model with a larger n_ctx (-c)"
            )
        if self._threads is None:  # not when it was opened: a tokenizer may be loading beside it
            self._tune()

    def _stage(
        self, batch: SequenceOf[tuple[Sequence, SequenceOf[int]]], wants_last: SequenceOf[bool]
    ) -> list[int]:
        """Write the step's arrays; return the rows of the last tokens that are wanted."""
        for sequence, ids in batch:
            self._cache.reserve(sequence, len(sequence.tokens) + len(ids))
        rows = self._weights.gather([i for _, ids in batch for i in ids])
        self._step.fill(rows, [(sequence, len(ids)) for sequence, ids in batch])
        ends = accumulate(len(ids) for _, ids in batch)
        return [end - 1 for end, wants in zip(ends, wants_last, strict=True) if wants]

    def _head(
        self, wanted: SequenceOf[int], hidden: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, rows), block by block: logits of the wanted rows of this step.

        Or what they are projected from, if `hidden`.
        """
        head = self._bound.inputs[-1]
        end = head.record if hidden else self._n_records
        out = head.rows if hidden else self._bound.logits[:, : self.n_vocab]
        for first in range(0, len(wanted), len(out)):
            rows = wanted[first : first + len(out)]
            self._step.want(rows)
            self._run(self._head_first, end)
            yield first, out[: len(rows)]

    def _run(self, first: int, last: int) -> None:
        assert self._threads is not None, "a step begins with _check"
        n_threads = self._threads.of_step(self._step.n_tokens)
        if not self._team.run(self._step.words, first, last, n_threads):
            raise Aborted("the model was closed" if self._closed else "the step was aborted")

    def observe(
        self,
        sequence: Sequence,
        ids: SequenceOf[int],
        visit: Callable[[str, np.ndarray], None],
    ) -> None:
        """Append tokens to a sequence; `visit(weight, rows)` sees the input of every projection.

        `rows` is f32 (T, width) for the projections of layers and (1, width) for the head's, a view that
        is good until `visit` returns.  Raises: UsageError when the tokens do not fit one step.
        """
        self._in_one_step(ids)
        with self._locked():
            self._check(sequence, ids)
            self._step.want(self._stage([(sequence, ids)], [True]))
            done = 0
            for given in self._bound.inputs:
                self._run(done, given.record)
                done = given.record
                visit(given.weight, given.rows[: 1 if given.of_out_rows else len(ids)])
            self._run(done, self._n_records)
            self._cache.commit(sequence, ids)

    def _in_one_step(self, ids: SequenceOf[int]) -> None:
        if len(ids) > self.n_batch:
            raise UsageError(f"{len(ids)} tokens do not fit a step of {self.n_batch}")

    def profile_step(self, sequence: Sequence, ids: SequenceOf[int]) -> list[float]:
        """Append tokens to a sequence one operation at a time; seconds of each record of the table.

        Raises: UsageError when the tokens do not fit one step.
        """
        self._in_one_step(ids)
        with self._locked():
            self._check(sequence, ids)
            self._step.want(self._stage([(sequence, ids)], [True]))
            times = []
            for i in range(self._n_records):
                start = time.perf_counter()
                self._run(i, i + 1)
                times.append(time.perf_counter() - start)
            self._cache.commit(sequence, ids)
            return times


def _packed(sizes: Iterable[int], room: int, n_pages: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield steps of up to `room` tokens on `n_pages` pages: (text, start, stop) of their pieces."""
    step: list[tuple[int, int, int]] = []
    left, pages_left = room, n_pages
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + left)
            pages_left -= -(-stop // PAGE)
            if not left or (step and pages_left < 0):
                yield step
                step, left, pages_left = [], room, n_pages
                continue
            step.append((i, start, stop))
            left -= stop - start
            start = stop
    if step:
        yield step
