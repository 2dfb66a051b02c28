"""What each implementation serves and how exact it is, measured, as the page pallas_kernels/PARITY.md.

    python benchmarks/parity_matrix.py [--only=IMPLEMENTATION,...]

Measures on the device at hand, adds the figures to those of other devices in benchmarks/results/parity.json, and
writes the page anew. A cell is the largest ratio of Frobenius norms, error over exact result, among what its row
names: outputs against float64 loops (tests/support/oracles.py), states and gradients against the definition in float32.
On the CPU the kernels are interpreted; `mosaic_gpu` wants NPROC=8 in the environment there, and jax 0.11.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from pallas_kernels import grouped_matmul as grouped  # noqa: E402
from pallas_kernels import lightning_attention as lightning  # noqa: E402
from pallas_kernels.segments import number_segments  # noqa: E402
from pallas_kernels.softmax_attention import softmax_attention  # noqa: E402
from tests.support import oracles  # noqa: E402

RESULTS = REPOSITORY / "benchmarks/results/parity.json"
PAGE = REPOSITORY / "pallas_kernels/PARITY.md"

PACKED = [(0, 3), (1, 37), (2, 60), (0, 5), (2, 25), (3, 70)]  # (id, tokens), borders inside chunks
LIGHTNING = {
    "one document": {},
    "ragged length, 150": dict(length=150),
    "shorter than a chunk, 5": dict(length=5),
    "packed, borders anywhere, padding": dict(segments=PACKED),
    "packed, gradients": dict(segments=PACKED, gradients=True),
    "initial and final state": dict(initial=True, states=True),
    "gradients, that of the initial state too": dict(initial=True, gradients=True),
    "from the last token to the first": dict(reverse=True, initial=True),
    "steep decay, slopes 2.6 and 100": dict(slopes=(2.6, 100.0), gradients=True),
    "head_dim 128": dict(dim=128, gradients=True),
    "head_dim 96": dict(dim=96),
    "one head": dict(heads=1),
    "16 heads": dict(heads=16),
    "float32": dict(dtype="float32", gradients=True),
}
GROUPED = {
    "even groups": dict(sizes=[64, 64, 64, 64]),
    "empty, unaligned, rows of no group": dict(sizes=[3, 0, 121, 30], rows=200),
    "one group holds all": dict(sizes=[0, 200]),
    "two rows, as in decoding": dict(sizes=[0, 1, 0, 1]),
    "gradients": dict(sizes=[3, 0, 121, 30], gradients=True),
    "widths of no multiple of 64": dict(sizes=[50, 20], width=60, columns=72),
    "SwiGLU expert with gradients": dict(sizes=[40, 0, 90], swiglu=True),
    "float32": dict(sizes=[3, 0, 121, 30], dtype="float32", gradients=True),
}
SOFTMAX = {
    "one document": {},
    "packed, borders anywhere, padding": dict(segments=PACKED),
    "packed, gradients": dict(segments=PACKED, gradients=True),
    "float32": dict(dtype="float32", gradients=True),
}


def segment_ids(segments):
    return np.concatenate([np.full(n, i, np.int32) for i, n in segments])[None]


def worst(got, want):
    return max(oracles.relative_error(a, b) for a, b in zip(got, want, strict=True))


def with_gradients(function, inputs, cotangents):
    outputs, vjp = jax.vjp(function, *inputs)
    return outputs, vjp(jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, outputs))


def lightning_error(
    implementation,
    *,
    dtype="bfloat16",
    dim=64,
    heads=2,
    slopes=None,
    segments=None,
    length=192,
    initial=False,
    states=False,
    gradients=False,
    reverse=False,
):
    rng = np.random.default_rng(0)
    ids = None if segments is None else segment_ids(segments)
    length = length if ids is None else ids.shape[1]
    slopes = np.array(slopes or 0.917 * 2.0 ** -np.arange(heads), np.float32)
    inputs = [jnp.asarray(rng.normal(size=(1, length, heads * dim)), dtype) for _ in range(3)]
    state = rng.normal(size=(1, heads, dim, dim)).astype(np.float32)
    state = jnp.asarray(state if initial else 0 * state)
    cotangents = (
        jnp.asarray(rng.normal(size=(1, length, heads * dim)), dtype),
        jnp.asarray(rng.normal(size=state.shape), jnp.float32),
    )

    def attend(name, options=()):
        def run(q, k, v, state):
            return lightning.lightning_attention(
                q,
                k,
                v,
                jnp.asarray(slopes),
                segment_ids=ids,
                initial_state=state,
                reverse=reverse,
                implementation=name,
                **dict(options),
            )

        return jax.jit(lambda *inputs: with_gradients(run, inputs, cotangents) if gradients else (run(*inputs), ()))

    (output, final), got_gradients = attend(implementation)(*inputs, state)
    exact = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        (want_output, want_final), want_gradients = attend("reference")(*exact, state)
    if not reverse:
        split = (1, length, heads, dim)
        loop, _ = oracles.lightning_attention(*(np.asarray(x).reshape(split) for x in exact), slopes, ids, state)
        want_output = loop.reshape(output.shape)
    pairs = [(output, want_output)]
    if states:
        pairs.append((final, want_final))
    pairs += zip(got_gradients, want_gradients, strict=True)
    return worst(*zip(*pairs, strict=True))


def grouped_error(
    implementation, *, sizes, rows=None, width=128, columns=128, dtype="bfloat16", gradients=False, swiglu=False
):
    rng = np.random.default_rng(0)
    rows = rows or sum(sizes)
    group_sizes = np.array(sizes, np.int32)
    up, down = (len(sizes), width, columns), (len(sizes), columns, width)
    shapes = ((rows, width), up, up, down) if swiglu else ((rows, width), up)
    inputs = [jnp.asarray(0.3 * rng.normal(size=shape), dtype) for shape in shapes]
    cotangent = jnp.asarray(rng.normal(size=(rows, width if swiglu else columns)), dtype)

    def run(name):
        operation = grouped.grouped_swiglu if swiglu else grouped.grouped_matmul
        apply = lambda *inputs: operation(*inputs, group_sizes, implementation=name)  # noqa: E731
        return jax.jit(lambda *inputs: with_gradients(apply, inputs, cotangent))

    output, got = run(implementation)(*inputs)
    exact = [x.astype(jnp.float32) for x in inputs]
    want_output, want = run("reference")(*exact)
    if swiglu:
        return worst((output, *got), (want_output, *want))
    want_output = oracles.grouped_matmul(*(np.asarray(x, np.float64) for x in exact), sizes)
    return worst((output, *(got if gradients else ())), (want_output, *(want if gradients else ())))


def softmax_error(implementation, *, dtype="bfloat16", segments=None, gradients=False):
    rng = np.random.default_rng(0)
    ids = None if segments is None else number_segments(jnp.asarray(segment_ids(segments)))
    shapes = ((1, 200, 4, 128), (1, 200, 2, 128), (1, 200, 2, 128))
    inputs = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    cotangent = jnp.asarray(rng.normal(size=shapes[0]), dtype)

    def run(name):
        def apply(*inputs):
            return softmax_attention(*inputs, ids, implementation=name, block=64)

        return jax.jit(lambda *inputs: with_gradients(apply, inputs, cotangent))

    output, got = run(implementation)(*inputs)
    exact = [x.astype(jnp.float32) for x in inputs]
    _, want = run("blockwise")(*exact)
    want_output = oracles.softmax_attention(*(np.asarray(x, np.float64) for x in exact), ids)
    return worst((output, *(got if gradients else ())), (want_output, *(want if gradients else ())))


TABLES = {
    "lightning_attention": (LIGHTNING, lightning_error, list(lightning.IMPLEMENTATIONS)),
    "grouped_matmul": (GROUPED, grouped_error, list(grouped.IMPLEMENTATIONS)),
    "softmax attention": (SOFTMAX, softmax_error, ["blockwise", "cudnn", "splash"]),
}


def cell(error_of, implementation, options):
    """The error as text, or why there is none."""
    try:
        error = error_of(implementation, **options)
    except NotImplementedError as refusal:
        return f"refused: {str(refusal).split(';')[0]}"
    except RuntimeError as failure:  # cuDNN where there is no GPU
        return f"refused: {str(failure).splitlines()[0]}"
    return f"{error:.1e}"


def heading(implementation, where):
    interpreted = implementation.startswith(("mosaic", "splash", "megablox")) and where.startswith("CPU")
    return f"{implementation}, {'interpreted on ' if interpreted else ''}{where}"


def write_page(results, path):
    lines = [
        "# What is served, and how exactly",
        "",
        "Written by `benchmarks/parity_matrix.py`, which says what a cell is. Inputs are bfloat16 and head_dim is 64, "
        "128 in softmax attention, unless a row says otherwise; one rounding of a result to bfloat16 is 1.7e-3.",
    ]
    for table, (cases, _, implementations) in TABLES.items():
        columns = [(n, where) for n in implementations for where in results if n in results[where].get(table, {})]
        lines += ["", f"## {table}", "", f"| | {' | '.join(heading(*column) for column in columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        notes = {}
        for case in cases:
            texts = []
            for name, where in columns:
                text = results[where][table][name].get(case, "")
                if text.startswith("refused: "):
                    text = f"refused [{notes.setdefault(text.removeprefix('refused: '), len(notes) + 1)}]"
                texts.append(text)
            lines.append(f"| {case} | {' | '.join(texts)} |")
        lines += ["", *(f"[{number}] {note}  " for note, number in notes.items())]
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="implementations; the others keep the figures that they have")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    where = "CPU" if device.platform == "cpu" else device.device_kind
    where = f"{where}, jax {jax.__version__}"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for table, (cases, error_of, implementations) in TABLES.items():
        for name in implementations:
            if arguments.only and name not in arguments.only.split(","):
                continue
            column = results.setdefault(where, {}).setdefault(table, {})[name] = {}
            for case, options in cases.items():
                column[case] = cell(error_of, name, options)
                print(f"{table:20} {name:12} {case:42} {column[case]}", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, PAGE)


if __name__ == "__main__":
    main()
