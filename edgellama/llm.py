"""The user's class: text in, text out.

    with LLM("smollm2-135m") as llm:
        print(llm.chat([{"role": "user", "content": "Hello!"}]).text)

Token ids and steps are the engine's (`runtime/engine.py`); this file joins it with the tokenizer,
the chat template, the sampler and the stop rules.  How an answer grows: `generation.py`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgellama.catalog import resolve
from edgellama.errors import ContextOverflowError, ModelFileError, TemplateError, UsageError
from edgellama.generation import (
    Answer,
    Completion,
    Delta,
    Logprobs,
    Timings,
    TokenLogprob,
    answer_together,
    collect,
    stream,
)
from edgellama.gguf import open_gguf
from edgellama.models.config import read_config
from edgellama.runtime.engine import Engine
from edgellama.sampling import (
    LogitsProcessor,
    Sampler,
    bias_by_id,
    check_count,
    file_params,
    read_params,
)
from edgellama.speculate import Drafter, DraftModel, Lookup, Steps, check_same_vocabulary
from edgellama.stopping import StopStrings
from edgellama.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from edgellama.chat import ChatTemplate
    from edgellama.sampling.penalties import Breakers

__all__ = ["LLM", "Completion", "Delta", "Timings", "TokenLogprob"]


class _TokenizerThread(threading.Thread):
    """Makes the tokenizer, which is Python's work, while native threads read and pack the weights.

    Not before: what precedes the weights is Python's work too, and every file it opens would wait
    5 ms to get the interpreter back, 200 ms in all.
    """

    def __init__(self, metadata: Mapping[str, Any], override_pre: str | None) -> None:
        super().__init__()
        self._arguments = (metadata, override_pre)
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._tokenizer = load_tokenizer(*self._arguments)
        except Exception as error:
            self._error = error

    def result(self) -> Tokenizer:
        """Wait for the tokenizer, or for the error that came in its place."""
        if self.ident is None:  # nobody has begun to load weights
            self.run()
        else:
            self.join()
        if self._error is not None:
            raise self._error
        return self._tokenizer


class LLM:
    """A model, ready to answer.

    `model` is a path, a catalogue name, hf:org/repo/file.gguf or a URL; None is the default model.
    `n_ctx` is the most tokens of one text (default: 4096, or what the model was trained for if that
    is less), `n_batch` the most tokens in one step, `n_threads` defaults to the physical cores that
    may be used, `kv_type` is "f16", "f32" or "q8_0", `seed` None is random.  `draft` makes answers faster
    where their next tokens are easy to guess, and never changes them: "lookup" guesses what followed
    the same words before (good for summaries, edits and code), a smaller model of the same
    vocabulary (as `model`, or an open LLM, which stays yours to close) what it would say itself.

    Raises: ModelFileError, UnsupportedModelError, UsageError, OutOfMemoryError, DownloadError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_threads: int | None = None,
        kv_type: str = "f16",
        seed: int | None = None,
        offline: bool = False,
        override_pre: str | None = None,
        draft: str | os.PathLike[str] | LLM | None = None,
    ) -> None:
        path = resolve(None if model is None else os.fspath(model), offline=offline)
        with open_gguf(path) as gguf:
            self.config = read_config(gguf)
            self.metadata = gguf.metadata
            trained = self.config.context_length
            self.n_ctx = min(4096, trained) if n_ctx is None else n_ctx
            if self.n_ctx > trained:
                import logging  # 10 ms that most starts do not need

                logging.getLogger("edgellama").warning(  # unconfigured, it goes to stderr
                    "%s was trained for %d tokens; with n_ctx %d, the text may lose its sense",
                    self.config.name, trained, self.n_ctx,
                )  # fmt: skip
            tokenizer = _TokenizerThread(gguf.metadata, override_pre)
            self._engine = Engine(
                gguf,
                self.config,
                n_ctx=self.n_ctx,
                n_batch=n_batch,
                n_threads=n_threads,
                kv_type=kv_type,
                on_loading=tokenizer.start,
            )
        try:
            self.tokenizer = tokenizer.result()
            if self.tokenizer.n_vocab != self.config.n_vocab:
                raise ModelFileError(
                    f"{path.name}: the tokenizer has {self.tokenizer.n_vocab} tokens, the model "
                    f"{self.config.n_vocab}"
                )
        except BaseException:
            self._engine.close()
            raise
        self.n_threads = self._engine.n_threads
        self._seed = seed
        self._n_calls = 0
        self._known_breakers: dict[tuple[str, ...], Breakers] = {}
        self._draft: LLM | None = None
        self._owns_draft = not isinstance(draft, LLM)
        self._looks_up = draft == "lookup"
        if draft is not None and not self._looks_up:
            try:
                self._draft = draft if isinstance(draft, LLM) else LLM(
                    draft, n_ctx=self.n_ctx, n_batch=n_batch, n_threads=n_threads,
                    kv_type=kv_type, offline=offline, override_pre=override_pre,
                )  # fmt: skip
                check_same_vocabulary(
                    self.config.name, self.tokenizer.vocab.tokens,
                    self._draft.config.name, self._draft.tokenizer.vocab.tokens,
                )  # fmt: skip
            except BaseException:
                self.close()
                raise

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template of the file, if it has one."""
        source = self.metadata.get("tokenizer.chat_template")
        if not isinstance(source, str):
            return None
        from edgellama.chat import ChatTemplate

        ids = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        bos, eos = ("" if i is None else self.tokenizer.token_text(i) for i in ids)
        return ChatTemplate(source, bos, eos)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free all memory and threads."""
        if self._draft is not None and self._owns_draft:
            self._draft.close()
        self._engine.close()

    # --- tokens -----------------------------------------------------------------------------------
    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Return the token ids of a text."""
        return self.tokenizer.encode(text, add_special, parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.tokenizer.decode(ids)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits after every token, f32 (T, V)."""
        return self._engine.logits(ids)

    # --- text -------------------------------------------------------------------------------------
    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Delta]:
        """Continue a text (or token ids), yielding it piece by piece; options as in `generate`.

        Raises: ContextOverflowError when the prompt does not fit, UsageError.
        """
        ids, [answer], of_prompt = self._prepare(prompt, 1, **options)

        def new_steps() -> Steps:
            return Steps(self._engine, answer.sampler, self._new_drafter())

        return stream(new_steps, ids, answer, of_prompt)

    def generate(
        self, prompt: str | Sequence[int], *, n: int = 1, **options: Any
    ) -> Completion | list[Completion]:
        """Continue a text (or token ids). With n > 1, return n completions, made in the same steps.

        Options, all of `stream`, `chat` and `stream_chat` too:
        `max_tokens`: None means until the model ends or the context is full.
        `stop`: a text, or several; the answer ends before it.
        `seed`: None is random; the i-th of n completions has seed + i.
        `logprobs`: log probabilities of the answer's tokens; `top_logprobs`: and of this many likeliest
        ones; `prompt_logprobs`: of the prompt's tokens.
        `parse_special`: whether special tokens may be written out in the prompt.
        `logits_processors`: called with all token ids so far and the logits f32 (V,), to change in place.
        Every field of `sampling.SamplingParams`: what is left out is as the file says, or the default.
        Raises: ContextOverflowError when the prompt does not fit, UsageError.
        """
        check_count("n", n, 1)
        if n == 1:
            return collect(self.stream(prompt, **options))
        ids, answers, of_prompt = self._prepare(prompt, n, **options)
        return answer_together(self._engine, ids, answers, of_prompt)

    def beam(
        self,
        prompt: str | Sequence[int],
        n_beams: int = 4,
        *,
        max_tokens: int | None = None,
        length_penalty: float = 1.0,
        parse_special: bool = False,
    ) -> list[Completion]:
        """Search for the likeliest continuations; return `n_beams` of them, the best first.

        They are ordered by log probability / length ** length_penalty.
        Raises: ContextOverflowError when the prompt or the beams do not fit, UsageError.
        """
        from edgellama.beam import search

        check_count("n_beams", n_beams, 1)
        ids = self._encode(prompt, parse_special)
        limit = self._limit(ids, max_tokens)
        return search(self._engine, self.tokenizer, ids, n_beams, limit, length_penalty)

    def _prepare(
        self,
        prompt: str | Sequence[int],
        n: int,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        parse_special: bool = False,
        logits_processors: Sequence[LogitsProcessor] = (),
        **sampling: Any,
    ) -> tuple[list[int], list[Answer], Logprobs | None]:
        """Check all options; return the prompt's ids, n answers, and what looks up the prompt's."""
        ids = self._encode(prompt, parse_special)
        limit = self._limit(ids, max_tokens)
        check_count("top_logprobs", top_logprobs)
        for name, flag in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if not isinstance(flag, bool):
                raise UsageError(f"{name} is {flag!r}; it must be True or False (see top_logprobs)")
        lookup = Logprobs(self.tokenizer, top_logprobs)
        of_answer = lookup if logprobs or top_logprobs else None
        seed = self._next_seed() if seed is None else seed
        answers = [
            Answer(
                self.tokenizer,
                self._sampler(ids, None if seed is None else seed + i, logits_processors, sampling),
                StopStrings(stop),
                limit,
                of_answer,
            )
            for i in range(n)
        ]
        return ids, answers, lookup if prompt_logprobs else None

    def _encode(self, prompt: str | Sequence[int], parse_special: bool) -> list[int]:
        """Return the ids of a prompt, at least one and no more than the context holds."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, True, parse_special)
        else:
            ids = list(prompt)
        if not ids:
            bos = self.tokenizer.bos_id
            if bos is None:
                raise UsageError("the prompt is empty; give at least one character")
            ids = [bos]
        if len(ids) > self.n_ctx:
            raise ContextOverflowError(
                f"the prompt has {len(ids)} tokens but the context holds {self.n_ctx}; "
                "shorten it or use a larger n_ctx (-c)"
            )
        return ids

    def _limit(self, ids: list[int], max_tokens: int | None) -> int:
        """How many tokens an answer may have."""
        limit = self.n_ctx - len(ids) + 1  # the last token need not be in the cache
        if max_tokens is None:
            return limit
        check_count("max_tokens", max_tokens)
        return min(limit, max_tokens)

    def _sampler(
        self,
        ids: list[int],
        seed: int | None,
        processors: Sequence[LogitsProcessor],
        options: Mapping[str, Any],
    ) -> Sampler:
        options = {**options, **file_params(self.metadata, options)}
        if options.get("logit_bias"):
            options["logit_bias"] = bias_by_id(
                options["logit_bias"], lambda text: self.tokenizer.encode(text, False, True)
            )
        params = read_params(options)
        texts = params.dry_sequence_breakers if params.dry_multiplier else ()
        breakers = self._breakers(texts) if texts else None
        return Sampler(seed=seed, text=ids, breakers=breakers, processors=processors, **options)

    def _breakers(self, texts: Sequence[str]) -> Breakers:
        """The tokens of sequence breakers; looking through a vocabulary takes a while (0.3 s)."""
        from edgellama.sampling.penalties import find_breakers

        texts = tuple(texts)
        if texts not in self._known_breakers:
            pieces = [self.tokenizer.token_bytes(i) for i in range(self.config.n_vocab)]
            self._known_breakers[texts] = find_breakers(
                texts, pieces, lambda text: self.tokenizer.encode(text, False)
            )
        return self._known_breakers[texts]

    def _new_drafter(self) -> Drafter | None:
        ends = self.tokenizer.eog_ids
        if self._draft is not None:
            engine = self._draft._engine
            return DraftModel(engine, engine.n_macs / self._engine.n_macs, ends)
        return Lookup(ends) if self._looks_up else None

    # --- chat -------------------------------------------------------------------------------------
    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Return the token ids of a chat as the model's template writes it.

        Raises: TemplateError when the file has no template or it fails.
        """
        if self.template is None:
            raise TemplateError(
                f"{self.config.name} has no chat template; continue plain text instead (--raw)"
            )
        text = self.template.render(messages, **variables)
        ids = self.tokenizer.encode(text, False, True)
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """Answer a chat, yielding the answer piece by piece; options as in `generate`."""
        return self.stream(self.render_chat(messages, **(chat_template_kwargs or {})), **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """Answer a chat of {"role": ..., "content": ...} messages; options as in `generate`."""
        return collect(self.stream_chat(messages, **options))

    def _next_seed(self) -> int | None:
        """Seeds of calls differ, and follow from the model's own when it has one."""
        if self._seed is None:
            return None
        self._n_calls += 1
        return self._seed + self._n_calls - 1
