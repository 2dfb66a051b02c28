"""What is fuzzed: for each parser valid contents to damage, and how to read one."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.paths import FIXTURES

TEXT = FIXTURES / "text"
WORDS = "the cat sat on a mat and ran far away from home"


@dataclasses.dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
      form: of the contents, see `mutate`.
      prepare: folder for files -> (valid contents, function that reads one, the errors it may raise).
    """

    form: str
    prepare: Callable[[Path], tuple[list[bytes], Callable[[bytes], object], tuple[type[Exception], ...]]]


def small_file(names=("a", "b"), dtype="F32", shape=(2, 3)) -> bytes:
    """A safetensors file of zeros."""
    nbytes = {"F32": 4, "BF16": 2, "U8": 1}[dtype] * int(np.prod(shape))
    header = {"__metadata__": {"format": "pt"}}
    for i, name in enumerate(names):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [i * nbytes, (i + 1) * nbytes]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(nbytes * len(names))


def _header(folder: Path):
    from mmx_jax.checkpoints.errors import ConversionError
    from mmx_jax.checkpoints.safetensors import read_header

    def read(data):
        (folder / "x.safetensors").write_bytes(data)
        entries, _, _ = read_header(folder / "x.safetensors")
        for entry in entries.values():
            assert entry.read().tobytes() == entry.map().tobytes()

    many = small_file([f"model.layers.{i}.w" for i in range(100)], "U8", (1,))
    return (
        [small_file(), small_file(["s"], "BF16", ()), small_file(["é"], "U8", (0, 3)), many],
        read,
        (ConversionError,),
    )


def _index(folder: Path):
    from absl import logging

    from mmx_jax.checkpoints.errors import ConversionError
    from mmx_jax.checkpoints.safetensors import INDEX_NAME, open_folder

    logging.set_verbosity(logging.ERROR)

    (folder / "one.safetensors").write_bytes(small_file(["a", "b"]))
    (folder / "two.safetensors").write_bytes(small_file(["b", "c"]))

    def read(data):
        (folder / INDEX_NAME).write_bytes(data)
        open_folder(folder)

    one, two = "one.safetensors", "two.safetensors"
    maps = [{"a": one, "b": one, "c": two}, {"a": one, "b": two, "c": two}]
    released = (TEXT / "tiny" / "orig" / INDEX_NAME).read_bytes()
    plain = [json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map}).encode() for weight_map in maps]
    return [*plain, released], read, (ConversionError,)


def _checkpoint(folder: Path):
    """config.json of a Hugging Face folder, up to the comparison with its tensors."""
    from mmx_jax.checkpoints.errors import ConversionError
    from mmx_jax.checkpoints.open import open_tensors, resolve

    for file in (TEXT / "tiny" / "orig").glob("model*"):
        (folder / file.name).symlink_to(file)

    def read(data):
        (folder / "config.json").write_bytes(data)
        open_tensors(resolve(folder))

    valid = [(TEXT / "tiny" / kind / "config.json").read_bytes() for kind in ("orig", "hf")]
    return valid, read, (ConversionError,)


def _config(folder: Path):
    from mmx_jax.config import Config, ConfigError
    from mmx_jax.config.io import config_from_json, config_to_json, format_config

    def read(data):
        format_config(config_from_json(data.decode(errors="replace")))

    return [config_to_json(Config()).encode()], read, (ConfigError,)


OVERRIDES = """
model.num_layers=16
model.layer_pattern=lightning,softmax
model.rope_theta=1e6
model.capacity_factor=none
model.postnorm=false
mesh.fsdp=4
name=x
training.total_tokens=1_000_000
training.stages=[{"tokens": 1e9, "sequence_length": 4096}]
training.stages.0.tokens=1e9
training.learning_rate_phases.0.shape=linear
training.batch_ramp=[]
data.sources=[{"path": "a.jsonl", "weight": 2}]
data.sources.0.path=x
""".split("\n")


def _overrides(folder: Path):
    from mmx_jax.config import Config, ConfigError
    from mmx_jax.config.io import apply_overrides

    def read(data):
        apply_overrides(Config(), data.decode(errors="surrogateescape").split("\n"))

    return [line.encode() for line in (*OVERRIDES, "\n".join(OVERRIDES[:4]))], read, (ConfigError,)


def _tokenizer_reader(folder: Path, name: str):
    from mmx_jax.data.tokenizer import ChatError, Tokenizer, TokenizerError

    tokenizer = Tokenizer.train([WORDS] * 5, 300)
    tokenizer.save(folder)

    def read(data):
        (folder / name).write_bytes(data)
        loaded = Tokenizer.load(folder)
        ids = loaded.encode("the cat\n é", parse_special=False)[:50]
        loaded.decode(ids)
        stream = loaded.stream()
        for token in ids:
            stream.step(token)
        stream.finish()
        assert isinstance(loaded.vocab_size, int) and isinstance(loaded.stop_ids, tuple)

    return read, (TokenizerError, ChatError)


def _tokenizer(folder: Path):
    read, errors = _tokenizer_reader(folder, "tokenizer.json")
    whole = json.loads((folder / "tokenizer.json").read_text())
    short = whole | {"model": whole["model"] | {"merges": []}}
    return [json.dumps(value).encode() for value in (whole, short)], read, errors


def _tokenizer_config(folder: Path):
    read, errors = _tokenizer_reader(folder, "tokenizer_config.json")
    roles = {"eos_token": {"content": "<end_of_document>"}, "pad_token": "<pad>", "bos_token": None}
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "x"}]
    configs = [roles | {"chat_template": "{{ messages[0].content }}"}, roles | {"chat_template": named}]
    return [json.dumps(value).encode() for value in configs], read, errors


def _template(folder: Path):
    from mmx_jax.data.chat_template import TEMPLATES, ChatError, render_chat

    messages = [{"role": role, "content": WORDS} for role in ("system", "user", "assistant")]
    tools = [{"name": "f", "parameters": {"a": [1, 2.5, None]}}]

    def read(data):
        render_chat(messages, data.decode(errors="replace"), tools=tools, eos_token="</s>")

    loops = "{% for m in messages %}{{ m.role ~ ': ' + m['content'] * 2 }}{% endfor %}{{ range(3) | list | tojson }}"
    macro = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}{{ 2 ** 10 }}"
    return [text.encode() for text in (*TEMPLATES.values(), loops, macro)], read, (ChatError,)


def _source_reader(folder: Path, name: str, form: str):
    from mmx_jax.config import SourceConfig
    from mmx_jax.data.sources import DataError, open_source

    def read(data):
        (folder / name).write_bytes(data)
        source = open_source(SourceConfig(path=str(folder / name), format=form), eos_id=0)
        for i in range(min(len(source), 50)):
            document = source[i]
            if isinstance(document, str):
                document.encode()  # half of a surrogate pair would fail in the tokenizer, and name no file

    return read, (DataError,)


def _jsonl(folder: Path):
    read, errors = _source_reader(folder, "x.jsonl", "jsonl")
    rows = [{"text": WORDS}, {"text": "é😀", "id": 1}, {"text": "", "meta": {"a": [1]}}]
    return ["\n".join(map(json.dumps, rows)).encode(), json.dumps(rows[1]).encode() + b"\n"], read, errors


def _jsonl_tokens(folder: Path):
    read, errors = _source_reader(folder, "x.jsonl", "tokens")
    rows = [{"tokens": [1, 2, 3]}, {"tokens": []}, {"tokens": [2**31], "id": "a"}]
    return ["\n".join(map(json.dumps, rows)).encode()], read, errors


def _npy(folder: Path):
    read, errors = _source_reader(folder, "x.npy", "tokens")
    valid = []
    for dtype in ("u2", "i4", "<i8"):
        file = io.BytesIO()
        np.save(file, np.array([1, 2, 0, 3, 0, 4], dtype))
        valid.append(file.getvalue())
    return valid, read, errors


def _manifest(folder: Path):
    from mmx_jax.checkpoints import export_hf, manifest
    from mmx_jax.checkpoints.errors import ConversionError
    from mmx_jax.checkpoints.open import WeightsSource
    from mmx_jax.checkpoints.safetensors import TensorSpec

    source = WeightsSource("weights", folder / "params", None, None)
    specs = [TensorSpec(name, np.dtype(np.float32), (2,)) for name in ("a", "b")]

    def read(data):
        (folder / manifest.MANIFEST).write_bytes(data)
        for file in export_hf._shards(specs, None, "original", manifest.read_manifest(source)):
            assert "/" not in file

    row = {"file": "model.safetensors", "dtype": "float32", "shape": [2], "sha256": "0" * 64}
    valid = [{"format": 1, "tensors": {"a": row, "b": row}, "dropped": []}]
    return [json.dumps(value).encode() for value in valid], read, (ConversionError,)


def _journal(folder: Path):
    from mmx_jax.checkpoints.errors import ConversionError
    from mmx_jax.checkpoints.journal import JOURNAL, Job

    plan = {"format": 1, "command": "import", "source": "/x", "shards": {"a": ["t"]}}

    def read(data):
        (folder / "out.partial").mkdir(exist_ok=True)
        (folder / "out.partial" / JOURNAL).write_bytes(data)
        job = Job(folder / "out", plan, overwrite=False)
        try:
            assert all(isinstance(part["sha256"], str) for part in job.finished.values())
        finally:
            job.close()

    parts = [{"part": "t", "sha256": "0" * 64}, {"part": "model.safetensors", "sha256": "1", "tensors": {"t": "2"}}]
    return [b"".join(json.dumps(line).encode() + b"\n" for line in [plan, *parts])], read, (ConversionError,)


TARGETS = {
    "header": Target("safetensors", _header),
    "index": Target("json", _index),
    "checkpoint": Target("json", _checkpoint),
    "config": Target("json", _config),
    "overrides": Target("bytes", _overrides),
    "tokenizer": Target("json", _tokenizer),
    "tokenizer_config": Target("json", _tokenizer_config),
    "template": Target("bytes", _template),
    "jsonl": Target("jsonl", _jsonl),
    "jsonl_tokens": Target("jsonl", _jsonl_tokens),
    "npy": Target("bytes", _npy),
    "manifest": Target("json", _manifest),
    "journal": Target("jsonl", _journal),
}
