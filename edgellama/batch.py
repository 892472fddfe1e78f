"""Many tasks from a file of JSON lines, into another: what `edgellama batch` does.

Every line is an object: a `task` (or what it holds says which), what the task needs, options of it, and
an `id` that is handed on.

    chat        messages                      generate   prompt
    answer      question, context             translate  text, to
    classify    text, labels                  score      prompt, continuation
    embed       text

Results are kept in a journal beside the file to be written, as they come; a run that was stopped goes on
with what is missing.  A line that cannot be done gets an `error` in place of a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from edgellama import tasks
from edgellama.errors import EdgeLlamaError, UsageError, shown
from edgellama.generation import Completion, Request
from edgellama.gguf.new_file import NewFile, check_absent
from edgellama.progress import progress

if TYPE_CHECKING:
    from edgellama.llm import LLM

_N_EMBEDDED = 64  # texts at a time
_TEXTS = ("prompt", "text", "to", "question", "context", "continuation")


class Line(NamedTuple):
    """One line of the file: what it holds beside its task and id."""

    number: int
    task: str
    id: Any
    given: dict[str, Any]


class Task(NamedTuple):
    """The keys that a task needs, and how it is done: by a request to the model, or at once."""

    needs: tuple[str, ...]
    request: Callable[..., Request] | None = None
    result: Callable[..., dict[str, Any]] | None = None


def _request(llm: LLM, prompt: tasks.Prompt, options: Mapping[str, Any]) -> Request:
    both: dict[str, Any] = {**prompt.options, **options}
    return llm.request(prompt.prompt, **both)


def _classify(llm: LLM, text: str, labels: tasks.Labels, **options: Any) -> dict[str, Any]:
    return llm.classify(text, labels, **options)._asdict()


def _score(llm: LLM, prompt: str, continuation: str) -> dict[str, Any]:
    score = llm.score(prompt, continuation)
    return {"logprob": score.logprob, "n_tokens": len(score.tokens), "logprobs": score.logprobs}


TASKS: dict[str, Task] = {
    "chat": Task(("messages",), lambda llm, messages, **o: llm.request(messages, **o)),
    "generate": Task(("prompt",), lambda llm, prompt, **o: llm.request(prompt, **o)),
    "answer": Task(
        ("question", "context"),
        lambda llm, question, context, **o: _request(
            llm, tasks.question_prompt(llm, question, context), o
        ),
    ),
    "translate": Task(
        ("text", "to"),
        lambda llm, text, to, **o: _request(llm, tasks.translation_prompt(llm, text, to), o),
    ),
    "classify": Task(("text", "labels"), None, _classify),
    "score": Task(("prompt", "continuation"), None, _score),
    "embed": Task(("text",)),
}


def run_batch(
    llm: LLM,
    source: Path,
    out: Path,
    *,
    task: str | None,
    defaults: Mapping[str, Any],
    n_parallel: int,
    force: bool,
) -> tuple[int, int]:
    """Do every line of `source`; return how many lines there are, and how many could not be done.

    `defaults` are options for lines that do not say otherwise, of generating tasks.  A line's number
    is its place in `out`.
    Raises: UsageError for files that cannot be read or are in the way; what a line alone is wrong about
    stands in its result.
    """
    try:
        data = source.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{source} cannot be read: {reason}") from None
    check_absent(out, force, [source])
    texts = [text for text in data.split(b"\n") if text.strip()]
    kind = {"input": hashlib.sha256(data).hexdigest(), "model": llm.config.name, "task": task,
            "options": {k: repr(v) for k, v in defaults.items()}}  # fmt: skip
    with (
        Journal(out.with_name(f"{out.name}.partial"), kind) as journal,
        progress("lines", len(texts), unit="") as advance,
    ):
        advance(len(journal.places))

        def add(index: int, result: dict[str, Any]) -> None:
            journal.add(index, result)
            advance(1)

        coming = ((i, text) for i, text in enumerate(texts) if i not in journal.places)
        _run(llm, coming, task, defaults, n_parallel, add)
        return len(texts), journal.write(out, force)


def read_line(index: int, text: bytes, task: str | None) -> Line:
    """Return what a line asks for.  Raises: UsageError saying what is wrong with it."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the line is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise UsageError(f"the line is {shown(given)}; a JSON object is needed")
    name = given.pop("task", task)
    if name is None:
        fitting = [n for n, t in TASKS.items() if given.keys() >= {*t.needs}]
        name = max(fitting, key=lambda n: len(TASKS[n].needs), default=None)
    if name not in TASKS:
        said = "the line has no task" if name is None else f"the task is {shown(name)}"
        raise UsageError(f"{said}; it must be one of {', '.join(TASKS)}")
    line = Line(index, name, given.pop("id", index), given)
    for key in TASKS[name].needs:
        if key not in given:
            raise UsageError(f"{name} needs {', '.join(TASKS[name].needs)}; the line has no {key}")
        ids = key == "prompt" and name == "generate" and isinstance(given[key], list)
        if key in _TEXTS and not ids and not isinstance(given[key], str):
            raise UsageError(f"{key} is {shown(given[key])}; a text is needed")
        if key == "messages" and not isinstance(given[key], list):
            raise UsageError(f"messages is {shown(given[key])}; a list of messages is needed")
    return line


def _run(
    llm: LLM,
    coming: Iterable[tuple[int, bytes]],
    task: str | None,
    defaults: Mapping[str, Any],
    n_parallel: int,
    add: Callable[[int, dict[str, Any]], None],
) -> None:
    """Do lines, and add each one's result when it is there."""
    asked: list[Line] = []  # in the order of their requests
    to_embed: list[Line] = []

    def requests() -> Iterator[Request]:
        """What is to be generated; everything else is done when its turn comes."""
        for index, text in coming:
            name: Any = index
            try:
                line = read_line(index, text, task)
                name, kind = line.id, TASKS[line.task]
                if kind.request is not None:
                    request = kind.request(llm, **{**defaults, **line.given})
                    asked.append(line)
                    yield request
                elif kind.result is not None:
                    add(index, {"id": line.id, **kind.result(llm, **line.given)})
                else:
                    if len(to_embed) == _N_EMBEDDED or (
                        to_embed and _options(line) != _options(to_embed[0])
                    ):
                        embed()
                    to_embed.append(line)
            except (EdgeLlamaError, TypeError) as error:
                add(index, {"id": name, "error": str(error)})
        embed()

    def embed() -> None:
        for line, result in _embed(llm, to_embed):
            add(line.number, {"id": line.id, **result})
        to_embed.clear()

    for i, done in llm.answer_all(requests(), n_parallel=n_parallel):
        add(asked[i].number, {"id": asked[i].id, **_of_completion(done)})


def _options(line: Line) -> dict[str, Any]:
    return {key: value for key, value in line.given.items() if key != "text"}


def _embed(llm: LLM, lines: list[Line]) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Yield the vectors of texts that have the same options."""
    if not lines:
        return
    try:
        vectors = llm.embed([line.given["text"] for line in lines], **_options(lines[0]))
    except (EdgeLlamaError, TypeError) as error:
        if len(lines) == 1:
            yield lines[0], {"error": str(error)}
        else:
            for line in lines:
                yield from _embed(llm, [line])
        return
    for line, vector in zip(lines, vectors, strict=True):
        yield line, {"embedding": vector.tolist()}


def _of_completion(done: Completion) -> dict[str, Any]:
    """What is written of an answer: no empty parts."""
    out: dict[str, Any] = {"text": done.text, "finish_reason": done.finish_reason}
    if done.reasoning:
        out["reasoning"] = done.reasoning
    if done.tool_calls:
        out["tool_calls"] = [call._asdict() for call in done.tool_calls]
    if done.logprobs:
        out["logprobs"] = [entry.logprob for entry in done.logprobs]
    out["usage"] = {"prompt_tokens": done.timings.prompt_n, "completion_tokens": len(done.tokens)}
    return out


class Journal:
    """Results in the order in which they came, behind a line that says of what; any end may be torn.

    Raises: UsageError when there is one of another input, model or options.
    """

    def __init__(self, path: Path, kind: Mapping[str, Any]) -> None:
        self.path = path
        self.places: dict[int, tuple[int, int]] = {}  # offset and length, by line number
        header = json.dumps(kind, sort_keys=True).encode() + b"\n"
        try:
            mode = "r+b" if path.exists() else "w+b"
            self._file: IO[bytes] = open(path, mode)  # noqa: SIM115, closed by __exit__
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UsageError(f"{path} cannot be written: {reason}") from None
        first = self._file.readline()
        if not first.endswith(b"\n"):  # new, or torn before anything was in it
            self._file.seek(0)
            self._file.write(header)
        elif first != header:
            self._file.close()
            raise UsageError(
                f"{path} holds results of another input, model or options; delete it to begin anew"
            )
        at = len(header)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self.places[json.loads(line)[0]] = (at, len(line))
            at += len(line)
        self._file.truncate(at)
        self._file.seek(at)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, index: int, result: dict[str, Any]) -> None:
        """Note the result of a line; it is safe when this returns, whatever kills the process."""
        line = json.dumps([index, result], ensure_ascii=False).encode() + b"\n"
        self.places[index] = (self._file.tell(), len(line))
        self._file.write(line)
        self._file.flush()

    def write(self, out: Path, force: bool) -> int:
        """Write all results in the order of their lines, and remove the journal; count the errors."""
        n_failed = 0
        new = NewFile(out, force=force)
        try:
            for index in sorted(self.places):
                at, nbytes = self.places[index]
                self._file.seek(at)
                result = json.loads(self._file.read(nbytes))[1]
                n_failed += "error" in result
                new.file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            new.finish()
        finally:
            new.discard()
        self._file.close()
        self.path.unlink()
        return n_failed
