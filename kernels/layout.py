"""Where things lie in the words that Python and the kernels share.  All fields are 8 bytes.

Numba freezes these numbers into kernels; the runtime writes through the same names.
"""

from __future__ import annotations

# --- rows of activations, bytes per 32 columns: see `quantize.py` ---------------------------------
I8_NBYTES = 52
I16_NBYTES = 68
ACTIVATION_NBYTES = {"i8": I8_NBYTES, "i16": I16_NBYTES, "f32": 128}

I8_SCRATCH_NBYTES = 5 << 17  # of a thread that multiplies them: see `project_i8.py`

# --- the KV cache: see `kv.py` --------------------------------------------------------------------
PAGE = 32  # positions
SPAN = 256  # positions over which attention sums before it merges: part of what a result is
SPLIT_TOKENS = 12  # steps of at most so many tokens share their spans out among threads
SPLIT_ROWS = 1024  # (token, span) pairs that there is room for
KV_NBYTES = {"f16": 2, "f32": 4, "q8_0": 1}  # of an element


def kv_page_nbytes(kv_type: str, head_size: int) -> int:
    """Bytes of a page of one KV head."""
    n_blocks = (head_size + 31) // 32
    scales = (n_blocks + 1) * PAGE * 4 if kv_type == "q8_0" else 0
    return 2 * PAGE * n_blocks * 32 * KV_NBYTES[kv_type] + scales


# --- the step: what this call evaluates -----------------------------------------------------------
STEP_N_TOKENS = 0  # T
STEP_N_OUT = 8  # rows whose logits are wanted
STEP_IDS = 16  # address, i32 (T,)
STEP_POSITIONS = 24  # address, i32 (T,)
STEP_TABLES = 32  # address, i64 (T,): address of each token's i32 page tables
STEP_OUT_ROWS = 40  # address, i32 (n_out,): token index of each wanted row
STEP_N_SPANS = 48  # spans of positions that attention shares out among threads; 1: it does not
STEP_NBYTES = 64

# --- an operation record --------------------------------------------------------------------------
RECORD_FUNCTION = 0  # address of the compiled operation
RECORD_PARTS = 8  # pieces that the output rows (or heads) are cut into
RECORD_TOKENS = 16  # tokens per chunk
RECORD_COUNT = 24  # offset in the step of the token count this operation runs over
RECORD_WAIT = 32  # operations before this index must be complete first
RECORD_OF_SPANS = 40  # 1: there are `parts` pieces for each of the step's spans
RECORD_ARGUMENTS = 64
RECORD_NBYTES = 256
MAX_ARGUMENTS = (RECORD_NBYTES - RECORD_ARGUMENTS) // 8

# --- the team -------------------------------------------------------------------------------------
TEAM_EPOCH = 0  # number of the launch; written last
TEAM_FIRST = 8  # operations [first, last) of the table
TEAM_LAST = 16
TEAM_TABLE = 24
TEAM_COUNTERS = 32  # one 64-byte line per operation: epoch << 40 | claimed << 20 | done
TEAM_STEP = 40
TEAM_SCRATCH = 48  # base of the threads' scratch
TEAM_SCRATCH_NBYTES = 56
TEAM_YIELD = 64  # address of the system's yield(void)
TEAM_SLEEP = 72  # address of the system's sleep(units)
TEAM_SLEEP_UNITS = 80
TEAM_STOP = 88  # 1: workers leave for good
TEAM_ABORT = 96  # 1: launches return at the next chunk
TEAM_N_ACTIVE = 104  # threads that take part in launches
TEAM_N_YIELDS = 112  # before a waiting thread sleeps
TEAM_CLOCK = 128  # address of the system's clock(argument, words)
TEAM_CLOCK_ARGUMENT = 136
TEAM_CLOCK_UNIT = 144  # nanoseconds of its first word; its second has nanoseconds
TEAM_CLOCK_WORDS = 152
TEAM_NBYTES = 192

CLAIM = 1 << 20
COUNT_MASK = CLAIM - 1
EPOCH_SHIFT = 40
EPOCH_SEALED = (1 << 23) - 1  # of a launch that was paused: nobody's, and the last there is
COUNTS_MASK = (1 << EPOCH_SHIFT) - 1
COUNTER_NBYTES = 64
