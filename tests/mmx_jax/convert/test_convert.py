"""Import, export and verify: round trips, damage, kills; the oracle is the safetensors package."""

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

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from mmx_jax.checkpoints import export_hf, hf_mapping, journal
from mmx_jax.checkpoints import safetensors as safetensors_io
from mmx_jax.checkpoints.bounded_map import bounded_map
from mmx_jax.checkpoints.difference import difference
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import detect_naming, model_config_from_hf
from mmx_jax.checkpoints.load import resolve
from mmx_jax.checkpoints.model_code import SHIPPED_KEYS
from mmx_jax.cli import convert as cli
from mmx_jax.convert import import_hf
from tests.support.checkpoint_files import (
    BF16,
    HF,
    INDEX,
    LFS,
    ORIGINAL,
    assert_same,
    expected_parameters,
    flat,
    hf_config,
    is_derived,
    read_all,
    shard_bytes,
    verify,
)
from tests.support.paths import REPOSITORY


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
