"""The vocabulary of a file, validated: tokens, their types, and the ids that mean something."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edgellama.errors import ModelFileError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = (CONTROL, UNKNOWN, USER_DEFINED)

MAX_TOKEN_LENGTH = 1 << 14  # characters
_INTEGERS = ("int32", "uint32", "int8", "uint8", "int16", "uint16", "int64", "uint64")
_PREFIX = "tokenizer.ggml."
# Tokens that mean something by their text, whatever the file says of them; the lists are llama.cpp's.
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|end_of_turn|>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>",
    "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip
# Fill-in-the-middle, where the file names no token for it.
_FIM = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>",
                "<PRE>", "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>",
                "<SUF>", "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>",
                "<MID>", "\u2581<MID>", "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_FIM_ENDS = ("fim_pad", "fim_rep", "fim_sep")
_OLD_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
# The channels of gpt-oss, which are part of what it says.
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class Vocab(NamedTuple):
    """What the metadata says, in checked form."""

    model: str
    pre: str
    tokens: list[str]
    scores: np.ndarray | None
    types: np.ndarray
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_bos_unset: bool
    add_eos: bool
    add_space_prefix: bool
    strip_left: frozenset[int]  # special tokens that swallow the white space before them
    strip_right: frozenset[int]  # or after
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
    types = np.full(n, NORMAL) if kinds is None else kinds.astype(np.int64)
    bad = np.flatnonzero((types < 0) | (types > 6))
    if len(bad):
        raise ModelFileError(f"{_PREFIX}token_type[{bad[0]}] is {types[bad[0]]}; types are 1 to 6")
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
    for i in np.flatnonzero(types == BYTE).tolist():
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
    named_fim = {
        kind: token_id(kind if get(f"{kind}_token_id") is not None else _OLD_KEYS.get(kind, kind))
        for kind in _FIM
    }
    ends = {i for i in (eos, token_id("eot"), token_id("eom")) if i is not None}
    _retype(tokens, types, named_fim, ends)
    strip_left, strip_right = _stripping(
        str(metadata.get("general.name") or ""), pre or "", tokens, types
    )
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
        eog_ids=frozenset(ends),
        add_bos=flag("add_bos_token", is_spm),
        add_bos_unset=get("add_bos_token") is None,
        add_eos=flag("add_eos_token", False),
        add_space_prefix=flag("add_space_prefix", is_spm),
        strip_left=strip_left,
        strip_right=strip_right,
        byte_of=byte_of,
    )


def _retype(
    tokens: list[str], types: np.ndarray, fim: Mapping[str, int | None], ends: set[int]
) -> None:
    """Correct the types of tokens known by text, and add to `ends` those that end a generation."""
    wanted = {*_ENDS, *_SHOWN, *(text for texts in _FIM.values() for text in texts)}
    ids = {text: tokens.index(text) for text in wanted.intersection(tokens)}
    control = {ids[text] for text in _ENDS if text in ids}
    ends |= control
    for kind, texts in _FIM.items():
        found = next((ids[text] for text in texts if text in ids), None)
        token = found if fim[kind] is None else fim[kind]
        if fim[kind] is None and found is not None:
            control.add(found)
        if kind in _FIM_ENDS and token is not None:
            ends.add(token)
    for token in control:
        types[token] = CONTROL
    for text in ids.keys() & set(_SHOWN):
        types[ids[text]] = USER_DEFINED
    # Where an answer has several parts, <|end|> closes one of them; Gemma 4 has </s> as plain text.
    if ids.keys() & {"<|call|>", "<|calls|>"} and ids.keys() & {"<|return|>", "<|flush|>"}:
        _unend("<|end|>", USER_DEFINED, ids, types, ends)
    if "<|tool_response>" in ids:
        _unend("</s>", NORMAL, ids, types, ends)


def _unend(text: str, kind: int, ids: dict[str, int], types: np.ndarray, ends: set[int]) -> None:
    if text in ids:
        types[ids[text]] = kind
        ends.discard(ids[text])


def _stripping(
    name: str, pre: str, tokens: list[str], types: np.ndarray
) -> tuple[frozenset[int], frozenset[int]]:
    """Return which special tokens swallow white space before and after them: no key says so."""
    masks: tuple[str, ...] = ()
    name = name.lower()
    if any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        masks = ("<mask>",)
    elif "phi-3" in name or "phi3" in name:
        keep = ("<unk>", "<s>", "<|endoftext|>")
        special = np.flatnonzero(np.isin(types, SPECIAL)).tolist()
        return frozenset(), frozenset(i for i in special if tokens[i] not in keep)
    elif "modern-bert" in name:
        masks = ("[MASK]",)
    return frozenset(tokens.index(text) for text in masks if text in tokens), frozenset()


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
