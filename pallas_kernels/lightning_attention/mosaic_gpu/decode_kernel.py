"""One token of decoding on NVIDIA Hopper, as one Pallas Mosaic GPU kernel with what surrounds the recurrence.

A step is bound by how many kernels there are and by the state, which passes through memory once here: a program has
some value columns of the state of one row and head in its registers, and writes them back where they came from. What
the norm over all heads needs leaves as sums of squares; the norm is a factor of a row, which can wait until the output
projection is made.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lightning_attention.reference import SQUARES
from pallas_kernels.platform import interpret

ROWS = 8  # of the state that the threads of a program hold at once: a row is 16 threads with 4 numbers each


def gated_step(projected, slopes, state, scale, token_mask):
    """See `api.gated_step`."""
    token_mask = None if token_mask is None else token_mask.astype(jnp.int32)
    # The decay is not for the kernel's approximate exponential: a state keeps its error for thousands of tokens.
    return _jitted_step(projected, jnp.exp(-slopes), state, scale, token_mask, interpreted=interpret())


# Jitted, so that the calls of a model's layers are traced and lowered once.
@functools.partial(jax.jit, static_argnames="interpreted")
def _jitted_step(projected, decays, state, scale, token_mask, *, interpreted):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, heads, dim, _ = state.shape
    dtype, inner, parts = projected.dtype, heads * dim, dim // SQUARES
    held = plgpu.Layout.TILED(
        plgpu.Tiling(((ROWS, SQUARES), (ROWS // 4, SQUARES), (4,))),
        warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
    )  # fmt: skip
    along_keys, along_values = held.reduce(1), held.reduce(0)

    def kernel(projected_ref, decay_ref, scale_ref, *refs):
        token_mask_ref = None if token_mask is None else refs[0]
        state_ref, output_ref, squares_ref = refs[token_mask is not None :]
        b, h, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
        keys, values = pl.ds(h * dim, dim), pl.ds(h * dim + part * SQUARES, SQUARES)

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        def number(index, own, layout):
            """Of q, k, v and the gate, the one with this index."""
            return load(projected_ref.at[b, pl.ds(index * inner + own.start, own.size)], layout).astype(jnp.float32)

        def activated(index, own, layout):
            x = number(index, own, layout)
            return (x * jax.nn.sigmoid(x)).astype(dtype).astype(jnp.float32)

        def spread(vector, axis):
            return plgpu.layout_cast(lax.broadcast_in_dim(vector, (dim, SQUARES), (axis,)), held)

        own_state = state_ref.at[b, h, :, pl.ds(part * SQUARES, SQUARES)]
        # All that is read is asked for at once; behind the sums over the rows, which wait, it would come later.
        old = load(own_state, held)
        gate = jax.nn.sigmoid(number(3, values, along_values))
        gate *= load(scale_ref.at[values], along_values).astype(jnp.float32)
        q, k = (spread(activated(index, keys, along_keys), 0) for index in (0, 1))  # [D, SQUARES]
        v = spread(activated(2, values, along_values), 1)
        new = decay_ref[h] * old + k * v
        if token_mask is not None:
            new = lax.cond(token_mask_ref[b] > 0, lambda: new, lambda: old)
        own_state[...] = new
        output = jnp.sum(q * new, axis=0)
        squares_ref[b, h * parts + part] = jnp.sum(output * output)
        output_ref[b, values] = (gate * output).astype(dtype)

    state_ref = jax.new_ref(state)  # written in place
    call = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((batch, inner), dtype),
            jax.ShapeDtypeStruct((batch, heads * parts), jnp.float32),
        ],
        grid=(batch, heads, parts), grid_names=("batch", "head", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    output, squares = call(projected, decays, scale, *([] if token_mask is None else [token_mask]), state_ref)
    return output, squares, jax.freeze(state_ref)
