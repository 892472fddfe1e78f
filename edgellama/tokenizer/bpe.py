"""Vocabularies of kind `gpt2`: byte-level BPE by the tokenizers library.

`tokenizer.ggml.pre` names how text is cut before merging; the names are llama.cpp's, the patterns those
of the models' own tokenizers.  An unknown name is an error: guessing would change every answer a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from edgellama.errors import ModelFileError, UnsupportedModelError

from .vocab import Vocab

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL
)
_WORDS = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Patterns applied one after another, and what else the name implies."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


_KINDS: tuple[tuple[str, PreTokenizer], ...] = (
    ("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe "
     "gigachat a.x-4.0 mellum modern-bert mpt olmo jais exaone4 trillion granite-docling",
     PreTokenizer((_GPT2,))),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan", PreTokenizer((_QWEN2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b",
     PreTokenizer((r"\p{N}", _GPT2))),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    ("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True)),
    ("gpt-4o llama4 kanana2 talkie", PreTokenizer((_GPT4O,))),
    ("deepseek-v3 hunyuan-dense joyai-llm",
     PreTokenizer((r"\p{N}{1,3}", r"[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_WORDS,))),
    ("viking", PreTokenizer((_WORDS, r"\p{N}"))),
)  # fmt: skip
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: kind for names, kind in _KINDS for name in names.split()
}


class ByteLevelBPE:
    """BPE over bytes written as printable characters."""

    adds_space_prefix = False

    def __init__(self, vocab: Vocab, pre: str) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        kind = PRE_TOKENIZERS.get(pre or "default")
        if kind is None:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise UnsupportedModelError(
                f"tokenizer.ggml.pre is {pre!r}, which is not known; override it with one of: {known}"
            )
        self.adds_bos_by_kind = kind.adds_bos
        merges = []
        for i, merge in enumerate(vocab.merges):
            left, space, right = merge.partition(" ") if merge[:1] != " " else ("", "", "")
            if not space or not left or not right:
                raise ModelFileError(
                    f"tokenizer.ggml.merges[{i}] is {merge[:40]!r}; two pieces and a space are needed"
                )
            merges.append((left, right))
        ids = {text: i for i, text in reversed(list(enumerate(vocab.tokens)))}
        known_merges = [m for m in merges if m[0] in ids and m[1] in ids and m[0] + m[1] in ids]
        if len(known_merges) < len(merges):
            i = next(i for i, m in enumerate(merges) if m not in set(known_merges))
            raise ModelFileError(
                f"tokenizer.ggml.merges[{i}] is {vocab.merges[i][:40]!r}; it names a piece that is "
                "no token"
            )
        self._tokens = vocab.tokens
        self._tokenizer = Tokenizer(
            models.BPE(vocab=ids, merges=merges, ignore_merges=kind.ignore_merges)
        )
        steps: list = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in kind.patterns
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def encode(self, text: str, follows_special: bool) -> list[int]:
        """Ids of a text without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a normal token."""
        table = byte_of_character()
        text = self._tokens[token]
        try:
            return bytes(table[c] for c in text)
        except KeyError:
            return text.encode()  # a token that is not written in the byte alphabet


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    table = {}
    shifted = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            table[chr(byte)] = byte
        else:
            table[chr(256 + shifted)] = byte
            shifted += 1
    return table
