"""Tokenizer: round trips, determinism, streaming decode, and the strings of the chat templates (spec F)."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.data.chat_template import ChatError, render_chat
from mmx_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "naïve café, 你好 😀\n" * 20]
TOKENIZER = Tokenizer.train(TEXTS, 330)
BOS, EOS = "<beginning_of_sentence>", "<end_of_sentence>"


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_decode_inverts_encode(text):
    ids = TOKENIZER.encode(text, parse_special=False)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=12))
@settings(max_examples=300, deadline=None)
def test_stream_equals_decode_for_any_tokens(ids):
    stream = TOKENIZER.stream()
    parts = [stream.step(i) for i in ids] + [stream.finish()]
    assert "".join(part or "" for part in parts) == TOKENIZER.decode(ids)


def test_stream_waits_for_a_whole_character():
    tokenizer = Tokenizer.train(["plain"], 260)  # bytes only: an emoji is four tokens
    stream = tokenizer.stream()
    ids = tokenizer.encode("a👍🏽b")
    assert len(ids) == 10
    assert [stream.step(i) for i in ids] == ["a", None, None, None, "👍", None, None, None, "🏽", "b"]
    assert stream.finish() is None


def test_stream_gives_out_an_unfinished_character_at_the_end():
    tokenizer = Tokenizer.train(["plain"], 260)
    stream = tokenizer.stream()
    assert [stream.step(i) for i in tokenizer.encode("é")[:1]] == [None]
    assert stream.finish() == "\ufffd"


def test_training_is_deterministic_across_processes():
    script = (
        "import sys, hashlib; from mmx_jax.data.tokenizer import Tokenizer\n"
        "texts = ['def f(x):\\n    return x + 1\\n' * 20, 'na\u00efve caf\u00e9, \u4f60\u597d \U0001f600\\n' * 20]\n"
        "sys.stdout.buffer.write(Tokenizer.train(texts, 330).backend.to_str().encode())"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.decode()
    assert json.loads(out) == json.loads(TOKENIZER.backend.to_str())


def test_save_then_load_keeps_everything(tmp_path):
    tokenizer = Tokenizer(TOKENIZER.backend, TOKENIZER.config, "{{ messages[0].content }}")
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.backend.to_str() == tokenizer.backend.to_str()
        assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (0, 1, None)
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.vocab_size == tokenizer.vocab_size


def test_special_tokens():
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert TOKENIZER.token_to_id("<absent>") is None
    assert TOKENIZER.stop_ids == (0, 3)
    assert TOKENIZER.encode("<end_of_document>") == [0]
    in_a_document = TOKENIZER.encode("<end_of_document>", parse_special=False)
    assert 0 not in in_a_document and TOKENIZER.decode(in_a_document) == "<end_of_document>"
    assert TOKENIZER.decode([0]) == "" and TOKENIZER.decode([0], skip_special_tokens=False) == "<end_of_document>"


def test_roles_written_as_objects_and_named_templates(tmp_path):
    TOKENIZER.save(tmp_path)
    config = {"eos_token": {"content": EOS}, "bos_token": BOS}
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id, loaded.chat_template) == (3, 2, None, "y")
    (tmp_path / "chat_template.jinja").write_text("z")
    assert Tokenizer.load(tmp_path).chat_template == "z"


def test_errors_name_the_file_or_the_field(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(TokenizerError, match=r"eos_token='</s>'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="vocab_size=100"):
        Tokenizer.train(TEXTS, 100)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pointer_in_the_place_of_a_file_is_named(tmp_path, name):
    TOKENIZER.save(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n")
    with pytest.raises(TokenizerError, match=rf"{name}: not the file itself, but a Git LFS pointer: run `git lfs pull"):
        Tokenizer.load(tmp_path)


def loaded_with(folder, **files):
    """A folder of TOKENIZER's tokenizer.json and the given files, loaded."""
    TOKENIZER.backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("change", ["truncation", "padding"])
def test_stored_truncation_and_padding_take_no_effect_and_are_kept(tmp_path, change):
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    if change == "truncation":
        backend.enable_truncation(4, stride=1, strategy="only_first", direction="left")
    else:
        backend.enable_padding(length=5000, pad_id=1, pad_token="<pad>", direction="left")
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    for parse_special in (True, False):
        assert loaded.encode(TEXTS[0], parse_special=parse_special) == TOKENIZER.encode(TEXTS[0])
    loaded.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text()) == json.loads(backend.to_str())


NEXT = TOKENIZER.vocab_size
DECLARATIONS = {
    "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": {NEXT: {"content": "<x>", "special": True}}}},
    "additional_special_tokens": {"tokenizer_config": {"additional_special_tokens": ["<x>"]}},
    "as objects": {"tokenizer_config": {"additional_special_tokens": [{"content": "<x>", "lstrip": False}]}},
    "extra_special_tokens": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<x>"}}},
    "special_tokens_map": {"special_tokens_map": {"additional_special_tokens": ["<x>"]}},
    "added_tokens": {"added_tokens": {"<x>": NEXT}, "special_tokens_map": {"additional_special_tokens": ["<x>"]}},
}


@pytest.mark.parametrize("where", sorted(DECLARATIONS))
def test_special_tokens_are_found_wherever_they_are_declared(tmp_path, where):
    tokenizer = loaded_with(tmp_path, **DECLARATIONS[where])
    a, b = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    assert tokenizer.encode("a<x>b") == [*a, NEXT, *b]
    assert tokenizer.decode([*a, NEXT, *b]) == "ab" and tokenizer.vocab_size == NEXT + 1
    assert NEXT not in tokenizer.encode("a<x>b", parse_special=False)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode("a<x>b") == [*a, NEXT, *b]


def test_roles_come_from_the_map_and_an_ordinary_token_with_a_role_is_special(tmp_path):
    word = TOKENIZER.backend.id_to_token(NEXT - 1)
    tokenizer = loaded_with(tmp_path, special_tokens_map={"eos_token": {"content": word}, "pad_token": "<pad>"})
    assert (tokenizer.eos_id, tokenizer.pad_id) == (NEXT - 1, 1)
    assert tokenizer.decode([NEXT - 1]) == ""
    both = {"special_tokens_map": {"eos_token": EOS}, "tokenizer_config": {"eos_token": BOS}}
    assert loaded_with(tmp_path, **both).eos_id == 3  # as transformers reads older folders
    both["tokenizer_config"]["added_tokens_decoder"] = {}
    assert loaded_with(tmp_path, **both).eos_id == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": 5}}, "eos_token of .*is 5"),
        ({"tokenizer_config": {"eos_token": {"text": "x"}}}, "eos_token of "),
        ({"tokenizer_config": {"chat_template": {"a": 1}}}, "chat_template of .*dict"),
        ({"tokenizer_config": {"chat_template": [1, {"template": "x"}]}}, "no template named default"),
        ({"tokenizer_config": {"chat_template": [{"name": "default"}, {"name": "default", "template": 3}]}}, "int"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json.*nested too deeply"),
        ({"tokenizer_config": '{"eos_token": "\\ud800"}'}, "tokenizer_config.json.*surrogate"),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json.*list"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder of .*list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, "the id 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": 5}}}, "token '5' of added_tokens_decoder"),
        ({"tokenizer_config": {"additional_special_tokens": 5}}, "additional_special_tokens of .*int"),
        ({"added_tokens": {"<x>": 10**6}}, "declare token '<x>' as 1000000"),
        ({"added_tokens": {"<x>": "many"}}, "added_tokens.json gives a token the id 'many'"),
        ({"special_tokens_map": {"eos_token": "</s>"}}, "eos_token='</s>'.*not in the vocabulary"),
        ({"special_tokens_map": "{"}, "special_tokens_map.json"),
        ({"chat_template": "5"}, "chat_template.json"),
    ],
)
def test_any_damaged_file_is_one_error_that_names_it(tmp_path, files, message):
    with pytest.raises(TokenizerError, match=message) as error:
        loaded_with(tmp_path, **files)
    assert str(tmp_path) in str(error.value)


def bpe(vocab, merges=(), normalizer=None, **model):
    model = {"type": "BPE", "vocab": vocab, "merges": list(merges)} | model
    return json.dumps({"model": model, "normalizer": normalizer})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bpe({}), "vocabulary is empty"),
        (bpe({"a": 2**32 - 1}), "holds token 4294967295; no vocabulary goes beyond 16777215"),
        (bpe({"a": 0, "b": 10**9}), "holds token 1000000000; no"),  # would take 16 GiB to write out
        (bpe({"a": 0}, ["a b"]), "not a tokenizer"),
        (bpe({"a": 0, "b": 1, "ab": 2}, ["a b"], continuing_subword_prefix="éé"), "not a tokenizer"),  # a panic
        (bpe({"a": 0}, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "not a tokenizer"),  # too
        ("[" * 100_000, "not a tokenizer"),
        ("", "not the file itself, but empty"),
    ],
)
def test_errors_and_panics_of_the_library_are_tokenizer_errors(tmp_path, text, message, capfd):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(error.value)
    capfd.readouterr()  # a panic writes its own lines


def test_text_that_cannot_be_encoded_is_a_tokenizer_error():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(TokenizerError, match="cannot encode"):
        Tokenizer(backend).encode("b")


def _part(text, **more):
    return [{"type": "text", "text": text, **more}]


CHAT = [("system", "SYS"), ("user", "U1"), ("assistant", "A1"), ("user", "U2")]
AS_TEXT = [{"role": role, "content": text} for role, text in CHAT]
AS_PARTS = [{"role": role, "content": _part(text)} for role, text in CHAT]
TURNS = (
    "<beginning_of_sentence>system ai_setting=assistant\nSYS<end_of_sentence>\n"
    "<beginning_of_sentence>user name=user\nU1<end_of_sentence>\n"
    "<beginning_of_sentence>ai name=assistant\nA1<end_of_sentence>\n"
    "<beginning_of_sentence>user name=user\nU2<end_of_sentence>\n"
)
PROMPT = "<beginning_of_sentence>ai name=assistant\n"
TOOLS = [{"name": "f", "description": "a <b> & 'c' 你", "parameters": {}}, {"name": "g"}]


@pytest.mark.parametrize("messages", [AS_TEXT, AS_PARTS])
def test_golden_conversations(messages):
    assert TOKENIZER.apply_chat(messages, "text01") == TURNS + PROMPT
    assert TOKENIZER.apply_chat(messages, "text01", add_generation_prompt=False) == TURNS
    assert TOKENIZER.apply_chat(messages, "m1") == "<begin_of_document>" + TURNS + PROMPT


def test_golden_text01_functions():
    messages = [{"role": "user", "content": "hi"}, {"role": "function", "name": "f", "content": '{"a": 1}'}]
    assert render_chat(messages, "text01", tools=TOOLS) == (
        "<beginning_of_sentence>user name=user\nhi<end_of_sentence>\n"
        '<beginning_of_sentence>system function_response=functions\n{"name": "f", "response": {"a": 1}}'
        "<end_of_sentence>\n"
        "<beginning_of_sentence>system function_setting=functions\n"
        '{"name": "f", "description": "a <b> & \'c\' 你", "parameters": {}}<end_of_sentence>\n'
        '<beginning_of_sentence>system function_setting=functions\n{"name": "g"}<end_of_sentence>\n'
        "<beginning_of_sentence>ai name=assistant\n"
    )


@pytest.mark.parametrize("named_part", [True, False])
def test_golden_m1_tools(named_part):
    result = {"content": _part("R", name="f")} if named_part else {"content": "R", "name": "f"}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "A"},
        {"role": "tool", **result},
        {"role": "system", "content": "B"},
    ]
    assert render_chat(messages, "m1", tools=TOOLS) == (
        "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nAB<end_of_sentence>\n"
        "<beginning_of_sentence>system tool_setting=tools\nYou are provided with these tools:\n<tools>\n"
        '{"name": "f", "description": "a <b> & \'c\' 你", "parameters": {}}\n{"name": "g"}\n</tools>\n\n'
        "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and "
        "json-object of arguments, following the format below:\n<tool_calls>\n"
        "{name: <tool-name-1>, arguments: <args-json-object-1>}\n...\n</tool_calls><end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nhi<end_of_sentence>\n"
        "<beginning_of_sentence>tool name=tools\ntool name: f\ntool result: R\n\n<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )


def _call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


HEADER = "<beginning_of_sentence>ai name=assistant\n"
CALLING = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [_call("f", '{"q": "é <b>"}', id="c1")]},
    {"role": "tool", "tool_call_id": "c1", "content": "3 degrees"},
]


@pytest.mark.parametrize("arguments", ['{"q": "é <b>"}', {"q": "é <b>"}])
def test_golden_tool_calls(arguments):
    messages = json.loads(json.dumps(CALLING))
    messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
    before = json.loads(json.dumps(messages))
    user = "<beginning_of_sentence>user name=user\nhi<end_of_sentence>\n" + HEADER
    assert render_chat(messages, "text01") == (
        f'{user}<function_call>```typescript\nfunctions.f({{"q": "é <b>"}})\n```<end_of_sentence>\n'
        '<beginning_of_sentence>system function_response=functions\n{"name": "f", "response": "3 degrees"}'
        f"<end_of_sentence>\n{HEADER}"
    )
    assert render_chat(messages, "m1") == (
        f'<begin_of_document>{user}<tool_calls>\n{{"name": "f", "arguments": {{"q": "é <b>"}}}}\n</tool_calls>'
        "<end_of_sentence>\n<beginning_of_sentence>tool name=tools\ntool name: f\ntool result: 3 degrees\n\n"
        f"<end_of_sentence>\n{HEADER}"
    )
    assert messages == before
    own = "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments.q }}{% endfor %}"
    assert render_chat(messages, own) == "é <b>"


def test_golden_m1_several_calls_and_results():
    messages = [
        {"role": "assistant", "content": "Two.", "tool_calls": [_call("f", "", id="a"), _call("g", {"n": 1}, id="b")]},
        {"role": "tool", "tool_call_id": "b", "content": "R2"},
        {"role": "tool", "name": "f", "content": _part("R1")},
    ]
    assert render_chat(messages, "m1", add_generation_prompt=False) == (
        f'<begin_of_document>{HEADER}Two.\n<tool_calls>\n{{"name": "f", "arguments": {{}}}}\n'
        '{"name": "g", "arguments": {"n": 1}}\n</tool_calls><end_of_sentence>\n'
        "<beginning_of_sentence>tool name=tools\ntool name: g\ntool result: R2\n\ntool name: f\ntool result: R1\n\n"
        "<end_of_sentence>\n"
    )
    with pytest.raises(ChatError, match="message 0 has several tool_calls"):
        render_chat(messages, "text01")


def test_json_results_of_text01_stay_as_they_are():
    messages = [*CALLING[:2], {"role": "tool", "name": "f", "content": '{"t":3}'}]
    assert '{"name": "f", "response": {"t":3}}' in render_chat(messages, "text01")


def _assistant(**more):
    return [{"role": "assistant", "content": "A", **more}]


@pytest.mark.parametrize("template", ["text01", "m1"])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (_assistant(reasoning_content="R"), r"message 0 \(assistant\) has 'reasoning_content'"),
        (_assistant(function_call={"name": "f", "arguments": "{}"}), "'function_call'"),
        ([{"role": "user", "content": "hi", "name": "Bo"}], "'name'"),
        ([{"role": "user", "content": _part("a") + _part("b")}], "one part of text"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "one part of text"),
        ([{"role": "system", "content": ["a"]}], "one part of text"),
        (_assistant(tool_calls=[_call("f", "{")]), "arguments of tool call 0 of message 0 are not JSON"),
        (_assistant(tool_calls=[_call("f", "[1]")]), "must be a JSON object"),
        (_assistant(tool_calls=[{"type": "custom", "custom": {}}]), "tool call 0 of message 0 must be"),
        (_assistant(tool_calls="f()"), "must be a list"),
        ([{"role": "user", "content": "a", "tool_calls": [_call("f", "{}")]}], "of an assistant"),
        ([{"role": "tool", "tool_call_id": "c9", "content": "R"}], "lacks the name of the tool"),
        ([{"role": "user", "content": "bad \ud83d"}], r"message 0 holds '\\ud83d'"),
        (_assistant(tool_calls=[_call("f", {"q": "\udce9"})]), r"message 0 holds '\\udce9'"),
    ],
)
def test_nothing_of_a_message_is_left_out(template, messages, message):
    with pytest.raises(ChatError, match=message):
        render_chat(messages, template)


def test_empty_entries_of_the_openai_interface_are_no_content():
    empty = dict(tool_calls=None, function_call=None, refusal=None, annotations=[], audio=None, reasoning="")
    for template in ("text01", "m1"):
        assert render_chat(_assistant(**empty), template) == render_chat(_assistant(), template)


def test_own_templates_do_not_lose_tool_calls():
    deaf = "<tool_calls>{% for m in messages %}{{ m.content }}{% endfor %}</tool_calls>"
    with pytest.raises(ChatError, match="leaves tool_calls out"):
        render_chat(CALLING, deaf)
    for read in ("m['tool_calls']", "m.get('tool_calls')", "'tool_calls' in m"):
        render_chat(CALLING, "{% for m in messages %}{{ " + read + " }}{% endfor %}")


def test_assistant_parts_are_joined():
    parts = _part("A") + [{"type": "image"}] + _part("B")
    chat = [{"role": "assistant", "content": parts}]
    expected = "<beginning_of_sentence>ai name=assistant\nAB<end_of_sentence>\n"
    assert render_chat(chat, "text01", add_generation_prompt=False) == expected


def test_own_templates_get_content_as_they_read_it():
    plain = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    tokenizer = Tokenizer(TOKENIZER.backend, TOKENIZER.config, plain)
    assert tokenizer.apply_chat(AS_TEXT[:2]) == "system:SYS<end_of_document>user:U1<end_of_document>"
    looping = "{% for m in messages %}{% for c in m['content'] %}{{ c.text }};{% endfor %}{% endfor %}"
    assert render_chat(AS_TEXT, looping) == "SYS;U1;A1;U2;"
    marked = "{% for m in messages %}{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endfor %}"
    assert render_chat(AS_TEXT, marked) == "SYSU1A1U2"
    assert render_chat([], "{{ strftime_now('%%') }}{% generation %}{% endgeneration %}{{ absent }}") == "%"


def test_chat_errors():
    with pytest.raises(ChatError, match='role "robot" is not one of system, user, assistant, function'):
        render_chat([{"role": "robot", "content": "x"}], "text01")
    with pytest.raises(ChatError, match='role "function" is not one of system, user, assistant, tool'):
        render_chat([{"role": "function", "name": "f", "content": "x"}], "m1")
    with pytest.raises(ChatError, match="message 0"):
        render_chat(["hello"], "m1")
    with pytest.raises(ChatError, match=r"content of message 1 \(user\)"):
        render_chat([AS_TEXT[0], {"role": "user"}], "m1")
    with pytest.raises(ChatError, match="name"):
        render_chat([{"role": "tool", "content": "R"}], "m1")
    with pytest.raises(ChatError, match="this one"):
        render_chat(AS_TEXT, "{{ raise_exception('this one') }}")
    with pytest.raises(ChatError, match="text01, m1"):
        TOKENIZER.apply_chat(AS_TEXT)
    with pytest.raises(ChatError, match="unsafe"):
        render_chat(AS_TEXT, "{{ messages.__class__.__mro__ }}")
