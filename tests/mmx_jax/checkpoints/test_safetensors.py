"""safetensors files: headers, damage, shards; the oracle is the safetensors package."""

import hashlib
import json
import os
import re
import time

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.checkpoints import safetensors as safetensors_io
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.load import resolve
from mmx_jax.checkpoints.open import open_tensors
from mmx_jax.cli import convert as cli
from tests.support.checkpoint_files import INDEX, LFS


def header_file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def tensor(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "not JSON"),
        (b"[1]", b"", "object"),
        (b"\xff\xfe", b"", "not UTF-8"),
        ({"a": tensor()}, b"1234567", "truncated"),
        ({"a": tensor()}, b"123456789", "1 bytes too long"),
        ({"a": tensor(end=4)}, b"1234", "needs 8 bytes"),
        ({"a": tensor(end=-8)}, b"", "data_offsets"),
        ({"a": tensor(1, 9)}, b"123456789", "hole"),
        ({"a": tensor(), "b": tensor(4, 12)}, b"1" * 12, "'b' overlaps"),
        ({"a": tensor(), "b": tensor(16, 24)}, b"1" * 24, "'b' leaves a hole"),
        ({"a": tensor(dtype="F17")}, b"12345678", "F17"),
        ({"a": tensor(shape=(-2,))}, b"12345678", "shape"),
        ({"a": tensor(shape=(True, 2))}, b"12345678", "shape"),
        ({"a": {"dtype": "F32"}}, b"", "exactly"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        (b'{"a":{},"a":{}}', b"", "'a' occurs twice"),
        (b"[" * 5000, b"", "not JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", b"", "wrong header"),
    ],
)
def test_malformed_header_is_one_clear_error(tmp_path, header, data, message):
    path = header_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ConversionError, match=message) as caught:
        safetensors_io.read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_short_and_endless_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    cases = (b"123", "truncated"), (b"\xff" * 8, "wrong header"), (b"\x10" + bytes(7) + b"{", "truncated")
    for raw, message in cases:
        path.write_bytes(raw)
        with pytest.raises(ConversionError, match=message):
            safetensors_io.read_header(path)


def refuse_header(path, header, data=b"", message=""):
    with pytest.raises(ConversionError, match=message) as caught:
        safetensors_io.read_header(header_file(path, header, data))
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


def test_a_header_costs_no_more_than_its_size(tmp_path):
    path = tmp_path / "x.safetensors"
    names = [f'"n{i}":0' for i in range(100_000)]
    start = time.process_time()
    refuse_header(path, ("{" + ",".join([*names, names[-1]]) + "}").encode(), message="occurs twice")
    refuse_header(path, {"a": tensor(shape=[2**62] * 200_000)}, message="at most 32 sizes")
    refuse_header(path, {"a": tensor(0, 0, shape=[1] * 33)}, message="at most 32 sizes")
    refuse_header(path, {"a": tensor(0, 0, shape=[2**62, 2**62, 0])}, message="no memory can hold")
    refuse_header(path, {"a": tensor(shape=[[[[[["x" * 10**6]]]]]])}, message="sizes is expected")
    # Quadratic work takes minutes of CPU; the bound only tells the two apart.
    assert time.process_time() - start < 30


def test_names_that_are_no_text_are_refused_or_shown(tmp_path):
    path = tmp_path / "x.safetensors"
    refuse_header(path, b'{"\\ud800": 0}', message="surrogate")
    refuse_header(path, {"\n\x1b[2J": 1}, message=r"tensor '\\n\\x1b\[2J'")
    refuse_header(path, {"a" * 10**6: 1}, message=r"tensor 'aaa.*\.\.\..*aaa'")
    refuse_header(path, {"__metadata__": [["a", "b"]]}, message="__metadata__")


NOT_THE_FILE = {
    "lfs": (LFS, "a Git LFS pointer: run `git lfs pull`, or .*hf download"),
    "annex": (b"/annex/objects/MD5E-s5--0.safetensors\n", "git-annex pointer: run `git annex get`"),
    "xet": (b"# xet version 0\nfilesize = 5\nhash = '0'\n", "a Xet pointer: .*hf download"),
    "html": (b"\n <!DOCTYPE html><html><title>Log in</title></html>", "an HTML page.*hf download"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "empty": (b"", "empty: download"),
    "zeros": (bytes(600), "nothing but zeros"),
    "zip": (b"PK\x03\x04" + b"a" * 60, "a zip archive, as `torch.save`"),
    "pickle": (b"\x80\x02}q\x00." + b"a" * 60, "a Python pickle"),
    "gzip": (b"\x1f\x8b\x08\x00" + b"a" * 60, "compressed by gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"a" * 60, "compressed by zstd"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + b"a" * 60, "a GGUF file"),
    "utf16": ("{}".encode("utf-16"), "UTF-16 text"),
}


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00002-of-00007.safetensors"])
@pytest.mark.parametrize("kind", NOT_THE_FILE)
def test_what_lies_in_the_place_of_a_file_is_named(source, file, kind):
    raw, message = NOT_THE_FILE[kind]
    (source / file).write_bytes(raw)
    with pytest.raises(ConversionError, match=message) as caught:
        open_tensors(resolve(source))
    assert str(source / file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00002-of-00007.safetensors"])
def test_the_answer_of_a_server_is_quoted(source, file):
    for raw in (b'{"error": "Repository not found"}', b"Entry not found"):
        (source / file).write_bytes(raw)
        with pytest.raises(ConversionError, match="not found"):
            open_tensors(resolve(source))
    for raw, message in ((b"\xef\xbb\xbf{}", "byte order mark"), (b"\xff", "UTF-8|too few")):
        (source / file).write_bytes(raw)
        with pytest.raises(ConversionError, match=message):
            open_tensors(resolve(source))


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00002-of-00007.safetensors"])
def test_what_is_no_file_is_not_waited_for(source, file):
    kinds = {
        "a folder": lambda path: path.mkdir(),
        "a pipe": os.mkfifo,
        "git-annex link": lambda path: path.symlink_to(".git/annex/objects/xx/MD5E-s5--0"),
        "does not exist": lambda path: path.symlink_to("../../blobs/0123"),
        "a link that leads to itself": lambda path: path.symlink_to(path),
    }
    for message, make in kinds.items():
        (source / file).unlink()
        make(source / file)
        with pytest.raises(ConversionError, match=message):
            open_tensors(resolve(source))
        (source / file).rmdir() if message == "a folder" else (source / file).unlink()
        (source / file).touch()


def test_a_tokenizer_that_is_a_pointer_is_not_carried_along(source, tmp_path, capsys):
    (source / "tokenizer.json").write_bytes(LFS)
    assert cli.main(["mmx-convert", "import", str(source), str(tmp_path / "out")]) == 1
    assert re.search(r"tokenizer\.json: .*a Git LFS pointer: run `git lfs pull`", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2**70) | st.floats() | st.text(max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=8,
)
plausible = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=150, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), plausible | json_values, max_size=3),
    data=st.binary(max_size=40),
    cut=st.integers(0, 30),
)
def test_any_header_is_read_as_the_package_reads_it_or_refused(tmp_path_factory, header, data, cut):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    header_file(path, header, data)
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - cut])
    try:
        entries, _, _ = safetensors_io.read_header(path)
    except ConversionError:
        return
    if any(entry.dtype.name.startswith("float8") for entry in entries.values()):
        return  # which the package cannot read into NumPy
    expected = safetensors.numpy.load_file(path)
    assert set(entries) == set(expected)
    for name, entry in entries.items():
        assert entry.read().tobytes() == entry.map().tobytes() == expected[name].tobytes()


def test_every_dtype_round_trips_and_files_equal_those_of_the_package(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for name, dtype in safetensors_io.DTYPES.items():
        raw = rng.integers(0, 2, 6 * dtype.itemsize, np.uint8)
        arrays[f"t_{name}"] = raw.view(dtype).reshape(2, 3)
        arrays[f"empty_{name}"] = np.zeros((0, 3), dtype)
    arrays["scalar"] = np.array(1.5, np.float32)
    arrays["ü"] = np.ones(3, np.float32)
    specs = [safetensors_io.TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    path = tmp_path / "all.safetensors"
    ordered = safetensors_io.file_order(specs)
    digest = safetensors_io.write_shard(path, specs, (arrays[spec.name] for spec in ordered))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    entries, metadata, _ = safetensors_io.read_header(path)
    assert metadata == {"format": "pt"}
    for name, array in arrays.items():
        got = entries[name].read()
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())

    known = {name: array for name, array in arrays.items() if "F8" not in name and "C64" not in name}
    theirs = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(known, theirs, {"format": "pt"})
    ordered = safetensors_io.file_order([spec for spec in specs if spec.name in known])
    safetensors_io.write_shard(path, ordered, (known[spec.name] for spec in ordered))
    assert path.read_bytes() == theirs.read_bytes()


def test_shards_are_planned_by_size_and_named_by_naming():
    sizes = enumerate((10, 10, 90, 5))
    specs = [safetensors_io.TensorSpec(f"t{i}", np.dtype(np.float32), (size,)) for i, size in sizes]
    shards = safetensors_io.plan_shards(specs, 80, "original")
    assert [[spec.name for spec in shard] for shard in shards.values()] == [["t0", "t1"], ["t2"], ["t3"]]
    assert list(shards)[0] == "model-00000-of-00003.safetensors"
    assert list(safetensors_io.plan_shards(specs, 80, "transformers"))[-1] == "model-00003-of-00003.safetensors"
    assert list(safetensors_io.plan_shards(specs, 10**9, "original")) == ["model.safetensors"]
