"""Definitions in NumPy float64, token by token: what everything else is held against."""

import numpy as np


def lightning_attention(q, k, v, slopes, segment_ids=None, initial_state=None):
    """The recurrence S <- exp(-s) S + k^T v, o = q S. q, k, v: [B, T, H, D]; returns (o, final state)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, _ = q.shape
    if segment_ids is None:
        segment_ids = np.ones((batch, length), int)
    decay = np.exp(-np.asarray(slopes, np.float64))[:, None, None]
    output = np.zeros(v.shape)
    states = np.zeros((batch, heads, k.shape[-1], v.shape[-1]))
    for b in range(batch):
        state = np.zeros(states.shape[1:]) if initial_state is None else np.asarray(initial_state[b], np.float64)
        document = None
        for t in range(length):
            if segment_ids[b, t] == 0:
                continue
            if document is not None and segment_ids[b, t] != document:
                state = np.zeros_like(state)
            document = segment_ids[b, t]
            state = decay * state + k[b, t, :, :, None] * v[b, t, :, None, :]
            output[b, t] = np.einsum("hd,hde->he", q[b, t], state)
        states[b] = state
    return output, states


def alibi_slopes(num_heads):
    """2^(-8 (h+1) / H), interleaved as in ALiBi where H is not a power of two."""

    def ladder(n):
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    power = 2 ** int(np.floor(np.log2(num_heads)))
    return np.array(ladder(power) + ladder(2 * power)[0::2][: num_heads - power])


def softmax_attention(q, k, v, segment_ids=None):
    """Causal grouped-query attention inside documents. q [B, T, H, D], k and v [B, T, K, D]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    if segment_ids is None:
        segment_ids = np.ones((batch, length), int)
    output = np.zeros((batch, length, heads, v.shape[-1]))
    for b in range(batch):
        for t in range(length):
            seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t] != 0]
            for h in range(heads):
                if seen:
                    scores = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(dim)
                    weights = np.exp(scores - scores.max())
                    output[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return output


def grouped_matmul(lhs, rhs, group_sizes):
    """Rows of group g times rhs[g]; rows behind the last group are zero."""
    output = np.zeros((lhs.shape[0], rhs.shape[-1]))
    row = 0
    for weight, size in zip(np.asarray(rhs, np.float64), group_sizes, strict=True):
        output[row : row + size] = np.asarray(lhs[row : row + size], np.float64) @ weight
        row += size
    return output


def grouped_swiglu(x, w_gate, w_up, w_down, group_sizes, d_output):
    """(output, gradients to x, w_gate, w_up and w_down) of (silu(x @ w_gate[g]) * (x @ w_up[g])) @ w_down[g]."""
    x, w_gate, w_up, w_down, d_output = (np.asarray(a, np.float64) for a in (x, w_gate, w_up, w_down, d_output))
    output, d_x = np.zeros_like(x), np.zeros_like(x)
    d_w_gate, d_w_up, d_w_down = (np.zeros_like(w) for w in (w_gate, w_up, w_down))
    row = 0
    for g, size in enumerate(group_sizes):
        own = slice(row, row + size)
        row += size
        gate, up = x[own] @ w_gate[g], x[own] @ w_up[g]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up
        output[own] = hidden @ w_down[g]
        d_hidden = d_output[own] @ w_down[g].T
        d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up = d_hidden * gate * sigmoid
        d_x[own] = d_gate @ w_gate[g].T + d_up @ w_up[g].T
        d_w_gate[g], d_w_up[g], d_w_down[g] = x[own].T @ d_gate, x[own].T @ d_up, hidden.T @ d_output[own]
    return output, d_x, d_w_gate, d_w_up, d_w_down


def mixture_of_experts(x, router, w_gate, w_up, w_down, k, *, capacity=None, real=None, kept=None):
    """Token by token; x [R, M]. Returns (output [R, M], experts [R, k], kept bool [R, k], probability [R, E]).

    With a capacity all first choices are served before any second choice, each in the order of the tokens;
    padding is not served at all. Or `kept` says which choices are served.
    """
    x, router, w_gate, w_up, w_down = (np.asarray(a, np.float64) for a in (x, router, w_gate, w_up, w_down))
    rows, experts = x.shape[0], router.shape[1]
    probability = np.zeros((rows, experts))
    chosen = np.zeros((rows, k), int)
    for r in range(rows):
        logits = x[r] @ router
        probability[r] = np.exp(logits - logits.max())
        probability[r] /= probability[r].sum()
        chosen[r] = sorted(range(experts), key=lambda e: (-probability[r, e], e))[:k]  # noqa: B023
    kept = np.ones((rows, k), bool) if kept is None else kept
    if capacity is not None:
        served = np.zeros(experts, int)
        for choice in range(k):
            for r in range(rows):
                wanted = real is None or real[r]
                kept[r, choice] = wanted and served[chosen[r, choice]] < capacity
                served[chosen[r, choice]] += kept[r, choice]
    output = np.zeros((rows, w_down.shape[-1]))
    for r in range(rows):
        total = sum(probability[r, e] for e in chosen[r])
        for choice, e in enumerate(chosen[r]):
            if kept[r, choice]:
                gate = x[r] @ w_gate[e]
                inner = gate / (1 + np.exp(-gate)) * (x[r] @ w_up[e])
                output[r] += probability[r, e] / total * (inner @ w_down[e])
    return output, chosen, kept, probability


def relative_error(got, want):
    """Ratio of Frobenius norms; the norm of `got` where `want` is 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = np.linalg.norm(want)
    return np.linalg.norm(got - want) / scale if scale else np.linalg.norm(got)
