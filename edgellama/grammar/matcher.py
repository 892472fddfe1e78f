"""A grammar beside a vocabulary: which tokens may come next."""

from __future__ import annotations

import re
import threading
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from edgellama.errors import GrammarError
from edgellama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

_SPECIAL = b"\xff"  # begins no text: how llguidance knows special tokens
# Sets of tokens whose masks are computed ahead: the insides of strings, short ones (a schema's maxLength)
# and all.  Without them a mask takes 3 ms in a string at V = 262144, with them 0.1; each takes 0.2 s.
_SLICES = [r'[^"\\\x00-\x1F\x7F]{1,10}', r'[^"\\\x00-\x1F\x7F]+']
_STACK_NBYTES = 64 << 20  # rules that name each other are resolved by recursion


class Tokens:
    """The vocabulary of a tokenizer in llguidance's form: made once, when a grammar is first used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def constrain(self, grammar: str) -> Matcher:
        """Return what keeps one answer to a grammar of `read_grammar`.

        Raises: GrammarError saying what is wrong with the grammar.
        """
        return Matcher(self._tokens, grammar, self._tokenizer)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        ends = sorted(self._tokenizer.eog_ids)
        if not ends:
            raise GrammarError(
                "the vocabulary has no end-of-generation token; a grammar could not end an answer"
            )
        vocabulary = cast("TokenizerWrapper", _Vocabulary(self._tokenizer, ends[0]))
        return LLTokenizer(vocabulary, eos_token=ends, slices=_SLICES)


class _Vocabulary:
    """What LLTokenizer asks of a tokenizer: the bytes of all tokens, and the tokens of a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.eos_token_id = end
        self.tokens = tokenizer.all_bytes()
        special = [i for i, text in enumerate(self.tokens) if not text or tokenizer.is_special(i)]
        # Its trie takes quadratic time for equal tokens; a sound vocabulary has a few hundred.
        if len(self.tokens) - len(set(self.tokens)) > 2000:
            first = dict(zip(reversed(self.tokens), range(len(self.tokens))[::-1], strict=True))
            special = sorted({*special, *range(len(self.tokens))} - {*first.values()} | {*special})
        for i in special:
            self.tokens[i] = _SPECIAL + b"%d" % i
        self.special_token_ids: list[int] = []  # they are marked already
        self._encode = tokenizer.encode_inside

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that a grammar demands; none where they do not spell it."""
        ids = self._encode(text)
        return ids if b"".join(self.tokens[i] for i in ids) == text.encode() else []


class Matcher:
    """Follows one answer through a grammar: a `Constraint` of `generation.py`."""

    def __init__(self, tokens: LLTokenizer, grammar: str, tokenizer: Tokenizer) -> None:
        self._matcher = build(tokens, grammar)
        self._ends = sorted(tokenizer.eog_ids)
        self._n_vocab = tokenizer.n_vocab
        self._bits = np.zeros(-(-self._n_vocab // 32), np.int32)
        self._allowed: np.ndarray | None = None
        self.mask()  # a grammar that allows no text is an error before the model begins

    def mask(self) -> np.ndarray:
        """Return which tokens may come next, bool (V,); ends are among them where it may end.

        Raises: GrammarError when no token may, or a limit is passed.
        """
        if self._allowed is None:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            self._check()
            bits = self._bits.view(np.uint8)
            allowed = np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)
            allowed[self._ends] = allowed[self._ends].any()
            if not allowed.any():
                raise GrammarError("no token of the vocabulary fits the grammar here")
            self._allowed = allowed
        return self._allowed

    def accept(self, token: int) -> None:
        """Note the token that came.

        Raises: GrammarError if the grammar does not allow it.
        """
        self._allowed = None
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _error(self._matcher)


def build(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """Return llguidance's matcher of a grammar of `read_grammar`.

    It is made on a thread of our own, whose stack is large: that of another may have 512 KB.
    Raises: GrammarError saying what is wrong with the grammar.
    """
    from llguidance import LLMatcher

    done: list[LLMatcher] = []
    thread = threading.Thread(
        target=lambda: done.append(LLMatcher(tokens, grammar, log_level=0)), daemon=True
    )
    before = threading.stack_size(_STACK_NBYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    matcher = done[0]
    if matcher.is_error():
        raise _error(matcher)
    for warning in matcher.get_grammar_warnings():
        raise GrammarError(f"the grammar cannot be used: {_one_line(warning)}")
    return matcher


def _error(matcher: LLMatcher) -> GrammarError:
    text = matcher.get_error()
    if text.startswith("NoExtension"):
        return GrammarError("no token of the vocabulary fits the grammar here")
    return GrammarError(f"the grammar cannot be used: {_one_line(text)}")


def _one_line(error: str) -> str:
    """The sentence in an error of llguidance, of which others show the place in the grammar."""
    found = re.search(r"^error: (.+)", error, re.MULTILINE)
    text = found[1] if found else error.strip().partition("\n")[0]
    text = text.partition(". Enable 'coerce_one_of'")[0]  # an option that would accept too much
    return text if len(text) <= 200 else f"{text[:197]}..."
