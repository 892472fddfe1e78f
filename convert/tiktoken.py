"""tiktoken's vocabulary files: a token in base64 and its rank on every line, as Llama 3's from Meta."""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from edgellama.errors import ModelFileError
from edgellama.tokenizer.bpe import byte_of_character

from .folder import read_file

# Llama 3 numbers its special tokens behind the ranks; the file does not name them.
_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
LLAMA3_NAMED = {
    "<|begin_of_text|>": "bos", "<|end_of_text|>": "eos", "<|eot_id|>": "eot", "<|eom_id|>": "eom",
}  # fmt: skip
"""What these tokens are called in a GGUF file."""
_N_SPECIAL = 256
_MAX_TOKEN_NBYTES = 1 << 10  # Llama 3's have up to 128; finding a merge takes their square


class Ranks(NamedTuple):
    """Tokens in GPT-2's alphabet of bytes, the merges they imply, and special tokens by id."""

    tokens: list[str]
    merges: list[str]
    special: dict[int, str]


def read_tiktoken(path: Path) -> Ranks:
    """Read a list of ranks.

    Raises: ModelFileError naming the line that is no token and rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, place = line.split()
            token = base64.b64decode(encoded, validate=True)
            ranks[token] = int(place)
        except (ValueError, binascii.Error):
            raise ModelFileError(
                f"{path} is neither a sentencepiece model nor tiktoken's: line {number} holds no "
                "token in base64 and rank"
            ) from None
        if not 0 < len(token) <= _MAX_TOKEN_NBYTES:
            raise ModelFileError(
                f"{path}: the token of line {number} has {len(token)} bytes; 1 to "
                f"{_MAX_TOKEN_NBYTES} are read"
            )
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelFileError(f"{path}: the ranks are not 0 to {len(ranks) - 1}; fetch it again")
    letter = {byte: text for text, byte in byte_of_character().items()}
    written = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append(f"{written[left]} {written[right]}")
    tokens = [written[token] for token in sorted(ranks, key=ranks.__getitem__)]
    names = [*_SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in range(2, _N_SPECIAL))]
    special = dict(enumerate(names[:_N_SPECIAL], len(tokens)))
    return Ranks(tokens, merges, special)


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merge a token's bytes by all ranks below its own: the two parts that are left are its merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
        if best[0] >= rank:
            raise ModelFileError(f"the token {token!r} of rank {rank} is made by no merge")
        i = best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
