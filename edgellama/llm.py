"""The user's class: text in, text out.

    with LLM("smollm2-135m") as llm:
        print(llm.chat([{"role": "user", "content": "Hello!"}]).text)

Token ids and steps are the engine's (`runtime/engine.py`); this file joins it with the tokenizer,
the chat template, the sampler and the stop rules.  How an answer grows: `generation.py`.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from edgellama import tasks
from edgellama.catalog import resolve
from edgellama.errors import ContextOverflowError, ModelFileError, UsageError
from edgellama.generation import (
    Answer,
    Completion,
    Delta,
    Request,
    answer_all,
    answer_together,
    collect,
    stream,
)
from edgellama.gguf import open_gguf
from edgellama.kernels.layout import PAGE
from edgellama.logprobs import Logprobs, PromptLogprobs
from edgellama.models.config import read_config
from edgellama.runtime.engine import Engine
from edgellama.sampling.of_model import ModelSampling
from edgellama.sampling.options import OPTION_NAMES, check_count, check_flag, check_number
from edgellama.speculate import Drafter, DraftModel, Lookup, Steps, check_same_vocabulary
from edgellama.stopping import StopStrings
from edgellama.tasks import Classification, Labels, Prompt, Score
from edgellama.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from edgellama.chat import Chat, ChatPrompt, ChatTemplate
    from edgellama.grammar import Tokens
    from edgellama.keywords import AnswerKeywords, ChatKeywords, PromptKeywords
    from edgellama.sampling import LogitsProcessor

_TEMPLATE_KEY = "tokenizer.chat_template"


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
    With `context_shift`, an answer that outgrows the context goes on without the older half of what
    follows the text's first `n_keep` tokens (rounded up to 32), instead of ending.
    `chat_template` replaces the file's: a path, jinja itself, or the name of another one in the file.

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
        context_shift: bool = False,
        n_keep: int = 1,
        chat_template: str | os.PathLike[str] | None = None,
    ) -> None:
        self._chat_template = chat_template
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
            self._opened: Engine | None = Engine(
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
        self._is_fork = False
        self._last_text: list[int] = []
        self._context_shift, self._n_keep = context_shift, n_keep
        self._sampling = ModelSampling(self.metadata, self.tokenizer)
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

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            raise UsageError("the fork is closed; make another one with fork()")
        return self._opened

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template: the one given, or the file's, if it has one."""
        if self._chat_template is None and _TEMPLATE_KEY not in self.metadata:
            return None  # without an import
        return self._chat.template()

    @cached_property
    def _chat(self) -> Chat:
        from edgellama.chat import Chat

        return Chat(self.config.name, self.tokenizer, self.metadata, self._chat_template)

    @cached_property
    def _grammar_tokens(self) -> Tokens:
        from edgellama.grammar import Tokens

        return Tokens(self.tokenizer)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free all memory and threads, those of forks too; of a fork, only itself."""
        if self._is_fork:
            self._opened = None
            return
        if self._draft is not None and self._owns_draft:
            self._draft.close()
        self._engine.close()

    # --- caches -----------------------------------------------------------------------------------
    def fork(self, seed: int | None = None) -> LLM:
        """Return a second LLM over the same open model, which costs next to nothing.

        It shares weights, threads and the cache, so what one has evaluated the other need not; it has a
        seed and a last text of its own (at first, the last text of this one).  `close` closes the fork
        alone; when this one is closed, so are its forks.
        """
        self._engine  # noqa: B018  (raises for a closed fork)
        fork = copy.copy(self)
        fork._is_fork = True
        fork._seed, fork._n_calls = seed, 0
        fork._last_text = self._last_text.copy()
        return fork

    def save_session(self, path: str | os.PathLike[str]) -> None:
        """Write the last text (prompt and answer) with its keys and values to a file.

        A file of this name is replaced once the new one is whole.
        Raises: UsageError when there is no text yet, SessionError when the file cannot be written.
        """
        if not self._last_text:
            raise UsageError("there is no text to save yet; call generate or chat first")
        self._engine.save_session(Path(path), self._last_text.copy())

    def load_session(self, path: str | os.PathLike[str]) -> list[int]:
        """Take keys and values of a text from a file; return the text's token ids.

        A call whose prompt begins with these tokens does not evaluate them again.
        Raises: SessionError when the file is damaged or does not belong to this model, kv_type and
        n_ctx; then nothing has changed.
        """
        self._last_text = self._engine.load_session(Path(path))
        return self._last_text.copy()

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
    def stream(
        self, prompt: str | Sequence[int], **options: Unpack[AnswerKeywords]
    ) -> Iterator[Delta]:
        """Continue a text (or token ids), yielding it piece by piece.

        Options, of `generate`, `chat` and `stream_chat` too:
        `max_tokens`: None means until the model ends or the context is full.
        `max_time_s`: no token begins later than this after the first piece was asked for.
        `stop`: a text, or several; the answer ends before it.
        `seed`: None is random.
        `ignore_eos`: whether to go on where the model would end.
        `logprobs`: log probabilities of the answer's tokens; `top_logprobs`: and of this many likeliest
        ones; `prompt_logprobs`: of the prompt's tokens, at the end.  All are the model's own.
        `processors`: called with all token ids so far, i64 (n,), and the logits f32 (V,) of the next,
        to change in place or return anew.
        `parse_special`: whether special tokens may be written out in the prompt.
        `context_shift`, `n_keep`: as in `LLM`, for this answer.
        `response_format` (as OpenAI has it), `json_schema`, `grammar` (Lark or GBNF), `regex` or
        `choices`: what the answer has to look like (docs/constrained.md).
        Every field of `sampling.SamplingOptions`: what is left out is as the file says, or the default.
        Raises: ContextOverflowError when the prompt does not fit, GrammarError, UsageError.
        """
        ids, [answer], of_prompt = self._prepare(prompt, 1, **options)

        def new_steps() -> Steps:
            steps = Steps(self._engine, answer.sampler, self._new_drafter(), answer.n_keep)
            self._last_text = steps.text  # which grows with the answer
            return steps

        return stream(new_steps, ids, answer, of_prompt)

    @overload
    def generate(
        self, prompt: str | Sequence[int], **options: Unpack[AnswerKeywords]
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        n: int = 1,
        beam_width: int | None = None,
        length_penalty: float = 1.0,
        **options: Unpack[AnswerKeywords],
    ) -> Completion | list[Completion]: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        n: int = 1,
        beam_width: int | None = None,
        length_penalty: float = 1.0,
        **options: Unpack[AnswerKeywords],
    ) -> Completion | list[Completion]:
        """Continue a text; options as in `stream`. With n > 1, return n completions.

        They are made in the same steps, and the i-th has seed + i.  With `beam_width`, search for the
        likeliest texts instead, by log probability / length ** `length_penalty`; the best comes first.
        """
        check_count("n", n, 1)
        if beam_width is not None:
            done = self._beams(prompt, beam_width, n, length_penalty, **options)
        elif n == 1:
            return collect(self.stream(prompt, **options))
        else:
            ids, answers, of_prompt = self._prepare(prompt, n, **options)
            done = answer_together(self._engine, ids, answers, of_prompt)
        return done[0] if n == 1 else done

    def _beams(
        self,
        prompt: str | Sequence[int],
        beam_width: int,
        n: int,
        length_penalty: float,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: bool = False,
        parse_special: bool = False,
        **others: Any,
    ) -> list[Completion]:
        from edgellama.beam import Beams

        for name in others:
            raise UsageError(
                f"{name} has no effect on a beam search; leave it out (max_tokens, stop, logprobs "
                "and parse_special have)"
            )
        check_count("beam_width", beam_width, n)
        check_number("length_penalty", length_penalty)
        check_flag("logprobs", logprobs)
        ids = self._encode(prompt, parse_special)
        beams = Beams(self._engine, self.tokenizer, beam_width, length_penalty, stop, logprobs)
        return beams.search(ids, self._limit(ids, max_tokens))[:n]

    def _prepare(
        self,
        prompt: str | Sequence[int],
        n: int,
        *,
        max_tokens: int | None = None,
        max_time_s: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        processors: Sequence[LogitsProcessor] = (),
        parse_special: bool = False,
        context_shift: bool | None = None,
        n_keep: int | None = None,
        together: bool = False,
        response_format: Mapping[str, Any] | None = None,
        json_schema: Mapping[str, Any] | bool | str | None = None,
        grammar: str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        shown: frozenset[int] = frozenset(),
        **sampling: Any,
    ) -> tuple[list[int], list[Answer], PromptLogprobs | None]:
        """Check all options; return the prompt's ids, n answers, and what looks up the prompt's."""
        if not sampling.keys() <= {*OPTION_NAMES}:
            from edgellama.keywords import AnswerKeywords

            name = next(name for name in sampling if name not in OPTION_NAMES)
            known = ", ".join(AnswerKeywords.__annotations__)
            raise UsageError(f"there is no option {name!r}; options are {known}")
        ids = self._encode(prompt, parse_special)
        n_kept = self._n_kept(context_shift, n_keep, together or n > 1)
        limit = self._limit(ids, max_tokens, n_kept is not None)
        if max_time_s is not None:
            check_number("max_time_s", max_time_s, 0)
        check_count("top_logprobs", top_logprobs)
        check_flag("logprobs", logprobs)
        check_flag("prompt_logprobs", prompt_logprobs)
        check_flag("ignore_eos", ignore_eos)
        if not all(map(callable, processors)):
            raise UsageError(f"processors is {processors!r}; a list of functions is needed")
        rules = None
        if any(x is not None for x in (response_format, json_schema, grammar, regex, choices)):
            from edgellama.grammar import read_grammar

            rules = read_grammar(response_format, json_schema, grammar, regex, choices)
        if rules is not None and ignore_eos:
            raise UsageError("ignore_eos has no sense with a grammar, which says where answers end")
        lookup = Logprobs(self.tokenizer, top_logprobs)
        seed = self._next_seed() if seed is None else seed
        options = self._sampling.read(sampling, ignore_eos)
        answers = [
            Answer(
                self.tokenizer,
                self._sampling.sampler(
                    options, ids, None if seed is None else seed + i, processors
                ),
                StopStrings(stop),
                limit,
                max_time_s=math.inf if max_time_s is None else max_time_s,
                logprobs=lookup if logprobs or top_logprobs else None,
                constraint=None if rules is None else self._grammar_tokens.constrain(rules),
                shown=shown,
                n_keep=n_kept,
            )
            for i in range(n)
        ]
        return ids, answers, PromptLogprobs(lookup, ids) if prompt_logprobs else None

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

    def _n_kept(self, context_shift: bool | None, n_keep: int | None, together: bool) -> int | None:
        """How many first tokens stay when the context is full; None: the answer ends there."""
        if context_shift is not None:
            check_flag("context_shift", context_shift)
        if together:
            if context_shift:
                raise UsageError("context_shift works for one answer at a time")
            return None
        if not (self._context_shift if context_shift is None else context_shift):
            return None
        n_keep = self._n_keep if n_keep is None else n_keep
        most = self.n_ctx - 2 * PAGE
        if most < 0:
            raise UsageError(
                f"context_shift needs a context of {2 * PAGE} tokens, not {self.n_ctx}; use a larger "
                "n_ctx (-c)"
            )
        check_count("n_keep", n_keep, 0, most)
        return n_keep

    def _limit(self, ids: list[int], max_tokens: int | None, shifts: bool = False) -> int:
        """How many tokens an answer may have."""
        limit = (
            sys.maxsize if shifts else self.n_ctx - len(ids) + 1
        )  # the last token need not be in the cache
        if max_tokens is None:
            return limit
        check_count("max_tokens", max_tokens)
        return min(limit, max_tokens)

    def _new_drafter(self) -> Drafter | None:
        ends = self.tokenizer.eog_ids
        if self._draft is not None:
            engine = self._draft._engine
            return DraftModel(engine, engine.n_macs / self._engine.n_macs, ends)
        return Lookup(ends) if self._looks_up else None

    # --- chat -------------------------------------------------------------------------------------
    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[PromptKeywords]
    ) -> list[int]:
        """Return the token ids of a chat as the model's template writes it.

        Options, of `chat` and `stream_chat` too:
        `tools`, `tool_choice`: in OpenAI's form; a call that is "required", or named, is forced by a
        grammar.  `tool_format`: "hermes", "llama3" or "mistral", how the answer writes calls, where
        the template's own marks do not tell.
        `documents`: for templates that take them; `chat_template_kwargs`: other variables for it.
        `chat_template`: as for `LLM`, for this chat alone.
        `add_generation_prompt`: whether the assistant's turn is opened.
        `continue_final_message`: whether the answer goes on with the last message, the assistant's.
        `reasoning_format`: "split" takes reasoning out of the text of an answer, "text" leaves it.
        Raises: TemplateError when the file has no template or it fails; UsageError.
        """
        return self._chat.prompt(messages, **options).ids

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatKeywords]
    ) -> Iterator[Delta]:
        """Answer a chat, yielding the answer piece by piece; options as in `stream` and `render_chat`."""
        prompt, rest = self._chat_prompt(messages, options)
        return prompt.read(self.stream(prompt.ids, **rest))

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatKeywords]
    ) -> Completion: ...

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, n: int = 1, **options: Unpack[ChatKeywords]
    ) -> Completion | list[Completion]: ...

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, n: int = 1, **options: Unpack[ChatKeywords]
    ) -> Completion | list[Completion]:
        """Answer a chat of {"role": ..., "content": ...} messages.

        Options as in `stream` and `render_chat`, `n` as in `generate`.  The answer's `.message` is to
        be added to the messages.
        """
        prompt, rest = self._chat_prompt(messages, options)
        if n == 1:
            return collect(prompt.read(self.stream(prompt.ids, **rest)))
        done = self.generate(prompt.ids, n=n, **rest)
        assert isinstance(done, list)
        return [collect(prompt.read([_as_delta(one)])) for one in done]

    def _chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> tuple[ChatPrompt, dict[str, Any]]:
        """Return the prompt of a chat, and the options that are not of chats."""
        from edgellama.chat import CHAT_OPTIONS, GRAMMAR_OPTIONS

        own = {name: value for name, value in options.items() if name in CHAT_OPTIONS}
        rest = {name: value for name, value in options.items() if name not in CHAT_OPTIONS}
        is_bound = any(rest.get(name) is not None for name in GRAMMAR_OPTIONS)
        prompt = self._chat.prompt(messages, is_bound=is_bound, **own)
        if prompt.json_schema is not None:
            rest["json_schema"] = prompt.json_schema
        return prompt, {**rest, "shown": prompt.shown}

    # --- many -------------------------------------------------------------------------------------
    def request(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
        **options: Unpack[ChatKeywords],
    ) -> Request:
        """Return a text, token ids or messages as `answer_all` takes them; options as in `stream_chat`."""
        if isinstance(prompt, str) or not all(isinstance(part, Mapping) for part in prompt):
            ids, [answer], of_prompt = self._prepare(
                cast(Any, prompt), 1, together=True, **cast(Any, options)
            )
            return Request(ids, answer, of_prompt)
        chat, rest = self._chat_prompt(cast(Any, prompt), options)
        ids, [answer], of_prompt = self._prepare(chat.ids, 1, together=True, **rest)
        return Request(ids, answer, of_prompt, chat.read)

    def answer_all(
        self, requests: Iterable[Request], *, n_parallel: int = 8
    ) -> Iterator[tuple[int, Completion]]:
        """Answer requests, up to `n_parallel` at a time, each as if it were alone.

        Yields (index, answer) in the order in which answers are done.
        """
        check_count("n_parallel", n_parallel, 1)
        return answer_all(self._engine, enumerate(requests), n_parallel)

    # --- tasks ------------------------------------------------------------------------------------
    @overload
    def score(self, prompt: str, continuation: str) -> Score: ...
    @overload
    def score(self, prompt: str, continuation: list[str]) -> list[Score]: ...
    def score(self, prompt: str, continuation: str | list[str]) -> Score | list[Score]:
        """Return how likely a continuation of a text is, or each of several."""
        if isinstance(continuation, str):
            return tasks.score(self._engine, self.tokenizer, prompt, [continuation])[0]
        return tasks.score(self._engine, self.tokenizer, prompt, continuation)

    @overload
    def classify(self, text: str, labels: Labels, **options: Any) -> Classification: ...
    @overload
    def classify(self, text: list[str], labels: Labels, **options: Any) -> list[Classification]: ...
    def classify(
        self, text: str | list[str], labels: Labels, **options: Any
    ) -> Classification | list[Classification]:
        """Return the label of a text, or of each of several; options as `tasks.Classifier` has them."""
        classifier = tasks.Classifier(self.score, labels, **options)
        return classifier(text) if isinstance(text, str) else [classifier(one) for one in text]

    def answer(self, question: str, context: str, **options: Any) -> Completion:
        """Answer a question from a context; options as in `stream`, greedy unless they say otherwise."""
        return self._complete(tasks.question_prompt(self, question, context), options)

    def translate(self, text: str, to: str, **options: Any) -> Completion:
        """Translate a text into the language `to`; options as in `answer`."""
        return self._complete(tasks.translation_prompt(self, text, to), options)

    def _complete(self, prompt: Prompt, options: Mapping[str, Any]) -> Completion:
        request = self.request(prompt.prompt, **cast(Any, {**prompt.options, **options}))
        [(_, done)] = self.answer_all([request])
        return done

    def embed(
        self, texts: str | list[str], pooling: str = "mean", normalize: bool = True
    ) -> np.ndarray | list[np.ndarray]:
        """Return vectors of texts, f32 (n, D), or (D,) for one text that is given alone.

        `pooling` is over what the last layer makes of a text's tokens: their "mean", the "last", the first
        ("cls"), or "none", which returns (T, D) for each text.  Vectors have length 1 if `normalize`.
        """
        ids = [self.tokenize(text) for text in ([texts] if isinstance(texts, str) else texts)]
        vectors = tasks.embed(self._engine, ids, pooling, normalize)
        return vectors[0] if isinstance(texts, str) else vectors

    def _next_seed(self) -> int | None:
        """Seeds of calls differ, and follow from the model's own when it has one."""
        if self._seed is None:
            return None
        self._n_calls += 1
        return self._seed + self._n_calls - 1


def _as_delta(done: Completion) -> Delta:
    """A whole answer as its only piece."""
    return Delta(
        done.text,
        done.tokens,
        done.logprobs,
        done.finish_reason,
        done.timings,
        done.prompt_logprobs,
    )
