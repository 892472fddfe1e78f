"""The vocabulary of a file, validated: tokens, their types, and the ids that mean something."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_TOKEN_LENGTH = 1 << 14  # characters
_INTEGERS = ("int32", "uint32", "int8", "uint8", "int16", "uint16", "int64", "uint64")
_PREFIX = "tokenizer.ggml."
# Texts that end a generation in one family or another, where the file does not say so by id.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_turn|>", "<turn|>",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Vocab:
    """What the metadata says, in checked form."""

    model: str
    pre: str
    tokens: list[str]
    scores: np.ndarray | None
    types: list[int]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_bos_unset: bool
    add_eos: bool
    add_space_prefix: bool
    byte_of: dict[int, int]


def read_vocab(metadata: Mapping[str, Any]) -> Vocab:
    """Check the tokenizer keys of a file.

    Raises: ModelFileError naming the key and what is wrong with it.
    """

    def get(key: str) -> Any:
        return metadata.get(_PREFIX + key)

    model = get("model")
    if not isinstance(model, str):
        raise ModelFileError(f"{_PREFIX}model is missing; the file has no tokenizer")
    tokens = get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelFileError(f"{_PREFIX}tokens is missing, empty or not an array of strings")
    n = len(tokens)
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_LENGTH:
        i = next(i for i, text in enumerate(tokens) if len(text) == longest)
        raise ModelFileError(
            f"{_PREFIX}tokens[{i}] has {longest} characters; {MAX_TOKEN_LENGTH} are allowed"
        )
    scores = _numbers(metadata, "scores", n, ("float32",))
    kinds = _numbers(metadata, "token_type", n, _INTEGERS)
    types = [NORMAL] * n if kinds is None else kinds.tolist()
    bad = next((i for i, kind in enumerate(types) if not 0 <= kind <= 6), None)
    if bad is not None:
        raise ModelFileError(f"{_PREFIX}token_type[{bad}] is {types[bad]}; types are 1 to 6")
    merges = get("merges")
    if merges is None:
        merges = []
    if not isinstance(merges, list):
        raise ModelFileError(f"{_PREFIX}merges is {shown(merges)}; an array of strings is needed")
    pre = get("pre")
    if not isinstance(pre, str | None) or len(pre or "") > 60:
        raise ModelFileError(f"{_PREFIX}pre is {shown(pre)}; a short string is needed")

    def token_id(key: str) -> int | None:
        value = get(f"{key}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
            raise ModelFileError(
                f"{_PREFIX}{key}_token_id is {shown(value)}; it must be an id below {n}"
            )
        return value

    def flag(key: str, default: bool) -> bool:
        value = get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelFileError(f"{_PREFIX}{key} is {shown(value)}; a bool is needed")
        return value

    byte_of = {}
    for i, kind in enumerate(types):
        if kind == BYTE:
            match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", tokens[i])
            if match is None:
                raise ModelFileError(
                    f"{_PREFIX}tokens[{i}] is a byte token {shown(tokens[i])}; <0x00> to <0xFF> is needed"
                )
            byte_of[i] = int(match[1], 16)
    is_spm = model == "llama"
    if is_spm and scores is None:
        raise ModelFileError(f"{_PREFIX}scores is missing; a vocabulary of kind llama needs it")
    bos, eos = token_id("bos"), token_id("eos")
    if is_spm:
        bos = 1 if bos is None and n > 2 else bos
        eos = 2 if eos is None and n > 2 else eos
    ends = {eos, token_id("eot"), token_id("eom")} - {None}
    wanted = set(_END_TEXTS)
    ends |= {
        i for i, text in enumerate(tokens) if text in wanted and types[i] in (CONTROL, USER_DEFINED)
    }
    return Vocab(
        model=model,
        pre=pre or "",
        tokens=tokens,
        scores=scores,
        types=types,
        merges=merges,
        bos_id=bos,
        eos_id=eos,
        unk_id=token_id("unknown"),
        eog_ids=frozenset(i for i in ends if i is not None),
        add_bos=flag("add_bos_token", is_spm),
        add_bos_unset=get("add_bos_token") is None,
        add_eos=flag("add_eos_token", False),
        add_space_prefix=flag("add_space_prefix", is_spm),
        byte_of=byte_of,
    )


def _numbers(
    metadata: Mapping[str, Any], key: str, n: int, wanted: tuple[str, ...]
) -> np.ndarray | None:
    values = metadata.get(_PREFIX + key)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or values.dtype.name not in wanted:
        seen = values.dtype.name if isinstance(values, np.ndarray) else shown(values)
        raise ModelFileError(
            f"{_PREFIX}{key} has the wrong element type {seen}; {wanted[0]} is needed"
        )
    if len(values) != n:
        raise ModelFileError(f"{_PREFIX}{key} has {len(values)} entries, {_PREFIX}tokens has {n}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ModelFileError(f"{_PREFIX}{key} holds a value that is not finite")
    return values
