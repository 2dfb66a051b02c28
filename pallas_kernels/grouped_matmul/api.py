"""The entry points, one product and a whole SwiGLU expert: validation, choice of backend, differentiation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform
from pallas_kernels.grouped_matmul import megablox, reference, tiled_xla
from pallas_kernels.grouped_matmul.mosaic_gpu import api as mosaic_gpu
from pallas_kernels.grouped_matmul.mosaic_gpu import router_kernel

# A backend is a module with `check`, `forward`, `backward`, `swiglu_forward` and `swiglu_backward`, as in reference.py.
IMPLEMENTATIONS = {"reference": reference, "tiled_xla": tiled_xla, "mosaic_gpu": mosaic_gpu, "megablox": megablox}
_KERNELS = {"gpu": "mosaic_gpu", "tpu": "megablox"}


def default_implementation(lhs: Any, rhs: Any) -> str:
    """The choice of `implementation="auto"`: the kernel of the platform if it serves the shapes, or tiled_xla."""
    kernel = _KERNELS.get(platform.platform())
    reason = kernel and platform.why_not(lambda: IMPLEMENTATIONS[kernel].check(lhs, rhs))
    chosen = kernel if kernel and reason is None else "tiled_xla"
    platform.announce("grouped matmul", chosen, reason or f"the default on {platform.platform()}")
    return chosen


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Multiplies the rows of group g, which lie one group after the other, with `rhs[g]`.

    Args:
      lhs: [R, K], the rows sorted by group.
      rhs: [G, K, N], in the dtype of `lhs`.
      group_sizes: int32 [G] rows of each group, at most R in all. Groups may be empty.
      implementation: a key of `IMPLEMENTATIONS`, or "auto" for the default of the platform.

    Returns:
      [R, N] in the dtype of `lhs`, accumulated in float32. Rows behind the last group are 0. It is named
      "grouped_matmul" for the policies of `jax.checkpoint`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown implementation.
      NotImplementedError: the chosen backend cannot serve these shapes; the message says which can.
    """
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"grouped_matmul takes lhs [R, K], rhs [G, K, N], group_sizes [G]; got {lhs.shape}, {rhs.shape}, "
            f"{group_sizes.shape}"
        )
    if lhs.dtype != rhs.dtype or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"lhs and rhs must share a dtype, group_sizes be int32; got {lhs.dtype}, {rhs.dtype}, {group_sizes.dtype}"
        )
    return _multiply(_resolve(implementation, lhs, rhs), lhs, rhs, group_sizes)


def grouped_swiglu(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """A SwiGLU expert for each group of rows: (silu(x @ w_gate[g]) * (x @ w_up[g])) @ w_down[g].

    Args:
      x: [R, M], the rows sorted by group.
      w_gate, w_up: [G, M, F], w_down: [G, F, M], all in the dtype of `x`.
      group_sizes: int32 [G] rows of each group, at most R in all. Groups may be empty.
      implementation: a key of `IMPLEMENTATIONS`, or "auto" for the default of the platform.

    Returns:
      [R, M] in the dtype of `x`, named "grouped_swiglu" for the policies of `jax.checkpoint` together with what the
      backward needs. Products accumulate in float32 and are rounded to the dtype of `x`; the activation
      is float32. Rows behind the last group are 0.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown implementation.
      NotImplementedError: the chosen backend cannot serve these shapes; the message says which can.
    """
    weights = w_gate, w_up, w_down
    groups, width = group_sizes.shape[0], x.shape[-1]
    inner = w_gate.shape[-1]
    expected = (groups, width, inner), (groups, width, inner), (groups, inner, width)
    if x.ndim != 2 or tuple(w.shape for w in weights) != expected:
        raise ValueError(
            f"grouped_swiglu takes x [R, M], w_gate and w_up [G, M, F], w_down [G, F, M], group_sizes [G]; "
            f"got {x.shape}, {', '.join(str(w.shape) for w in weights)}, {group_sizes.shape}"
        )
    if any(w.dtype != x.dtype for w in weights) or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"x and the weights must share a dtype, group_sizes be int32; got {x.dtype}, "
            f"{', '.join(str(w.dtype) for w in weights)}, {group_sizes.dtype}"
        )
    return _swiglu(_resolve(implementation, x, w_gate), x, *weights, group_sizes)


def serves_few_tokens(x: Any, chosen: int, w_gate: Any, *, implementation: str = "auto") -> bool:
    """Whether `few_tokens_swiglu` serves x [R, M], of which each row has `chosen` experts, and w_gate [G, M, F].

    `implementation` is that of `grouped_swiglu`, in whose place it would be.
    """
    return _resolve(implementation, x, w_gate) == "mosaic_gpu" and mosaic_gpu.serves_few_tokens(x, chosen, w_gate)


def few_tokens_swiglu(
    x: jax.Array, ranking: jax.Array, chosen: int, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    """Every token through the SwiGLU experts that it has chosen, in two kernels, with nothing sorted: for decoding.

    Args:
      x: [R, M], bfloat16.
      ranking: int32 [R, G], all experts of each token; the first `chosen` take it.
      w_gate, w_up: [G, M, F], w_down: [G, F, M], all in the dtype of `x`.

    Returns:
      [R, chosen, M] in the dtype of `x`: bit for bit what `grouped_swiglu` on "mosaic_gpu" gives for these rows. It
      has no derivative.

    Raises:
      NotImplementedError: `serves_few_tokens` says no.
    """
    if not serves_few_tokens(x, chosen, w_gate, implementation="mosaic_gpu"):
        raise NotImplementedError(
            f"few_tokens_swiglu serves {mosaic_gpu.ROWS} tokens, {mosaic_gpu.MOST_CHOICES} choices and "
            f"{mosaic_gpu.MOST_CHOSEN_GROUPS} experts at most, got {x.shape[0]}, {x.shape[0] * chosen} and "
            f"{w_gate.shape[0]}; 'grouped_swiglu' serves every number"
        )
    return mosaic_gpu.few_tokens_swiglu(x, ranking, chosen, w_gate, w_up, w_down)


def serves_norm_and_route(x: Any, experts: int, *, implementation: str = "auto") -> bool:
    """Whether `norm_and_route` serves x [R, M] and so many experts.

    `implementation` is that of `grouped_swiglu`, which comes behind it. No other one than "mosaic_gpu" has it.
    """
    if implementation != "mosaic_gpu" and (implementation != "auto" or platform.platform() != "gpu"):
        return False
    reason = platform.why_not(lambda: router_kernel.check(x, experts))
    platform.announce("norm and router of few tokens", "XLA" if reason else "mosaic_gpu", reason or "it serves")
    return reason is None


def norm_and_route(x: jax.Array, scale: jax.Array, eps: float, router: jax.Array, chosen: int) -> tuple[jax.Array, ...]:
    """The norm before experts and the choice of their router in one kernel: for decoding.

    Args:
      x: [R, M], bfloat16.
      scale: [M], of the norm.
      eps: float, of the norm.
      router: float32 [M, G].
      chosen: how many experts a token takes.

    Returns:
      (r [R, M] = x / sqrt(mean(x^2) + eps) * scale, rounded to the dtype of `x` before and behind the scale;
      the experts of each token int32 [R, chosen], the best first, the lowest index first among equals; their
      probabilities float32 [R, chosen] in softmax(r @ router)). It has no derivative. Where a token is no number
      neither are its probabilities, and its experts are any.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: `serves_norm_and_route` says no.
    """
    if x.ndim != 2 or scale.shape != x.shape[1:] or router.ndim != 2 or router.shape[0] != x.shape[1]:
        raise ValueError(
            f"norm_and_route takes x [R, M], scale [M], router [M, G]; got {x.shape}, {scale.shape}, {router.shape}"
        )
    if router.dtype != jnp.float32 or not 1 <= chosen <= router.shape[1]:
        raise ValueError(f"the router must be float32 with {chosen} experts or more; got {router.dtype} {router.shape}")
    router_kernel.check(x, router.shape[1])
    return router_kernel.norm_and_route(x, scale, eps, router, chosen)


def _resolve(implementation, lhs, rhs):
    if implementation == "auto":
        implementation = default_implementation(lhs, rhs)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(sorted(IMPLEMENTATIONS))}")
    IMPLEMENTATIONS[implementation].check(lhs, rhs)
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(implementation, lhs, rhs, group_sizes):
    return IMPLEMENTATIONS[implementation].forward(lhs, rhs, group_sizes)


def _multiply_forward(implementation, lhs, rhs, group_sizes):
    output = checkpoint_name(IMPLEMENTATIONS[implementation].forward(lhs, rhs, group_sizes), "grouped_matmul")
    return output, (lhs, rhs, group_sizes)


def _multiply_backward(implementation, saved, d_output):
    lhs, rhs, group_sizes = saved
    return *IMPLEMENTATIONS[implementation].backward(lhs, rhs, group_sizes, d_output), None


_multiply.defvjp(_multiply_forward, _multiply_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(implementation, x, w_gate, w_up, w_down, group_sizes):
    return IMPLEMENTATIONS[implementation].swiglu_forward(x, w_gate, w_up, w_down, group_sizes, differentiated=False)[0]


def _swiglu_forward(implementation, *inputs):
    results = IMPLEMENTATIONS[implementation].swiglu_forward(*inputs, differentiated=True)
    output, residuals = checkpoint_name(results, "grouped_swiglu")
    return output, (inputs, residuals)


def _swiglu_backward(implementation, saved, d_output):
    inputs, residuals = saved
    return *IMPLEMENTATIONS[implementation].swiglu_backward(*inputs, residuals, d_output), None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
