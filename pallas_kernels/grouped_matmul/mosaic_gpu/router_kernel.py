"""The router of few tokens on NVIDIA Hopper, as one Pallas Mosaic GPU kernel with the norm before it.

Decoding is bound by how many kernels there are: the norm, the product, the softmax and the choice are four to XLA. A
program is one token. It reads the whole router, which is why that may not be large.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_gpu_common
from pallas_kernels.platform import interpret

NUMBERS = 1 << 14  # of the router that a program holds at once, in half of its registers
MOST_NUMBERS = 1 << 16  # of a router
MOST_TOKENS = 64


def check(x, experts):
    """Raises NotImplementedError where the kernel cannot serve."""
    tokens, width = x.shape
    mosaic_gpu_common.check("norm_and_route", x.dtype, fallback="XLA")
    if tokens > MOST_TOKENS or experts not in (8, 16, 32) or width % 256 or width * experts > MOST_NUMBERS:
        raise NotImplementedError(
            f"norm_and_route serves {MOST_TOKENS} tokens at most, 8, 16 or 32 experts, widths that are multiples of "
            f"256, and routers of {MOST_NUMBERS} numbers at most; got {tokens} tokens, {experts} experts and width "
            f"{width}; XLA serves all"
        )


def norm_and_route(x, scale, eps, router, chosen):
    """See `api.norm_and_route`."""
    return _jitted_route(x, scale, router, eps=eps, chosen=chosen, interpreted=interpret())


# Jitted, so that the calls of a model's layers are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("eps", "chosen", "interpreted"))
def _jitted_route(x, scale, router, *, eps, chosen, interpreted):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tokens, width = x.shape
    experts = router.shape[1]
    rows = min(width, NUMBERS // experts)  # of the router, at once
    each = next(n for n in (8, 4, 2) if width % (128 * n) == 0)  # numbers of a row that lie side by side in a thread
    whole_row = plgpu.Layout.WG_STRIDED((width,), vec_size=each)
    held = plgpu.Layout.TILED(
        plgpu.Tiling(((512 // experts, experts), (128 // experts, experts), (4,))),
        warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
    )  # fmt: skip
    along_width, along_experts = held.reduce(1), held.reduce(0)

    def kernel(x_ref, scale_ref, router_ref, normed_ref, expert_ref, chosen_ref, normed_smem):
        token = lax.axis_index("token")

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        router_part = load(router_ref.at[pl.ds(0, rows)], held)  # on its way while the norm is made
        row = load(x_ref.at[token], whole_row).astype(jnp.float32)
        rms = lax.rsqrt(jnp.sum(row * row) / width + eps)
        normed = (row * rms).astype(x.dtype).astype(jnp.float32)
        normed = (normed * load(scale_ref, whole_row).astype(x.dtype).astype(jnp.float32)).astype(x.dtype)
        normed_ref[token] = normed
        normed_smem[...] = normed
        plgpu.commit_smem()

        products = 0.0
        for start in range(0, width, rows):
            own = pl.ds(start, rows)
            if start:
                router_part = load(router_ref.at[own], held)
            factor = load(normed_smem.at[own], along_width).astype(jnp.float32)
            factor = plgpu.layout_cast(lax.broadcast_in_dim(factor, (rows, experts), (0,)), held)
            products += factor * router_part
        logits = jnp.sum(products, axis=0)
        unnormed = jnp.exp(logits - jnp.max(logits))
        probability = unnormed / jnp.sum(unnormed)

        number = plgpu.broadcasted_iota(jnp.int32, (experts,), 0, layout=along_experts)
        rest = probability
        for i in range(chosen):
            best = jnp.max(rest)
            # The lowest index among equals; any one if there are no numbers.
            expert = jnp.min(jnp.where(rest == best, number, experts - 1))
            expert_ref[token, i] = expert
            chosen_ref[token, i] = best
            rest = jnp.where(number == expert, -1.0, rest)

    call = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((tokens, width), x.dtype),
            jax.ShapeDtypeStruct((tokens, chosen), jnp.int32),
            jax.ShapeDtypeStruct((tokens, chosen), jnp.float32),
        ],
        scratch_types=[plgpu.SMEM((width,), x.dtype)],
        grid=(tokens,), grid_names=("token",),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    return tuple(call(x, scale, router))
