"""Chat templates: messages to the text that a model was trained on.

Templates are Jinja, rendered in a sandbox with the helpers that Hugging Face tokenizers rely on. The two
built-in ones give the strings of MiniMax-Text-01 and MiniMax-M1. Any other template is a program that came
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
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
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
{%- for call in message.get('tool_calls') or [] -%}
{{ '<function_call>```typescript\nfunctions.' + call.function.name }}
{{- '(' + call.function.arguments | tojson + ')\n```' }}
{%- endfor -%}
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
{%- if message.get('tool_calls') -%}
{{ '\n' if message.content | map(attribute='text', default='') | join else '' }}
{{- '<tool_calls>\n' }}
{%- for call in message.tool_calls -%}
{{ '{"name": ' + call.function.name | tojson + ', "arguments": ' + call.function.arguments | tojson + '}\n' }}
{%- endfor -%}
{{ '</tool_calls>' }}
{%- endif -%}
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
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
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
        if inner is not None and _is_content(inner):
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


@functools.cache
def _reads_tool_calls(source: str) -> bool:
    """Whether a template reads `tool_calls` of a message; text such as "<tool_calls>" does not count."""
    tree = _environment().parse(source)
    return any(node.attr == "tool_calls" for node in tree.find_all(jinja2.nodes.Getattr)) or any(
        node.value == "tool_calls" for node in tree.find_all(jinja2.nodes.Const)
    )


def _arguments(arguments: object, where: str) -> dict:
    """The object that the arguments of a call are; the OpenAI interface writes it as text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ChatError(f"the arguments of {where} are not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise ChatError(f"the arguments of {where} must be a JSON object, got {arguments!r}")
    return dict(arguments)


def _tool_call(call: object, where: str) -> dict:
    """`{"type": "function", "function": {"name", "arguments"}}` with the arguments as an object."""
    if isinstance(call, Mapping) and call.get("type", "function") == "function":
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]:
            return {**call, "function": {**function, "arguments": _arguments(function.get("arguments", {}), where)}}
    raise ChatError(f'{where} must be {{"type": "function", "function": {{"name", "arguments"}}}}, got {call!r}')


def _with_tool_calls(messages: Sequence[Mapping]) -> list[dict]:
    """Copies of the messages; arguments of tool calls become objects, and calls that are None or empty go."""
    result = []
    for i, message in enumerate(messages):
        message = dict(message)
        calls = message.pop("tool_calls", None)
        if calls:
            if message["role"] != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
                raise ChatError(f"tool_calls of message {i} ({message['role']}) must be a list, of an assistant")
            message["tool_calls"] = [_tool_call(call, f"tool call {n} of message {i}") for n, call in enumerate(calls)]
        result.append(message)
    return result


# What the built-in templates write of a message, besides its role and content.
_KEYS = {"assistant": {"tool_calls"}, "tool": {"name", "tool_call_id"}, "function": {"name"}}


def _check_written(messages: Sequence[Mapping], template: str) -> None:
    """Raises ChatError for what a built-in template would leave out."""
    for i, message in enumerate(messages):
        role: str = message["role"]
        content: Any = message.get("content")
        written = {"role", "content"} | _KEYS.get(role, set())
        left_out = [key for key, value in message.items() if key not in written and value not in (None, "", [], {})]
        if left_out:
            raise ChatError(
                f"message {i} ({role}) has {', '.join(map(repr, left_out))}, which the template {template} does not "
                "write: put it into the content, or remove it"
            )
        if role != "assistant" and not isinstance(content, str):
            parts = [part for part in content if not isinstance(part, Mapping) or not isinstance(part.get("text"), str)]
            if parts or len(content) > 1 and role != "tool":
                raise ChatError(
                    f"content of message {i} ({role}) must be text, or {'parts' if role == 'tool' else 'one part'} of "
                    f"text: the template {template} writes nothing else"
                )


def _for_text01(messages: Sequence[Mapping]) -> list[dict]:
    """Tool messages in the form of the OpenAI interface become `function` messages, whose response is JSON."""
    result = []
    for i, message in enumerate(messages):
        if len(message.get("tool_calls", ())) > 1:
            raise ChatError(f"message {i} has several tool_calls; a turn of text01 holds one: split the turn")
        if message["role"] == "tool":
            response = _only_text(message["content"], i)
            try:
                json.loads(response)
            except (ValueError, RecursionError):
                response = json.dumps(response, ensure_ascii=False)
            message = {"role": "function", "name": message["name"], "content": response}
        result.append(message)
    return result


def _only_text(content: str | Sequence[Mapping], i: int) -> str:
    if isinstance(content, str):
        return content
    if len(content) > 1:
        raise ChatError(f"message {i} has several results; a turn of text01 holds one: split the message")
    return content[0]["text"]


def _for_m1(messages: Sequence[Mapping]) -> list[dict]:
    """Results of tools that follow one another share a turn."""
    result = []
    for message in map(_as_parts, messages):
        if message["role"] == "tool":
            message["content"] = [{"name": message.get("name"), **part} for part in message["content"]]
            if result and result[-1]["role"] == "tool":
                result[-1]["content"] = [*result[-1]["content"], *message["content"]]
                continue
        result.append(message)
    return result


_ADAPTED = {"text01": _for_text01, "m1": _for_m1}


def _with_names(messages: Sequence[Mapping]) -> list[dict]:
    """Tool messages with the `name` of what was called, looked up by their `tool_call_id`."""
    names, result = {}, []
    for i, message in enumerate(messages):
        names |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and "name" not in message:
            parts = message["content"] if not isinstance(message["content"], str) else ()
            call_id = message.get("tool_call_id")
            if call_id is not None and call_id in names:
                message = {**message, "name": names[call_id]}
            elif not parts or any("name" not in part for part in parts):
                raise ChatError(
                    f"message {i} (tool) lacks the name of the tool: give name, or the tool_call_id of a call before it"
                )
        result.append(message)
    return result


def _adapted(messages: Sequence[Mapping], template: str) -> list[dict]:
    """The messages as a template wants them; ChatError for what a built-in one would leave out."""
    messages = _with_tool_calls(messages)
    if template not in TEMPLATES:
        return messages
    _check_written(messages, template)
    return _ADAPTED[template](_with_names(messages))


def _as_read(messages: Sequence[Mapping], source: str) -> Sequence[Mapping]:
    """The messages in the form that the source reads; ChatError for tool calls that it does not read."""
    if any("tool_calls" in message for message in messages) and not _reads_tool_calls(source):
        raise ChatError("the chat template leaves tool_calls out: name one that writes them, such as template='m1'")
    return [_as_parts(message) for message in messages] if _reads_parts(source) else messages


def _check_unicode(value: object, name: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ChatError(f"{name} holds {half}, half of a surrogate pair, which is no character") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{name} cannot be written as JSON: {error}") from None


def _check_messages(messages: Sequence[Mapping]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {i} must be a mapping with a role and a content, got {message!r}")
        _check_unicode(message, f"message {i}")
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
        `tool` message also carries the `name` of what was called, or the `tool_call_id` of a call before it. The
        `tool_calls` of an assistant have the form of the OpenAI interface; their arguments may be JSON text.
      template: a key of `TEMPLATES`, or the Jinja source of a template.
      tools: JSON descriptions of the callable tools.
      add_generation_prompt: end with the header of the assistant's turn.
      **variables: what else a checkpoint's template reads, such as `bos_token`.

    Raises:
      ChatError: an unknown role, a part that the template needs and a message lacks, one that the template would
        leave out, text that is no Unicode, a broken template.
    """
    _check_messages(messages)
    _check_unicode(tools, "the tools")
    messages = _adapted(messages, template)
    variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
    if template not in TEMPLATES:
        return _render_apart(template, messages, variables)
    try:
        return _render(_environment(), TEMPLATES[template], messages, variables)
    except Exception as error:  # whatever a value of another kind than the template reads leads to
        raise ChatError(f"the chat template does not render: {_reason(error)}") from error


def _render(environment, source: str, messages: Sequence[Mapping], variables: Mapping) -> str:
    return environment.from_string(source).render(messages=_as_read(messages, source), **variables)


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
