"""Small trained tokenizers in the files of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from edgellama.convert.probes import PROBES

TEXT = [*PROBES, *(f"the quick brown fox {i} jumps over the lazy dog's back" for i in range(200))]
# Published patterns; what they are called in a GGUF is for the converter to find out.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve"
    r"|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:"
    r"'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cutter(name: str) -> Any:
    pre = tokenizers.pre_tokenizers
    split = {"llama3": LLAMA3, "dbrx": LLAMA3, "qwen2": QWEN2}
    bytes_ = pre.ByteLevel(add_prefix_space=False, use_regex=name not in split)
    if name in split:
        return pre.Sequence([pre.Split(tokenizers.Regex(split[name]), "isolated"), bytes_])
    return pre.Sequence([pre.Digits(True), bytes_]) if name == "starcoder" else bytes_


def byte_level(folder: Path, name: str, n_vocab: int = 400, **extra: Any) -> Path:
    """A small trained BPE, with a template that puts <s> first when `bos` is set."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=name == "llama3"))
    tokenizer.pre_tokenizer = cutter(name)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_vocab, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|end|>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(["<plain>"])
    if extra.pop("bos", False):
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, **extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
