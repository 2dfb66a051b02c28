"""The grouped product of the experts on one GPU: our kernel, plain XLA and tokamax, beside what the card allows.

    python benchmarks/grouped_matmul.py [--json=FILE] [--plot=FILE.png] [--only=CASE,...] [--skip=IMPLEMENTATION,...]

bfloat16. Errors come before times: at each shape the output and both gradients, of every 16th group of those that have
rows, against float32 products, as a ratio of Frobenius norms. A time is the median of five rounds of launches. Few rows
are bound by reading the matrices: their floor is that traffic over the bandwidth that a copy reaches on the same card,
which reading alone can exceed.
tokamax is left out, with a word, where it is missing; its block sizes are its own defaults.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import copy_bandwidth, median_ms

from pallas_kernels.grouped_matmul import grouped_matmul


class Case(NamedTuple):
    rows: int
    width: int
    columns: int
    groups: int
    zipf: bool = False
    decode: bool = False  # forward alone, against the bandwidth


TEXT_01 = dict(width=6144, columns=9216, groups=32)
SMALL = dict(width=2048, columns=2816, groups=8)
CASES = {
    "text_01": Case(8192, **TEXT_01),
    "text_01_zipf": Case(8192, **TEXT_01, zipf=True),
    "text_01_decode_32": Case(32, **TEXT_01, decode=True),
    "text_01_decode_256": Case(256, **TEXT_01, decode=True),
    "small_1b": Case(32768, **SMALL),
}


def group_sizes(case):
    """Even, or in proportion to 1 / rank with the ranks in random order."""
    share = 1 / np.arange(1, case.groups + 1) if case.zipf else np.ones(case.groups)
    sizes = np.floor(case.rows * share / share.sum()).astype(np.int32)
    sizes[: case.rows - sizes.sum()] += 1
    return np.random.default_rng(0).permutation(sizes)


def with_gradients(multiply):
    def both(lhs, rhs, sizes, d_output):
        output, vjp = jax.vjp(lambda lhs, rhs: multiply(lhs, rhs, sizes), lhs, rhs)
        return output, *vjp(d_output)

    return both


def contenders():
    found = {
        name: lambda lhs, rhs, sizes, name=name: grouped_matmul(lhs, rhs, sizes, implementation=name)
        for name in ("mosaic_gpu", "tiled_xla")
    }
    try:
        import tokamax
    except ImportError as error:
        print(f"tokamax left out: {error}")
        return found
    found[f"tokamax {tokamax.__version__}"] = lambda lhs, rhs, sizes: tokamax.ragged_dot(
        lhs, rhs, sizes, implementation="mosaic"
    )
    return found


def errors(multiply, lhs, rhs, sizes, d_output):
    """Of every 16th group that has rows; the inputs are those that are timed."""
    results = jax.jit(with_gradients(multiply))(lhs, rhs, sizes, d_output)
    bounds = np.cumsum([0, *np.asarray(sizes)])
    worst = 0.0

    @jax.jit
    def ratio(got, want):
        return jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)

    for g in np.flatnonzero(np.diff(bounds))[::16]:
        own = slice(bounds[g], bounds[g + 1])
        x, w, d = (a.astype(jnp.float32) for a in (lhs[own], rhs[g], d_output[own]))
        with jax.default_matmul_precision("highest"):
            exact = x @ w, d @ w.T, x.T @ d
        for got, want in zip((results[0][own], results[1][own], results[2][g]), exact, strict=True):
            worst = max(worst, float(ratio(got, want)))
    return worst


def measure(names, skipped):
    device = jax.devices()[0].device_kind
    bandwidth = copy_bandwidth()
    print(f"{device}, jax {jax.__version__}, a copy runs at {bandwidth / 1e12:.2f} TB/s", flush=True)
    found = {name: multiply for name, multiply in contenders().items() if name not in skipped}
    rows = []
    for name in names:
        case = CASES[name]
        keys = jax.random.split(jax.random.key(0), 3)
        lhs = jax.random.normal(keys[0], (case.rows, case.width), jnp.bfloat16)
        rhs = jax.random.normal(keys[1], (case.groups, case.width, case.columns), jnp.bfloat16)
        d_output = jax.random.normal(keys[2], (case.rows, case.columns), jnp.bfloat16)
        sizes = jnp.asarray(group_sizes(case))
        occupied = int(jnp.sum(sizes > 0))
        for implementation, multiply in found.items():
            row = dict(case=name, implementation=implementation)
            try:
                row["error"] = errors(multiply, lhs, rhs, sizes, d_output)
                wait = jax.block_until_ready
                forward_ms = median_ms(jax.jit(multiply), (lhs, rhs, sizes), wait, 10)
                row["forward_ms"] = forward_ms
                if case.decode:
                    row["of_floor"] = occupied * rhs[0].nbytes / bandwidth * 1e3 / forward_ms
                else:
                    flops = 2 * case.rows * case.width * case.columns
                    row["forward_tflops"] = flops / forward_ms / 1e9
                    both = jax.jit(with_gradients(multiply))
                    row["all_ms"] = median_ms(both, (lhs, rhs, sizes, d_output), wait, 10)
                    row["all_tflops"] = 3 * flops / row["all_ms"] / 1e9
            except Exception as error:  # a contender that cannot serve a shape
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            rows.append(row)
            print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return dict(device=device, jax=jax.__version__, bandwidth=bandwidth, rows=rows)


def plot(found, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = dict.fromkeys(row["implementation"] for row in found["rows"])
    for axes, keys, title in (
        (left, ("forward_tflops", "all_tflops"), "TFLOP/s, forward and all three products"),
        (right, ("of_floor",), "fraction of the bandwidth floor"),
    ):
        rows = [row for row in found["rows"] if keys[0] in row]
        cases = list(dict.fromkeys(row["case"] for row in rows))
        bars = [(name, key) for name in names for key in keys]
        for i, (name, key) in enumerate(bars):
            heights = [
                next((row[key] for row in rows if (row["case"], row["implementation"]) == (c, name)), 0) for c in cases
            ]
            at = np.arange(len(cases)) + (i + 0.5) / (len(bars) + 1) - 0.5
            axes.bar(at, heights, 0.9 / (len(bars) + 1), label=f"{name}{', all' if key == 'all_tflops' else ''}")
        axes.set_xticks(range(len(cases)), cases, fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"{found['device']}, bfloat16", fontsize=9)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--plot", help="draw them there")
    parser.add_argument("--only", default=",".join(CASES), help="names of cases")
    parser.add_argument("--skip", default="", help="implementations")
    arguments = parser.parse_args()
    names, skipped = arguments.only.split(","), arguments.skip.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    found = measure(names, skipped)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
