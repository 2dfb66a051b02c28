"""The Mosaic GPU kernels of decoding, interpreted on the CPU and lowered for CUDA."""

import collections
import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.models import decoder
from mmx_jax.models import params as model_params
from mmx_jax.models.cache import init_state
from pallas_kernels import platform
from pallas_kernels.grouped_matmul import norm_and_route
from pallas_kernels.lightning_attention import gated_step
from tests.support import interpreter, oracles

STEPS = {  # batch, heads, head_dim
    "one": (1, 3, 64),
    "one_128": (1, 5, 128),
    "one_of_two_rows": (1, 2, 128),
    "many": (32, 1, 64),
    "many_128": (3, 2, 128),
    "without_a_token": (3, 2, 64),
    "no_number": (2, 2, 64),
}


def step_inputs(case):
    """(projected bfloat16 [R, 4 H D], slopes [H], state float32 [B, H, D, D], scale bfloat16 [H D], real [B])."""
    batch, heads, dim = STEPS[case]
    rng = np.random.default_rng(len(case))
    rows = 2 if case == "one_of_two_rows" else batch
    projected = jnp.asarray(2 * rng.normal(size=(rows, 4 * heads * dim)), jnp.bfloat16)
    state = rng.normal(size=(batch, heads, dim, dim)).astype(np.float32)
    scale = jnp.asarray(1 + 0.1 * rng.normal(size=heads * dim), jnp.bfloat16)
    slopes = np.geomspace(0.9, 0.004, heads).astype(np.float32)
    real = np.arange(batch) % 2 == 0 if case == "without_a_token" else None
    if case == "no_number":
        projected = projected.at[0, 5].set(jnp.nan)  # of the query
    return projected, slopes, state, scale, real


ROUTES = {  # tokens, width, experts, chosen
    "one": (1, 2048, 8, 2),
    "many": (32, 256, 8, 2),
    "in_parts": (2, 1536, 32, 3),
    "sixteen": (3, 768, 16, 1),
    "equals": (2, 256, 8, 4),
    "no_number": (3, 512, 32, 2),
}
EPS = 1e-5


def route_inputs(case):
    """(x bfloat16 [R, M], scale bfloat16 [M], router float32 [M, G])."""
    tokens, width, experts, _ = ROUTES[case]
    rng = np.random.default_rng(len(case))
    x = jnp.asarray(3 * rng.normal(size=(tokens, width)), jnp.bfloat16)
    scale = jnp.asarray(1 + 0.1 * rng.normal(size=width), jnp.bfloat16)
    router = (3 * rng.normal(size=(width, experts)) / np.sqrt(width)).astype(np.float32)
    if case == "equals":
        router[:] = router[:, :1]
        router[:, 1] = -router[:, 1]
    if case == "no_number":
        x = x.at[1, 7].set(jnp.nan)
    return x, scale, router


MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_layers=2,
    layer_pattern=("lightning",) * 2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=32,
    mlp_dim=192,
    num_experts=8,
    dtype="bfloat16",
)


def layer_output(batch, dtype="bfloat16", runtime=RuntimeConfig()):
    """[6, 1, M]: one token each through the first layer, `batch` at a time; for the error of one alone is chance."""
    rng = np.random.default_rng(batch)
    x = jnp.asarray(rng.normal(size=(6 // batch, batch, 1, MODEL.hidden_size)), jnp.bfloat16)
    states = rng.normal(size=(6 // batch, batch, 2, 64, 64)).astype(np.float32)
    params = model_params.init_params(MODEL, jax.random.key(0))["blocks"]["layer_0"]
    params = jax.tree.map(lambda w: w[0], params)
    shared = decoder.LayerInputs(jnp.zeros((batch, 1), jnp.int32), None, None)
    layer = decoder.DecoderLayer(dataclasses.replace(MODEL, dtype=dtype), "lightning", runtime)
    slopes = jnp.array([0.5, 0.01])
    run = jax.jit(lambda params, x, state: layer.apply({"params": params}, x, shared, slopes, state)[0])
    x = x.astype(dtype)
    return jnp.concatenate([run(params, *inputs) for inputs in zip(x, states, strict=True)])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def compute_all(path):
    arrays = {}
    for case in STEPS:
        for name, x in zip(("output", "squares", "state"), jax.jit(gated_step)(*step_inputs(case)), strict=True):
            arrays[f"step/{case}/{name}"] = np.asarray(x, np.float32)
    for case, (*_, chosen) in ROUTES.items():
        x, scale, router = route_inputs(case)
        results = jax.jit(lambda *operands, chosen=chosen: norm_and_route(*operands[:2], EPS, operands[2], chosen))
        for name, y in zip(("normed", "experts", "chosen"), results(x, scale, router), strict=True):
            arrays[f"route/{case}/{name}"] = np.asarray(y, np.float32)
    kernels = dict(runtime=RuntimeConfig(lightning_implementation="mosaic_gpu", moe_implementation="mosaic_gpu"))
    for batch in (1, 3):
        for name, changes in dict(float32=dict(dtype="float32"), xla={}, kernels=kernels).items():
            arrays[f"layer/{batch}/{name}"] = np.asarray(layer_output(batch, **changes), np.float32)
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    return interpreter.arrays_of(__name__, tmp_path_factory.mktemp("kernel"))


@interpreter.needed
@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_the_recurrence_with_its_gate(computed, case):
    batch, heads, dim = STEPS[case]
    projected, slopes, state, scale, real = step_inputs(case)
    *qkv, gate = np.split(np.asarray(projected[:batch], np.float64), 4, axis=1)
    q, k, v = (np.asarray(jnp.asarray(x * sigmoid(x), jnp.bfloat16), np.float64) for x in qkv)
    split = (x.reshape(batch, 1, heads, dim) for x in (q, k, v))
    ids = None if real is None else real[:, None].astype(int)
    output, want_state = oracles.lightning_attention(*split, slopes, ids, state)
    output = output.reshape(batch, -1)
    want = output * sigmoid(gate) * np.asarray(scale, np.float64)
    got, squares, got_state = (computed[f"step/{case}/{name}"] for name in ("output", "squares", "state"))
    real = np.ones(batch, bool) if real is None else real
    if case == "no_number":  # the query of one head, which the output of that head alone is made of
        bad = np.isnan(got)
        assert np.all(bad[0, :dim]) and not np.any(bad[0, dim:]) and not np.any(bad[1])
        assert np.all(np.isnan(squares[0, : dim // 64])) and not np.any(np.isnan(got_state))
        got, want, squares, output = got[1:], want[1:], squares[1:], output[1:]
        real = real[1:]
    np.testing.assert_allclose(got_state, want_state, rtol=2e-6, atol=2e-6)
    # One rounding to bfloat16.
    assert oracles.relative_error(got[real], want[real]) < 3e-3
    np.testing.assert_allclose(np.sum(squares, axis=1)[real], np.sum(output**2, axis=1)[real], rtol=1e-5)
    np.testing.assert_array_equal(computed[f"step/{case}/state"][-1:][~real[-1:]], state[-1:][~real[-1:]])


@interpreter.needed
@pytest.mark.parametrize("case", STEPS)
def test_a_step_lowers_for_cuda_as_one_kernel_in_place(case):
    inputs = step_inputs(case)
    with platform.target("gpu"):
        text = jax.jit(lambda *x: gated_step(*x)).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert "output_operand_alias<output_tuple_indices = [2]" in call


@interpreter.needed
@pytest.mark.parametrize("case", ROUTES)
def test_a_norm_and_its_router_are_those_of_the_definition(computed, case):
    x, scale, router = (np.asarray(a, np.float64) for a in route_inputs(case))
    tokens, _, experts, chosen = ROUTES[case]
    normed, got_experts, got = (computed[f"route/{case}/{name}"] for name in ("normed", "experts", "chosen"))
    numbers = np.all(np.isfinite(x), axis=1)
    assert np.all(np.isnan(got[~numbers])) and np.all(np.isnan(normed[~numbers]))
    assert np.all((got_experts >= 0) & (got_experts < experts))
    want = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPS) * scale
    assert oracles.relative_error(normed[numbers], want[numbers]) < 4e-3  # two roundings to bfloat16
    for token in np.flatnonzero(numbers):
        logits = normed[token].astype(np.float64) @ router
        probability = np.exp(logits - np.max(logits))
        probability /= np.sum(probability)
        best = sorted(range(experts), key=lambda e: (-probability[e].round(12), e))[:chosen]  # noqa: B023
        assert got_experts[token].tolist() == best
        np.testing.assert_allclose(got[token], probability[best], rtol=1e-5)


@interpreter.needed
@pytest.mark.parametrize("case", ROUTES)
def test_a_norm_and_its_router_lower_for_cuda_as_one_kernel(case):
    x, scale, router = route_inputs(case)
    chosen = ROUTES[case][-1]
    with platform.target("gpu"):
        traced = jax.jit(lambda x, scale, router: norm_and_route(x, scale, EPS, router, chosen)).trace(x, scale, router)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@interpreter.needed
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_a_layer_errs_as_much_as_through_xla(computed, batch):
    want, xla, kernels = (computed[f"layer/{batch}/{name}"] for name in ("float32", "xla", "kernels"))
    assert not np.array_equal(xla, kernels)
    through_xla = oracles.relative_error(xla, want)
    assert through_xla < 2e-2  # 4e-3 to 1e-2: it depends on how the processor multiplies bfloat16
    assert oracles.relative_error(kernels, want) < 1.25 * through_xla


@interpreter.needed
def test_a_step_of_a_model_is_few_kernels_unless_differentiated():
    params = model_params.abstract_params(MODEL)
    state = jax.eval_shape(lambda: init_state(MODEL, 3, 16))

    def calls(compute, length=1, dtype=MODEL.dtype, **changes):
        model = decoder.Decoder(dataclasses.replace(MODEL, dtype=dtype), RuntimeConfig(**changes))
        tokens = jax.ShapeDtypeStruct((3, length), jnp.int32)

        def logits(params, tokens, state):
            return jnp.sum(model.apply({"params": params}, tokens, state=state).logits)

        with platform.target("gpu"):
            traced = jax.jit(compute(logits)).trace(params, tokens, state)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return collections.Counter(re.findall(r"call @(_jitted_step|_jitted_route)", text))

    assert calls(lambda f: f) == dict(_jitted_step=2, _jitted_route=2)
    assert calls(lambda f: f, lightning_implementation="chunked_xla") == dict(_jitted_route=2)
    assert calls(lambda f: f, moe_implementation="tiled_xla") == dict(_jitted_step=2)
    assert not calls(lambda f: f, length=2) and not calls(lambda f: f, dtype="float32")
    assert not calls(jax.grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(dtype=jnp.float32), NotImplementedError, "bfloat16"),
        (dict(dim=48), NotImplementedError, "head_dim 64 and 128"),
        (dict(rows=1), ValueError, r"projected must be \[2 or more"),
        (dict(state_dtype=jnp.bfloat16), ValueError, "float32 state"),
    ],
)
def test_what_a_step_does_not_serve_is_refused(monkeypatch, change, error, message):
    if jax.__version_info__ < (0, 11) and error is NotImplementedError:
        message = "jax 0.11"
    monkeypatch.setenv("NPROC", "8")
    case = dict(dtype=jnp.bfloat16, dim=64, rows=2, state_dtype=jnp.float32) | change
    projected = jnp.zeros((case["rows"], 4 * 3 * case["dim"]), case["dtype"])
    state = jnp.zeros((2, 3, case["dim"], case["dim"]), case["state_dtype"])
    with pytest.raises(error, match=message):
        gated_step(projected, jnp.ones(3), state, jnp.ones(3 * case["dim"]))


@pytest.mark.parametrize(
    ("shape", "experts", "dtype", "error", "message"),
    [
        ((2, 256), 8, jnp.float32, NotImplementedError, "bfloat16"),
        ((2, 256), 12, jnp.bfloat16, NotImplementedError, "8, 16 or 32 experts"),
        ((2, 320), 8, jnp.bfloat16, NotImplementedError, "multiples of 256"),
        ((65, 256), 8, jnp.bfloat16, NotImplementedError, "64 tokens at most"),
        ((1, 6144), 32, jnp.bfloat16, NotImplementedError, "65536 numbers at most"),
        ((2, 256), 1, jnp.bfloat16, ValueError, "2 experts or more"),
    ],
)
def test_what_a_router_does_not_serve_is_refused(monkeypatch, shape, experts, dtype, error, message):
    if jax.__version_info__ < (0, 11) and error is NotImplementedError:
        message = "jax 0.11"
    monkeypatch.setenv("NPROC", "8")
    x = jnp.zeros(shape, dtype)
    with pytest.raises(error, match=message):
        norm_and_route(x, jnp.ones(shape[1]), EPS, jnp.zeros((shape[1], experts)), 2)


if __name__ == "__main__":
    compute_all(sys.argv[1])
