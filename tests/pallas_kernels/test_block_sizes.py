"""The tuning table and the program that extends it: what is looked up, what is refused, and that the fastest wins."""

import json
import logging
import os
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import autotune, block_sizes, grouped_matmul, platform
from pallas_kernels.lightning_attention import lightning_attention

KERNEL = block_sizes.Kernel("op", "kernel", "rows")
SHAPE = dict(rows=8, dtype="float32")
CHUNKS = block_sizes.Kernel("lightning_attention", "chunked_xla", "chunks")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of an empty table, which is the one that is read."""
    path = tmp_path / "table.json"
    block_sizes.save(path, [])
    monkeypatch.setenv(block_sizes.VARIABLE, str(path))
    return path


def choose(shape=SHAPE, candidates=(1, 2)):
    return block_sizes.choose(
        *KERNEL, shape, candidates=lambda: [dict(tile=n) for n in candidates], heuristic=lambda: dict(tile=1)
    )["tile"]


def test_exactly_the_measured_shape_is_looked_up(table):
    assert choose() == 1
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=2), 0.5)
    assert choose() == 2
    assert choose(dict(reversed(SHAPE.items()))) == 2
    assert choose(SHAPE | dict(rows=9)) == 1


def test_the_entry_of_another_device_is_not_taken(table, monkeypatch):
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=2), 0.5)
    with platform.target("tpu"):
        assert choose() == 1  # compiled ahead of time: there is no device
    monkeypatch.setattr(block_sizes, "device", lambda: "TPU v9")
    assert choose() == 1


def test_an_entry_that_is_no_candidate_is_left_out_and_logged(table, caplog):
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=2), 0.5)
    with caplog.at_level(logging.WARNING):
        assert choose(candidates=(1, 3)) == 1
    assert "{'tile': 2}" in caplog.text and "no such candidate" in caplog.text


def test_the_heuristic_may_be_entered_though_it_is_no_candidate(table, caplog):
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=1), 0.5)
    assert choose(candidates=(2, 3)) == 1 and not caplog.text


def test_forced_parameters_come_first(table):
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=2), 0.5)
    with block_sizes.forced({KERNEL: dict(tile=3)}):
        assert choose(candidates=(1, 2, 3)) == 3
        assert choose() == 1  # which has no 3
    assert choose() == 2


def test_storing_replaces_the_entry_and_keeps_the_others(table):
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=2), 0.5)
    block_sizes.store(table, KERNEL, SHAPE | dict(rows=9), dict(tile=1), 0.7)
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=1), 0.4)
    entries = {entry["shape"]["rows"]: entry for entry in block_sizes.load(table)}
    assert len(block_sizes.load(table)) == 2
    assert entries[8]["parameters"] == dict(tile=1) and entries[8]["ms"] == 0.4
    assert entries[8]["device"] == jax.devices()[0].device_kind and entries[8]["jax"] == jax.__version__


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_table_as_it_was(table, monkeypatch, step):
    block_sizes.store(table, KERNEL, SHAPE, dict(tile=2), 0.5)
    before = table.read_text()

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="no space left"):
            block_sizes.store(table, KERNEL, SHAPE, dict(tile=1), 0.4)
    assert table.read_text() == before
    assert os.listdir(table.parent) == [table.name]


ENTRY = dict(op="a", implementation="b", kernel="c", device="d", shape={}, parameters={}, ms=1.0, jax="e")
BROKEN = {
    "no JSON": ("{", "is not JSON"),
    "no table": ("[]", 'is not {"entries"'),
    "no list": ('{"entries": 3}', 'is not {"entries"'),
    "a field too few": (json.dumps(dict(entries=[ENTRY, {"op": "a"}])), "entry 1 of the tuning table.*the fields op"),
    "a wrong type": (json.dumps(dict(entries=[ENTRY | dict(ms="fast")])), "entry 0.*ms is 'fast'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_named_and_not_overwritten(table, name):
    text, message = BROKEN[name]
    table.write_text(text)
    block_sizes._index.cache_clear()
    with pytest.raises(block_sizes.TableError, match=message) as raised:
        choose()
    assert str(table) in str(raised.value)
    with pytest.raises(SystemExit, match=message):
        autotune.main(["--op=grouped_matmul", "--shape=rows=8,depth=8,columns=8,groups=2"])
    assert table.read_text() == text


def test_a_table_that_is_not_there_is_named(table):
    table.unlink()
    block_sizes._index.cache_clear()
    with pytest.raises(block_sizes.TableError, match=f"cannot read the tuning table {table}"):
        choose()


def test_the_table_of_the_package_is_one_and_names_what_exists(monkeypatch):
    monkeypatch.delenv(block_sizes.VARIABLE, raising=False)
    for entry in block_sizes.load(block_sizes.table_path()):
        assert entry["implementation"] in autotune.OPS[entry["op"]].implementations


def chunks_of(length, chunk_size=None):
    x = jnp.zeros((1, length, 2 * 8))
    text = str(
        jax.make_jaxpr(
            lambda x: lightning_attention(x, x, x, jnp.ones(2), chunk_size=chunk_size, implementation="chunked_xla")
        )(x)
    )
    return next(n for n in range(1, length + 1) if f"length={n}\n" in text)


def test_lightning_attention_takes_the_chunk_of_the_table(table):
    assert chunks_of(96) == 1  # the heuristic's 256 and more
    block_sizes.store(table, CHUNKS, dict(batch=1, length=96, heads=2, dim=8, dtype="float32"), dict(chunk=32), 0.5)
    assert chunks_of(96) == 3
    assert chunks_of(96, 48) == 2  # what the caller says comes first


GROUPED = dict(rows=256, depth=256, columns=384, groups=2, dtype="float32")
LIGHTNING = dict(batch=1, length=150, heads=4, dim=64, dtype="float32")
INTERPRETED = {
    "megablox": ("grouped_matmul", GROUPED, {"rows", "rows transposed", "columns"}),
    "mosaic_tpu": ("lightning_attention", LIGHTNING, {"forward", "backward"}),
}


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_kernels_for_tpu_say_what_can_be_chosen(implementation):
    op, shape, names = INTERPRETED[implementation]
    plan = autotune._plan(op, implementation, shape, forward_alone=False)
    assert {choice.kernel.name for choice, _ in plan} == names
    for choice, _ in plan:
        assert choice.kernel[:2] == (op, implementation)
        assert choice.heuristic in choice.candidates and len(choice.candidates) > 3
        assert set(choice.shape) == set(shape)
    assert {choice.kernel.name for choice, _ in autotune._plan(op, implementation, shape, forward_alone=True)} < names


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_the_least_likely_candidates_are_right_too(implementation):
    op, shape, _ = INTERPRETED[implementation]
    own = autotune.job(op, implementation, shape, rounds=1)
    plan = autotune._plan(op, implementation, shape, forward_alone=False)
    last = {choice.kernel: [c for c in choice.candidates if c != choice.heuristic][-1] for choice, _ in plan}
    kernel, parameters = next(iter(last.items()))
    measured = autotune.measure(own, kernel, parameters, last, backward=True)
    assert measured.error < 1e-5 and measured.ms > 0, measured


def test_forced_tiles_reach_the_kernel():
    tile = dict(rows=128, depth=128, columns=128)
    lhs, rhs, sizes = jnp.zeros((256, 256)), jnp.zeros((2, 256, 384)), jnp.zeros(2, jnp.int32)

    def blocks():
        text = str(
            jax.make_jaxpr(lambda *x: grouped_matmul.grouped_matmul(*x, implementation="megablox"))(lhs, rhs, sizes)
        )
        return "f32[128,128]" in text

    assert not blocks()
    with block_sizes.forced({block_sizes.Kernel("grouped_matmul", "megablox", "rows"): tile}):
        assert blocks()


def run(capsys, *arguments):
    autotune.main([*arguments, "--rounds=3"])
    return capsys.readouterr()


def test_end_to_end(table, capsys):
    arguments = "--op=lightning_attention", "--shape=length=64,heads=2,dim=8,dtype=float32"
    said = run(capsys, *arguments, "--dry_run")
    assert "chunk=64" in said.out and "and 2 candidates" in said.out
    assert block_sizes.load(table) == []
    said = run(capsys, *arguments)
    assert "2 of 2" in said.err and "0 s left" in said.err
    (entry,) = block_sizes.load(table)
    assert entry["implementation"] == "chunked_xla" and entry["ms"] > 0
    rows = [line.split() for line in said.out.splitlines() if line.startswith("  chunk=")]
    assert {row[0] for row in rows} == {"chunk=32", "chunk=64"}
    times = [float(row[1]) for row in rows]
    assert times == sorted(times) and f"chunk={entry['parameters']['chunk']}" == rows[0][0]
    assert chunks_of(64) == 64 // entry["parameters"]["chunk"]


def test_the_fastest_right_candidate_wins(table, capsys, monkeypatch):
    """0: slow, 1: fast and wrong, 2: right, 3: does not compile, 4: NaN."""

    clock = [0.0]  # seconds, as the candidates take them: a real clock would judge the machine
    monkeypatch.setattr(
        autotune, "time", types.SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic)
    )

    def host(x, mode):
        clock[0] += 0.02 if mode == 0 else 0.01
        return np.asarray(x) * (1.1 if mode == 1 else np.nan if mode == 4 else 1)

    def apply(arrays, others, implementation):
        (x,) = arrays
        if implementation == "reference":
            return x
        mode = block_sizes.choose(
            "fake",
            "tiled_xla",
            "modes",
            dict(n=4, dtype="float32"),
            candidates=lambda: [dict(mode=n) for n in range(5)],
            heuristic=lambda: dict(mode=0),
        )["mode"]
        if mode == 3:
            raise RuntimeError("out of VMEM\nin a long message")
        return x + jax.lax.stop_gradient(jax.pure_callback(lambda x: host(x, mode), x, jax.lax.stop_gradient(x)) - x)

    fake = autotune._Op(
        defaults=dict(n=None, dtype="float32"),
        implementations=dict(reference=None, tiled_xla=None),
        inputs=lambda shape: ((jnp.ones(shape["n"]),), ()),
        apply=apply,
        default=lambda arrays, others: "tiled_xla",
        shorten=lambda shape: shape,
    )
    monkeypatch.setitem(autotune.OPS, "fake", fake)
    said = run(capsys, "--op=fake", "--shape=n=4")
    (entry,) = block_sizes.load(table)
    assert entry["parameters"] == dict(mode=2)
    lines = {line.split()[0]: line for line in said.out.splitlines() if line.startswith("  mode=")}
    assert "heuristic" in lines["mode=0"] and "wrong: error" in lines["mode=1"] and "wrong" in lines["mode=4"]
    assert lines["mode=3"].endswith("RuntimeError: out of VMEM")


SHAPES = "--shape=rows=256,depth=128,columns=128,groups=2"
REFUSED = {
    "an unknown operation": (("--op=convolution", SHAPES), "--op is one of lightning_attention, grouped_matmul; got"),
    "an unknown field": (("--op=grouped_matmul", "--shape=width=3"), "has the fields rows, depth.*got 'width=3'"),
    "a missing field": (("--op=grouped_matmul", "--shape=rows=3,depth=2"), "lacks columns, groups"),
    "no number": (("--op=grouped_matmul", "--shape=rows=many"), "rows is a positive number; got 'many'"),
    "an unknown dtype": (("--op=grouped_matmul", "--shape=dtype=int8"), "one of bfloat16, float32; got 'int8'"),
    "an unknown implementation": (
        ("--op=grouped_matmul", SHAPES, "--implementation=cutlass"),
        "auto or one of reference.*got 'cutlass'",
    ),
    "an interpreted kernel": (
        ("--op=grouped_matmul", SHAPES, "--implementation=megablox"),
        "megablox is interpreted on the CPU",
    ),
    "a device without a kernel to tune": (("--op=grouped_matmul", SHAPES), "tiled_xla of grouped_matmul has nothing"),
    "a folder": (("--op=grouped_matmul", SHAPES, "--table=/"), "cannot read the tuning table /: Is a directory"),
    "no such folder": (("--op=grouped_matmul", SHAPES, "--table=/no/such/t.json"), "cannot write /no/such/t.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_refused_in_one_sentence(table, case):
    arguments, message = REFUSED[case]
    before = table.stat().st_mtime_ns, os.listdir(table.parent)
    with pytest.raises(SystemExit, match=message) as raised:
        autotune.main(arguments)
    assert "\n" not in str(raised.value)
    assert (table.stat().st_mtime_ns, os.listdir(table.parent)) == before  # not even written anew


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_measured(table, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "t.json")

    monkeypatch.setattr(block_sizes.tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(autotune, "measure", None)
    with pytest.raises(SystemExit, match="cannot write .*Permission denied.*--table"):
        autotune.main(["--op=lightning_attention", "--shape=length=96,heads=2,dim=8"])


@pytest.mark.parametrize(("wrong", "failure"), [(False, ""), (True, "wrong: error")])
def test_what_the_short_shape_has_no_room_for_is_held_against_the_heuristic(table, monkeypatch, wrong, failure):
    """Tiles of 8 on a short shape of 4."""

    def apply(arrays, others, implementation):
        (x,) = arrays
        if implementation == "reference":
            return x
        tile = block_sizes.choose(
            *KERNEL,
            dict(n=x.size),
            candidates=lambda: [dict(tile=n) for n in (2, 4, 8) if n <= x.size],
            heuristic=lambda: dict(tile=2),
        )["tile"]
        return x * (1.1 if wrong and tile == 8 else 1)

    fake = autotune._Op(
        defaults={},
        implementations={},
        inputs=lambda shape: ((jnp.ones(shape["n"]),), ()),
        apply=apply,
        default=None,
        shorten=lambda shape: shape | dict(n=4),
    )
    monkeypatch.setitem(autotune.OPS, "op", fake)
    own = autotune.job("op", "kernel", dict(n=16, dtype="float32"), rounds=1)
    measured = autotune.measure(own, KERNEL, dict(tile=8), {}, backward=False)
    assert measured.failure.startswith(failure) and bool(measured.failure) == wrong
    assert (measured.ms is None) == wrong


def test_errors_of_kernels_count_every_result():
    want = [np.ones(3), np.zeros(2)]
    assert autotune._error(want, want) == 0
    assert autotune._error([np.ones(3), np.array([0.0, 0.1])], want) == pytest.approx(0.1)
    assert autotune._error([np.array([1.0, np.nan, 1.0]), np.zeros(2)], want) == float("inf")
