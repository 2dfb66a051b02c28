"""The grouped product on TPU, by megablox: what the suite of all backends leaves out, and compiled for real chips.

No TPU is needed: libtpu compiles for a named topology on any host. That shows that the kernels compile, fit, and that
nothing of the size of the matrices is made around them; numerics are shown by interpretation.
"""

import itertools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from pallas_kernels import platform
from pallas_kernels.grouped_matmul import default_implementation, grouped_matmul, grouped_swiglu, megablox
from tests.support import ahead_of_time, oracles

CASES = {
    "aligned": (256, [128, 0, 128]),
    "unaligned": (300, [130, 0, 107]),  # and rows behind the last group
    "decode": (3, [0, 1, 2]),
}


def rows_tile(*shape):
    return megablox._rows_tiles(*shape, 2, megablox._VMEM_BYTES)[0]


def columns_tile(*shape):
    return megablox._columns_tiles(*shape, 2, megablox._VMEM_BYTES)[0]


def with_gradients(operation):
    def both(inputs, sizes, d_output):
        output, vjp = jax.vjp(lambda *inputs: operation(*inputs, sizes), *inputs)
        return output, *vjp(d_output)

    return both


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_in_many_tiles_with_gradients(monkeypatch, case):
    """Rows of no group are NaN: they may not reach any result."""
    monkeypatch.setattr(megablox, "_VMEM_BYTES", 600_000)  # several tiles along every axis
    num_rows, sizes = CASES[case]
    if num_rows >= 128:
        assert rows_tile(num_rows, 384, 512, 3).depth < 384
        assert columns_tile(num_rows, 384, 512, 3).depth < 384
    rng = np.random.default_rng(0)
    lhs, rhs, d_output = (
        rng.normal(size=s).astype(np.float32) for s in ((num_rows, 384), (3, 384, 512), (num_rows, 512))
    )
    lhs[sum(sizes) :], d_output[sum(sizes) :] = np.nan, np.nan
    lhs, rhs, d_output = (jnp.asarray(x, jnp.bfloat16) for x in (lhs, rhs, d_output))
    multiply = lambda *inputs: grouped_matmul(*inputs, implementation="megablox")  # noqa: E731
    got = jax.jit(with_gradients(multiply))((lhs, rhs), np.array(sizes, np.int32), d_output)
    lhs, rhs, d_output = (np.float64(x) for x in (lhs, rhs, d_output))
    bounds = np.cumsum([0, *sizes])
    want = (
        oracles.grouped_matmul(lhs, rhs, sizes),
        oracles.grouped_matmul(d_output, rhs.swapaxes(1, 2), sizes),
        np.stack([lhs[a:b].T @ d_output[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]),
    )
    for name, a, b in zip(("output", "d_lhs", "d_rhs"), got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert oracles.relative_error(a, b) < 2e-3, name  # one rounding to bfloat16


@pytest.mark.parametrize("asked", ["default", "highest"])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_float32_products_are_precise_whatever_the_context(dtype, precision, asked):
    """The MXU makes float32 products out of bfloat16 ones: several, if it is asked."""

    def multiply(*inputs):
        return grouped_matmul(*inputs, implementation="megablox")

    lhs, rhs, sizes = jnp.zeros((128, 128), dtype), jnp.zeros((2, 128, 128), dtype), jnp.zeros(2, jnp.int32)
    with jax.default_matmul_precision(asked):
        text = str(jax.make_jaxpr(with_gradients(multiply))((lhs, rhs), sizes, lhs))
    products = text.count("dot_general[")
    assert products >= 4  # `gmm` has one more, for the last step of the contraction
    assert text.count(f"precision=(Precision.{precision}, Precision.{precision})") == products


@pytest.mark.parametrize(
    ("depth", "columns", "dtype", "message"),
    [
        (192, 128, "bfloat16", "widths 192 and 128.*multiples of 128.*'tiled_xla'"),
        (128, 64, "bfloat16", "widths 128 and 64.*multiples of 128.*'tiled_xla'"),
        (128, 128, "float16", "float16.*bfloat16 and float32.*'tiled_xla'"),
    ],
)
def test_what_is_not_served_is_named_and_left_to_xla(depth, columns, dtype, message):
    lhs, rhs = jnp.zeros((4, depth), dtype), jnp.zeros((2, depth, columns), dtype)
    with pytest.raises(NotImplementedError, match=message):
        grouped_matmul(lhs, rhs, jnp.zeros(2, jnp.int32), implementation="megablox")
    with platform.target("tpu"):
        assert default_implementation(lhs, rhs) == "tiled_xla"


def test_the_default_on_tpu():
    lhs, rhs = jnp.zeros((4, 128)), jnp.zeros((2, 128, 128))
    with platform.target("tpu"):
        assert default_implementation(lhs, rhs) == "megablox"
    with platform.target("gpu"), pytest.raises(NotImplementedError, match="platform gpu.*'tiled_xla'"):
        grouped_matmul(lhs, rhs, jnp.zeros(2, jnp.int32), implementation="megablox")


TEXT_01 = dict(rows=8192, width=6144, inner=9216, groups=32)
SMALL_1B = dict(rows=32768, width=2048, inner=2816, groups=8)


def fetched(steps, sizes):
    """Bytes that a pipeline moves: a block is fetched where it is not that of the step before.

    Args:
      steps: for each step, the index of each block.
      sizes: bytes of each block.
    """
    changes = np.any(np.diff(np.array(steps), axis=0) != 0, axis=2).sum(axis=0) + 1
    return int(np.dot(changes, sizes))


def visits(rows, groups, tile_rows):
    """(group, tile of rows) of each visit, for groups of one size or of two where that would align them with tiles."""
    ends = np.minimum(np.arange(1, groups + 1) * (rows // groups) + tile_rows // 2, rows)
    begins = np.pad(ends, (1, 0))[:-1]
    return [(g, m) for g in range(groups) for m in range(begins[g] // tile_rows, -(-ends[g] // tile_rows))]


@pytest.mark.parametrize(("shape", "limit"), [(TEXT_01, 2.1), (SMALL_1B, 1.9)], ids=["text_01", "small_1b"])
@pytest.mark.parametrize("back", [False, True])
def test_tiles_are_read_little_more_than_once(shape, limit, back):
    rows, groups = shape["rows"], shape["groups"]
    depth, columns = (shape["inner"], shape["width"]) if back else (shape["width"], shape["inner"])
    once = 2 * (rows * depth + groups * depth * columns + rows * columns)

    m, k, n = rows_tile(rows, depth, columns, groups)
    grid = itertools.product(range(columns // n), visits(rows, groups, m), range(depth // k))
    steps = [((i, p, 0), (g, p, j), (i, j, 0)) for j, (g, i), p in grid]
    assert fetched(steps, [2 * m * k, 2 * k * n, 2 * m * n]) < limit * once

    m, k, n = columns_tile(rows, depth, columns, groups)
    grid = itertools.product(range(columns // n), range(depth // k), visits(rows, groups, m))
    steps = [((i, p, 0), (i, j, 0), (g, p, j)) for j, p, (g, i) in grid]
    assert fetched(steps, [2 * m * k, 2 * m * n, 2 * k * n]) < limit * once


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def compiled(topology, operation, weights, *, rows, width, inner, groups, dtype="bfloat16"):
    """Compiles an operation of `weights` matrices and its gradients, as `auto` does; what XLA says of the program."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    up, down = array(groups, width, inner), array(groups, inner, width)
    inputs = (array(rows, width), *(up, up, down)[:weights])
    d_output = array(rows, inner if weights == 1 else width)
    with platform.target("tpu"):
        lowered = jax.jit(with_gradients(operation)).lower(inputs, array(groups, dtype=jnp.int32), d_output)
        program = lowered.compile()
    text = program.as_text()
    kernels = [int(found) for found in re.findall(r'"cost_estimate":{[^}]*"bytes_accessed":"(\d+)"', text)]
    copied = re.findall(r"\w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return {
        "kernels": len(kernels),
        "bytes_around": program.cost_analysis()["bytes accessed"] - sum(kernels),
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "copied": max((math.prod(map(int, shape.split(","))) for shape in copied), default=0),
    }


def compile_all(topology):
    """The programs that the test below asks about, by name: more for the chip whose kernels get the least memory."""
    programs = {
        "text_01": compiled(topology, grouped_matmul, 1, **TEXT_01),
        "small_1b": compiled(topology, grouped_swiglu, 3, **SMALL_1B),
    }
    if topology == TOPOLOGIES[0]:
        odd = dict(rows=1000, width=1152, inner=384, groups=5)
        programs |= {
            "float32": compiled(topology, grouped_swiglu, 3, **SMALL_1B, dtype="float32"),
            "odd": compiled(topology, grouped_swiglu, 3, **odd, dtype="float32"),
            "decode": compiled(topology, grouped_swiglu, 3, **(SMALL_1B | dict(rows=2))),
        }
    return programs


@pytest.mark.parametrize("topology", ahead_of_time.each(TOPOLOGIES, subset="v5p:2x2x1"))
def test_compiled_for_chips_without_a_copy_of_the_matrices(topology):
    programs = ahead_of_time.answer_of(__name__, topology)
    text_01, small_1b = programs["text_01"], programs["small_1b"]
    rows = {name: 2 * case["rows"] * case["inner"] for name, case in dict(text_01=TEXT_01, small_1b=SMALL_1B).items()}
    matrices = 2 * 32 * 6144 * 9216
    # Of one product: its surplus rows are zeroed, which reads and writes the output and the gradient to the rows.
    # XLA may copy an array into VMEM ahead of a kernel that reads it several times.
    assert text_01["temporary"] < matrices / 10 and text_01["bytes_around"] < 8 * rows["text_01"]
    # Of an expert: gate, up, hidden and their gradients are kept in part, no sum of the size of [G, K, N] besides.
    assert small_1b["temporary"] < 8 * rows["small_1b"]
    for name, program in programs.items():
        assert program["kernels"] == (3 if name == "text_01" else 9), name
        assert program["copied"] < 1e5, (name, program)


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
