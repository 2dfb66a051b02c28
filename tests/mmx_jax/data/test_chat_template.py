"""Templates of a checkpoint are programs: each ends in text or in a ChatError, in bounded time and memory."""

import resource

import pytest

from mmx_jax.data import chat_template
from mmx_jax.data.chat_template import ChatError, render_chat

MESSAGES = [{"role": "user", "content": "hi"}]


def children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ messages | tojson(indent=10**10) }}", "MemoryError"),
        ("{{ 'a' * 3 * 10**7 }}", "it writes 30,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "RecursionError"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('x' * 10**6) }}", r"xxx\.\.\.$"),
        ("{{ strftime_now(3) }}", "must be str"),
        ("{{ messages | nothing }}", "No filter named"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_whatever_a_template_does_is_a_chat_error(template, message):
    before = children_cpu_seconds()
    with pytest.raises(ChatError, match=message) as caught:
        render_chat(MESSAGES, template)
    assert len(str(caught.value)) < 1000
    assert children_cpu_seconds() - before < 2 * chat_template.CPU_SECONDS + 2


def test_a_template_without_end_is_ended():
    before = children_cpu_seconds()
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' * i }}{% endfor %}{% endfor %}"
    with pytest.raises(ChatError, match="takes more than 3 s of CPU time|MemoryError"):
        render_chat(MESSAGES, endless)
    doubling = (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
    )
    with pytest.raises(ChatError, match="takes more than 3 s of CPU time|MemoryError"):
        render_chat(MESSAGES, doubling)
    assert children_cpu_seconds() - before < 4 * chat_template.CPU_SECONDS + 4


def test_a_template_gets_what_it_was_given():
    class Parts(tuple):
        pass

    messages = [{"role": "user", "content": Parts([{"type": "text", "text": "é😀\u2028"}])}]
    template = "{% for part in messages[0].content %}{{ part.text ~ tools ~ x ~ add_generation_prompt }}{% endfor %}"
    assert render_chat(messages, template, tools=[{"a": None}], x=2.5) == "é😀\u2028[{'a': None}]2.5True"
    with pytest.raises(ChatError, match="must be JSON: got a object"):
        render_chat(MESSAGES, "", x=object())


def test_long_conversations_pass():
    messages = [{"role": "user", "content": "word " * 4000}] * 200  # 4 million characters
    template = "{% for m in messages %}{{ '<u>' + m.content + '</u>' }}{% endfor %}"
    assert len(render_chat(messages, template)) == 200 * (20_000 + 7)


def test_built_in_templates_refuse_odd_values_with_the_same_error():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for messages in (
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"text": {}}]}],
        [{"role": "function", "name": 5, "content": "x"}],
    ):
        with pytest.raises(ChatError, match="does not render|must be text|must be a"):
            render_chat(messages, "text01")
    with pytest.raises(ChatError, match="does not render|cannot be written as JSON"):
        render_chat(MESSAGES, "text01", tools=[deep])
