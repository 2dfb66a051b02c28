"""The Mosaic GPU kernels of the grouped product, interpreted on the CPU and lowered for CUDA."""

import collections
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.layers import moe
from mmx_jax.models import decoder
from mmx_jax.models import params as model_params
from pallas_kernels import mosaic_gpu_common, platform
from pallas_kernels.grouped_matmul import few_tokens_swiglu, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.mosaic_gpu import api as mosaic_gpu
from tests.support import interpreter, oracles

# Name -> rows, width, columns, sizes of the groups.
CASES = {
    "even": (256, 128, 128, [64, 64, 64, 64]),
    "unaligned": (200, 128, 64, [16, 0, 121, 30]),  # and rows behind the last group
    "smaller_than_a_block": (61, 64, 128, [3, 0, 57, 1]),
    "one_holds_all": (300, 64, 64, [0, 300]),
    "several_tiles": (400, 64, 64, [131, 269]),
    "fewer_rows_than_groups": (2, 64, 64, [0, 1, 0, 1]),
    "no_rows_used": (9, 64, 64, [0, 0, 0, 0]),
    "wide": (130, 64, 256, [7, 123]),
    "deep": (70, 640, 64, [70]),  # more steps than the ring has stages
}
NAMES = ("output", "d_lhs", "d_rhs")
SWIGLU_NAMES = ("output", "x", "w_gate", "w_up", "w_down")
# Name -> rows, width, inner width, sizes of the groups.
SWIGLU = {
    "unaligned": (150, 64, 128, [40, 0, 90]),  # and rows behind the last group
    "several_pieces": (290, 64, 256, [3, 0, 287]),  # of the columns of a tile, and several tiles
    "decoding": (3, 128, 64, [1, 0, 0, 2]),
    "no_rows_used": (9, 64, 64, [0, 0]),
}
# Few tokens, of which nothing is sorted. Name -> tokens, width, inner width, groups, groups of each token.
TOKENS = {
    "one_token": (1, 128, 64, 4, 2),
    "padded_rows": (12, 64, 128, 32, 3),
    "unchosen_groups": (3, 64, 64, 6, 2),
    "whole_tile": (64, 64, 64, 2, 1),
}


def inputs(case):
    """(lhs, rhs, group sizes, cotangent), bfloat16. Rows of no group are NaN: they may not reach any result."""
    num_rows, width, columns, sizes = CASES[case]
    rng = np.random.default_rng(len(case))
    shapes = (num_rows, width), (len(sizes), width, columns), (num_rows, columns)
    lhs, rhs, d_output = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    lhs[sum(sizes) :] = np.nan
    d_output[sum(sizes) :] = np.nan
    return (
        *(jnp.asarray(x, jnp.bfloat16) for x in (lhs, rhs)),
        np.array(sizes, np.int32),
        jnp.asarray(d_output, "bfloat16"),
    )


def swiglu_inputs(case):
    """(x and weights, group sizes, cotangent), bfloat16. Rows of no group are NaN."""
    num_rows, width, inner, sizes = SWIGLU[case]
    rng = np.random.default_rng(len(case))
    up, down = (len(sizes), width, inner), (len(sizes), inner, width)
    shapes = (num_rows, width), up, up, down, (num_rows, width)
    x, *weights, d_output = (jnp.asarray(0.3 * rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    x, d_output = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, d_output))
    return (x, *weights), np.array(sizes, np.int32), d_output


def tokens_inputs(case):
    """(x, weights, the groups of each token from the best on int32 [R, G]), bfloat16.

    Groups that no token has among its first ones are NaN: they may not reach any result.
    """
    tokens, width, inner, groups, chosen = TOKENS[case]
    rng = np.random.default_rng(len(case))
    shapes = (tokens, width), *[(groups, width, inner)] * 2, (groups, inner, width)
    x, *weights = (0.3 * rng.normal(size=shape) for shape in shapes)
    wanted = groups if case != "unchosen_groups" else groups - 3
    ranking = np.array([rng.permutation(wanted) for _ in range(tokens)])
    ranking = np.concatenate([ranking, np.tile(np.arange(wanted, groups), (tokens, 1))], axis=1).astype(np.int32)
    unused = np.setdiff1d(np.arange(groups), ranking[:, :chosen])
    for w in weights:
        w[unused] = np.nan
    return (*(jnp.asarray(a, jnp.bfloat16) for a in (x, *weights)),), ranking


def compute_all(path):
    mosaic_gpu_common.MULTIPROCESSORS = 1  # so that tiles are as wide as those of large products
    arrays = {}
    for case in CASES:
        lhs, rhs, sizes, d_output = inputs(case)

        @jax.jit
        def both(lhs, rhs, d_output, sizes=sizes):
            multiply = lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, implementation="mosaic_gpu")  # noqa: E731
            output, vjp = jax.vjp(multiply, lhs, rhs)
            return output, *vjp(d_output)

        for name, x in zip(NAMES, both(lhs, rhs, d_output), strict=True):
            arrays[f"{case}/{name}"] = np.asarray(x, np.float32)
    for case in SWIGLU:
        operands, sizes, d_output = swiglu_inputs(case)

        @jax.jit
        def both(operands, d_output, sizes=sizes):
            expert = lambda *operands: grouped_swiglu(*operands, sizes, implementation="mosaic_gpu")  # noqa: E731
            output, vjp = jax.vjp(expert, *operands)
            return expert(*operands), output, *vjp(d_output)

        names = ("without_gradients", *SWIGLU_NAMES)
        for name, x in zip(names, both(operands, d_output), strict=True):
            arrays[f"swiglu/{case}/{name}"] = np.asarray(x, np.float32)
    for case, (*_, chosen) in TOKENS.items():
        (x, *weights), ranking = tokens_inputs(case)
        rows = jax.jit(few_tokens_swiglu, static_argnums=2)(x, ranking, chosen, *weights)
        arrays[f"tokens/{case}"] = np.asarray(rows, np.float32)
        # The same rows one group after the other.
        assignment = ranking[:, :chosen].reshape(-1)
        order = np.argsort(assignment, kind="stable")
        sizes = np.bincount(assignment, minlength=ranking.shape[1]).astype(np.int32)
        expert = jax.jit(functools.partial(grouped_swiglu, implementation="mosaic_gpu"))
        rows = expert(np.repeat(x, chosen, axis=0)[order], *weights, sizes)
        arrays[f"tokens/{case}/sorted"] = np.asarray(rows, np.float32)[np.argsort(order)].reshape(len(x), chosen, -1)
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    return interpreter.arrays_of(
        "tests.pallas_kernels.grouped_matmul.test_mosaic_gpu", tmp_path_factory.mktemp("kernel")
    )


@interpreter.needed
@pytest.mark.parametrize("case", CASES)
def test_matches_the_loop_with_gradients(computed, case):
    lhs, rhs, sizes, d_output = (np.asarray(x, np.float64) for x in inputs(case))
    sizes = sizes.astype(int)
    bounds = np.cumsum([0, *sizes])
    d_rhs = [lhs[a:b].T @ d_output[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    want = (
        oracles.grouped_matmul(lhs, rhs, sizes),
        oracles.grouped_matmul(d_output, rhs.swapaxes(1, 2), sizes),
        np.stack(d_rhs),
    )
    for name, x in zip(NAMES, want, strict=True):
        assert oracles.relative_error(computed[f"{case}/{name}"], x) < 3e-3, name  # one rounding to bfloat16


@interpreter.needed
@pytest.mark.parametrize("case", SWIGLU)
def test_swiglu_is_the_experts_with_gradients(computed, case):
    operands, sizes, d_output = swiglu_inputs(case)
    want = oracles.grouped_swiglu(*operands, sizes, d_output)
    for name, x in zip(SWIGLU_NAMES, want, strict=True):
        # Gate, up and hidden are rounded to bfloat16 on the way.
        assert oracles.relative_error(computed[f"swiglu/{case}/{name}"], x) < 8e-3, name
    # The same products, but that neither gate nor up is written.
    np.testing.assert_array_equal(computed[f"swiglu/{case}/without_gradients"], computed[f"swiglu/{case}/output"])


@interpreter.needed
@pytest.mark.parametrize("case", TOKENS)
def test_few_tokens_get_bit_for_bit_what_sorted_rows_get(computed, case):
    got = computed[f"tokens/{case}"]
    assert np.all(np.isfinite(got)) and np.any(got)
    np.testing.assert_array_equal(got, computed[f"tokens/{case}/sorted"])


@interpreter.needed
@pytest.mark.parametrize("case", TOKENS)
def test_few_tokens_lower_for_cuda_as_two_kernels_without_tables(case):
    (x, *weights), ranking = tokens_inputs(case)
    with platform.target("gpu"):
        traced = jax.jit(lambda *operands: few_tokens_swiglu(*operands[:2], TOKENS[case][-1], *operands[2:])).trace(
            x, ranking, *weights
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 2
    assert all("x".join(map(str, ranking.shape)) + "xi32" in line for line in calls)  # as it came


def test_tiles_cover_every_row_once():
    rng = np.random.default_rng(1)
    tiles_of = jax.jit(mosaic_gpu._row_tiles, static_argnums=(1, 2))
    for num_rows, groups in [(1, 4), (3, 8), (70, 3), (333, 16), (1000, 2), (1024, 8)]:
        for tile_rows in (64, 128):
            cuts = np.sort(rng.integers(0, num_rows + 1, groups))
            sizes = np.diff([0, *cuts]).astype(np.int32)  # some rows are behind the last group
            table = np.asarray(tiles_of(sizes, num_rows, tile_rows))
            owner = np.repeat(np.arange(groups + 1), [*sizes, num_rows - sizes.sum()])
            seen = np.zeros(num_rows, int)
            for group, start, first, last, _ in table[: table[0, 4]]:
                assert start % mosaic_gpu.ALIGNMENT == 0 and 0 <= first < last <= tile_rows
                assert np.all(owner[start + first : start + last] == group)
                seen[start + first : start + last] += 1
            assert np.all(seen == 1)


@interpreter.needed
def test_a_model_lowers_for_cuda_and_repeats_what_its_remat_policy_says():
    """Lowering needs no GPU. "dots" repeats no kernel of the experts in the backward, "full" two a layer."""
    layers = 2
    config = ModelConfig(
        vocab_size=64,
        hidden_size=128,
        num_layers=layers,
        layer_pattern=("lightning",),
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=32,
        mlp_dim=192,
        num_experts=4,
        max_position_embeddings=1024,
        dtype="bfloat16",
    )

    def lowered(remat):
        model = decoder.Decoder(config, RuntimeConfig(remat=remat, scan_blocks=False))

        def loss(params, tokens):
            return jnp.sum(model.apply({"params": params}, tokens).logits)

        with platform.target("gpu"):
            arguments = model_params.abstract_params(config), jax.ShapeDtypeStruct((1, 512), jnp.int32)
            text = jax.jit(jax.grad(loss)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        calls = collections.Counter(re.findall(r"call @(_multiply_rows|_multiply_columns|_jitted_scan)", text))
        return calls, text.count("custom_call @mosaic_gpu")

    calls, kernels = lowered("none")
    assert calls["_multiply_columns"] == 3 * layers
    assert kernels < sum(calls.values()) / 2  # the layers share them
    assert lowered("dots")[0] == calls
    full = lowered("full")[0]
    assert full - calls == collections.Counter(_multiply_rows=2 * layers, _jitted_scan=layers)


@interpreter.needed
def test_few_tokens_of_a_layer_are_not_sorted_unless_differentiated():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=128,
        num_layers=1,
        layer_pattern=("lightning",),
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=32,
        mlp_dim=192,
        num_experts=4,
        dtype="bfloat16",
    )

    def total(params, x):
        return jnp.sum(moe.MixtureOfExperts(config).apply({"params": params}, x, None)[0])

    def calls(compute, tokens):
        stacked = model_params.abstract_params(config)["blocks"]["layer_0"]["mlp"]
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
        with platform.target("gpu"):
            traced = jax.jit(compute).trace(params, jax.ShapeDtypeStruct((1, tokens, 128), jnp.bfloat16))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return collections.Counter(re.findall(r"call @(_multiply_[a-z]+)", text))

    assert calls(total, 3) == dict(_multiply_tokens=2)
    assert calls(jax.grad(total, argnums=(0, 1)), 3) == dict(_multiply_rows=4, _multiply_columns=3)
    assert calls(total, mosaic_gpu.ROWS + 1) == dict(_multiply_rows=2)


@interpreter.needed
@pytest.mark.parametrize("num_rows", [2, 8, 10, 133])
def test_any_number_of_rows_lowers_for_cuda(num_rows):
    def both(lhs, rhs, sizes):
        return jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, implementation="mosaic_gpu"), lhs, rhs)[1](lhs)

    shapes = ((num_rows, 64), jnp.bfloat16), ((3, 64, 64), jnp.bfloat16), ((3,), jnp.int32)
    with platform.target("gpu"):
        traced = jax.jit(both).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        assert "custom_call @mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@interpreter.needed
@pytest.mark.parametrize(("columns", "counters"), [(64 * 20, 0), (64 * 300, 1)])
def test_programs_share_many_tiles_by_a_counter_of_their_own(columns, counters):
    """The interpreter has no counter, so this looks at the operands of the lowered kernel."""
    shapes = ((512, 64), jnp.bfloat16), ((2, 64, columns), jnp.bfloat16), ((2,), jnp.int32)
    with platform.target("gpu"):
        traced = jax.jit(lambda *operands: grouped_matmul(*operands, implementation="mosaic_gpu")).trace(
            *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    operands = re.search(r": \((.*)\) -> ", call)[1]
    assert operands.count("tensor<1xi32>") == counters


@interpreter.needed
@pytest.mark.parametrize(("differentiated", "written"), [(False, 1), (True, 3)])
def test_gate_and_up_are_written_only_if_a_backward_follows(differentiated, written):
    operands, sizes, _ = swiglu_inputs("unaligned")

    def expert(*operands):
        return grouped_swiglu(*operands, sizes, implementation="mosaic_gpu")

    compute = (lambda *operands: jax.vjp(expert, *operands)) if differentiated else expert
    with platform.target("gpu"):
        text = jax.jit(compute).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    results = [line.split("->")[-1] for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    inner = SWIGLU["unaligned"][2]
    assert len(results) == 2  # gate, up and hidden; the output
    assert sum(line.count(f"x{inner}xbf16>") for line in results) == written


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((6, 60), jnp.bfloat16, "multiples of 64"), ((6, 64), jnp.float32, "bfloat16")],
)
def test_what_is_not_served_names_what_serves_it(monkeypatch, shape, dtype, message):
    if jax.__version_info__ < (0, 11):
        message = "jax 0.11"
    monkeypatch.setenv("NPROC", "8")
    rhs = jnp.zeros((2, shape[1], 64), dtype)
    with pytest.raises(NotImplementedError, match=message) as raised:
        grouped_matmul(jnp.zeros(shape, dtype), rhs, jnp.zeros(2, jnp.int32), implementation="mosaic_gpu")
    assert "tiled_xla" in str(raised.value)


if __name__ == "__main__":
    compute_all(sys.argv[1])
