"""The one entry point of lightning attention: validation, choice of backend, differentiation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform
from pallas_kernels.lightning_attention import chunked_xla, mosaic_tpu, reference
from pallas_kernels.lightning_attention.mosaic_gpu import api as mosaic_gpu
from pallas_kernels.lightning_attention.mosaic_gpu import decode_kernel

# A backend is a module with `check`, `documents`, `forward`, `backward` and `end_state`, as in reference.py.
IMPLEMENTATIONS = {
    "reference": reference,
    "chunked_xla": chunked_xla,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
}
_KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


def default_implementation(q: Any, k: Any, v: Any, slopes: Any, *, segmented: bool, chunk_size: int | None) -> str:
    """The choice of `implementation="auto"`: the kernel of the platform if it serves the shapes, or chunked_xla."""
    options: dict[str, Any] = dict(segmented=segmented, chunk_size=chunk_size)
    kernel = _KERNELS.get(platform.platform())
    reason = kernel and platform.why_not(lambda: IMPLEMENTATIONS[kernel].check(q, k, v, slopes, **options))
    chosen = kernel if kernel and reason is None else "chunked_xla"
    platform.announce("lightning attention", chosen, reason or f"the default on {platform.platform()}")
    return chosen


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention with per-head exponential decay (arXiv 2501.08313, section 2.2.1; 2401.04658).

    With S_0 the initial state, per row and head:

        S_t = exp(-s) S_{t-1} + k_t^T v_t        o_t = q_t S_t

    so position j contributes to t >= j with weight exp(-s (t - j)), 1 on the diagonal. Padding neither
    contributes nor counts as distance, and a document starts from a zero state, wherever it starts. The
    initial state is continued by the first document of its row and the final state is the last document's.
    The results are named "lightning_attention" for the policies of `jax.checkpoint`.

    Args:
      q, k: [B, T, H*D], v: [B, T, H*E], heads merged head-major, one floating dtype.
      slopes: float32 [H] decay rates s > 0. They are constants of the architecture: no gradient reaches them.
      segment_ids: int [B, T]; 0 is padding, a maximal run of one positive id is a document. None: one document.
      initial_state: float32 [B, H, D, E]; None is zero.
      reverse: run from the last token to the first; the initial state then enters at the right end.
      chunk_size: tokens handled at once, None: chosen from shape and device (`pallas_kernels.block_sizes`). It changes
        speed and rounding, not the function.
      implementation: a key of `IMPLEMENTATIONS`, or "auto" for the default of the platform.

    Returns:
      (output [B, T, H*E] in the dtype of `v`, final state float32 [B, H, D, E]). Outputs at padding are 0.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown implementation.
      NotImplementedError: the chosen backend cannot serve these shapes; the message says which can.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(sorted(IMPLEMENTATIONS))}")
    _validate(q, k, v, slopes, segment_ids, initial_state, chunk_size)
    options: dict[str, Any] = dict(segmented=segment_ids is not None, chunk_size=chunk_size)
    if implementation == "auto":
        implementation = default_implementation(q, k, v, slopes, **options)
    IMPLEMENTATIONS[implementation].check(q, k, v, slopes, **options)
    batch, _, width = q.shape
    heads = slopes.shape[0]
    slopes = jax.lax.stop_gradient(slopes)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, width // heads, v.shape[-1] // heads), jnp.float32)
    if reverse:
        q, k, v = (jnp.flip(x, axis=1) for x in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.flip(segment_ids, axis=1)
    documents = documents_for(implementation, segment_ids, numbered=False)
    output, state = _attend(implementation, chunk_size, q, k, v, slopes, documents, initial_state)  # pyright: ignore[reportGeneralTypeIssues]
    return (jnp.flip(output, axis=1) if reverse else output), state


def end_state(
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    segments: jax.Array | None = None,
    *,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: str,
) -> jax.Array:
    """The state alone that tokens leave behind, from a zero state on; not differentiable.

    With `reverse` False it is the final state of `lightning_attention`. With `reverse` it is what the gradient to
    the outputs, `v`, gives to the initial state where the queries are `k`: sum_i exp(-s c_i) k_i^T v_i over the
    tokens of document 1, c_i the number of real tokens up to and including i.

    Args:
      k: [B, T, H*D], v: [B, T, H*E], one floating dtype.
      slopes: float32 [H].
      segments: int32 [B, T], numbers of documents that grow along the row, 0 at padding; they need not start at 1.
        None: one document, number 1.
      chunk_size, implementation: as in `lightning_attention`; a key of `IMPLEMENTATIONS`.

    Returns:
      float32 [B, H, D, E].
    """
    documents = documents_for(implementation, segments, numbered=True)
    return IMPLEMENTATIONS[implementation].end_state(k, v, slopes, documents, reverse=reverse, chunk_size=chunk_size)


def documents_for(implementation: str, ids: jax.Array | None, *, numbered: bool) -> Any:
    """Documents in the form of the backend: of segment ids, or of numbered segments, of which 1 continues the left."""
    return None if ids is None else IMPLEMENTATIONS[implementation].documents(ids, numbered=numbered)


def serves_gated_step(dtype: jax.typing.DTypeLike, slopes: Any, state: Any, *, implementation: str = "auto") -> bool:
    """Whether `gated_step` serves projections of this dtype, slopes [H] and a state [B, H, D, D].

    `implementation` is that of `lightning_attention`, in whose place it would be.
    """
    batch, heads, dim, _ = state.shape
    q = jax.ShapeDtypeStruct((batch, 1, heads * dim), dtype)
    if implementation == "auto":
        implementation = default_implementation(q, q, q, slopes, segmented=False, chunk_size=None)
    elif implementation == "mosaic_gpu":
        mosaic_gpu.check(q, q, q, slopes, segmented=False, chunk_size=None)
    return implementation == "mosaic_gpu" and not platform.divided()


@jax.custom_vjp
def gated_step(
    projected: jax.Array, slopes: jax.Array, state: Any, scale: jax.Array, token_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token of decoding in one kernel, from the projections of a layer to what its output projection takes.

    With q, k and v behind SiLU in float32, rounded to the dtype of `projected`:

        S <- exp(-s) S + k^T v        o = q S        output = sigmoid(gate) o scale

    The norm is left: rsqrt(sum of `squares` / (H*D) + eps) of a row is a factor of `output`, and of its projection.

    Args:
      projected: bfloat16 [R, 4*H*D], q, k, v and gate of a row, each head-major; R may be more than B, the rows behind
        are not read.
      slopes: float32 [H].
      state: float32 [B, H, D, D]. The next one takes its place in memory where nothing else needs it.
      scale: [H*D], of the norm.
      token_mask: bool [B]; rows that hold no token keep their state.

    Returns:
      (output [B, H*D] in the dtype of `projected`, squares float32 [B, H*D / SQUARES], state float32 [B, H, D, D]).

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the kernel cannot serve these shapes.
    """
    batch, heads, dim, _ = state.shape
    if projected.ndim != 2 or projected.shape[0] < batch or projected.shape[1] != 4 * heads * dim:
        raise ValueError(
            f"projected must be [{batch} or more, {4 * heads * dim}] for this state; got {projected.shape}"
        )
    if slopes.shape != (heads,) or scale.shape != (heads * dim,) or state.dtype != jnp.float32:
        raise ValueError(
            f"gated_step takes slopes [H]={(heads,)}, scale [H*D]={(heads * dim,)} and a float32 state; got "
            f"{slopes.shape}, {scale.shape} and {state.dtype}"
        )
    if not serves_gated_step(projected.dtype, slopes, state, implementation="mosaic_gpu"):
        raise NotImplementedError("gated_step serves one device; 'recurrent_step' is divided over several")
    return decode_kernel.gated_step(projected, slopes, state, scale, token_mask)


def _gated_step_forward(projected, slopes, state, scale, token_mask):
    # The recurrence of one token has nothing that only a kernel could do well in a backward.
    return jax.vjp(
        lambda *inputs: reference.gated_step(*inputs, token_mask=token_mask), projected, slopes, state, scale
    )


def _gated_step_backward(vjp, cotangents):
    d_projected, d_slopes, d_state, d_scale = vjp(cotangents)
    return d_projected, jnp.zeros_like(d_slopes), d_state, d_scale, None


gated_step.defvjp(_gated_step_forward, _gated_step_backward)


def _validate(q, k, v, slopes, segment_ids, initial_state, chunk_size):
    if q.ndim != 3 or q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.ndim != 3:
        raise ValueError(f"q, k, v must be [B, T, H*D]; got {q.shape}, {k.shape}, {v.shape}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k, v must share a floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if slopes.ndim != 1 or slopes.dtype != jnp.float32:
        raise ValueError(f"slopes must be float32 [H]; got {slopes.dtype} {slopes.shape}")
    (heads,) = slopes.shape
    if q.shape[-1] % heads or v.shape[-1] % heads:
        raise ValueError(f"widths {q.shape[-1]} and {v.shape[-1]} are not multiples of the {heads} heads of slopes")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids must be [B, T]={q.shape[:2]}; got {segment_ids.shape}")
    state_shape = (q.shape[0], heads, q.shape[-1] // heads, v.shape[-1] // heads)
    if initial_state is not None and (initial_state.shape != state_shape or initial_state.dtype != jnp.float32):
        raise ValueError(
            f"initial_state must be float32 {state_shape}; got {initial_state.dtype} {initial_state.shape}"
        )
    if (chunk_size is not None and chunk_size < 1) or q.shape[1] < 1:
        raise ValueError(f"chunk_size={chunk_size} and the length {q.shape[1]} must be positive")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation, chunk_size, q, k, v, slopes, documents, initial_state):
    output, state, _ = IMPLEMENTATIONS[implementation].forward(
        q, k, v, slopes, documents, initial_state, chunk_size=chunk_size
    )
    return output.astype(v.dtype), state


def _attend_forward(implementation, chunk_size, q, k, v, slopes, documents, initial_state):
    output, state, residuals = IMPLEMENTATIONS[implementation].forward(
        q, k, v, slopes, documents, initial_state, chunk_size=chunk_size
    )
    output, state = checkpoint_name((output.astype(v.dtype), state), "lightning_attention")
    return (output, state), (q, k, v, slopes, documents, residuals)


def _attend_backward(implementation, chunk_size, saved, cotangents):
    q, k, v, slopes, documents, residuals = saved
    d_output, d_state = cotangents
    dq, dk, dv, d_initial = IMPLEMENTATIONS[implementation].backward(
        q, k, v, slopes, documents, residuals, d_output, d_state, chunk_size=chunk_size
    )
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), jnp.zeros_like(slopes), None, d_initial


_attend.defvjp(_attend_forward, _attend_backward)
