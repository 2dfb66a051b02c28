"""Strict JSON: everything that Python's own reader lets pass, or answers with another error."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmx_jax.storage.json_io import JsonError, loads, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_reads_what_json_writes(value):
    assert loads(json.dumps(value)) == value
    assert loads(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789eE+-.\\u dtruefalsn', max_size=60))
def test_anything_else_is_one_error(data):
    try:
        loads(data)
    except JsonError:
        pass


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 200_000, "too deeply"),
        ("{" + '"a":{' * 200_000, "too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", "not JSON"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        ('{"a": "\\ud83d"}', "surrogate"),
        ('{"\\uDE00": 1}', "surrogate"),
        (b'{"a": "\xff"}', "UTF-8"),
        ("", "not JSON"),
        ("{'a': 1}", "not JSON"),
    ],
)
def test_refused(text, says):
    with pytest.raises(JsonError, match=says):
        loads(text)


def test_a_whole_surrogate_pair_is_a_character():
    assert loads('"\\ud83d\\ude00 \\\\ud83d"') == "\U0001f600 \\ud83d"


def test_a_repeated_key_among_many_takes_linear_time():
    keys = [f'"n{i}":0' for i in range(400_000)]
    start = time.process_time()
    with pytest.raises(JsonError, match="twice"):
        loads("{" + ",".join([*keys, keys[-1]]) + "}")
    # Quadratic work takes an hour of CPU here; the bound only tells the two apart.
    assert time.process_time() - start < 60


def test_read_object_names_the_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(JsonError, match=r"x\.json: holds a JSON list, not an object"):
        read_object(path)
    path.write_bytes(b"\xff")
    with pytest.raises(JsonError, match=r"x\.json: not UTF-8"):
        read_object(path)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none.json")
