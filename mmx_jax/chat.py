"""Chat templates: messages to the text that a model was trained on.

Templates are Jinja, rendered in a sandbox with the helpers that Hugging Face tokenizers rely on. The two
built-in ones give the strings of MiniMax-Text-01 and MiniMax-M1 (spec F). Any other template is a program that came
with a checkpoint. Jinja's sandbox keeps it from files and from Python, but lets it loop and allocate without end. So it
runs in a process of its own, of limited CPU time and memory: this file, as a script.
"""

import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

# System and user turns read the first part only, as released. Tools follow the messages, also as released,
# although the guide's prose puts them after the system turn.
_TEXT01 = r"""
{%- macro turn(header, body) -%}
{{ '<beginning_of_sentence>' + header + '\n' + body + '<end_of_sentence>\n' }}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ turn('system ai_setting=assistant', message.content[0].text) }}
{%- elif message.role == 'user' -%}
{{ turn('user name=user', message.content[0].text) }}
{%- elif message.role == 'assistant' -%}
{{ '<beginning_of_sentence>ai name=assistant\n' }}
{%- generation -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endgeneration -%}
{{ '<end_of_sentence>\n' }}
{%- elif message.role == 'function' -%}
{{ turn('system function_response=functions',
        '{"name": "' + message.name + '", "response": ' + message.content[0].text + '}') }}
{%- else -%}
{{ raise_exception('role ' + message.role | tojson + ' is not one of system, user, assistant, function') }}
{%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] -%}
{{ turn('system function_setting=functions', tool | tojson) }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<beginning_of_sentence>ai name=assistant\n' }}{%- endif -%}
"""

_M1 = r"""
{%- macro turn(header, body) -%}
{{ '<beginning_of_sentence>' + header + '\n' + body + '<end_of_sentence>\n' }}
{%- endmacro -%}
{{ '<begin_of_document>' }}
{%- set prompt = namespace(system='') -%}
{%- for message in messages if message.role == 'system' -%}
{%- set prompt.system = prompt.system + message.content[0].text -%}
{%- endfor -%}
{%- if prompt.system -%}{{ turn('system ai_setting=assistant', prompt.system) }}{%- endif -%}
{%- if tools -%}
{{ '<beginning_of_sentence>system tool_setting=tools\nYou are provided with these tools:\n<tools>\n' }}
{%- for tool in tools -%}{{ tool | tojson + '\n' }}{%- endfor -%}
{{ '</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide '
   'tool-name and json-object of arguments, following the format below:\n<tool_calls>\n'
   '{name: <tool-name-1>, arguments: <args-json-object-1>}\n...\n</tool_calls><end_of_sentence>\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ turn('user name=user', message.content[0].text) }}
{%- elif message.role == 'assistant' -%}
{{ '<beginning_of_sentence>ai name=assistant\n' }}
{%- generation -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endgeneration -%}
{{ '<end_of_sentence>\n' }}
{%- elif message.role == 'tool' -%}
{{ '<beginning_of_sentence>tool name=tools\n' }}
{%- for part in message.content -%}
{{ 'tool name: ' + part.name + '\ntool result: ' + part.text + '\n\n' }}
{%- endfor -%}
{{ '<end_of_sentence>\n' }}
{%- elif message.role != 'system' -%}
{{ raise_exception('role ' + message.role | tojson + ' is not one of system, user, assistant, tool') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<beginning_of_sentence>ai name=assistant\n' }}{%- endif -%}
"""

TEMPLATES = {"text01": _TEXT01, "m1": _M1}
# Of a template that is not built in. Released ones need milliseconds, and a few times the size of the messages.
CPU_SECONDS = 3
MEMORY_BYTES = 2**30  # of address space; the interpreter takes a tenth of it
MAX_OUTPUT = 2**24  # characters, beside four times the messages
_MAX_MESSAGE = 500  # characters of an error that a template raises


class ChatError(ValueError):
    """Messages that a template cannot render, or a template that is broken."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training masks; the text itself is unchanged."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML characters, which the models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )  # fmt: skip
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@functools.cache
def _lenient_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """As transformers renders a checkpoint's template: what is undefined is empty and false."""
    return _environment().overlay(undefined=jinja2.Undefined)


def _is_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, jinja2.nodes.Getitem)
        and isinstance(node.arg, jinja2.nodes.Const)
        and node.arg.value == "content"
    )


@functools.cache
def _reads_parts(source: str) -> bool:
    """Whether a template loops over a message's content or indexes it by number, so wants a list of parts."""
    tree = _environment().parse(source)
    for loop in tree.find_all(jinja2.nodes.For):
        inner = loop.iter
        while isinstance(inner, jinja2.nodes.Filter):
            inner = inner.node
        if _is_content(inner):
            return True
    return any(
        _is_content(item.node) and isinstance(item.arg, jinja2.nodes.Const) and isinstance(item.arg.value, int)
        for item in tree.find_all(jinja2.nodes.Getitem)
    )


def _as_parts(message: Mapping) -> dict:
    """A message whose content is a list of parts: a plain string becomes one text part with the message's name."""
    message, content = dict(message), message.get("content")
    if content is None:
        message["content"] = []
    elif isinstance(content, str):
        part = {"type": "text", "text": content}
        message["content"] = [part | {"name": message["name"]} if "name" in message else part]
    return message


def _check_messages(messages: Sequence[Mapping]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {i} must be a mapping with a role and a content, got {message!r}")
        content = message.get("content")
        if content is None and message["role"] == "assistant":
            continue  # an assistant that only calls tools, in the form of the OpenAI interface
        if not isinstance(content, str | Sequence) or len(content) == 0 and not isinstance(content, str):
            raise ChatError(f"content of message {i} ({message['role']}) must be text or a list of parts: {content!r}")


def render_chat(
    messages: Sequence[Mapping],
    template: str,
    *,
    tools: Sequence[Mapping] | None = None,
    add_generation_prompt: bool = True,
    **variables,
) -> str:
    """Renders a conversation.

    Args:
      messages: mappings with `role` and `content`, a string or a list of parts such as
        `{"type": "text", "text": ...}`. Strings become parts for templates that read parts. A `function` or
        `tool` message also carries the `name` of what was called.
      template: a key of `TEMPLATES`, or the Jinja source of a template.
      tools: JSON descriptions of the callable tools.
      add_generation_prompt: end with the header of the assistant's turn.
      **variables: what else a checkpoint's template reads, such as `bos_token`.

    Raises:
      ChatError: an unknown role, a part that the template needs and a message lacks, a broken template.
    """
    _check_messages(messages)
    variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
    if template not in TEMPLATES:
        return _render_apart(template, messages, variables)
    try:
        return _render(_environment(), TEMPLATES[template], messages, variables)
    except Exception as error:  # whatever a value of another kind than the template reads leads to
        raise ChatError(f"the chat template does not render: {_reason(error)}") from error


def _render(environment, source: str, messages: Sequence[Mapping], variables: Mapping) -> str:
    if _reads_parts(source):
        messages = [_as_parts(message) for message in messages]
    return environment.from_string(source).render(messages=messages, **variables)


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, jinja2.TemplateError | TypeError) else f"{type(error).__name__}: "
    text = f"{kind}{error}"
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."


def _render_apart(source: str, messages: Sequence[Mapping], variables: Mapping) -> str:
    """`_render` of a template that nobody vouches for, by this file as a script."""
    try:
        request = json.dumps([source, messages, variables], default=_as_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"messages, tools and variables of a chat must be JSON: {_reason(error)}") from error
    # The child finds jinja2 where this process found it; -P keeps this folder, whose names it does not need, out.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", __file__]
    child = subprocess.run(command, input=request.encode(), capture_output=True, env=environment, check=False)
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ChatError(f"the chat template does not render: it takes more than {CPU_SECONDS} s of CPU time")
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        last = (child.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise ChatError(
            f"the chat template does not render: its process ended with {child.returncode}, {last[:_MAX_MESSAGE]}"
        ) from None
    if "error" in answer:
        raise ChatError(f"the chat template does not render: {answer['error']}")
    return answer["text"]


def _as_json(value):
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"got a {type(value).__name__}")


def _answer_request() -> None:
    """Renders the request on stdin under the limits; the answer on stdout holds `text` or `error`."""
    for limit, amount in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))
    request = sys.stdin.buffer.read()
    try:
        text = _render(_lenient_environment(), *json.loads(request))
        if len(text) > MAX_OUTPUT + 4 * len(request):
            raise jinja2.TemplateError(f"it writes {len(text):,} characters")
        answer = {"text": text}
    except Exception as error:
        answer = {"error": _reason(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _answer_request()
