"""What people use a language model for, in terms of what it says and how likely it finds texts.

    score      how likely a continuation of a text is
    classify   which label continues a text best
    answer     a question about a text; translate  a text into another language
    embed      vectors of texts

Nothing here is trained for its task: how good it is, is the model's affair and the prompt's.
Source: Brown et al., Language models are few-shot learners, 2020, section 2.4 (labels by likelihood per
token); Zhao et al., Calibrate before use, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgellama.errors import UsageError, shown

if TYPE_CHECKING:
    from edgellama.llm import LLM
    from edgellama.runtime.engine import Engine
    from edgellama.tokenizer import Tokenizer

PROMPT = "Text: {text}\nLabel:"
Labels = Sequence[str] | Mapping[str, str]
POOLINGS = ("mean", "last", "cls", "none")
_NO_CONTENT = ("N/A", "", "[MASK]")


class Score(NamedTuple):
    """How likely a continuation is: natural logarithms of the probability of each of its tokens."""

    tokens: list[int]
    logprobs: list[float]

    @property
    def logprob(self) -> float:
        """Logarithm of the probability of all of it."""
        return math.fsum(self.logprobs)

    @property
    def per_token(self) -> float:
        """The same, divided by its number of tokens, so that long texts compare with short ones."""
        return self.logprob / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of minus the mean."""
        return math.exp(-self.per_token)


class Classification(NamedTuple):
    """The most likely label, and how likely each is beside the others."""

    label: str
    probabilities: dict[str, float]


class Prompt(NamedTuple):
    """A text or messages, and the options they are meant to be answered with."""

    prompt: str | list[dict[str, Any]]
    options: dict[str, Any]


def score(
    engine: Engine, tokenizer: Tokenizer, prompt: str, continuations: Sequence[str]
) -> list[Score]:
    """Score continuations of one text, which is evaluated once.

    A token that spans the end of the prompt counts to the continuation.
    Raises: UsageError for an empty continuation, or an empty prompt of a model without BOS;
    ContextOverflowError.
    """
    for text in continuations:
        if not isinstance(text, str) or not text:
            raise UsageError(f"a continuation is {text!r}; give at least one character")
    base = _encode(tokenizer, prompt)
    texts = [_encode(tokenizer, prompt + text) for text in continuations]
    firsts = [_n_common(base, ids) for ids in texts]
    shared = min(firsts, default=1)
    if shared < 1:
        raise UsageError("the prompt is empty, and the model has no token that begins a text")
    sequence = engine.new_sequence()
    scores: list[Score] = []
    try:
        for ids, first in zip(texts, firsts, strict=True):
            if not scores:
                last = engine.evaluate(sequence, ids[:shared])
            rows = last[None]
            if len(ids) > shared + 1:
                rows = np.vstack([rows, engine.evaluate_each(sequence, ids[shared:-1])])
                engine.truncate(sequence, shared)
            logprobs = [log_softmax(rows[i - shared])[ids[i]] for i in range(first, len(ids))]
            scores.append(Score(ids[first:], [float(x) for x in logprobs]))
    finally:
        engine.free(sequence)
    return scores


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities f64 (V,) of logits f32 (V,)."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= math.log(np.exp(values).sum())
    return values


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on: without an end."""
    ids = tokenizer.encode(text)
    return ids[:-1] if tokenizer.add_eos else ids


def _n_common(start: Sequence[int], ids: Sequence[int]) -> int:
    """How many of `ids` are as in `start`, the last one left out."""
    n = min(len(start), len(ids) - 1)
    return next((i for i in range(n) if start[i] != ids[i]), n)


class Classifier:
    """Labels texts by how likely each label is after `prompt`, per token.

    `labels` are strings, or a mapping from labels to what the model is to say for them. `prompt` holds
    {text} where the text belongs, and may hold {labels}; `examples` are (text, label) pairs that come
    before it. `calibrated` takes off what the model would say of a text without content, which helps
    where it favours one label whatever it reads.

    Raises: UsageError for fewer than two labels, equal ones, or a prompt without {text}.
    """

    def __init__(
        self,
        score: Callable[[str, list[str]], list[Score]],
        labels: Labels,
        *,
        prompt: str = PROMPT,
        examples: Iterable[tuple[str, str]] = (),
        calibrated: bool = False,
    ) -> None:
        said = dict(labels) if isinstance(labels, Mapping) else {label: label for label in labels}
        if isinstance(labels, str) or len(said) < max(2, len(labels)):
            raise UsageError(f"labels are {labels!r}; two or more different ones are needed")
        if not all(isinstance(x, str) and x.strip() for pair in said.items() for x in pair):
            raise UsageError("a label is empty, or no string; give at least one character")
        if "{text}" not in prompt:
            raise UsageError(f"the prompt {shown(prompt)} has no {{text}}, where the text belongs")
        self._score = score
        self._labels = list(said)
        prompt = prompt.replace("{labels}", ", ".join(said.values()))
        gap = "" if prompt[-1:].isspace() else " "
        self._said = [gap + text for text in said.values()]
        self._prompt = prompt
        self._shots = ""
        for text, label in examples:
            if label not in said:
                known = ", ".join(said)
                raise UsageError(f"an example has the label {shown(label)}; labels are {known}")
            self._shots += f"{prompt.replace('{text}', text)}{gap}{said[label]}\n\n"
        self._bias: np.ndarray | float = 0.0
        if calibrated:
            plain = np.mean([self._probabilities(text) for text in _NO_CONTENT], axis=0)
            self._bias = np.log(np.maximum(plain, 1e-300))

    def __call__(self, text: str) -> Classification:
        """Return the label of a text.  Raises: ContextOverflowError."""
        p = self._probabilities(text)
        best = self._labels[int(np.argmax(p))]
        return Classification(best, dict(zip(self._labels, p.tolist(), strict=True)))

    def _probabilities(self, text: str) -> np.ndarray:
        prompt = self._shots + self._prompt.replace("{text}", text)
        values = np.array([s.per_token for s in self._score(prompt, self._said)]) - self._bias
        p = np.exp(values - values.max())
        return p / p.sum()


def question_prompt(llm: LLM, question: str, context: str) -> Prompt:
    """Return the prompt of a question about a context."""
    return _prompt(
        llm,
        f"Context:\n{context}\n\nQuestion: {question}\nAnswer from the context, in few words.",
        f"{context}\n\nQuestion: {question}\nAnswer:",
    )


def translation_prompt(llm: LLM, text: str, to: str) -> Prompt:
    """Return the prompt that asks for a translation."""
    return _prompt(
        llm, f"Translate into {to}. Write the translation only.\n\n{text}", f"Text: {text}\n{to}:"
    )


def _prompt(llm: LLM, message: str, text: str) -> Prompt:
    """Messages for the model's chat template, or where it has none, a text to be gone on with."""
    if llm.template is not None:
        return Prompt([{"role": "user", "content": message}], {"temperature": 0.0})
    return Prompt(text, {"temperature": 0.0, "stop": ["\n\n"]})


def embed(
    engine: Engine, texts: Sequence[Sequence[int]], pooling: str, normalize: bool
) -> np.ndarray | list[np.ndarray]:
    """Return vectors of texts, f32 (n, D), or one (T, D) for each text where pooling is "none".

    Pooled is what the last layer gives to the head for each token: the mean of all, the last one, or
    the first ("cls"). Raises: UsageError for an unknown pooling or a text without tokens.
    """
    if pooling not in POOLINGS:
        raise UsageError(f"pooling is {shown(pooling)}; it must be one of {', '.join(POOLINGS)}")
    for i, ids in enumerate(texts):
        if not ids:
            raise UsageError(f"text {i} is empty; give at least one character")
    rows = [_pool(r, pooling) for r in engine.hidden(texts)]
    if normalize:
        rows = [r / np.maximum(np.linalg.norm(r, axis=-1, keepdims=True), 1e-12) for r in rows]
    return rows if pooling == "none" else np.array(rows)


def _pool(rows: np.ndarray, pooling: str) -> np.ndarray:
    if pooling == "mean":
        return np.array(np.mean(rows, axis=0, dtype=np.float64), np.float32)
    pooled: np.ndarray = {"last": rows[-1], "cls": rows[0], "none": rows}[pooling]
    return pooled
