"""Conversion: configs, safetensors, import, export, verify, loading; the oracle is the safetensors package."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.checkpoints import export_hf, hf_mapping, journal, orbax_slices
from mmx_jax.checkpoints import safetensors as safetensors_io
from mmx_jax.checkpoints.bounded_map import bounded_map
from mmx_jax.checkpoints.difference import difference
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import NAMINGS, detect_naming, model_config_from_hf, model_config_to_hf
from mmx_jax.checkpoints.load import load_params, resolve, save_huggingface
from mmx_jax.checkpoints.model_code import SHIPPED_KEYS
from mmx_jax.checkpoints.open import open_tensors
from mmx_jax.cli import convert as cli
from mmx_jax.config import Config, ConfigError, ModelConfig, shortest_period
from mmx_jax.config.io import config_to_json
from mmx_jax.convert import import_hf
from mmx_jax.convert.verify import verify_checkpoints
from mmx_jax.models.params import abstract_params
from tests.support import fake_devices
from tests.support.paths import FIXTURES, REPOSITORY

TEXT = FIXTURES / "text"
HF, ORIGINAL, BF16 = TEXT / "tiny" / "hf", TEXT / "tiny" / "orig", TEXT / "tiny_bf16" / "orig"


def hf_config(folder=ORIGINAL):
    return json.loads((folder / "config.json").read_text())


def read_all(folder):
    """Every tensor of a folder, by the safetensors package."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(file)
    return out


def is_derived(name):
    return name.endswith(("slope_rate", "query_decay", "key_decay", "diagonal_decay"))


def shard_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """tiny_bf16, imported once; not to be changed."""
    folder = tmp_path_factory.mktemp("imported") / "weights"
    import_hf.import_checkpoint(BF16, folder)
    return folder


@pytest.fixture
def source(tmp_path):
    """A copy of tiny_bf16 to damage."""
    shutil.copytree(BF16, tmp_path / "source")
    return tmp_path / "source"


# Configs


@pytest.mark.parametrize("claim", [10**4, 10**6, 10**9, 2**62, 10**4000])
@pytest.mark.parametrize("key", ["num_local_experts", "num_hidden_layers"])
def test_claims_are_compared_with_the_weights_before_work_grows_with_them(source, key, claim):
    config = hf_config(source) | {key: claim}
    if key == "num_hidden_layers" and claim <= 10**6:
        config["attn_type_list"] = [0] * claim
    (source / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    refused = "far more than the 155 tensors|64 bits|entries|larger than any array|is more than 100,000"
    with pytest.raises((ConversionError, ConfigError), match=refused):
        open_tensors(resolve(source))
    assert time.process_time() - start < 30


def test_claims_of_our_own_config_are_compared_with_the_parameters():
    config = model_config_from_hf(hf_config())
    shapes = hf_mapping.leaf_shapes(config, hf_mapping.expand(config))
    assert hf_mapping.match_parameters(config, shapes) == hf_mapping.expand(config)
    for change in (
        {"num_experts": 10**9},
        {"num_layers": 8 * 10**9},
        {"num_layers": 10**6, "layer_pattern": ("lightning",) * (10**6 - 1) + ("softmax",)},
        {"num_experts": 10**4000},
    ):
        # Some no longer make a config.
        refused = "has shape|far more|64 bits|larger than any array|is more than 100,000"
        with pytest.raises((ConversionError, ConfigError), match=refused) as caught:
            hf_mapping.match_parameters(dataclasses.replace(config, **change), shapes)
        assert len(str(caught.value)) < 10_000
    with pytest.raises(ConversionError, match="more than 1,000,000 tensors"):
        hf_mapping.expand(dataclasses.replace(config, num_experts=10**9))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": float("inf")},
        {"rms_norm_eps": 10**400},
        {"vocab_size": 10**4000},
        {"num_attention_heads": 0, "head_dim": None},
        {"head_dim": 2**62, "rotary_dim": None, "partial_rotary_factor": 1e300},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": {"a": [1]}}},
        {"hidden_act": [["x" * 10**6]]},
        {"layer_types": [["full_attention"]] * 8},
        {f"key_{i}": 0 for i in range(3000)},
        {"k" * 10**6: 0},
        {"num_local_experts": list(range(10**5))},
    ],
    ids=lambda change: next(iter(change))[:20],
)
def test_odd_values_of_a_config_are_one_short_error(change):
    start = time.process_time()
    with pytest.raises((ConversionError, ConfigError)) as caught:
        model_config_from_hf(hf_config(HF) | change)
    assert len(str(caught.value)) < 2000
    assert time.process_time() - start < 30


def test_both_namings_of_one_model_give_one_config():
    config = model_config_from_hf(hf_config(ORIGINAL))
    assert config == model_config_from_hf(hf_config(HF))
    assert config.layer_pattern == ("lightning",) * 7 + ("softmax",)
    assert (config.rotary_dim, config.rope_theta, config.postnorm, config.num_kv_heads) == (16, 1e7, True, 2)
    assert config.lightning_norm_eps == 1e-6


def test_m1_config_loads():
    m1 = hf_config() | {"architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1"}
    assert model_config_from_hf(m1) == model_config_from_hf(hf_config())


positive = st.integers(1, 64)
scale = st.floats(0.1, 10)


@st.composite
def model_configs(draw):
    kinds = draw(st.lists(st.sampled_from(["lightning", "softmax"]), min_size=1, max_size=9))
    head_dim, kv_heads, experts = draw(positive), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    pattern = shortest_period(tuple(kinds))
    return ModelConfig(
        vocab_size=draw(positive),
        hidden_size=draw(positive),
        num_layers=len(kinds),
        layer_pattern=pattern,
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(0, head_dim // 2)),
        rope_theta=draw(st.floats(1, 1e8)),
        max_position_embeddings=draw(positive),
        mlp_dim=draw(positive),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        postnorm=draw(st.booleans()),
        lightning_alpha=draw(scale),
        lightning_beta=draw(scale),
        softmax_alpha=draw(scale),
        softmax_beta=draw(scale),
        mlp_alpha=draw(scale),
        mlp_beta=draw(scale),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        lightning_norm_eps=draw(st.floats(1e-8, 1e-3)),
        eos_token_id=draw(st.none() | positive),
    )


@settings(max_examples=60, deadline=None)
@given(config=model_configs(), naming=st.sampled_from(NAMINGS))
def test_config_round_trip(config, naming):
    hf = json.loads(json.dumps(model_config_to_hf(config, naming)))
    assert detect_naming(hf) == naming
    assert model_config_from_hf(hf) == config


def test_written_config_is_the_released_one():
    written = model_config_to_hf(model_config_from_hf(hf_config()), "original")
    assert written == hf_config() | {"pad_token_id": None}
    written = model_config_to_hf(model_config_from_hf(hf_config(HF)), "transformers")
    assert written["architectures"] == ["MiniMaxForCausalLM"] and written["block_size"] == 256
    assert written["rope_parameters"] == {"partial_rotary_factor": 0.5, "rope_theta": 1e7, "rope_type": "default"}
    assert set(hf_config(HF)) - set(written) == {"transformers_version"}


INERT = {
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "use_cache",
    "output_router_logits",
    "dtype",
}
ABSENT_IS_NONE = {"bos_token_id", "eos_token_id", "pad_token_id"}


@pytest.mark.parametrize("folder", [ORIGINAL, HF], ids=NAMINGS)
def test_no_key_that_matters_has_a_default(folder):
    harmless = INERT | ABSENT_IS_NONE | {"shared_moe_mode"}
    if folder is HF:  # extras there, of which rotary_dim falls back on the partial rotary factor
        harmless |= {"block_size", "postnorm", "rotary_dim", "shared_intermediate_size"}
    for key in hf_config(folder):
        config = hf_config(folder)
        del config[key]
        if key in harmless:
            model_config_from_hf(config)
        else:
            with pytest.raises(ConversionError, match="rope_theta" if key == "rope_parameters" else key):
                model_config_from_hf(config)


def test_unknown_key_is_named_with_the_nearest():
    with pytest.raises(ConversionError, match="'rotary_dims'.*nearest valid key: 'rotary_dim'"):
        model_config_from_hf(hf_config() | {"rotary_dims": 8})
    with pytest.raises(ConversionError, match="'rope_thetas'.*'rope_theta'"):
        model_config_from_hf(hf_config(HF) | {"rope_parameters": {"rope_thetas": 1.0}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"quantization_config": {"quant_method": "fp8"}}, "dequantise"),
        ({"shared_intermediate_size": [9216]}, "shared expert"),
        ({"num_local_experts": [4, 4, 2]}, "num_local_experts"),
        ({"attn_type_list": [0] * 7}, "attn_type_list has 7 entries"),
        ({"attn_type_list": [0] * 7 + [2]}, r"attn_type_list\[7\]=2"),
        ({"layer_types": ["full_attention"] * 8}, "both"),
        ({"num_attention_heads": 4.5}, "num_attention_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"postnorm": 1}, "postnorm"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(hf_config() | change)


def test_traps_of_the_config():
    plain = model_config_from_hf(hf_config())
    assert model_config_from_hf(hf_config() | {"shared_intermediate_size": [0]}) == plain
    assert model_config_from_hf(hf_config() | {"num_local_experts": [4] * 8}) == plain
    with pytest.raises(ConversionError, match="neither"):
        model_config_from_hf({key: value for key, value in hf_config().items() if key != "attn_type_list"})

    hf = hf_config(HF)
    both = hf | {"rope_theta": 1e7, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert model_config_from_hf(both).rope_theta == 1e7
    without = {key: value for key, value in hf.items() if key != "rotary_dim"}
    assert model_config_from_hf(without).rotary_dim == 32
    half = without | {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}}
    assert model_config_from_hf(half).rotary_dim == 8
    assert model_config_from_hf(half | {"rotary_dim": 16}).rotary_dim == 16
    assert model_config_from_hf({k: v for k, v in hf.items() if k != "postnorm"}).postnorm is True
    with pytest.raises(ConversionError, match="rope_type"):
        model_config_from_hf(hf | {"rope_parameters": {"rope_theta": 1e7, "rope_type": "yarn"}})


# safetensors


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


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
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
INDEX = "model.safetensors.index.json"


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


# Rules


def test_rules_map_every_tensor_of_the_released_model_once():
    config = ModelConfig()
    mappings = hf_mapping.expand(config)
    assert len({mapping.hf for mapping in mappings}) == len(mappings) == 8243
    assert sum(int(np.prod(mapping.hf_shape)) for mapping in mappings) == 456_089_655_296
    assert sum(int(np.prod(shape)) for shape in hf_mapping.leaf_shapes(config, mappings).values()) == 456_089_655_296


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3, "layer_pattern": ("softmax", "lightning", "softmax")},
        {"num_layers": 4, "layer_pattern": ("lightning",), "param_dtype": "bfloat16"},
        {"num_layers": 2, "layer_pattern": ("softmax",), "num_experts": 1, "experts_per_token": 1},
    ],
)
def test_rules_fill_exactly_the_parameters_of_the_decoder(changes):
    config = ModelConfig(**changes)
    parameters = orbax_slices.flatten(abstract_params(config))
    mappings = hf_mapping.expand(config)
    hf_mapping.check_parameters(config, mappings, {path: leaf.shape for path, leaf in parameters.items()})
    float32 = {mapping.leaf for mapping in mappings if mapping.float32}
    for path, leaf in parameters.items():
        assert leaf.dtype == (np.float32 if path in float32 else config.param_dtype), path


def test_parameters_and_rules_that_differ_are_listed_on_both_sides():
    config = model_config_from_hf(hf_config())
    mappings = hf_mapping.expand(config)
    shapes = hf_mapping.leaf_shapes(config, mappings)
    hf_mapping.check_parameters(config, mappings, shapes)
    renamed = {path: shape for path, shape in shapes.items() if path != ("lm_head", "kernel")} | {("head", "w"): (1,)}
    with pytest.raises(ConversionError, match=r"no rule fills \['head/w'\].*'lm_head/kernel'"):
        hf_mapping.check_parameters(config, mappings, renamed)
    with pytest.raises(ConversionError, match="final_norm/scale has shape"):
        hf_mapping.check_parameters(config, mappings, shapes | {("final_norm", "scale"): (65,)})
    with pytest.raises(ConversionError, match="filled twice"):
        hf_mapping.check_parameters(config, [*mappings, mappings[0]], shapes)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=4), data=st.data())
def test_strip_copy_equals_assignment(shape, data):
    permutation = data.draw(st.permutations(range(len(shape))))
    values = np.random.default_rng(0).integers(0, 2**16, shape).astype(np.uint16).view(ml_dtypes.bfloat16)
    for source, like in ((values.transpose(permutation), None), (values, permutation)):
        if like is None:
            out = np.empty(source.shape, source.dtype)
        else:
            out = np.empty([shape[axis] for axis in permutation], source.dtype).transpose(np.argsort(permutation))
        hf_mapping.copy_strips(out, source)
        assert np.array_equal(out.view(np.uint16), source.view(np.uint16))


# Import, export, verify


def expected_parameters(tensors, config):
    """The parameter tree of the plan, written out by hand for the tiny fixtures (one block)."""
    h, k, d, m = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    out = {
        "embed/embedding": tensors["model.embed_tokens.weight"],
        "final_norm/scale": tensors["model.norm.weight"],
        "lm_head/kernel": tensors["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"blocks/layer_{layer}/", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        out[ours + "attention_norm/scale"] = tensors[theirs + "input_layernorm.weight"][None]
        out[ours + "mlp_norm/scale"] = tensors[theirs + "post_attention_layernorm.weight"][None]
        if layer < 7:
            qkv = tensors[attention + "qkv_proj.weight"]
            split = np.stack([qkv[head * 3 * d : (head + 1) * 3 * d].reshape(3, d, m) for head in range(h)])
            out[ours + "attention/qkv"] = np.einsum("hcdm->mchd", split)[None]
            out[ours + "attention/gate"] = tensors[attention + "output_gate.weight"].T.reshape(1, m, h, d)
            out[ours + "attention/norm"] = tensors[attention + "norm.weight"].reshape(1, h, d)
            out[ours + "attention/out"] = tensors[attention + "out_proj.weight"].T.reshape(1, h, d, m)
        else:
            out[ours + "attention/query"] = tensors[attention + "q_proj.weight"].T.reshape(1, m, h, d)
            out[ours + "attention/key"] = tensors[attention + "k_proj.weight"].T.reshape(1, m, k, d)
            out[ours + "attention/value"] = tensors[attention + "v_proj.weight"].T.reshape(1, m, k, d)
            out[ours + "attention/out"] = tensors[attention + "o_proj.weight"].T.reshape(1, h, d, m)
        moe = theirs + "block_sparse_moe."
        out[ours + "mlp/router"] = tensors[moe + "gate.weight"].T[None]
        for name, weight in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            experts = [tensors[f"{moe}experts.{e}.{weight}.weight"].T for e in range(config.num_experts)]
            out[ours + f"mlp/{name}"] = np.stack(experts)[None]
    return out


def flat(tree):
    return {"/".join(path): np.asarray(leaf) for path, leaf in orbax_slices.flatten(tree).items()}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def test_orbax_restores_an_import_and_it_is_what_the_layout_says(imported):
    config = resolve(imported).config
    expected = expected_parameters(read_all(BF16), config)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_same(flat(checkpointer.restore(imported.absolute() / "params")), expected)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        assert_same(flat(checkpointer.restore(imported.absolute() / "params")), expected)


@pytest.mark.parametrize("folder", [BF16, ORIGINAL], ids=["bf16", "float32"])
def test_round_trip_is_byte_identical(tmp_path, folder):
    report = import_hf.import_checkpoint(folder, tmp_path / "weights")
    assert "970,688 parameters" in report
    export_hf.export_checkpoint(tmp_path / "weights", tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == shard_bytes(folder)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    source = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == source["weight_map"]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in read_all(folder).values())
    dtype = {"torch_dtype": "bfloat16" if folder == BF16 else "float32"}
    # MiniMax's own code is not in the folder, so that its auto_map names files that are not there.
    assert hf_config(tmp_path / "out") == hf_config(folder) | {"pad_token_id": None} | dtype | SHIPPED_KEYS
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_transformers_save_imports_without_its_derived_buffers(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    assert "28 derived buffers dropped" in import_hf.import_checkpoint(source, tmp_path / "weights")
    export_hf.export_checkpoint(tmp_path / "weights", tmp_path / "out", naming="transformers", shard_size=10**6)
    assert_same(read_all(tmp_path / "out"), {k: v for k, v in read_all(HF).items() if not is_derived(k)})
    files = sorted(shard_bytes(tmp_path / "out"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    assert all(file.stat().st_size < 1.1e6 for file in (tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "generation_config.json").exists()
    assert detect_naming(hf_config(tmp_path / "out")) == "transformers"


def test_export_casts_all_but_the_routers(imported, tmp_path):
    export_hf.export_checkpoint(imported, tmp_path / "out", dtype="float32")
    original = {name: array.astype(np.float32) for name, array in read_all(BF16).items()}
    assert_same(read_all(tmp_path / "out"), original)
    # And back: the weights were bfloat16 before, so nothing is lost.
    export_hf.export_checkpoint(tmp_path / "out", tmp_path / "back", dtype="bfloat16")
    assert_same(read_all(tmp_path / "back"), read_all(BF16))


def test_bfloat16_gates_are_widened(source, tmp_path):
    for file in source.glob("*.safetensors"):
        arrays = safetensors.numpy.load_file(file)
        arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
        safetensors.numpy.save_file(arrays, file)
    assert "8 gates widened" in import_hf.import_checkpoint(source, tmp_path / "weights")
    export_hf.export_checkpoint(tmp_path / "weights", tmp_path / "out")
    gate = "model.layers.3.block_sparse_moe.gate.weight"
    got, expected = read_all(tmp_path / "out")[gate], read_all(source)[gate]
    assert got.dtype == np.float32 and np.array_equal(got, expected.astype(np.float32))


def verify(first, second, **kw):
    lines = []
    return verify_checkpoints(first, second, lines.append, **kw), lines


def test_verify_compares_any_two_kinds(imported, source, capsys):
    equal, lines = verify(BF16, imported)
    assert equal and lines == ["155 of 155 tensors are equal"]
    equal, lines = verify(BF16, imported, show_all=True)
    assert equal and "155 of 155" in lines[-1] and len(lines) == 157
    digest = hashlib.sha256(read_all(BF16)["lm_head.weight"].tobytes()).hexdigest()
    (row,) = [line for line in lines if line.startswith("lm_head.weight")]
    assert row.split()[1:] == ["512x64", "bfloat16", digest[:10], digest[:10], "yes"]

    file = source / "model-00003-of-00007.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    equal, lines = verify(source, imported)
    assert (
        not equal and len(lines) == 3 and re.search(r" NO: 1 of [\d,]+ values differ, by at most \S+ \(rel", lines[1])
    )
    assert lines[-1] == "154 of 155 tensors are equal; 1 differ"
    capsys.readouterr()
    assert cli.main(["mmx-convert", "verify", str(source), str(imported)]) == 1
    assert capsys.readouterr().out.count("\n") == 3
    assert cli.main(["mmx-convert", "verify", str(source), str(imported), "--all"]) == 1
    assert capsys.readouterr().out.count("\n") == 157
    assert cli.main(["mmx-convert", "verify", str(BF16), str(BF16)]) == 0
    equal, lines = verify(ORIGINAL, BF16)
    assert not equal and any("float32 / bfloat16" in line for line in lines)


def test_difference_of_values():
    a = np.array([1.0, -0.0, np.nan, np.inf, 5.0, np.nan], np.float32)
    assert difference(a, a) == "the values are equal, their bytes are not"
    assert difference(a, np.array([1.0, 0.0, np.nan, np.inf, 5.0, np.nan], ml_dtypes.bfloat16)).startswith("the values")
    b = np.array([1.5, 0.0, np.nan, np.inf, 4.0, 1.0], np.float32)
    said = "3 of 6 values differ, by at most 1 (relative 0.333), 1 of them not finite"
    assert difference(a, b) == difference(b, a) == said
    far = np.zeros(3 * 2**20, np.float32)
    near = far.copy()
    near[-1] = -2  # in the last of several pieces
    assert difference(far, near) == "1 of 3,145,728 values differ, by at most 2 (relative 1)"


# What goes wrong


def damage_truncate(folder):
    file = folder / "model-00002-of-00007.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def damage_extend(folder):
    file = folder / "model-00002-of-00007.safetensors"
    file.write_bytes(file.read_bytes() + b"x")


def damage_header(folder):
    file = folder / "model-00002-of-00007.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape"', b'"shpae"', 1))


def damage_missing_shard(folder):
    (folder / "model-00002-of-00007.safetensors").unlink()


def rewrite(folder, file, change, index=True):
    arrays = safetensors.numpy.load_file(folder / file)
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / file, {"format": "pt"})
    if index:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        content["weight_map"] = {name: f for name, f in content["weight_map"].items() if f != file}
        content["weight_map"] |= dict.fromkeys(arrays, file)
        path.write_text(json.dumps(content))


LAST = "model-00006-of-00007.safetensors"


def damage_missing_tensor(folder):
    rewrite(folder, LAST, lambda arrays: arrays.pop("model.norm.weight"))


def damage_surplus_tensor(folder):
    rewrite(folder, LAST, lambda arrays: arrays.update({"model.extra.weight": np.ones(3, np.float32)}))


def damage_unlisted_tensor(folder):
    rewrite(folder, LAST, lambda a: a.update({"model.extra.weight": np.ones(3, np.float32)}), index=False)


def damage_absent_tensor(folder):
    rewrite(folder, LAST, lambda arrays: arrays.pop("model.norm.weight"), index=False)


def damage_shape(folder):
    rewrite(folder, LAST, lambda arrays: arrays.update({"model.norm.weight": arrays["model.norm.weight"][:-1]}))


def damage_dtype(folder):
    name = "model.norm.weight"
    rewrite(folder, LAST, lambda arrays: arrays.update({name: arrays[name].astype(np.float16)}))


def damage_mixed_dtype(folder):
    def change(arrays):
        name = next(name for name in arrays if ".experts." in name)
        arrays[name] = arrays[name].astype(np.float32)

    rewrite(folder, LAST, change)


def test_the_index_says_which_of_two_copies_is_taken(source, tmp_path, capsys):
    name = "model.norm.weight"
    first = sorted(source.glob("*.safetensors"))[0].name
    stale = np.full(64, 7, ml_dtypes.bfloat16)
    rewrite(source, first, lambda arrays: arrays.update({name: stale}), index=False)
    folder = safetensors_io.open_folder(source)
    assert folder.ignored == (f"{name} in {first}",) and folder.entries[name].path.name == LAST
    assert cli.main(["mmx-convert", "import", str(source), str(tmp_path / "out")]) == 0
    assert f"'{name} in {first}' ignored" in capsys.readouterr().out
    assert verify(BF16, tmp_path / "out")[0]
    content = json.loads((source / INDEX).read_text())
    content["weight_map"][name] = first
    (source / INDEX).write_text(json.dumps(content))
    assert safetensors_io.open_folder(source).entries[name].read().tobytes() == stale.tobytes()


@pytest.mark.parametrize("name", ["..", ".", "", "/etc/passwd", "a/b", "x" * 300, "a\0b", "a\nb", 5, None, ["a"]])
def test_shard_names_that_are_no_file_names(source, name):
    content = json.loads((source / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = name
    (source / INDEX).write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="file name|name of a file|missing shard"):
        safetensors_io.open_folder(source)


@pytest.mark.parametrize("layer", ["9" * 5000, "²", "-1", "10" * 8])
def test_derived_buffers_of_odd_layers_are_surplus(layer):
    config = model_config_from_hf(hf_config())
    mappings = hf_mapping.expand(config)
    tensors = {m.hf: safetensors_io.TensorSpec(m.hf, np.dtype(np.float32), m.hf_shape) for m in mappings}
    name = f"model.layers.{layer}.self_attn.slope_rate"
    tensors[name] = safetensors_io.TensorSpec(name, np.dtype(np.float32), (1,))
    with pytest.raises(ConversionError, match=r"surplus \['model\.layers"):
        hf_mapping.check_tensors(config, mappings, tensors, "x")


def test_damaged_journal_and_manifest_are_one_error(imported, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for line in (b"5", b'{"part": 1}', b"[" * 10**5, b'{"part": "a"}', b'{"part": "a", "sha256": "", "tensors": []}'):
        (partial / "journal.jsonl").write_bytes(b"{}\n" + line + b"\n")
        with pytest.raises(ConversionError, match=r"journal\.jsonl: damaged.*start over"):
            journal.Job(tmp_path / "out", {}, overwrite=False)
    weights = tmp_path / "weights"
    shutil.copytree(imported, weights)
    good = json.loads((weights / "manifest.json").read_text())
    row = good["tensors"]["lm_head.weight"]
    for tensors in ([], {"a": 1}, good["tensors"] | {"lm_head.weight": row | {"file": "../../outside.safetensors"}}):
        (weights / "manifest.json").write_text(json.dumps(good | {"tensors": tensors}))
        with pytest.raises(ConversionError, match=r"manifest\.json: damaged"):
            export_hf.export_checkpoint(weights, tmp_path / "exported")
    (weights / "manifest.json").write_bytes(LFS)
    with pytest.raises(ConversionError, match="Git LFS pointer"):
        export_hf.export_checkpoint(weights, tmp_path / "exported")
    assert not (tmp_path / "exported").exists() and not (tmp_path / "outside.safetensors").exists()


def damage_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def damage_escape(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"model-00000', '"../model-00000'))


def damage_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "model-00002-of-00007.safetensors: truncated"),
        (damage_extend, "1 bytes too long"),
        (damage_header, "wrong header: tensor '.*' must have exactly"),
        (damage_missing_shard, "model-00002-of-00007.safetensors: missing shard"),
        (damage_missing_tensor, r"missing \['model.norm.weight'\]; surplus \[\]"),
        (damage_surplus_tensor, r"missing \[\]; surplus \['model.extra.weight'\]"),
        (damage_unlisted_tensor, "holds 'model.extra.weight'"),
        (damage_absent_tensor, "lacks 'model.norm.weight'"),
        (damage_shape, r"'model.norm.weight' has shape \[63\]"),
        (damage_dtype, "'model.norm.weight' has dtype float16"),
        (damage_mixed_dtype, "has dtype (float32|bfloat16), expected (float32|bfloat16); as the other"),
        (damage_index, "index.json: not JSON"),
        (damage_escape, "leaves the folder"),
        (damage_config, "config.json"),
    ],
)
def test_damage_is_one_line_and_nothing_is_left(source, tmp_path, capsys, damage, message):
    damage(source)
    assert cli.main(["mmx-convert", "import", str(source), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.err.count("\n") == 1 and not captured.out
    assert os.listdir(tmp_path) == ["source"]


def test_existing_destination_is_kept_without_overwrite(imported, tmp_path, capsys):
    destination = tmp_path / "out"
    destination.mkdir()
    (destination / "mine").write_text("x")
    assert cli.main(["mmx-convert", "export", str(imported), str(destination)]) == 1
    assert "--overwrite" in capsys.readouterr().err and (destination / "mine").exists()
    assert cli.main(["mmx-convert", "export", str(imported), str(destination), "--overwrite"]) == 0
    assert shard_bytes(destination) == shard_bytes(BF16) and not (destination / "mine").exists()
    assert os.listdir(tmp_path) == ["out"]


def full_after(monkeypatch, limit):
    """The disk is full after `limit` bytes."""
    written = [0]
    write = safetensors_io._CompleteWriter.write

    def limited(self, data):
        written[0] += memoryview(data).nbytes
        if written[0] > limit:
            write(self, memoryview(data).cast("B")[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        write(self, data)

    monkeypatch.setattr(safetensors_io._CompleteWriter, "write", limited)


@pytest.mark.parametrize("command", ["import", "export"])
def test_full_disk_is_one_line_and_can_be_continued(imported, tmp_path, capsys, monkeypatch, command):
    argv = [command, str(BF16 if command == "import" else imported), str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        full_after(patch, 1_000_000)
        assert cli.main(["mmx-convert", *argv]) == 1
    assert re.fullmatch(r"error: .*disk full.*\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["out.partial"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert cli.main(["mmx-convert", *argv]) == 0
    assert re.search(r"\([1-9]\d* were finished before\)", capsys.readouterr().out)
    assert os.listdir(tmp_path) == ["out"]
    assert verify(BF16, tmp_path / "out")[0]


def test_an_error_of_the_consumer_ends_the_threads_of_the_pipeline():
    """At once, not when the collector finds the iterator: that may happen on one of these threads."""
    names = {thread.name for thread in threading.enumerate()}
    with pytest.raises(OSError, match="full") as caught, bounded_map(str, range(9), lambda _: 1, 5) as results:
        for item, result in results:
            assert result == str(item) and {thread.name for thread in threading.enumerate()} > names
            raise OSError("full")
    assert caught.traceback and {thread.name for thread in threading.enumerate()} == names


def test_too_little_space_is_seen_before_the_work(imported, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ConversionError, match="disk full: 0.00 GB are needed"):
        export_hf.export_checkpoint(imported, tmp_path / "out")


KILLED = """
import os, signal, sys
from mmx_jax.checkpoints import journal, safetensors as safetensors_io
from mmx_jax.cli import convert as cli
where, argv = sys.argv[1], sys.argv[2:]
def kill(): os.kill(os.getpid(), signal.SIGKILL)
if where == "record":  # between two parts
    record = journal.Job.record
    def patched(self, part, **facts):
        record(self, part, **facts)
        if len(self.finished) == 3: kill()
    journal.Job.record = patched
elif where == "journal":  # in the middle of a line
    append = journal.Job._append
    def patched(self, line):
        if len(self.finished) == 3:
            self._file.write(b'{"part": "x'); self._file.flush(); kill()
        append(self, line)
    journal.Job._append = patched
else:  # in the middle of a file
    write, seen = safetensors_io._CompleteWriter.write, [0]
    def patched(self, data):
        seen[0] += 1
        if seen[0] == 60:
            write(self, memoryview(data).cast("B")[:9]); kill()
        write(self, data)
    safetensors_io._CompleteWriter.write = patched
cli.main(["mmx-convert", *argv])
"""


@pytest.mark.parametrize(("command", "where"), [("import", "write"), ("import", "journal"), ("export", "record")])
def test_killed_conversion_continues(imported, tmp_path, capsys, command, where):
    argv = [command, str(BF16 if command == "import" else imported), str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, where, *argv], cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert process.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["out.lock", "out.partial"]  # nobody holds that lock any more
    with pytest.raises(ConversionError, match="out.partial beside it"):
        (tmp_path / "out").mkdir()
        resolve(tmp_path / "out")
    (tmp_path / "out").rmdir()
    assert cli.main(["mmx-convert", *argv]) == 0
    assert re.search(r"\([1-9]\d* were finished before\)", capsys.readouterr().out)
    assert os.listdir(tmp_path) == ["out"] and not list(tmp_path.rglob("*.tmp"))
    assert verify(BF16, tmp_path / "out")[0]
    if command == "export":
        assert shard_bytes(tmp_path / "out") == shard_bytes(BF16)


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


def killed_at(monkeypatch, number):
    """Ends the commit of a conversion at its call of that number to the file system."""
    calls = []

    def counted(call):
        def wrapper(*arguments, **options):
            if len(calls) == number:
                raise Killed
            calls.append(call)
            return call(*arguments, **options)

        return wrapper

    monkeypatch.setattr(journal, "fsync_folder", counted(journal.fsync_folder))
    monkeypatch.setattr(journal.os, "rename", counted(journal.os.rename))
    monkeypatch.setattr(journal.filesystem, "remove", counted(journal.filesystem.remove))
    monkeypatch.setattr(journal, "_exchange", counted(journal._exchange))


@pytest.mark.parametrize("exchange", [True, False])
def test_a_commit_killed_at_any_point_keeps_a_checkpoint_and_the_same_command_leaves_one(
    tmp_path, monkeypatch, exchange
):
    destination = tmp_path / "out"
    new = {"format": 1, "command": "new"}

    def convert(text):
        if not exchange:
            monkeypatch.setattr(journal, "_exchange", lambda first, second: False)
        work = journal.Job(destination, new, overwrite=True)
        try:
            work.begin()
            (work.folder / "weights").write_text(text)
            work.commit()
        finally:
            work.close()

    def holds():
        return [(path / "weights").read_text() for path in tmp_path.glob("out*") if (path / "weights").exists()]

    number, done = 0, False
    while not done:
        convert("old")
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            try:
                convert("new")
                done = True
            except Killed:
                pass
        assert set(holds()) & {"old", "new"} and not (destination / "weights").is_symlink()
        assert "old" in holds() or (destination / "weights").read_text() == "new"
        convert("newest")
        assert holds() == ["newest"] and [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in destination.iterdir()] == ["weights"]
        number += 1
    assert number > 3


def test_two_conversions_into_one_folder_are_kept_apart(tmp_path):
    first = journal.Job(tmp_path / "out", {}, overwrite=False)
    with pytest.raises(ConversionError, match="out: another process is converting into it: process .* on "):
        journal.Job(tmp_path / "out", {}, overwrite=False)
    first.close()
    journal.Job(tmp_path / "out", {}, overwrite=False).close()


def test_a_folder_that_happens_to_be_called_replaced_is_nobodys_to_remove(tmp_path):
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced/mine").write_text("precious")
    for text in ("first", "second"):
        work = journal.Job(tmp_path / "out", {"text": text}, overwrite=True)
        work.begin()
        (work.folder / "weights").write_text(text)
        work.commit()
        work.close()
        assert (tmp_path / "out/weights").read_text() == text
    assert (tmp_path / "out.replaced/mine").read_text() == "precious"


def interrupt(argv, monkeypatch, after=20):
    with monkeypatch.context() as patch:
        full_after(patch, after * 10_000)
        assert cli.main(["mmx-convert", *argv]) == 1


def test_finished_part_that_was_damaged_is_made_again(tmp_path, monkeypatch):
    argv = ["import", str(BF16), str(tmp_path / "out")]
    interrupt(argv, monkeypatch, after=100)
    chunk = tmp_path / "out.partial" / "params" / "embed.embedding" / "0.0"
    raw = bytearray(chunk.read_bytes())
    raw[100] ^= 1
    chunk.write_bytes(raw)
    assert cli.main(["mmx-convert", *argv]) == 0
    assert verify(BF16, tmp_path / "out")[0]


def test_changed_source_is_not_mixed_in(source, tmp_path, capsys, monkeypatch):
    argv = ["import", str(source), str(tmp_path / "out")]
    interrupt(argv, monkeypatch)
    os.utime(source / "model-00004-of-00007.safetensors", ns=(1, 1))
    capsys.readouterr()
    assert cli.main(["mmx-convert", *argv]) == 1
    assert "model-00004-of-00007.safetensors changed since" in capsys.readouterr().err
    assert cli.main(["mmx-convert", *argv, "--overwrite"]) == 0
    assert verify(source, tmp_path / "out")[0]


def test_damaged_weights_are_not_exported(tmp_path, capsys):
    import_hf.import_checkpoint(BF16, tmp_path / "weights")
    (chunk,) = (tmp_path / "weights" / "params" / "lm_head.kernel").glob("0.0")
    raw = bytearray(chunk.read_bytes())
    raw[5] ^= 1
    chunk.write_bytes(raw)
    assert cli.main(["mmx-convert", "export", str(tmp_path / "weights"), str(tmp_path / "out")]) == 1
    assert "'lm_head.weight' is damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()
    chunk.unlink()
    assert cli.main(["mmx-convert", "export", str(tmp_path / "weights"), str(tmp_path / "out2")]) == 1
    error = capsys.readouterr().err
    assert "cannot read lm_head/kernel" in error and "missing" in error


# Loading


@pytest.mark.parametrize("kind", ["huggingface", "weights"])
def test_load_params(imported, kind):
    path = BF16 if kind == "huggingface" else imported
    assert resolve(path).kind == kind
    expected = expected_parameters(read_all(BF16), resolve(path).config)
    config, params = load_params(path)
    assert config.param_dtype == "bfloat16"
    assert_same(flat(params), expected)
    config, params = load_params(path, param_dtype="float32")
    assert config.param_dtype == "float32"
    assert_same(flat(params), {name: array.astype(np.float32) for name, array in expected.items()})
    with pytest.raises(ConversionError, match="param_dtype='int8'"):
        load_params(path, param_dtype="int8")


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mmx_jax.config import MeshConfig
from mmx_jax.checkpoints import hf_mapping, load
from mmx_jax.checkpoints.orbax_slices import flatten, unflatten
from mmx_jax.sharding import make_mesh

hf, ours = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
_, whole = load.load_params(hf)
names = {"embedding": P("tensor", "fsdp"), "qkv": P(None, "fsdp", None, "tensor"), "down": P(None, "fsdp", "tensor")}
places = {path: NamedSharding(mesh, names.get(path[-1], P())) for path in flatten(whole)}
mesh4 = make_mesh(MeshConfig(fsdp=4, tensor=2), devices=jax.devices())
for path in (hf, ours):
    _, params = load.load_params(path, mesh=mesh4)
    for leaf, expected in flatten(whole).items():
        got = flatten(params)[leaf]
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), leaf
    assert not flatten(params)["blocks", "layer_0", "mlp", "down"].sharding.is_fully_replicated
    _, params = load.load_params(path, shardings=unflatten(places))
    for leaf, expected in flatten(whole).items():
        got = flatten(params)[leaf]
        assert got.sharding.is_equivalent_to(places[leaf], got.ndim), leaf
        assert np.asarray(got).tobytes() == np.asarray(expected).tobytes(), leaf

# One process of several: only the slices of its own shards are touched.
tensors = load.HuggingFaceTensors(load.resolve(hf))
leaf = ("blocks", "layer_0", "mlp", "down")
slices = {m.index: m for m in tensors.mappings if m.leaf == leaf}
shape = hf_mapping.leaf_shapes(tensors.config, tensors.mappings)[leaf]
opened = []
class Entries(dict):
    def __getitem__(self, name):
        opened.append(name)
        return tensors.folder.entries[name]
read = load._ShardReader(tensors, slices, shape, np.asarray(flatten(whole)[leaf]).dtype)
read._entries = Entries()
region = (slice(None), slice(1, 2), slice(0, 48), slice(None))
assert read(region).tobytes() == np.asarray(flatten(whole)[leaf])[region].tobytes()
assert opened == ["model.layers.0.block_sparse_moe.experts.1.w2.weight"], opened
print("sharded equals whole")
"""


def test_import_onto_a_mesh_reads_only_its_shards(imported):
    process = subprocess.run(
        [sys.executable, "-c", SHARDED, str(BF16), str(imported)],
        cwd=REPOSITORY,
        env=fake_devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert process.stdout == "sharded equals whole\n", process.stderr[-2000:]


def test_arrays_in_memory_are_exported(imported, tmp_path):
    config, params = load_params(imported)
    save_huggingface(params, config, tmp_path / "out", "transformers", shard_size=10**6)
    assert_same(read_all(tmp_path / "out"), read_all(BF16))
    assert hf_config(tmp_path / "out")["dtype"] == "bfloat16"
    with pytest.raises(ConversionError, match="exists already"):
        save_huggingface(params, config, tmp_path / "out")
    del params["lm_head"]
    with pytest.raises(ConversionError, match="lm_head/kernel"):
        save_huggingface(params, config, tmp_path / "out2")


def test_training_run_is_exported_from_its_newest_step(tmp_path, capsys):
    config, params = load_params(ORIGINAL)
    run = tmp_path / "run"
    for step, values in ((5, jax.tree.map(lambda leaf: leaf * 0, params)), (10, params)):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(run.absolute() / "checkpoints" / str(step) / "params", values)
    whole = import_hf.whole_config("run", config)
    assert isinstance(whole, Config)
    (run / "config.json").write_text(config_to_json(whole))
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    assert resolve(run).kind == "run"
    assert cli.main(["mmx-convert", "export", str(run), str(tmp_path / "out"), "--dtype=keep"]) == 0
    assert_same(read_all(tmp_path / "out"), read_all(ORIGINAL))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert verify(run, tmp_path / "out")[0]
    assert not verify(run / "checkpoints" / "5", tmp_path / "out")[0]
    with pytest.raises(ConversionError, match="already a checkpoint of ours"):
        import_hf.import_checkpoint(run, tmp_path / "again")


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A checkpoint of 1 GB in tensors of 16 MB, measured as benchmarks/convert_memory.py does for 8 GB."""
    script = REPOSITORY / "benchmarks" / "convert_memory.py"
    process = subprocess.run(
        [sys.executable, script, "--gigabytes=0.6", f"--folder={tmp_path}", "--largest_megabytes=16"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout.splitlines()[-1])
    for command in ("import", "export", "verify"):
        assert result[command]["peak_megabytes"] < result["bound_megabytes"] == 3 * result["largest_megabytes"] + 500
