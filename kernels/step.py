"""The interpreter: every thread of the team runs the same table of operations over the same step.

An operation is cut into chunks (a part of the rows x some tokens); threads claim chunks from a counter
word and the operation is over when its chunks are done, not when every thread has arrived.  The word
is `epoch << 40 | claimed << 20 | done`: a thread that was asleep since an earlier launch finds another
epoch, can claim nothing, and leaves.  That is why `launch` turns the counters before it publishes the
step.

A launch ends early, between two chunks, when it is aborted or has lasted long enough: thread 0 turns
the counters to an epoch that nobody has, and waits for the chunks that were claimed.  What is done
stays counted, so the launch can be resumed.
"""

from __future__ import annotations

from .layout import (
    CLAIM,
    COUNT_MASK,
    COUNTER_NBYTES,
    COUNTS_MASK,
    EPOCH_SEALED,
    EPOCH_SHIFT,
    RECORD_COUNT,
    RECORD_FUNCTION,
    RECORD_NBYTES,
    RECORD_OF_SPANS,
    RECORD_PARTS,
    RECORD_TOKENS,
    RECORD_WAIT,
    STEP_N_SPANS,
    STEP_NBYTES,
    TEAM_ABORT,
    TEAM_CLOCK,
    TEAM_CLOCK_ARGUMENT,
    TEAM_CLOCK_UNIT,
    TEAM_CLOCK_WORDS,
    TEAM_COUNTERS,
    TEAM_EPOCH,
    TEAM_FIRST,
    TEAM_LAST,
    TEAM_N_ACTIVE,
    TEAM_N_YIELDS,
    TEAM_SCRATCH,
    TEAM_SCRATCH_NBYTES,
    TEAM_SLEEP,
    TEAM_SLEEP_UNITS,
    TEAM_STEP,
    TEAM_STOP,
    TEAM_TABLE,
    TEAM_YIELD,
)
from .simd import *
from .simd import inline

SPINS = 4000  # pauses before the processor is offered to others: about 50 us
FEW_TOKENS = 8  # with no more, an operation is so short that the clock is looked at once in it


@inline
def back_off(team, n_waits):
    """Wait a little, more politely the longer it lasts."""
    if n_waits < SPINS:
        pause()
    elif n_waits < SPINS + load_i64(team + TEAM_N_YIELDS):
        call_yield(load_i64(team + TEAM_YIELD))
    else:
        call_sleep(load_i64(team + TEAM_SLEEP), load_i64(team + TEAM_SLEEP_UNITS))


@inline
def parts_of(record, step):
    parts = load_i64(record + RECORD_PARTS)
    if load_i64(record + RECORD_OF_SPANS) != 0:
        parts *= load_i64(step + STEP_N_SPANS)
    return parts


@inline
def n_chunks_of(record, step):
    per_chunk = load_i64(record + RECORD_TOKENS)
    n_tokens = load_i64(step + load_i64(record + RECORD_COUNT))
    return parts_of(record, step) * ((n_tokens + per_chunk - 1) // per_chunk)


@inline
def now_ns(team):
    words = team + TEAM_CLOCK_WORDS
    call_clock(load_i64(team + TEAM_CLOCK), load_i64(team + TEAM_CLOCK_ARGUMENT), words)
    return load_i64(words) * load_i64(team + TEAM_CLOCK_UNIT) + load_i64(words + 8)


@inline
def must_pause(team, deadline, looks):
    """Say whether this launch is to end: only thread 0 has a deadline, and it need not always look."""
    if deadline == 0:
        return False
    return load_acquire(team + TEAM_ABORT) != 0 or (looks and now_ns(team) > deadline)


@inline
def wait_for(team, counter, epoch, n_chunks, deadline):
    """Return 1 when the operation is done, 0 when its launch is over."""
    n_waits = 0
    while True:
        word = load_acquire(counter)
        if word >> EPOCH_SHIFT != epoch:
            return 0
        if word & COUNT_MASK >= n_chunks:
            return 1
        if must_pause(team, deadline, n_waits >= SPINS):
            return 0
        back_off(team, n_waits)
        n_waits += 1


@inline
def run_table(team, epoch, first, last, thread, deadline):
    """Return the operation before which all are done: `last` unless the launch ended early."""
    table = load_i64(team + TEAM_TABLE)
    counters = load_i64(team + TEAM_COUNTERS)
    step = load_i64(team + TEAM_STEP)
    scratch = load_i64(team + TEAM_SCRATCH) + thread * load_i64(team + TEAM_SCRATCH_NBYTES)
    done = first
    n_mine = 0
    for index in range(first, last):
        record = table + index * RECORD_NBYTES
        counter = counters + index * COUNTER_NBYTES
        need = load_i64(record + RECORD_WAIT)
        while done < need:
            n_chunks = n_chunks_of(table + done * RECORD_NBYTES, step)
            at = counters + done * COUNTER_NBYTES
            if wait_for(team, at, epoch, n_chunks, deadline) == 0:
                return done
            done += 1
        parts = parts_of(record, step)
        per_chunk = load_i64(record + RECORD_TOKENS)
        n_tokens = load_i64(step + load_i64(record + RECORD_COUNT))
        n_chunks = n_chunks_of(record, step)
        function = load_i64(record + RECORD_FUNCTION)
        looks = n_mine > 0  # so that every launch gets on
        while True:
            word = load_acquire(counter)
            if word >> EPOCH_SHIFT != epoch:
                return done
            chunk = (word // CLAIM) & COUNT_MASK
            if chunk >= n_chunks:
                break
            if must_pause(team, deadline, looks):
                return done
            if compare_exchange(counter, word, word + CLAIM) == 1:
                token = (chunk // parts) * per_chunk
                call_operation(
                    function, step, record, chunk % parts,
                    token, min(per_chunk, n_tokens - token), scratch,
                )  # fmt: skip
                atomic_add(counter, 1)
                n_mine += 1
                looks = n_tokens > FEW_TOKENS
    while done < last:
        n_chunks = n_chunks_of(table + done * RECORD_NBYTES, step)
        if wait_for(team, counters + done * COUNTER_NBYTES, epoch, n_chunks, deadline) == 0:
            return done
        done += 1
    return done


@inline
def seal(team, first, last):
    """Take operations [first, last) out of the hands of all threads, keeping their counts."""
    counters = load_i64(team + TEAM_COUNTERS)
    for index in range(first, last):
        counter = counters + index * COUNTER_NBYTES
        while True:
            word = load_acquire(counter)
            sealed = (word & COUNTS_MASK) + (EPOCH_SEALED << EPOCH_SHIFT)
            if compare_exchange(counter, word, sealed) == 1:
                break
    for index in range(first, last):
        n_waits = 0
        while True:
            word = load_acquire(counters + index * COUNTER_NBYTES)
            if (word // CLAIM) & COUNT_MASK == word & COUNT_MASK:
                break
            back_off(team, n_waits)
            n_waits += 1


def launch(team, staged, first, last, resumes, budget_ns):
    """Run operations [first, last) on the step at `staged`; the caller is thread 0.

    Returns `last`; or, aborted or after `budget_ns`, the operation from which to resume.
    """
    epoch = (load_i64(team + TEAM_EPOCH) + 1) % EPOCH_SEALED
    counters = load_i64(team + TEAM_COUNTERS)
    for index in range(first, last):
        counter = counters + index * COUNTER_NBYTES
        counts = load_i64(counter) & COUNTS_MASK if resumes != 0 else 0
        store_release(counter, (epoch << EPOCH_SHIFT) + counts)
    step = load_i64(team + TEAM_STEP)
    for i in range(0, STEP_NBYTES, 8):
        store_release(step + i, load_i64(staged + i))
    store_release(team + TEAM_FIRST, first)
    store_release(team + TEAM_LAST, last)
    store_release(team + TEAM_EPOCH, epoch)
    done = run_table(team, epoch, first, last, 0, now_ns(team) + budget_ns)
    # Also what is done: a late thread reads the number of chunks anew, from the next step by then.
    seal(team, first, last)
    return done


def work(team, thread, n_sleeps):
    """Serve launches until the team stops (returns 1) or nothing came for `n_sleeps` naps (0)."""
    seen = load_acquire(team + TEAM_EPOCH) - 1
    n_waits = 0
    while load_acquire(team + TEAM_STOP) == 0:
        epoch = load_acquire(team + TEAM_EPOCH)
        if epoch != seen and thread < load_i64(team + TEAM_N_ACTIVE):
            seen = epoch
            n_waits = 0
            run_table(
                team, epoch, load_i64(team + TEAM_FIRST), load_i64(team + TEAM_LAST), thread, 0
            )
        else:
            back_off(team, n_waits)
            n_waits += 1
            if n_waits > SPINS + load_i64(team + TEAM_N_YIELDS) + n_sleeps:
                return 0
    return 1
