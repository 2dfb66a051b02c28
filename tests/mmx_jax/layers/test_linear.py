"""Projections: their gradients, and what the functions behind them keep for the backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.layers.linear import einsum, silu
from mmx_jax.layers.norm import gated_rms_norm, rms_norm
from pallas_kernels import platform

SIZES = dict(b=2, t=5, m=6, c=3, f=4)


@pytest.mark.parametrize("equation", ["btm,mf->btf", "btf,fm->btm", "btm,mcf->btcf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_projection_equal_float64(equation, dtype):
    rng = np.random.default_rng(0)
    a, b, y = equation.replace("->", ",").split(",")
    x, w, dy = (rng.normal(size=[SIZES[letter] for letter in term]) for term in (a, b, y))
    x, dy = (np.asarray(jnp.asarray(value, dtype)) for value in (x, dy))
    output, vjp = jax.vjp(lambda x, w: einsum(equation, x, w), x, jnp.float32(w))
    dx, dw = vjp(jnp.asarray(dy))
    assert (output.dtype, dx.dtype, dw.dtype) == (dtype, dtype, "float32")
    tolerance = dict(float32=1e-5, bfloat16=2e-2)[dtype]
    x, dy = np.float64(x), np.float64(dy)
    np.testing.assert_allclose(np.float64(output), np.einsum(equation, x, w), atol=tolerance * 4)
    np.testing.assert_allclose(np.float64(dx), np.einsum(f"{y},{b}->{a}", dy, w), atol=tolerance * 4)
    # Straight from the float32 accumulator, whatever the dtype of the activations.
    np.testing.assert_allclose(dw, np.einsum(f"{a},{y}->{b}", x, dy), atol=1e-4)


@pytest.mark.parametrize("equation", ["btm,mf->btf", "btm,mcf->btcf"])
def test_one_row_is_a_matrix_product_on_gpu(equation):
    rng = np.random.default_rng(0)
    a, b, _ = equation.replace("->", ",").split(",")
    x, w = (np.float32(rng.normal(size=[(SIZES | dict(b=1, t=1))[letter] for letter in term])) for term in (a, b))
    with platform.target("gpu"):
        lowered = jax.jit(lambda x, w: einsum(equation, x, w)).lower(x, w)
    assert "dot_general" in lowered.as_text() and "tensor<2x1x" in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(x, w), np.einsum(equation, x, w), atol=1e-5)


def test_elementwise_functions_keep_their_inputs_alone():
    x, gate = (jax.random.normal(jax.random.key(i), (7, 8), jnp.bfloat16) for i in range(2))
    scale = jnp.ones(8)
    for function, inputs in (
        (silu, (x,)),
        (lambda x, s: rms_norm(x, s, 1e-5), (x, scale)),
        (lambda x, g, s: gated_rms_norm(x, g, s, 1e-5), (x, gate, scale)),
    ):
        kept = jax.make_jaxpr(lambda *args, f=function: jax.vjp(f, *args)[1])(*inputs).jaxpr.outvars
        shapes = [(v.aval.shape, v.aval.dtype) for v in kept if v.aval.ndim]
        assert len(shapes) <= len(inputs) and set(shapes) <= {(i.shape, i.dtype) for i in inputs}, shapes
