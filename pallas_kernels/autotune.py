"""Measures the block sizes of kernels for one shape on this device, and enters the best into the tuning table.

    python -m pallas_kernels.autotune --op=grouped_matmul --shape=rows=8192,depth=6144,columns=9216,groups=32
    python -m pallas_kernels.autotune --op=lightning_attention --shape=length=8192,heads=64 --dry_run

A program of the operation and its gradients asks `block_sizes.choose` for every kernel in it. Each candidate is first
held against the definition on a short shape, then timed on the whole one; one kernel after the other, with the best
found for those before.
"""

import argparse
import collections
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sizes, platform
from pallas_kernels.grouped_matmul import api as grouped
from pallas_kernels.lightning_attention import api as lightning

_LIMITS = {"bfloat16": 1e-2, "float32": 1e-4}  # of the error, in Frobenius norms
_ROUND_SECONDS = 0.02  # a round is as many calls as fill it
_SHORT = 1024  # tokens or rows of the shape that candidates are checked on


class _Op(NamedTuple):
    """How an operation is called."""

    defaults: dict[str, int | str | None]  # of a shape; None has to be given
    implementations: dict
    inputs: Callable  # shape -> (arrays to differentiate, others)
    apply: Callable  # (arrays, others, implementation) -> output
    default: Callable  # (arrays, others) -> implementation that "auto" stands for
    shorten: Callable  # shape -> one on which the definition is fast, with the same kernels


def _random(shape, sizes):
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return tuple(jax.random.normal(key, size, shape["dtype"]) for key, size in zip(keys, sizes, strict=True))


def _lightning_inputs(shape):
    size = shape["batch"], shape["length"], shape["heads"] * shape["dim"]
    return _random(shape, [size] * 3), (jnp.geomspace(0.9, 0.004, shape["heads"], dtype=jnp.float32),)


def _lightning(arrays, others, implementation):
    return lightning.lightning_attention(*arrays, *others, implementation=implementation)[0]


def _grouped_inputs(shape):
    rows, depth, columns, groups = (shape[name] for name in ("rows", "depth", "columns", "groups"))
    sizes = np.full(groups, rows // groups, np.int32)
    sizes[: rows % groups] += 1
    return _random(shape, [(rows, depth), (groups, depth, columns)]), (jnp.asarray(sizes),)


def _grouped(arrays, others, implementation):
    return grouped.grouped_matmul(*arrays, *others, implementation=implementation)


OPS = {
    "lightning_attention": _Op(
        defaults=dict(batch=1, length=None, heads=None, dim=128, dtype="bfloat16"),
        implementations=lightning.IMPLEMENTATIONS,
        inputs=_lightning_inputs,
        apply=_lightning,
        default=lambda arrays, others: lightning.default_implementation(
            *arrays, *others, segmented=False, chunk_size=None
        ),
        shorten=lambda shape: shape | dict(batch=1, length=min(shape["length"], _SHORT)),
    ),
    "grouped_matmul": _Op(
        defaults=dict(rows=None, depth=None, columns=None, groups=None, dtype="bfloat16"),
        implementations=grouped.IMPLEMENTATIONS,
        inputs=_grouped_inputs,
        apply=_grouped,
        default=lambda arrays, others: grouped.default_implementation(*arrays),
        shorten=lambda shape: shape | dict(rows=min(shape["rows"], _SHORT), groups=min(shape["groups"], 3)),
    ),
}


class Refusal(Exception):
    """Why there is nothing to measure; one sentence for the user."""


class _Measured(NamedTuple):
    parameters: block_sizes.Parameters
    error: float
    ms: float | None  # None: it was not timed
    failure: str = ""


def parse_shape(op: str, text: str) -> block_sizes.Shape:
    """The shape that "rows=8192,depth=6144" stands for, with the defaults of `op`.

    Raises:
      Refusal: an unknown or missing field, or a value that is no size.
    """
    defaults = OPS[op].defaults
    shape: dict[str, Any] = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise Refusal(f"--shape of {op} has the fields {', '.join(defaults)}; got {part!r}")
        if name == "dtype":
            if value not in _LIMITS:
                raise Refusal(f"dtype is one of {', '.join(_LIMITS)}; got {value!r}")
            shape[name] = value
        elif value.isdecimal() and int(value) > 0:
            shape[name] = int(value)
        else:
            raise Refusal(f"{name} is a positive number; got {value!r}")
    if missing := [name for name, value in shape.items() if value is None]:
        raise Refusal(f"--shape of {op} lacks {', '.join(missing)}")
    return shape


def _program(op, implementation, *, backward):
    """A function of (arrays, others) that was never traced: the output, or the output and all gradients."""

    def forward(arrays, others):
        return OPS[op].apply(arrays, others, implementation)

    def both(arrays, others):
        output, vjp = jax.vjp(lambda arrays: forward(arrays, others), arrays)
        return output, vjp(jnp.ones_like(output))

    return jax.jit(both if backward else forward)


def _choices(op, implementation, shape, *, backward):
    """The choices of the implementation in a program, in the order in which it asks; repeated where it does."""
    inputs = jax.eval_shape(lambda: OPS[op].inputs(shape))
    jax.clear_caches()  # what is cached does not ask
    with block_sizes.recorded() as record:
        _program(op, implementation, backward=backward).trace(*inputs)
    return [choice for choice in record if choice.kernel.implementation == implementation]


def resolve(op: str, implementation: str, shape: block_sizes.Shape) -> str:
    """The name of the implementation to tune.

    Raises:
      Refusal: it is unknown, or cannot serve the shape here, or is only interpreted.
    """
    implementations = OPS[op].implementations
    if implementation not in ("auto", *implementations):
        raise Refusal(
            f"--implementation of {op} is auto or one of {', '.join(implementations)}; got {implementation!r}"
        )
    arrays, others = jax.eval_shape(lambda: OPS[op].inputs(shape))
    if implementation == "auto":
        implementation = OPS[op].default(arrays, others)
    if platform.platform() == "cpu" and implementation not in ("reference", "chunked_xla", "tiled_xla"):
        raise Refusal(f"{implementation} is interpreted on the CPU: there is nothing to measure without its device")
    try:
        jax.eval_shape(lambda *inputs: OPS[op].apply(*inputs, implementation), arrays, others)
    except (NotImplementedError, ValueError) as error:
        raise Refusal(str(error)) from error
    return implementation


class _Job(NamedTuple):
    """Settings shared by all measurements of an implementation."""

    op: str
    implementation: str
    shape: block_sizes.Shape
    rounds: int
    want: list[np.ndarray]  # output and all gradients by the definition, on a short shape


def job(op: str, implementation: str, shape: block_sizes.Shape, rounds: int) -> _Job:
    """A `_Job`, with the definition computed."""
    inputs = OPS[op].inputs(OPS[op].shorten(shape))
    return _Job(op, implementation, shape, rounds, _leaves(_program(op, "reference", backward=True)(*inputs)))


def measure(
    job: _Job, kernel: block_sizes.Kernel, parameters: block_sizes.Parameters, found: dict, *, backward: bool
) -> _Measured:
    """Error and time of a kernel with `parameters`.

    Args:
      found: parameters of other kernels, by kernel.
      backward: whether gradients are timed too.
    """
    op = OPS[job.op]
    inputs = op.inputs(job.shape)

    def program(*, backward=backward):
        jax.clear_caches()  # what is cached does not ask
        return _program(job.op, job.implementation, backward=backward)

    try:
        with block_sizes.forced(found | {kernel: parameters}):
            with block_sizes.recorded() as asked:
                short = program(backward=True)(*op.inputs(op.shorten(job.shape)))
            error = _error(_leaves(short), job.want)
            run = program().lower(*inputs).compile()
        results = run(*inputs)
        if not all(choice.offers(parameters) for choice in asked if choice.kernel == kernel):
            # The short shape has no room for these parameters: they are held against what is chosen without them.
            with block_sizes.forced(found):
                error = max(error, float(_difference(results, program()(*inputs))))
        if not error <= _LIMITS[str(job.shape["dtype"])]:
            return _Measured(parameters, error, None, f"wrong: error {error:.1e}")
        return _Measured(parameters, error, _median_ms(run, inputs, job.rounds))
    except Exception as failure:  # a block that this chip has no room for fails in its compiler, in many ways
        reason = f"{type(failure).__name__}: {str(failure).splitlines()[0][:90]}"
        return _Measured(parameters, float("nan"), None, reason)


@jax.jit
def _difference(got, want):
    """`_error`, of results that are too large for the host."""

    def ratio(got, want):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        return jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-30)

    errors = jnp.stack(jax.tree.leaves(jax.tree.map(ratio, got, want)))
    return jnp.where(jnp.all(jnp.isfinite(errors)), jnp.max(errors), jnp.inf)


def _leaves(results):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(results)]


def _error(got, want):
    """The largest ratio of Frobenius norms."""
    errors = [float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)) for a, b in zip(got, want, strict=True)]
    return max(errors) if all(np.isfinite(errors)) else float("inf")


def _median_ms(run, inputs, rounds):
    def seconds(calls):
        start = time.perf_counter()
        for _ in range(calls):
            last = run(*inputs)
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / calls

    calls = max(1, round(_ROUND_SECONDS / seconds(1)))
    return 1e3 * statistics.median(seconds(calls) for _ in range(rounds))


def _measure_all(job, choice, found, *, backward):
    """`measure` of every candidate, the heuristic's first, and how far it is."""
    candidates = [choice.heuristic, *(c for c in choice.candidates if c != choice.heuristic)]
    measured, start = [], time.monotonic()
    for number, candidate in enumerate(candidates, 1):
        measured.append(measure(job, choice.kernel, candidate, found, backward=backward))
        best = min((m.ms for m in measured if m.ms is not None), default=float("nan"))
        left = (time.monotonic() - start) / number * (len(candidates) - number)
        print(
            f"{choice.kernel.name}: {number} of {len(candidates)}, best {best:.4g} ms, {left:.0f} s left ",
            end="\r" if sys.stderr.isatty() else "\n",
            file=sys.stderr,
            flush=True,
        )
    return measured


def _table_of(choice, measured):
    lines = [f"{choice.kernel.op} {choice.kernel.implementation}, {choice.kernel.name}: {_text(choice.shape)}"]
    for m in sorted(measured, key=lambda m: m.ms or float("inf")):
        result = m.failure or f"{m.ms:9.4f} ms  error {m.error:.1e}"
        lines.append(f"  {_text(m.parameters):40} {result}{'  heuristic' if m is measured[0] else ''}")
    return "\n".join(lines)


def _text(parameters):
    return " ".join(f"{name}={value}" for name, value in parameters.items())


def _check_writable(path: Path):
    """That a table cannot be written is known before minutes of measuring."""
    try:
        block_sizes.check_writable(path)
    except OSError as error:
        raise Refusal(f"cannot write {path} ({error.strerror}): name another file with --table") from error


def _plan(op, implementation, shape, *, forward_alone):
    """[(choice, whether gradients are timed too)], one for each kernel of the implementation."""
    in_forward = collections.Counter(choice.kernel for choice in _choices(op, implementation, shape, backward=False))
    asked = _choices(op, implementation, shape, backward=not forward_alone)
    if not asked:
        raise Refusal(f"{implementation} of {op} has nothing to tune on this device, {block_sizes.device()}")
    in_all = collections.Counter(choice.kernel for choice in asked)
    # A kernel of the forward alone is timed in it, where it counts for most.
    return [(c, in_all[c.kernel] > in_forward[c.kernel]) for c in {c.kernel: c for c in asked}.values()]


def tune(
    op: str,
    shape: str,
    *,
    implementation: str = "auto",
    table: str | None = None,
    forward_alone: bool = False,
    rounds: int = 7,
    dry_run: bool = False,
) -> None:
    """See the head of this file.

    Args:
      op: a key of `OPS`.
      shape: text, as `parse_shape` takes it.
      table: a path instead of `block_sizes.table_path()`.
      forward_alone: tune what the forward uses, as in decoding.
      rounds: a time is the median of so many.
      dry_run: say what there is to tune, and stop.

    Raises:
      Refusal: there is nothing to measure, or the table cannot be written.
      tuning.TableError: the table cannot be read.
    """
    if op not in OPS:
        raise Refusal(f"--op is one of {', '.join(OPS)}; got {op!r}")
    sizes = parse_shape(op, shape)
    path = Path(table) if table else block_sizes.table_path()
    if not dry_run:
        _check_writable(path)
    implementation = resolve(op, implementation, sizes)
    plan = _plan(op, implementation, sizes, forward_alone=forward_alone)
    print(f"{block_sizes.device()}, jax {jax.__version__}, {implementation}, table {path}", flush=True)
    if dry_run:
        for choice, _ in plan:
            note = f"and {len(choice.candidates)} candidates"
            print(_table_of(choice, [_Measured(choice.heuristic, 0.0, None, note)]))
        return
    own, found = job(op, implementation, sizes, rounds), {}
    for choice, backward in plan:
        measured = _measure_all(own, choice, found, backward=backward)
        print(_table_of(choice, measured), flush=True)
        timed = [m for m in measured if m.ms is not None]
        if not timed:
            raise Refusal(f"no candidate of {choice.kernel.name} is right and runs: nothing is entered for it")
        best = min(timed, key=lambda m: m.ms)
        found[choice.kernel] = best.parameters
        block_sizes.store(path, choice.kernel, choice.shape, best.parameters, round(best.ms, 5))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", required=True, help=" or ".join(OPS))
    parser.add_argument("--shape", required=True, help="fields and sizes, as above")
    parser.add_argument("--implementation", default="auto", help="instead of the default of this device")
    parser.add_argument("--table", help=f"instead of the one in the package, or that ${block_sizes.VARIABLE} names")
    parser.add_argument("--forward_alone", action="store_true", help="tune what the forward uses, as in decoding")
    parser.add_argument("--rounds", type=int, default=7, help="a time is the median of so many")
    parser.add_argument("--dry_run", action="store_true", help="say what there is to tune, and stop")
    try:
        tune(**vars(parser.parse_args(argv)))
    except (Refusal, block_sizes.TableError) as refusal:
        sys.exit(f"python -m pallas_kernels.autotune: {refusal}")


if __name__ == "__main__":
    main()
