"""Pre-tokenizers: what each kind cuts, what llama.cpp makes of every name, and how long it takes."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from make_vocab import byte_level, characters, vocabulary
from tokenizers import PreTokenizedString

from edgellama.errors import UnsupportedModelError
from edgellama.gguf import open_gguf
from edgellama.tokenizer import Tokenizer, load_tokenizer
from edgellama.tokenizer.pre import PRE_TOKENIZERS

GOLDEN = json.loads((DATA / "pre.json").read_text(encoding="ascii"))
TEXTS = [text for text, *_ in GOLDEN["cases"]]
CLASS_OF = {name: i for i, names in enumerate(GOLDEN["classes"]) for name in names.split()}
SHARED = Path(__file__).parents[2] / "shared" / "data"
KINDS = {kind.patterns: name for name, kind in PRE_TOKENIZERS.items()}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    tokenizer = load_tokenizer(vocabulary(name, TEXTS, GOLDEN["whole"]))
    for text, which, *answers in GOLDEN["cases"]:
        ids = answers[int(which[CLASS_OF[name]], 36)]
        if ids is not None:
            assert tokenizer.encode(text) == ids, ascii(text)


def test_every_name_is_recorded() -> None:
    assert CLASS_OF.keys() == PRE_TOKENIZERS.keys()
    assert len(GOLDEN["cases"]) >= 300


# Of each kind: texts, and the same with bars where the published patterns cut them one after another.
CUTS = [
    ("default", "ab 123", "ab| |123"),
    ("default", "x12345!?$9`", "x|123|45|!?$|9|`"),
    ("falcon", "Don't `x` 12345", "Don|'|t| |`|x|`| |123|45"),
    ("falcon", " 1234567", " |123|456|7"),
    ("gpt-2", "I'm DON'T  don't  ", "I|'m| DON|'|T| | don|'t|  "),
    ("gpt-2", "a1b22  c\n\n d", "a|1|b|22| | c|\n\n| d"),
    ("gpt-2", "中文 世界!!e\u0301", "中文| 世界|!!|e|\u0301"),
    ("smollm", "x 123 y½", "x| |1|2|3| y|½"),
    (
        "chameleon",
        "<sentinel:7>IMGIMGABZ a,b 12\t x",
        "<|sentinel|:|7|>|IMGIMGABZ| a|,|b| |1|2|\t| x",
    ),
    ("chameleon", "      x", "    |  |x"),
    ("llama-bpe", "I'll DON'T 12345", "I|'ll| DON|'T| |123|45"),
    ("llama-bpe", "(abc) x\n\n  y !!\r\nz", "(abc|)| x|\n\n| | y| !!\r\n|z"),
    ("llama-bpe", "a   \n   b    ", "a|   \n|  | b|    "),
    ("jais-2", "a" + " " * 20 + "b", "a|" + " " * 16 + "|  | | b"),
    ("jais-2", "a   \n" + " " * 7, "a|   \n|    |  | "),
    ("minicpm5", "ab12345c", "ab|123|45|c"),
    ("qwen2", "I'LL pay 123", "I|'LL| pay| |1|2|3"),
    ("qwen35", "cafe\u0301s \u0301x", "cafe\u0301s| \u0301x"),
    ("laguna", "a!\n\nb", "a|!|\n\n|b"),
    ("ufakzeka", "Ankara'da 12", "Ankara|'da| |1|2"),
    ("seed-coder", "x!!\n y", "x|!!|\n| y"),
    ("exaone-moe", "a b c\u0301d  e!\n\nf", "a b c\u0301d| | e|!\n|\n|f"),
    ("kimi-k2", "漢字abc's 1234かな", "漢字|abc's| |123|4|かな"),
    ("kimi-k2", "x漢 漢", "x|漢| |漢"),
    ("gpt-4o", "camelCase I'M HTMLPage 1234", "camel|Case| I'M| HTMLPage| |123|4"),
    ("gpt-4o", "a //\n/x e\u0301x", "a| //\n/|x| e|\u0301x"),
    ("granite-embed-multi-97m", "e\u0301x fooBar", "e\u0301x| foo|Bar"),
    ("tekken", "camelCase it's 12", "camel|Case| it|'s| |1|2"),
    ("youtu", "한국어…中文かなabcABC's 12", "한국어|…|中文かな|abcABC's| |1|2"),
    ("tiny_aya", "1234567", "1|234|567"),
    ("tiny_aya", "x12 fooBar's", "x|12| fooBar's"),
    ("afmoe", "12345 中文ab", "12|345| |中文|ab"),
    ("superbpe", "so it is 1234567.25 or 123456", "so it is |1|234|567|.|25| or |123|456"),
    ("deepseek-llm", "Ab é1 ,。中文 12\n  ", "Ab| é|1| ,|。|中文| |12|\n|  "),
    ("deepseek-coder", "ab 中文 ,12\nc", "ab| |中文| ,|1|2|\n|c"),
    ("deepseek-v3", "1234中文かなx !?\n(ab", "123|4|中文かな|x| !?\n|(ab"),
    ("spark2_5", "123 ab!\n\n", "1|2|3| ab|!|\n|\n"),
    ("bloom", " one,two (three 4", " one|,|two| (|three| 4"),
    ("viking", "one 23", "one| |2|3"),
    ("gemma4", "a b\n\nc", "a b|\n\n|c"),
    ("sarvam-moe", "a\n\n", "a|\n\n"),
    ("whitespace", "ab  c!", "ab|  |c!"),
]


@pytest.mark.parametrize(("name", "text", "cut"), CUTS)
def test_cuts(name: str, text: str, cut: str) -> None:
    pieces = [piece for piece, _ in PRE_TOKENIZERS[name].cutter().pre_tokenize_str(text)]
    assert pieces == cut.split("|")


def test_cuts_cover_the_kinds() -> None:
    assert {PRE_TOKENIZERS[name].patterns for name, *_ in CUTS} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS.values())
def test_no_text_takes_long_to_cut(name: str) -> None:
    cutter = PRE_TOKENIZERS[name].cutter()
    texts = ["x" * 1_000_000, *(" " * 65536 + end for end in ("", "x", "7", "!", "\n7"))]
    for unit in (
        "7",
        "X",
        "\n",
        "!",
        "'",
        "\u00e9",
        "\u4e2d",
        "\u0301",
        "a ",
        " \n",
        "aA",
        "7\u0663",
    ):
        texts.append(unit * (65536 // len(unit)))
    for text in texts:
        start = time.monotonic()
        cutter.pre_tokenize(PreTokenizedString(text))
        assert time.monotonic() - start < 5, f"{len(text)} of {text[:2]!r}"


@pytest.mark.parametrize("name", ["superbpe", "gemma4", "llama-bpe"])
def test_long_pieces_merge_in_time(name: str) -> None:
    tokenizer = load_tokenizer(vocabulary(name, ("  xx",), ()))
    for text in (" " * 65536, "x" * 1_000_000, "x\n" * 5000):
        start = time.monotonic()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert time.monotonic() - start < 10


# --- names and flags ------------------------------------------------------------------------------
def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'unheard-of'.*--override-pre: .*gpt-2"
    ) as error:
        load_tokenizer(byte_level("unheard-of", [], []))
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in PRE_TOKENIZERS)
    assert load_tokenizer(byte_level("unheard-of", [], []), "gpt-2").encode("!") == [33]


def test_a_file_without_a_name_has_the_default() -> None:
    texts = ["x12345!?"]
    ids = [load_tokenizer(vocabulary(name, texts, ())).encode(texts[0]) for name in ("", "default")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("pre", "said", "adds"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("tekken", None, True),
     ("llama-bpe", False, False), ("chameleon", None, True), ("gemma4", False, True)],
)  # fmt: skip
def test_bos(pre: str, said: bool | None, adds: bool) -> None:
    metadata = vocabulary(pre, ("ab",), ()) | {"tokenizer.ggml.add_bos_token": said}
    metadata["tokenizer.ggml.add_eos_token"] = True
    tokenizer = load_tokenizer(metadata)
    assert tokenizer.encode("")[:-1] == [tokenizer.bos_id] * adds
    assert tokenizer.encode("")[-1] == tokenizer.eos_id
    assert tokenizer.encode("", add_special=False) == []


def test_characters_fall_back_to_bytes() -> None:
    tokenizer = load_tokenizer(characters("gemma4", ["a b", "\u2581 ab", "\n \n"], ["\n\n\n"]))
    ids = tokenizer.encode(" ab\u00e9\n\n\n\n\n\n", add_special=False)
    texts = [tokenizer.token_text(i) for i in ids]
    assert texts == ["\u2581ab", "<0xC3>", "<0xA9>", "\n\n", "\n\n", "\n\n"]
    assert tokenizer.decode(ids) == " ab\u00e9\n\n\n\n\n\n"
    assert len(tokenizer.encode("\n\n\n", add_special=False)) == 1


def test_nothing_merges_over_what_is_no_token() -> None:
    metadata = byte_level("gpt-2", ["a b"], [])
    metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.tokens"].index("~")] = "gone"
    tokenizer = load_tokenizer(metadata)
    assert [tokenizer.token_text(i) for i in tokenizer.encode("ab")] == ["ab"]
    assert tokenizer.encode("~~") == []
    metadata["tokenizer.ggml.pre"] = "superbpe"
    assert [tokenizer.token_text(i) for i in load_tokenizer(metadata).encode("a~b")] == ["a", "b"]


# --- special tokens -------------------------------------------------------------------------------
def with_tokens(tokens: dict[str, int], pre: str = "gpt-2", **changes: Any) -> Tokenizer:
    """A vocabulary of bytes and some more tokens of given types."""
    metadata = byte_level(pre, [], []) | changes
    metadata["tokenizer.ggml.tokens"] += tokens
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.array([*types, *tokens.values()], np.int32)
    return load_tokenizer(metadata)


def shown(tokenizer: Tokenizer, text: str, parse_special: bool = True) -> str:
    ids = tokenizer.encode(text, add_special=False, parse_special=parse_special)
    return "|".join(tokenizer.token_text(i) for i in ids)


def test_the_longest_special_token_is_split_off_first() -> None:
    tokenizer = with_tokens({"<ab": 4, "ab>": 4, "b>cd": 4, "<\u00e9": 3, "\u00e9>x": 3})
    assert shown(tokenizer, "<ab>cd") == "<|a|b>cd"
    assert shown(tokenizer, "<\u00e9>x") == "<|\u00e9>x"
    assert shown(tokenizer, "<ab", parse_special=False) == "<ab"
    assert shown(tokenizer, "<start>", parse_special=False) == "<|s|t|a|r|t|>"


def test_white_space_around_special_tokens() -> None:
    plain = with_tokens({"<a>": 3})
    assert shown(plain, "x <a> \n<a>y") == "x|\u0120|<a>|\u0120|\u010a|<a>|y"
    phi = with_tokens({"<a>": 3, "<u>": 4, "<s>": 3}, **{"general.name": "My Phi-3 Mini"})
    assert shown(phi, "x <a> \n\t<a> y<s> z") == "x|\u0120|<a>|<a>|y|<s>|\u0120|z"
    assert shown(phi, "<u> \n<a> x", parse_special=False) == "<u>|<|a|>|\u0120|x"
    jina = with_tokens({"<mask>": 3}, pre="jina-v2-code")
    assert shown(jina, "x \n <mask> y") == "x|<mask>|\u0120|y"
    bert = with_tokens({"[MASK]": 3}, **{"general.name": "modern-bert-x"})
    assert shown(bert, " [MASK] [MASK]") == "[MASK]|[MASK]"


def test_tokens_known_by_text() -> None:
    tokenizer = with_tokens(
        {"<|im_end|>": 4, "<fim_prefix>": 1, "[PAD]": 1, "<|channel|>": 3, "<|end|>": 3, "<|call|>": 3,
         "<|return|>": 3}
    )  # fmt: skip
    ends = {tokenizer.token_text(i) for i in tokenizer.eog_ids}
    assert ends == {"<stop>", "<|im_end|>", "[PAD]", "<|call|>", "<|return|>"}
    assert "<|im_end|>" not in shown(tokenizer, "<|im_end|>", parse_special=False)
    assert shown(tokenizer, "<fim_prefix>x[PAD]") == "<fim_prefix>|x|[PAD]"
    assert shown(tokenizer, "<|channel|><|end|>", parse_special=False) == "<|channel|>|<|end|>"
    assert tokenizer.decode(tokenizer.encode("a<|channel|>b")) == "a<|channel|>b"
    named = with_tokens({"[PAD]": 1, "<|end|>": 3}, **{"tokenizer.ggml.fim_pad_token_id": 5})
    assert named.eog_ids >= {5}
    assert shown(named, "[PAD]") == "[|P|A|D|]"
    assert "<|end|>" in {named.token_text(i) for i in named.eog_ids}


# --- SentencePiece --------------------------------------------------------------------------------
def sentence_piece(pieces: dict[str, tuple[float, int]], **changes: Any) -> Tokenizer:
    """A vocabulary of kind `llama`: byte tokens, and pieces with scores and types."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(
            [0.0] * 259 + [score for score, _ in pieces.values()], np.float32
        ),
        "tokenizer.ggml.token_type": np.array(
            [2, 3, 3] + [6] * 256 + [kind for _, kind in pieces.values()], np.int32
        ),
    }
    return load_tokenizer(metadata | {f"tokenizer.ggml.{k}": v for k, v in changes.items()})


PIECES = dict.fromkeys("\u2581abcx<>", (-100.0, 1)) | {
    "\u2581a": (-3.0, 1),
    "\u2581\u2581": (-1.0, 4),
}


def test_sentence_piece_spaces_and_bytes() -> None:
    tokenizer = sentence_piece(PIECES)
    assert shown(tokenizer, "a a\u00e9\n") == "\u2581a|\u2581a|<0xC3>|<0xA9>|<0x0A>"
    assert shown(tokenizer, "    a") == "\u2581\u2581|\u2581\u2581|\u2581a"
    assert shown(tokenizer, "a</s>a") == "\u2581a|</s>|\u2581a"
    assert tokenizer.encode("") == [1]
    plain = sentence_piece(PIECES | {"\u2581\u2581": (-1.0, 1)})
    for text in ("", " ", "  a  b ", "a\t\n\0", "\u2603 \U0001f642"):
        assert plain.decode(plain.encode(text)) == text
    bare = sentence_piece(PIECES, add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    assert shown(bare, "a a") == "a|\u2581a"
    assert bare.encode("")[-1:] == [2]
    kept = sentence_piece(PIECES, remove_extra_whitespaces=True)
    assert shown(kept, "a    a") == shown(tokenizer, "a    a")


def test_sentence_piece_merges_any_token_but_control() -> None:
    pieces = PIECES | {
        "ab": (-2.0, 5),
        "bc": (-0.0, 1),
        "cx": (0.0, 1),
        "<a": (-1.0, 1),
        "<a>": (0.0, 3),
    }
    tokenizer = sentence_piece(pieces, add_space_prefix=False)
    assert shown(tokenizer, "aba") == "ab|a"
    assert shown(tokenizer, "bcx") == "bc|x"
    assert shown(tokenizer, "<a>", parse_special=False) == "<a|>"
    assert shown(tokenizer, "\u2581\u2581") == "\u2581\u2581"


# --- vocabularies of others -----------------------------------------------------------------------
@cache
def published(name: str, folder: Path) -> Tokenizer:
    path = folder / f"{name}.gguf"
    with (
        gzip.open(SHARED / "vocab" / f"ggml-vocab-{name}.gguf.gz") as packed,
        path.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out)
    with open_gguf(path) as gguf:
        return load_tokenizer(gguf.metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the published vocabularies are unpacked."""
    if not (SHARED / "vocab").exists():
        pytest.skip("the published vocabularies are not beside this checkout")
    return tmp_path_factory.mktemp("vocab")


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "falcon"])
def test_published_ids(name: str, folder: Path) -> None:
    base = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    with open(f"{base}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{base}.out").read_text(encoding="ascii").splitlines()
    assert len(texts) > 40
    tokenizer = published(name, folder)
    for text, line in zip(texts, lines, strict=True):
        ids = [int(i) for i in line.split()]
        assert tokenizer.encode(text, add_special=False) == ids, ascii(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "file", "model"),
    [("llama-spm", "llama", "Xenova/llama-tokenizer"), ("gpt-2", "gpt2", "Xenova/gpt2"),
     ("falcon", "falcon", "tiiuae/falcon-7b")],
)  # fmt: skip
def test_published_special_ids(name: str, file: str, model: str, folder: Path) -> None:
    path = SHARED / "tokenizer" / f"transformers_js_{file}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))[model].values()
    assert len(cases) > 20
    tokenizer = published(name, folder)
    for case in cases:
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids"], ascii(
            case["text"]
        )
