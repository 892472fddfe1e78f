"""Keywords of an answer, as type checkers and editors see them; nothing of this is imported otherwise.

What they mean: `LLM.stream`, and `sampling/options.py` for those of the sampler.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from edgellama.sampling import LogitsProcessor


class SamplingKeywords(TypedDict, total=False):
    """Fields of `SamplingOptions`; None is as if left out."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    min_keep: int | None
    xtc_probability: float | None
    xtc_threshold: float | None
    dynatemp_range: float | None
    dynatemp_exponent: float | None
    repeat_last_n: int | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: str | Sequence[str] | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    logit_bias: Mapping[Any, float] | None  # of token ids and texts
    samplers: str | Sequence[str] | None


class AnswerKeywords(SamplingKeywords, total=False):
    """Keywords of `LLM.stream`."""

    max_tokens: int | None
    max_time_s: float | None
    stop: str | Sequence[str]
    seed: int | None
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    processors: Sequence[LogitsProcessor]
    parse_special: bool
    context_shift: bool | None
    n_keep: int | None
    response_format: Mapping[str, Any] | None
    json_schema: Mapping[str, Any] | bool | str | None
    grammar: str | None
    regex: str | None
    choices: Sequence[str] | None


class PromptKeywords(TypedDict, total=False):
    """Keywords of `LLM.render_chat`."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    tool_format: str | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template: str | os.PathLike[str] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool
    reasoning_format: str


class ChatKeywords(AnswerKeywords, PromptKeywords, total=False):
    """Keywords of `LLM.stream_chat`."""
