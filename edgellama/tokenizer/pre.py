"""How text is cut before merging: the names that `tokenizer.ggml.pre` may hold, and their patterns.

The names and the cuts are llama.cpp's, also where these differ from the model's own tokenizer: upper and
lower case are told apart in ASCII only, and a group of digits may keep the text before it.  A pattern
isolates its matches, and the next one sees each piece alone.  All are written so that the time grows
with the length of the text: possessive repeats, and nothing counted again from every place in a run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from edgellama.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers


class PreTokenizer(NamedTuple):
    """Patterns applied one after another, and what else the name implies."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    adds_bos: bool = False  # where the file does not say
    insists_on_bos: bool = False  # also where the file says no
    raw: bool = False  # pieces are characters, not GPT-2's alphabet of bytes
    space: str = " "  # how the vocabulary writes a space
    whole_newlines: bool = False  # as ignore_merges, for runs of newlines alone

    def cutter(self) -> pre_tokenizers.PreTokenizer:
        """Return what applies the patterns."""
        from tokenizers import Regex, pre_tokenizers

        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        )


def _either(*patterns: str) -> str:
    return "|".join(patterns)


_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UP_TO_3 = r"\p{N}{1,3}"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _either(_CONTRACTION, _WORD, _UP_TO_3, _SYMBOLS, _SPACES)
_QWEN2 = _either(_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _SPACES)
_QWEN35 = _either(
    _CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"\p{N}",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    _SPACES,
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _cased(letters: str, suffix: str, digits: str) -> str:
    """Words as GPT-4o has them: capitals, then small letters, each also any letter beyond ASCII."""
    upper, lower = rf"[{letters}&&[^a-z]]", rf"[{letters}&&[^A-Z]]"
    return _either(
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _SPACES,
    )


def _marked(digits: str) -> str:
    """Words of letters and marks of any case, with what GPT-4o has beside its words."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_CONTRACTION})?"
    return _either(word, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES)


_KANA_AND_HAN = r"[\u4E00-\u9FA5\u3040-\u30FF]+"
_SYMBOL_AND_WORD = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = _either(_SYMBOL_AND_WORD, r" ?[\p{P}\p{S}]+[\r\n]*", _SPACES)
_SPARK = _either(_SYMBOL_AND_WORD, r" ?[\p{P}\p{S}]+", r"[\r\n]", r"\s+(?!\S)|\s+")
# Not white space: llama.cpp hides that from patterns without categories.
_DEEPSEEK_CJK = r"[\u0800-\u9FA5\uAC00-\uD7FF&&\S]+"
# The letters with case of an older Unicode, as DeepSeek's first tokenizer lists them.
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F "
    "386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD "
    "1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D "
    "1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 "
    "1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE "
    "2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 "
    "FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
_CASED_LETTERS = re.sub(r"[0-9A-F]+", r"\\x{\g<0>}", _CASED_LETTERS).replace(" ", "")
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3001\u3002]+",
    r"(?<!\s)\s++\z",
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")

# Threes from the right: the first group takes what is left over, and the text before the number.
_THREES = (
    r"\P{N}*+\p{N}*+",
    r"\A\P{N}*+(?:\p{N}{1,2}(?=(?>(?:\p{N}{3})*)\z)|\p{N}{3})|\p{N}{3}",
)
# The same for ASCII digits inside a number; where the left-over ends is found once, at the start.
_SUPERBPE = (
    r"\p{N}+",
    r"(?<![0-9])[0-9]{0,2}\K(?=(?>(?:[0-9]{3})+)(?![0-9]))",
    r"[0-9]{3}(?=[0-9]{3})",
)
_AFMOE_SCRIPTS = (
    r"[\u4E00-\uFAFF\u3400-\u4DBF\u3040-\u30FF\uFF65-\uFF9F\u2F00-\u2FDF\u0E40-\u0EFF\u1780-\u17FF"
    r"\u1000-\u109F\u1100-\u11FF]+"
)
_YOUTU_SCRIPTS = _either(
    r"[\uAC00-\uD7A3\u3131-\u318E]+",
    r"[！…“”‘’—：；，\u3001-\u303F\uFE30-\uFE4F]+",
    r"[\u3105-\u312F]+",
    _KANA_AND_HAN,
)
_HAN = (
    r"\u4E00-\u9FFF\u3400-\u4DBF\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\uF900-\uFAFF"
    r"\x{2F800}-\x{2FA1F}"
)
_KIMI = _either(
    rf"[{_HAN}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_CONTRACTION})?",
    _UP_TO_3,
    _SYMBOLS,
    _SPACES,
)
_CHAMELEON = (
    r"<sentinel:[0-9]+>",
    r"IMGIMG[A-I]{1,4}Z",
    r"[\t\n]|    |  ",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)
_EXAONE_MOE = _either(
    _CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?(?>\p{L}\p{M}*(?: ?\p{L}\p{M}*)*)",
    r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
    _SPACES,
)
# Runs of spaces in powers of two; runs that end in a newline stay.
_JAIS2 = (
    _LLAMA3,
    _either(
        r"\A\s++(?<=[\r\n])",
        *(rf"[^\S\r\n]{{{n}}}" for n in (512, 256, 128, 64, 32, 16, 8, 4)),
        r"[^\S\r\n]{1,2}(?!\S)",
    ),
)
_SEED_CODER = _either(_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}]+", _SPACES)
_LINES = (r"[^\n]++|\n++",)

_KINDS: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}"))),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9]{3}"))),
    ("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat "
     "a.x-4.0 mellum modern-bert mpt olmo jais exaone4 trillion granite-docling",
     PreTokenizer((_GPT2,))),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
     PreTokenizer((r"\p{N}", _GPT2))),
    ("chameleon", PreTokenizer(_CHAMELEON, adds_bos=True)),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("jais-2", PreTokenizer(_JAIS2)),
    ("minicpm5", PreTokenizer((_UP_TO_3, _LLAMA3), ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2 "
     "bailingmoe bailingmoe2 llada-moe", PreTokenizer((_QWEN2,))),
    ("qwen35", PreTokenizer((_QWEN35,))),
    ("laguna", PreTokenizer((*_LINES, _QWEN2))),
    ("ufakzeka", PreTokenizer((_either(_WORD, r"\p{N}", _SYMBOLS, _SPACES),))),
    ("seed-coder", PreTokenizer((_SEED_CODER,))),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    ("kimi-k2", PreTokenizer((_KIMI,))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2",
     PreTokenizer((_cased(r"\p{L}", f"(?:{_CONTRACTION})?", _UP_TO_3),))),
    ("granite-embed-multi-97m",
     PreTokenizer((_cased(r"\p{L}\p{M}", f"(?:{_CONTRACTION})?", _UP_TO_3),), ignore_merges=True)),
    ("tekken", PreTokenizer((_cased(r"\p{L}", "", r"\p{N}"),), ignore_merges=True, adds_bos=True)),
    ("youtu", PreTokenizer((_YOUTU_SCRIPTS, _marked(r"\p{N}")), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((*_THREES, _marked(_UP_TO_3)))),
    ("afmoe", PreTokenizer((*_THREES, _AFMOE_SCRIPTS, _DEEPSEEK3))),
    ("superbpe", PreTokenizer(_SUPERBPE)),
    ("deepseek-llm", PreTokenizer(_DEEPSEEK_LLM)),
    ("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4",
     PreTokenizer((_UP_TO_3, _KANA_AND_HAN, _DEEPSEEK3))),
    ("spark2_5", PreTokenizer((_UP_TO_3, _KANA_AND_HAN, _SPARK, r"\p{N}"))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("gemma4 granite-embed-multi-311m",
     PreTokenizer(_LINES, insists_on_bos=True, raw=True, space="\u2581", whole_newlines=True)),
    ("sarvam-moe", PreTokenizer(_LINES, raw=True, space="\u2581")),
    ("whitespace", PreTokenizer((r"\S+",), raw=True)),
)  # fmt: skip
PRE_TOKENIZERS = {name: kind for names, kind in _KINDS for name in names.split()}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the kind of a name; a file without one means `default`.

    Raises: UnsupportedModelError that lists the known names.
    """
    kind = PRE_TOKENIZERS.get(name or "default")
    if kind is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(
            f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known; name one that cuts text "
            f"in the same way with --override-pre: {known}"
        )
    return kind
