"""Chat templates: what they render, and what a hostile one cannot do."""

from __future__ import annotations

import re
import sys
import time
import tracemalloc

import pytest

from edgellama.chat.template import MAX_CHARACTERS, MAX_SOURCE, ChatTemplate
from edgellama.errors import TemplateError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello <b>"}]


def render(source: str, messages: list | None = None, **variables: object) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(
        HELLO if messages is None else messages, **variables
    )


# --- what is rendered -----------------------------------------------------------------------------
def test_chatml() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello <b><|im_end|>\n"
    assert render(CHATML, messages) == expected + "<|im_start|>assistant\n"
    assert render(CHATML, messages, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hello <b></s>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <b>"}]'),
        ("{{ {'b': 'é', 'a': 1} | tojson(indent=1) }}", '{\n "b": "é",\n "a": 1\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks, lstrip_blocks
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}", "1"),
        ("{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{% endfor %}",
         "TrueTrue1"),
        ("{{ tools is defined }}{{ missing }}", "False"),
        ("{{ 'a' ~ 1 ~ none ~ missing }}", "a1None"),
        ("{{ '%s-%03d' % ('x', 7) }}{{ '%s'|format('y') }}{{ '{:>3}'.format(1) }}", "x-007y  1"),
        ("{{ 'a,b'.split(',')|join('; ') }}{{ ' x '.strip()|indent(2, true) }}", "a; b  x"),
        ("{{ messages|map(attribute='role')|join }}{{ 2 ** 10 }}{{ [1] + [2] }}", "user1024[1, 2]"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('y') }}", "<y>"),
        ("{{ 'abc'.replace('b', 'x')|replace('c', 'z') }}{{ 'x'|center(3) }}", "axz x "),
    ],
)  # fmt: skip
def test_rendering(source: str, expected: str) -> None:
    assert render(source) == expected


def test_variables_reach_the_template() -> None:
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"


def test_strftime_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(TemplateError, match="image_url"):
        render("x", [{"role": "user", "content": image}])


@pytest.mark.parametrize("message", [{}, {"content": "x"}, {"role": 3, "content": "x"}, "text"])
def test_messages_are_checked(message: object) -> None:
    with pytest.raises(TemplateError, match="message 0 has no role"):
        render(CHATML, [message])


# --- what fails -----------------------------------------------------------------------------------
def test_raise_exception() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 +", "{% unknown_tag %}", "{{ x|no_such }}"])
def test_broken_template_is_found_at_use(source: str) -> None:
    template = ChatTemplate(source)  # opening a model must not fail
    with pytest.raises(TemplateError, match="--raw"):
        template.render(HELLO)


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ missing.x.y }}", "{{ 'x' + 1 }}"])
def test_errors_of_template_code(source: str) -> None:
    with pytest.raises(TemplateError) as error:
        render(source)
    assert "\n" not in str(error.value)


# --- what a hostile template cannot do ------------------------------------------------------------
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner.__init__.__globals__['os'].system('id') }}",
        "{{ namespace.__init__.__globals__ }}{{ namespace.__init__.__globals__.os.getcwd() }}",
        "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
        "{{ raise_exception.__globals__['json'].loads('1') }}",
        "{{ strftime_now.__globals__['time'].sleep(9) }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__.os.getcwd() }}",
    ],
)
def test_sandbox(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_class_is_not_shown() -> None:
    assert render("{{ ''.__class__ }}{{ ''|attr('__class__') }}") == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [[1], [1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
        "{{ ('x' * 99999).join(range(99999)|map('string'))|length }}",
        "{{ 5|round(-1000000000) }}",
        "{{ 5|round(100000000, 'ceil') }}",
        "{{ ([[1]] * 99999)|sum(start=[])|length }}",
        # lists that are equal, or keys, only after 2^40 comparisons in C
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
        "{% set ns = namespace(x={'a': 1}, y={'a': 1}) %}{% for i in range(40) %}"
        "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% set ns.y = {'a': ns.y, 'b': ns.y} %}{% endfor %}"
        "{{ ns.x == ns.y }}",
        "{% set ns = namespace(x=(1,)) %}{% for i in range(40) %}"
        "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1}|length }}",
        "{% set ns = namespace(x=dict(), y=dict()) %}{% for i in range(40) %}"
        "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% set ns.y = dict(a=ns.y, b=ns.y) %}{% endfor %}"
        "{{ ns.x == ns.y }}",
        "{{ range(99999)|map('batch', 1)|map('list')|map('length')|list|length }}"
        "{{ ([range(99999)] * 99999)|map('sum')|list|length }}",
    ],
)
def test_endless_work_is_stopped(source: str) -> None:
    trace = sys.gettrace()
    start = time.monotonic()
    with pytest.raises(TemplateError):
        render(source)
    assert time.monotonic() - start < 5
    assert sys.gettrace() is trace


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{% macro f() %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endmacro %}"
        "{% set x = f() %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ [1] * 10**10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(40) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(40) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}"
        "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|string|length }}",
        "{% set ns = namespace(x=3) %}{% for i in range(40) %}"
        "{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'x'|center(10**10) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x'|indent(10**10, true) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d'|format(10**10, 1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10**10) }}",
        "{{ ('x' * 99999)|replace('x', 'x' * 99999) }}",
        "{{ ('x' * 99999).replace('', 'x' * 99999) }}",
        "{{ range(99999)|join('x' * 99999) }}",
        "{{ ('x' * 99999).join('x' * 99999) }}",
        "{{ ('{0:9999}' * 99999).format(1) }}",
        "{{ ('%9999d' * 9999) % (range(9999)|list) }}",
        "{{ 'x'.encode().ljust(10**10) }}",
        "{{ (1).to_bytes(10**10, 'little') }}",
        "{{ [1]|batch(10**10, 0)|list }}",
        "{{ [1]|tojson(indent=10**10) }}",
        "{{ [1]|tojson(indent='x' * 99999) }}",
        "{{ range(99999)|list|tojson(separators=('x' * 99999, ':')) }}",
        "{{ ('ab ' * 999999).split()|length }}",
        # one after another none is too large; all are held at once
        "{% macro f() %}{% set x = 'x' * 4000000 %}{{ f() }}{{ x }}{% endmacro %}{{ f() }}",
        "{% set s = 'x' * 4000000 %}{% macro f() %}{% set x = s[1:] %}{{ f() }}{{ x }}{% endmacro %}"
        "{{ f() }}",
        "".join(f"{{% set x{i} = 'x' * 4000000 %}}" for i in range(99)),
    ],
)
def test_huge_values_are_refused(source: str) -> None:
    render(CHATML)  # imports, which are not its memory
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "source",
    [
        "x" * (MAX_SOURCE + 1),
        "{#" * 99999,
        "{{ " + "(" * 99999 + ")" * 99999 + " }}",
        "{{ " + "1+" * 99999 + "1 }}",
        "{{ a" + ".a" * 99999 + " }}",
        "{{ " + "9" * 99999 + " }}",
        "{% if a %}" + "{% elif b %}" * 9999 + "{% endif %}",
        "{% for a in b %}" * 99 + "{% endfor %}" * 99,
        "{{ '" + "\\'" * 99999,
    ],
    ids=lambda source: source[:20],
)
def test_sources_that_are_hard_to_compile(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError) as error:
        render(source)
    assert time.monotonic() - start < 5
    assert str(error.value).isprintable()


def test_limits_hold_for_one_rendering() -> None:
    template = ChatTemplate("{{ ('x' * 4000000)|length }}")
    assert {template.render(HELLO) for _ in range(40)} == {"4000000"}


def test_long_chats_pass() -> None:
    content = "word " * (MAX_CHARACTERS // 50)
    assert render(CHATML, [{"role": "user", "content": content}] * 5).count("word ") == len(content)
