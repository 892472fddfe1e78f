"""What an answer is made of: text, reasoning, calls of tools; and prompts that lead to them.

Every answer is read however it is cut into pieces; nothing of it may be lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_gguf import bpe_vocabulary
from test_llm import FakeEngine, install

from edgellama.chat import Chat, ToolCall
from edgellama.chat.reasoning import MARKS, ReasoningReader
from edgellama.chat.tools import FORMATS, ToolReader, find_format
from edgellama.errors import TemplateError, UsageError
from edgellama.generation import Delta, Timings, collect
from edgellama.llm import LLM
from edgellama.tokenizer import load_tokenizer

CITY = '{"city": "Zürich", "n": [1, 2.5, null]}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
CALL = ("weather", CITY)
TIME = ("time", "{}")

# Of each: the form, what the model says, its text, its calls.
SAID: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {
    "hermes": ("hermes", HERMES, "", [CALL]),
    "text before": ("hermes", f"I look.\n{HERMES}", "I look.", [CALL]),
    "text after": ("hermes", f"{HERMES}\n\nDone.", "\n\nDone.", [CALL]),
    "parallel": ("hermes", f'{HERMES}\n<tool_call>{{"name": "time"}}</tool_call>\n', "", [CALL, TIME]),
    "no end": ("hermes", HERMES[:-12], "", [CALL]),
    "arguments as text": (
        "hermes", f'<tool_call>{json.dumps({"name": "weather", "arguments": CITY})}</tool_call>', "", [CALL],
    ),
    "the mark in an argument": (
        "hermes", '<tool_call>{"name": "time", "arguments": {"a": "\\"</tool_call>"}}</tool_call>', "",
        [("time", '{"a": "\\"</tool_call>"}')],
    ),
    "python_tag": ("llama3", f'<|python_tag|>{{"name": "weather", "parameters": {CITY}}}', "", [CALL]),
    "two after python_tag": (
        "llama3", f'<|python_tag|>{{"name": "weather", "parameters": {CITY}}}; {{"name": "time"}}', "",
        [CALL, TIME],
    ),
    "bare": ("llama3", f'\n{{"type": "function", "name": "weather", "parameters": {CITY}}}\n', "", [CALL]),
    "function tag": ("llama3", f"So: <function=weather>{CITY}</function> ", "So:", [CALL]),
    "mistral": ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CITY}}}]', "", [CALL]),
    "mistral list": (
        "mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {CITY}}}, {{"name": "time"}}]', "",
        [CALL, TIME],
    ),
    "mistral args": (
        "mistral", f"Hm. [TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]time[CALL_ID]abc[ARGS]{{}}", "Hm.",
        [CALL, TIME],
    ),
}  # fmt: skip

# What is no call: all of it stays text.
TEXTS = {
    "plain": ("hermes", "Use a <tool_ call\n"),
    "begun": ("hermes", "x <tool_cal"),
    "cut off": ("hermes", '<tool_call>\n{"name": "weather", "argu'),
    "broken": ("hermes", 'a <tool_call>{"name": weather}</tool_call> b'),
    "no name": ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    "no object": ("hermes", "<tool_call>[1]</tool_call>"),
    "a list of arguments": ("hermes", '<tool_call>{"name": "time", "arguments": [1]}</tool_call>'),
    "NaN": ("hermes", '<tool_call>{"name": "time", "arguments": {"a": NaN}}</tool_call>'),
    "deep": ("hermes", "<tool_call>" + "[" * 9999 + "</tool_call>"),
    "JSON of another kind": ("llama3", '{"city": "Paris"}'),
    "unknown name": ("llama3", '{"name": "Ada", "parameters": {}}'),
    "JSON within": ("llama3", 'See {"name": "time", "parameters": {}}'),
    "text after JSON": ("llama3", '{"name": "time", "parameters": {}} is a call'),
    "Python": ("llama3", "<|python_tag|>print(1)"),
    "no function": ("llama3", "<function=>{}</function>"),
    "function cut off": ("llama3", '<function=time>{"a'),
    "no calls": ("mistral", "[TOOL_CALLS] none"),
    "args cut off": ("mistral", '[TOOL_CALLS]time[ARGS]{"a": '),
    "list cut off": ("mistral", '[TOOL_CALLS] [{"name": "time"}, '),
}


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)] or [""]


def read_calls(form: str, parts: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolReader(FORMATS[form], {"weather", "time"})
    text, calls = "", []
    for i, part in enumerate(parts):
        more, found = reader.feed(part, i == len(parts) - 1)
        text, calls = text + more, calls + found
    return text, calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", SAID)
def test_calls(name: str, size: int) -> None:
    form, said, text, expected = SAID[name]
    seen, calls = read_calls(form, pieces(said, size))
    assert seen == text
    assert [(c.name, c.arguments) for c in calls] == expected
    assert len({c.id for c in calls}) == len(calls)
    assert all(c.id.isalnum() for c in calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_call_stays_text(name: str, size: int) -> None:
    form, said = TEXTS[name]
    size = max(size, len(said) // 50)
    assert read_calls(form, pieces(said, size)) == (said, [])


def test_a_call_after_a_broken_one() -> None:
    text, calls = read_calls("hermes", [f"<tool_call>{{no}}</tool_call> {HERMES}"])
    assert text == "<tool_call>{no}</tool_call>"
    assert [c.name for c in calls] == ["weather"]


def test_own_ids_are_kept() -> None:
    assert (
        read_calls("mistral", ["[TOOL_CALLS]time[CALL_ID]abc123def[ARGS]{}"])[1][0].id
        == "abc123def"
    )


def test_text_and_calls_come_as_soon_as_they_are_certain() -> None:
    reader = ToolReader(FORMATS["hermes"], ())
    assert reader.feed("Hello ") == ("Hello", [])
    assert reader.feed("you") == (" you", [])
    assert reader.feed(HERMES[:-1]) == ("", [])
    text, calls = reader.feed(">")
    assert (text, len(calls)) == ("", 1)
    bare = ToolReader(FORMATS["llama3"], ())
    assert bare.feed('{"city"') == ('{"city"', [])


@pytest.mark.parametrize(
    ("source", "tokens", "wanted", "found"),
    [
        ("tools '<tool_call>'", {"<|python_tag|>"}, None, "hermes"),
        ("tools", {"<|python_tag|>"}, None, "llama3"),
        ("tools", {"[TOOL_CALLS]"}, None, "mistral"),
        ("tools [TOOL_CALLS]", (), None, "mistral"),
        ("tools", (), None, "llama3"),
        ("tools [TOOL_CALLS]", (), "hermes", "hermes"),
    ],
)
def test_the_form_follows_from_marks(source: str, tokens: Any, wanted: Any, found: str) -> None:
    assert find_format(source, lambda text: text in tokens, wanted) is FORMATS[found]


# --- reasoning ------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("said", "is_open", "reasoning", "text"),
    [
        ("<think>\nSo \n so.\n</think>\n\nYes.\n", False, "So \n so.", "Yes.\n"),
        ("\nSo.\n</think>\n\nYes.", True, "So.", "Yes."),
        ("\n <think></think>Yes.", False, "", "Yes."),
        ("<think>cut off", False, "cut off", ""),
        ("<think>cut </thi", False, "cut </thi", ""),
        ("<think>  \n", False, "", ""),
        ("Yes. <think> is a mark </think>", False, "", "Yes. <think> is a mark </think>"),
        (" Yes", False, "", " Yes"),
        ("<thin", False, "", "<thin"),
        ("", False, "", ""),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
    ],
)
def test_reasoning(size: int, said: str, is_open: bool, reasoning: str, text: str) -> None:
    reader = ReasoningReader(MARKS[0], is_open)
    read = [reader.feed(piece) for piece in pieces(said, size)] + [reader.flush()]
    assert "".join(r for r, _ in read) == reasoning
    assert "".join(t for _, t in read) == text


# --- prompts --------------------------------------------------------------------------------------
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
JOINS_TEXT = (
    "tools {% for m in messages %}{% for c in m.tool_calls or [] %}{{ '=' + c.function.arguments }}"
    "{% endfor %}{% endfor %}"
)
OPENED = (
    "{% for m in messages %}{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def new_llm(
    monkeypatch: pytest.MonkeyPatch, answer: str, template: str | None, **options: Any
) -> tuple[LLM, FakeEngine]:
    engine = install(monkeypatch, FakeEngine(answer), template=template, trained=4096)
    return LLM("fake", **options), engine


def prompt_of(engine: FakeEngine) -> str:
    return bytes(i for i in engine.prompts[-1] if i < 256).decode()


def test_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, engine = new_llm(monkeypatch, f"I look.{HERMES}", CHATML)
    done = llm.chat(USER, tools=[WEATHER], temperature=0)
    assert (done.text, done.finish_reason) == ("I look.", "tool_calls")
    assert done.tool_calls is not None
    assert [(c.name, c.arguments) for c in done.tool_calls] == [CALL]
    assert 'TOOLS [{"type": "function", "function": {"name": "weather"' in prompt_of(engine)
    assert done.tokens == list(f"I look.{HERMES}".encode())
    # The answer as history is written as the model said it.
    llm.chat([*USER, done.message, {"role": "tool", "content": "4 C"}], tools=[WEATHER])
    assert f"I look.{HERMES}<|im_end|>\n<|im_start|>tool\n4 C" in prompt_of(engine)
    assert done.message["tool_calls"][0]["function"]["arguments"] == CITY


def test_streamed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = new_llm(monkeypatch, HERMES * 2, CHATML)
    deltas = list(llm.stream_chat(USER, tools=[WEATHER], temperature=0))
    assert [len(d.tool_calls) for d in deltas if d.tool_calls] == [1, 1]
    assert deltas[-1].finish_reason == "tool_calls"
    assert [t for d in deltas for t in d.tokens] == list((HERMES * 2).encode())


@pytest.mark.parametrize(
    "options", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}]
)
def test_without_tools_there_are_no_calls(monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    llm, engine = new_llm(monkeypatch, HERMES, CHATML)
    done = llm.chat(USER, temperature=0, **options)
    assert (done.text, done.tool_calls, done.finish_reason) == (HERMES, None, "stop")
    assert "TOOLS" not in prompt_of(engine)


def test_a_call_cut_off_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = new_llm(monkeypatch, HERMES, CHATML)
    done = llm.chat(USER, tools=[WEATHER], temperature=0, max_tokens=20)
    assert (done.text, done.finish_reason, done.tool_calls) == (HERMES[:20], "length", None)


def test_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = new_llm(monkeypatch, f"<think>a</think>b{HERMES}", CHATML)
    done = llm.chat(USER, n=2, tools=[WEATHER], temperature=0)
    assert isinstance(done, list)
    assert [(d.reasoning, d.text, d.finish_reason) for d in done] == [("a", "b", "tool_calls")] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": "x"}, "tools is"), ({"tools": [{"type": "function"}]}, "tool 0"),
        ({"tools": [3]}, "tool 0"),
        ({"tools": [WEATHER, WEATHER]}, "two tools"), ({"tools": [{"name": "x", "parameters": 3}]}, "schema"),
        ({"tools": [WEATHER], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"function": {"name": "time"}}}, "tools are weather"),
        ({"tools": [WEATHER], "tool_format": "x"}, "hermes, llama3, mistral"),
        ({"reasoning_format": "x"}, "reasoning_format"), ({"chat_template": "rag"}, "the file has default"),
        ({"chat_template": Path("/nowhere/x")}, "cannot be read"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"), ({"toolz": 1}, "toolz"),
    ],
)  # fmt: skip
def test_bad_options(monkeypatch: pytest.MonkeyPatch, options: Any, said: str) -> None:
    llm, _ = new_llm(monkeypatch, "x", CHATML)
    with pytest.raises(UsageError, match=said):
        llm.stream_chat(USER, **options)


@pytest.mark.parametrize(
    ("option", "value"), [("tools", [WEATHER]), ("documents", [{"text": "x"}])]
)
def test_a_template_that_takes_none(
    monkeypatch: pytest.MonkeyPatch, option: str, value: Any
) -> None:
    llm, _ = new_llm(monkeypatch, "x", OPENED)
    with pytest.raises(TemplateError, match=f"takes no {option}"):
        llm.stream_chat(USER, **{option: value})


def test_reasoning_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, engine = new_llm(monkeypatch, "<think>\nHm.\n</think>\n\nYes.", CHATML)
    done = llm.chat(USER, temperature=0)
    assert (done.reasoning, done.text) == ("Hm.", "Yes.")
    deltas = list(llm.stream_chat(USER, temperature=0))
    assert "".join(d.reasoning for d in deltas) == "Hm."
    whole = llm.chat(USER, temperature=0, reasoning_format="text")
    assert (whole.reasoning, whole.text) == ("", "<think>\nHm.\n</think>\n\nYes.")
    llm.chat([*USER, done.message, *USER])  # this template drops it, as most do
    assert "Hm." not in prompt_of(engine)
    llm.chat(USER, chat_template_kwargs={"enable_thinking": False})
    assert prompt_of(engine).endswith("<think>\n\n</think>\n\n")


def test_reasoning_that_the_template_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = new_llm(monkeypatch, "Hm.\n</think>\nYes.", OPENED)
    done = llm.chat(USER, temperature=0)
    assert (done.reasoning, done.text) == ("Hm.", "Yes.")
    cut = llm.chat(USER, temperature=0, max_tokens=2)
    assert (cut.reasoning, cut.text, cut.finish_reason) == ("Hm", "", "length")


@pytest.mark.parametrize(
    ("template", "message", "end"),
    [
        (CHATML, {"content": "Yes, "}, "assistant\nYes, "),
        (CHATML, {"content": [{"type": "text", "text": "Ye"}]}, "assistant\nYe"),
        (CHATML, {"content": "Yes", "reasoning": "Hm."}, "assistant\n<think>\nHm.\n</think>\n\nYes"),
        (OPENED, {"content": "Yes"}, "hi|<think>\n\n</think>\n\nYes"),
        (OPENED, {"content": "<think>\nHm"}, "hi|<think>\nHm"),
    ],
)  # fmt: skip
def test_going_on_with_an_answer(
    monkeypatch: pytest.MonkeyPatch, template: str, message: Any, end: str
) -> None:
    llm, engine = new_llm(monkeypatch, ".</think>more", template)
    messages = [*USER, {"role": "assistant", **message}]
    done = llm.chat(messages, temperature=0, continue_final_message=True)
    assert prompt_of(engine).endswith(end)
    is_open = end.endswith("Hm")
    assert (done.reasoning, done.text) == ((".", "more") if is_open else ("", ".</think>more"))


def test_arguments_as_text_where_a_template_joins_them(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, engine = new_llm(monkeypatch, "x", JOINS_TEXT)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": CITY}}
    llm.chat([{"role": "assistant", "tool_calls": [call]}])
    assert prompt_of(engine) == f"tools ={CITY}"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "narrator", "content": "x"}, "roles are system"), ({"role": "user"}, "no content"),
        ({"role": "user", "content": 3}, "content of type int"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool call"),
        ({"role": "assistant", "tool_calls": 3}, "tool call"),
    ],
)  # fmt: skip
def test_bad_messages(monkeypatch: pytest.MonkeyPatch, message: Any, said: str) -> None:
    llm, _ = new_llm(monkeypatch, "x", CHATML)
    with pytest.raises(TemplateError, match=said):
        llm.render_chat([message])


def test_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, engine = new_llm(monkeypatch, "x", CHATML)
    llm.chat([{"role": "developer", "content": "a"}, {"role": "assistant", "content": None}])
    assert prompt_of(engine).startswith(
        "<|im_start|>system\na<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )
    llm.chat(
        [{"role": "ipython", "content": "a"}], chat_template="{# ipython #}{{ messages[0].role }}"
    )
    assert prompt_of(engine) == "ipython"


# --- templates ------------------------------------------------------------------------------------
def test_named_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llm, engine = new_llm(monkeypatch, "x", "default")
    llm.metadata |= {
        "tokenizer.chat_template.rag": "rag",
        "tokenizer.chat_template.tool_use": "tools used",
    }
    file = tmp_path / "my.jinja"
    file.write_text("mine é", "utf-8")
    for options, said in [
        ({}, "default"), ({"chat_template": "rag"}, "rag"), ({"chat_template": "default"}, "default"),
        ({"tools": [WEATHER]}, "tools used"), ({"chat_template": file}, "mine é"),
        ({"chat_template": "{{ 1 + 1 }}"}, "2"),
    ]:  # fmt: skip
        llm.chat(USER, **options)
        assert prompt_of(engine) == said
    with pytest.raises(UsageError, match="default, rag, tool_use"):
        llm.chat(USER, chat_template="other")


def test_a_template_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llm, engine = new_llm(monkeypatch, "x", None, chat_template="{{ messages[0].content }}!")
    llm.chat(USER)
    assert prompt_of(engine) == "hi!"
    assert llm.template is not None
    (tmp_path / "x").write_bytes(b"\xff")
    for bad in ("name", tmp_path / "x", tmp_path):
        llm, _ = new_llm(monkeypatch, "x", None, chat_template=bad)
        with pytest.raises(UsageError, match=r"no chat template|cannot be read"):
            llm.chat(USER)


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{% unknown %}", "{{ raise_exception('no') }}", "x" * 10_000_000,
     "{% for i in range(10**9) %}{% endfor %}"],
    ids=lambda s: s[:12],
)  # fmt: skip
def test_a_broken_template_disables_chat_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    llm, _ = new_llm(monkeypatch, "fine", source)
    with pytest.raises(TemplateError) as error:
        llm.chat(USER)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)
    assert llm.generate("p", temperature=0).text == "fine"


# --- special tokens -------------------------------------------------------------------------------
def test_special_tokens_that_mark_calls_are_seen() -> None:
    metadata = bpe_vocabulary(300)
    marks = ["[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "<|other|>"]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens[-5:], types[-5:] = marks, [3] * 5
    metadata["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    tokenizer = load_tokenizer(metadata)
    chat = Chat("m", tokenizer, {"tokenizer.chat_template": "tools"})
    said = f"<think>Hm.<|other|></think>[TOOL_CALLS]weather[ARGS]{CITY}"

    def answer(prompt: Any) -> Any:
        decoder = tokenizer.stream(prompt.shown)
        texts = [decoder.feed(i) for i in tokenizer.encode(said, False, True)]
        last = Delta(decoder.flush(), [], finish_reason="stop", timings=Timings())
        return collect(prompt.read([*(Delta(t, []) for t in texts), last]))

    done = answer(chat.prompt(USER, tools=[WEATHER]))
    assert (done.reasoning, done.text) == ("Hm.", "")
    assert [(c.name, c.arguments) for c in done.tool_calls] == [CALL]
    done = answer(chat.prompt(USER, reasoning_format="text"))
    assert done.text == f"Hm.weather{CITY}"
