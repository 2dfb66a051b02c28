"""Lightning attention on one GPU: every implementation that serves it, beside fla, with what the memory would allow.

    python benchmarks/lightning_attention.py [--json=FILE] [--plot=FILE.png] [--lengths=...] [--skip=chunked_xla,fla]
                                             [--peer_seconds=1200]

Heads of 128, bfloat16. Errors come before times: outputs, final state and gradients at each timed shape against
`chunked_xla` in float32 (which the tests hold against a float64 recurrence), as a ratio of Frobenius norms. Rows that
leave no room for float32 are compared with themselves: with the right half alone, from the state of the left half.
A time is the median of five rounds of launches, each round waited for as a whole. The floor of a shape is the traffic
that no implementation can avoid, 4 tensors forward and 11 forward and backward, over the bandwidth that the best copy
reaches on the same card. fla (flash-linear-attention) runs in a process of its own and is left out, with a word, where
it is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import copy_bandwidth, median_ms

DIM = 128
EXACT = 32768 * 64  # tokens times heads that leave room for float32 intermediates
DIFFERENTIABLE = 2**26  # tokens times heads whose gradients fit into the memory of an H200 beside all that they need
WHOLE = 131072  # tokens; of longer rows a launch hands over the last token alone, for results of two would not fit
PERIOD = 8192  # tokens after which inputs repeat, up to a factor


def launches_for(length, heads):
    return max(3, min(40, (40 * 8192 * 64) // (length * heads) // 2))


def slopes_of(heads):
    from mmx_jax.layers.lightning_attention import decay_slopes

    return decay_slopes(80, 64)[0][:: 64 // heads]


def measure_jax(shapes, skipped):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from pallas_kernels.lightning_attention import lightning_attention
    from pallas_kernels.platform import cdiv

    def inputs(length, heads):
        @jax.jit
        def draw(key):
            tokens = jax.random.normal(key, (min(length, PERIOD), heads * DIM), jnp.bfloat16)
            factors = jax.random.uniform(key, (cdiv(length, PERIOD), 1, 1), jnp.bfloat16, 0.5, 1.5)
            return lax.optimization_barrier(tokens) * factors

        return [draw(key).reshape(1, length, -1) for key in jax.random.split(jax.random.key(0), 4)]

    def functions(length, heads, segment_ids, implementation):
        slopes = jnp.asarray(slopes_of(heads))

        def attend(q, k, v, initial=None):
            return lightning_attention(
                q,
                k,
                v,
                slopes,
                segment_ids=segment_ids,
                initial_state=initial,
                implementation=implementation,
                chunk_size=256,
            )

        def handed_over(tokens):
            return [x[:, -1:] if length > WHOLE else x for x in tokens]

        def forward(q, k, v, initial=None):
            output, state = attend(q, k, v, initial)
            return *handed_over([output]), state

        def both(q, k, v, do):
            (output, state), vjp = jax.vjp(attend, q, k, v)
            (output,) = lax.optimization_barrier(handed_over([output]))
            return output, state, *handed_over(vjp((do, jnp.zeros_like(state))))

        return jax.jit(attend), jax.jit(forward), jax.jit(both)

    def documents(length, count):
        cuts = np.sort(np.random.default_rng(1).choice(np.arange(1, length), count - 1, replace=False))
        return jnp.asarray(np.searchsorted(cuts, np.arange(length), side="right") + 1, jnp.int32)[None]

    def errors(got, want):
        names = ("output", "state", "dq", "dk", "dv")
        ratio = jax.jit(lambda a, b: jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        return {name: float(ratio(a.ravel(), b.ravel())) for name, a, b in zip(names, got, want, strict=True)}

    def errors_of_halves(attend, q, k, v):
        half = q.shape[1] // 2

        @jax.jit
        def of_half(q, k, v, initial, begin):
            return attend(*(lax.dynamic_slice_in_dim(x, begin, half, axis=1) for x in (q, k, v)), initial)

        @jax.jit
        def of_right(a, b):
            a, b = a[:, half:].astype(jnp.float32), b.astype(jnp.float32)
            return jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.sum(b**2))

        output, state = attend(q, k, v)
        left = of_half(q, k, v, jnp.zeros_like(state), 0)[1]
        right, right_state = of_half(q, k, v, left, half)
        of_state = float(jnp.linalg.norm(state - right_state) / jnp.linalg.norm(right_state))
        return dict(output=float(of_right(output, right)), state=of_state)

    bandwidth = copy_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, a copy runs at {bandwidth / 1e12:.2f} TB/s", flush=True)

    def measure(length, heads, packed):
        size = 2 * length * heads * DIM
        segment_ids = documents(length, 8) if packed else None
        arguments = inputs(length, heads)
        want = None
        if length * heads <= EXACT:
            exact = functions(length, heads, segment_ids, "chunked_xla")[-1]
            want = exact(*(x.astype(jnp.float32) for x in arguments))
        for implementation in ("mosaic_gpu", "chunked_xla"):
            if implementation in skipped or (implementation == "chunked_xla" and length > 32768):
                continue  # hundreds of milliseconds
            attend, forward, both = functions(length, heads, segment_ids, implementation)
            row = dict(implementation=implementation, length=length, heads=heads, packed=packed)
            row["errors"] = errors_of_halves(attend, *arguments[:3]) if want is None else errors(both(*arguments), want)
            timed = [("forward", forward, arguments[:3], 4)]
            if length * heads <= DIFFERENTIABLE:
                timed.append(("both", both, arguments, 11))
            for name, function, inputs_of_it, tensors in timed:
                row[name + "_ms"] = median_ms(
                    function, inputs_of_it, jax.block_until_ready, launches_for(length, heads)
                )
                row[name + "_of_floor"] = 1e3 * tensors * size / row[name + "_ms"] / bandwidth
            yield row

    rows = []
    for shape in sorted(shapes, key=lambda shape: -shape[0] * shape[1]):  # the largest while memory is whole
        try:
            for row in measure(*shape):
                rows.append(row)
                print(describe(row), flush=True)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"T={shape[0]} H={shape[1]}: left out, the tensors do not fit into the memory of the device")
    rows.sort(key=lambda row: (row["packed"], -row["heads"], row["length"]))
    return dict(device=device, jax=jax.__version__, bandwidth=bandwidth, rows=rows)


def measure_fla(shapes):
    """Runs in a process of its own; prints one row of JSON a line."""
    import fla
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    for length, heads, packed in shapes:
        if packed:
            continue
        torch.manual_seed(0)
        q, k, v, do = (
            torch.randn(1, length, heads, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
            for i in range(4)
        )
        gamma = -torch.tensor(slopes_of(heads), device="cuda")

        def forward(q=q, k=k, v=v, gamma=gamma):
            return chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0, output_final_state=True)[0]

        def both(q=q, k=k, v=v, do=do, forward=forward):
            return torch.autograd.grad(forward(), (q, k, v), do)

        def without_gradient(forward=forward):
            with torch.no_grad():
                return forward()

        wait = lambda _: torch.cuda.synchronize()  # noqa: E731
        launches = launches_for(length, heads)
        row = dict(implementation=f"fla {fla.__version__}", length=length, heads=heads, packed=packed)
        row["forward_ms"] = median_ms(without_gradient, (), wait, launches)
        row["both_ms"] = median_ms(both, (), wait, launches)
        print(json.dumps(row), flush=True)


def peer_rows(shapes, seconds):
    """What fla reaches before its time is up: its own tuning takes minutes."""
    command = [sys.executable, __file__, "--peer", json.dumps(shapes)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            subprocess.run(command, stdout=output, stderr=errors, timeout=seconds, check=True)
        except subprocess.TimeoutExpired:
            print(f"fla left out from here on: it did not finish in {seconds} s")
        except subprocess.CalledProcessError:
            errors.seek(0)
            print(f"fla left out from here on: {errors.read().strip().splitlines()[-1]}")
        output.seek(0)
        rows = [json.loads(line) for line in output if line.startswith("{")]
    for row in rows:
        print(describe(row))
    return rows


def describe(row):
    parts = []
    for name, label in (("forward", "forward"), ("both", "with backward")):
        if name + "_ms" in row:
            parts.append(f"{label} {row[name + '_ms']:8.3f} ms")
        if name + "_of_floor" in row:
            parts.append(f"({row[name + '_of_floor']:.2f} of floor)")
    if row.get("errors"):
        parts.append(f"worst error {max(row['errors'].values()):.1e}")
    packed = "packed" if row["packed"] else ""
    return f"T={row['length']:7} H={row['heads']:3} {packed:6} {row['implementation']:12} {' '.join(parts)}"


def plot(found, path):
    """Time against length, and the fraction of the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = [row for row in found["rows"] if row["heads"] == 64 and not row["packed"]]
    for name in dict.fromkeys(row["implementation"] for row in rows):
        own = [row for row in rows if row["implementation"] == name]
        for key, style in (("forward", "-"), ("both", "--")):
            label = f"{name}, {'forward' if key == 'forward' else 'with backward'}"
            timed = [row for row in own if key + "_ms" in row]
            lengths = [row["length"] for row in timed]
            (line,) = left.loglog(lengths, [row[key + "_ms"] for row in timed], style, marker="o", label=label)
            if key + "_of_floor" in own[0]:
                values = [row[key + "_of_floor"] for row in timed]
                right.semilogx(lengths, values, style, marker="o", color=line.get_color(), label=label)
    left.set(xlabel="tokens", ylabel="ms", title=f"64 heads of {DIM}, bfloat16, {found['device']}")
    right.set(xlabel="tokens", ylabel="fraction of the memory floor", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192,32768,131072,1048576")
    parser.add_argument("--skip", default="", help="implementations, and fla")
    parser.add_argument("--peer_seconds", type=int, default=1200, help="the most that fla may take")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--plot", help="draw them there")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return measure_fla(json.loads(arguments.peer))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    lengths = [int(length) for length in arguments.lengths.split(",")]
    shapes = [(length, 64, False) for length in lengths]
    shapes += [(8192, 64, True), (32768, 8, False)]
    shapes += [(length, 32, False) for length in lengths if length * 64 > DIFFERENTIABLE]
    skipped = arguments.skip.split(",")
    # First, while the memory is free, and the length that matters most before others.
    peer_shapes = sorted((s for s in shapes if s[0] <= WHOLE), key=lambda shape: shape[0] != 8192)
    of_peer = [] if "fla" in skipped else peer_rows(peer_shapes, arguments.peer_seconds)
    found = measure_jax(shapes, skipped)
    found["rows"] += sorted(of_peer, key=lambda row: (-row["heads"], row["length"]))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
