"""Where things lie in the words that Python and the kernels share.  All fields are 8 bytes.

Numba freezes these numbers into kernels; the runtime writes through the same names.
"""

from __future__ import annotations

# --- rows of activations, bytes per 32 columns: see `quantize.py` ---------------------------------
I8_NBYTES = 52
I16_NBYTES = 68
ACTIVATION_NBYTES = {"i8": I8_NBYTES, "i16": I16_NBYTES, "f32": 128}

# --- the step: what this call evaluates -----------------------------------------------------------
STEP_N_TOKENS = 0  # T
STEP_N_OUT = 8  # rows whose logits are wanted
STEP_IDS = 16  # address, i32 (T,)
STEP_POSITIONS = 24  # address, i32 (T,)
STEP_TABLES = 32  # address, i64 (T,): address of the i32 page table of each token's sequence
STEP_OUT_ROWS = 40  # address, i32 (n_out,): token index of each wanted row
STEP_NBYTES = 64

# --- an operation record --------------------------------------------------------------------------
RECORD_FUNCTION = 0  # address of the compiled operation
RECORD_PARTS = 8  # pieces that the output rows (or heads) are cut into
RECORD_TOKENS = 16  # tokens per chunk
RECORD_COUNT = 24  # offset in the step of the token count this operation runs over
RECORD_WAIT = 32  # operations before this index must be complete first
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
TEAM_STOP = 88
TEAM_NBYTES = 128

CLAIM = 1 << 20
COUNT_MASK = CLAIM - 1
EPOCH_SHIFT = 40
EPOCH_MASK = (1 << 23) - 1
COUNTER_NBYTES = 64
