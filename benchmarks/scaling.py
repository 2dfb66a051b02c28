"""Where communication would bind on 1,000 to 10,000 chips: the page benchmarks/SCALING.md.

    python benchmarks/scaling.py [--only=NAME;...] [--keep=FOLDER] [--write]

Compiles the training step of Text-01 for slices of v5p, which needs libtpu and no TPU, and keeps what its collectives
put on the links in benchmarks/results/scaling.json. Page and plot are made anew from all that is kept there; `--write`
does that alone. A program takes three to eight minutes on two cores. With `--keep` the optimized program is kept in
that folder, and read there if it is there already.
"""

import argparse
import importlib.metadata
import json
import math
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results/scaling.json"
PLOT = REPOSITORY / "benchmarks/results/scaling.png"
PAGE = REPOSITORY / "benchmarks/SCALING.md"

# v5p by its data sheet, https://docs.cloud.google.com/tpu/docs/v5p (read in November 2026): 459 TFLOP/s in bfloat16;
# 1200 GB/s over the six links of a chip, both directions together; 50 Gbit/s of a chip to other slices.
FLOPS_PER_SECOND = 459e12
LINK_BYTES_PER_SECOND = 1200e9 / 6 / 2
NETWORK_BYTES_PER_SECOND = 50e9 / 8
LARGEST_SLICE = 6144

MILLION = 2**20
TEXT_01 = "model.expert_buffer=2.0", "training.stages=[]", "training.batch_ramp=[]"
# Name: (what is shown, topology, settings in addition to TEXT_01)
PROGRAMS = {
    "8k": ("8k, 16M tokens", "v5p:8x8x16", "mesh.data=1 mesh.fsdp=64 mesh.expert=16"),
    "128k": (
        "128k, 16M tokens",
        "v5p:8x8x16",
        "mesh.data=1 mesh.fsdp=8 mesh.expert=16 mesh.seq=8 training.sequence_length=131072",
    ),
    "1M": (
        "1M, 16M tokens",
        "v5p:8x8x16",
        "mesh.data=1 mesh.fsdp=1 mesh.expert=16 mesh.seq=64 training.sequence_length=1048576",
    ),
    "8k, expert=8": ("8k, 16M tokens, experts over 8 chips", "v5p:8x8x16", "mesh.data=1 mesh.fsdp=128 mesh.expert=8"),
    "8k, two slices": (
        "8k, 32M tokens, two slices",
        "v5p:8x8x16:2",
        "mesh.data=2 mesh.fsdp=64 mesh.expert=16 training.batch_tokens=33554432",
    ),
    "8k, 4096 chips": (
        "8k, 32M tokens",
        "v5p:16x16x16",
        "mesh.data=1 mesh.fsdp=256 mesh.expert=16 training.batch_tokens=33554432",
    ),
    "8k, 4096 chips, seq=16": (
        "8k, 16M tokens, sequences over 16 chips",
        "v5p:16x16x16",
        "mesh.data=1 mesh.fsdp=16 mesh.expert=16 mesh.seq=16",
    ),
}


def versions():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))


def measure(name, keep):
    """The entry of RESULTS for a program."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import numpy as np

    from mmx_jax import sharding
    from mmx_jax.analysis import aot, aot_training, hlo_collectives, interconnect
    from mmx_jax.config import io as config_io
    from mmx_jax.models import flops
    from mmx_jax.training import schedule

    _, topology, settings = PROGRAMS[name]
    config = config_io.load_config(REPOSITORY / "configs/minimax_text_01.py")
    config = config_io.apply_overrides(config, [*TEXT_01, *settings.split()])
    mesh = sharding.make_mesh(config.mesh, aot.topology_devices(topology))
    kept = Path(keep, name.replace(", ", "_").replace(" ", "_") + ".hlo") if keep else None
    if kept and kept.exists():
        peak, _, text = kept.read_text().partition("\n")
    else:
        with aot.compiling_for(mesh, topology):
            program = aot_training.lower_step(config, mesh).compile()
        peak, text = aot.peak_bytes(program.memory_analysis()), program.as_text()
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(f"{peak}\n{text}")

    one, slices = aot.split_slices(topology)
    torus = interconnect.Torus.of_v5p([int(size) for size in one.split(":")[1].split("x")])
    mesh_sizes = dict(mesh.shape) | {"data": mesh.shape["data"] // slices}
    chips = math.prod(torus.sizes)
    coords = np.array([device.coords for device in mesh.devices.flat[:chips]])
    step = schedule.plan_step(config.training, 0)
    length = step.stage.sequence_length
    return {
        "topology": topology,
        "mesh": dict(mesh.shape),
        "chips": chips * slices,
        "slices": slices,
        "length": length,
        "tokens": step.rows * length // (chips * slices),
        "peak": int(peak),
        "flops_per_token": flops.training_flops_per_token(config.model, length),
        "forward_flops_per_token": sum(flops.forward_flops(config.model, length).values()),
        "loads": [
            load._asdict()
            for load in interconnect.loads(hlo_collectives.operations(text), mesh_sizes, coords, torus, slices)
        ],
        "versions": versions(),
    }


def compute_seconds(program, tokens):
    """Of one step at the peak: forward, forward again for the backward pass (`remat=full`), and backward."""
    return tokens * (program["flops_per_token"] + program["forward_flops_per_token"]) / FLOPS_PER_SECOND


def seconds(load):
    """The least time of a load on its links, or on the network between slices."""
    slow = load["kind"].startswith("slices-")
    return load["link_bytes"] / (NETWORK_BYTES_PER_SECOND if slow else LINK_BYTES_PER_SECOND)


CLASSES = ("tokens to experts", "weights and gradients", "keys and values", "lightning states", "between slices")


def class_of(load):
    """Which of `CLASSES` a load is of; each grows with other numbers (`extrapolate`)."""
    kind, axes = load["kind"], tuple(load["axes"])
    if kind.startswith("slices-"):
        return "between slices"
    if kind == "collective-permute" and axes == ("seq",):
        return "keys and values"
    if kind in ("ragged-all-to-all", "all-to-all", "collective-permute"):
        return "tokens to experts"
    if kind == "all-gather" and axes == ("seq",) and load["dtype"] == "f32":
        return "lightning states"
    return "weights and gradients"


def by_class(program):
    """{class: seconds} of one step."""
    total = dict.fromkeys(CLASSES, 0.0)
    for load in program["loads"]:
        total[class_of(load)] += seconds(load)
    return total


def extrapolate(program, *, chips, tokens, seq=None, slices=1, network=0.0):
    """{class: seconds} of one step of a compiled program on other chips.

    The mesh grows along fsdp or seq and the axis of the experts stays. Then what goes over a link is, for

    - tokens to experts: as the tokens of a chip;
    - weights and gradients: what a chip has not, of the same whole: as 1 - 1/(fsdp * seq);
    - keys and values: as the tokens of all chips that share a row, since a chip meets all keys of its rows;
    - lightning states: one of every chip that shares a row, for each row: as the tokens of a chip times seq squared;
    - between slices: of the gradients, which the chips of a slice divide.

    Args:
      tokens: of one chip.
      seq: chips that share a row.
      network: seconds of the network that two slices of 1024 chips need.
    """
    mesh = program["mesh"]
    seq = mesh["seq"] if seq is None else seq

    def missing(slice_chips):
        """The part of the weights that a chip gathers."""
        return 1 - mesh["expert"] / slice_chips

    rows = tokens * seq / (program["tokens"] * mesh["seq"])
    factors = {
        "tokens to experts": tokens / program["tokens"],
        "weights and gradients": missing(chips // slices) / missing(program["chips"] // program["slices"]),
        "keys and values": rows,
        "lightning states": rows * seq / mesh["seq"],
    }
    total = {name: size * factors.get(name, 0.0) for name, size in by_class(program).items()}
    total["between slices"] = network * 1024 / (chips // slices) * 2 * (slices - 1) / slices
    return total


def slices_for(chips):
    return math.ceil(chips / LARGEST_SLICE)


CHIPS = 1024, 2048, 4096, 6144, 8192, 10240
# Tokens of a step that do not grow with the chips: (what is shown, tokens, program, chips that share a row).
FIXED = (
    ("8k, 16M tokens", 16 * MILLION, lambda chips: ("8k", 1) if chips <= 2048 else ("8k, 4096 chips, seq=16", 16)),
    ("8k, 128M tokens", 128 * MILLION, lambda chips: ("8k", 1)),
    ("1M, 16M tokens", 16 * MILLION, lambda chips: ("1M", chips // 16)),
    ("1M, 128M tokens", 128 * MILLION, lambda chips: ("1M", 64)),
)


def fixed_batch(results, tokens, program_for, chips):
    """(tokens of a chip, seconds of computing, {class: seconds}) where a step has `tokens` on all chips together."""
    name, seq = program_for(chips)
    each, network = tokens / chips, by_class(results["8k, two slices"])["between slices"]
    found = extrapolate(results[name], chips=chips, tokens=each, seq=seq, slices=slices_for(chips), network=network)
    return each, compute_seconds(results[name], each), found


def binds_at(results, tokens, program_for):
    """The fewest chips, in cubes of 64, on which sending takes longer than computing where the tokens are fixed."""
    for chips in range(1024, 10240 + 1, 64):
        _, computing, parts = fixed_batch(results, tokens, program_for, chips)
        if sum(parts.values()) > computing:
            return chips
    raise ValueError("communication binds nowhere up to 10,240 chips")


def fewest_tokens(program):
    """Tokens of a chip at which communication takes as long as computing at the peak; only tokens and weights count."""
    parts, tokens = by_class(program), program["tokens"]
    spare = compute_seconds(program, tokens) - parts["tokens to experts"]
    return parts["weights and gradients"] / spare * tokens


INTRODUCTION = """\
# Where communication would bind on 1,000 to 10,000 chips

Text-01 in training on v5p: AdamW, float32 master weights, bfloat16 products, layers computed again in the backward
pass. Written by `python benchmarks/scaling.py`. Nothing here ran on a TPU.

- **From compiled programs**: which collectives there are, how often they run, their bytes, and the axes of mesh and
  torus that they run over (groups of devices in the optimized program).
- **From formulas**: bytes over the busiest link in one direction (`mmx_jax/analysis/interconnect.py`: by the
  algorithms that need the fewest, on a torus that is closed and not twisted, experts chosen evenly, no latency), and
  FLOPs (`mmx_jax/models/flops.py`; a third more for what is computed again).
- **From the [data sheet](https://docs.cloud.google.com/tpu/docs/v5p)**: 459 TFLOP/s a chip; 1200 GB/s over six links
  in both directions, so 100 GB/s over a link in one; 50 Gbit/s a chip between slices. All times are the least that
  these allow, for computing as for sending. Chips that compute at half of their peak have twice the time to send.
- **Extrapolated**: everything in the tables below "What it says".

![scaling](results/scaling.png)

## What was compiled

Seconds of a step. Collectives by what they carry, added up as if none ran beside another ("together"), and the busiest
axis of the torus alone, which is what remains if all of them run side by side. Peak memory is that of programs whose
gradients of experts waited for the end of a round of the loop over blocks; today's is in TOPOLOGIES.md.
"""

GROWING = """
## Tokens grow with the chips

As many tokens a chip as compiled (16,384), rows over as many chips, `fsdp` growing inside a slice, slices of up to
6,144 chips joined by `data`. Extrapolated from the programs above, as below.
"""

FIXED_TOKENS = """
## Tokens of a step are fixed

Extrapolated: tokens to experts go with the tokens of a chip; weights and gradients with what a chip has not, of the
same whole; keys and values with the tokens of all chips that share a row; lightning states with those, times the chips;
what goes between slices is divided among the chips of a slice. Rows of 8k lie over 16 chips where there are fewer rows
than chips; rows of 1M over all chips but for the 16 of the experts (16M tokens), or over 64 (128M). That all this
divides and fits is not looked at.
"""


def findings(results):
    """What the figures say, in a list."""
    base, long, short = results["8k"], results["1M"], results["8k, 4096 chips, seq=16"]
    parts, narrow = by_class(base), by_class(results["8k, expert=8"])
    fewest, wide = fewest_tokens(base), by_class(results["8k, 4096 chips"])
    exposed = sum(parts.values()) / compute_seconds(base, base["tokens"])
    guess = extrapolate(base, chips=4096, tokens=results["8k, 4096 chips"]["tokens"])
    return f"""
## What it says

- **Weights and gradients** take {parts["weights and gradients"]:.2f} s a step however many tokens and chips there are:
  it is the same model that is gathered. So tokens of a chip decide, not chips.
- **Tokens to experts** take {parts["tokens to experts"]:.2f} s beside {compute_seconds(base, base["tokens"]):.2f} s of
  computing, and go with the tokens: the same part at every scale, and the largest. On a ring of 16 chips a token passes
  4 links on average. Experts over 8 chips halve that to {narrow["tokens to experts"]:.2f} s, for
  {narrow["weights and gradients"]:.2f} s of weights, and take less memory.
- **Communication binds** at 8k below {fewest:,.0f} tokens a chip, where all collectives together take as long as
  computing: with 128M tokens a step, the report's last batch, beyond {128 * MILLION / fewest:,.0f} chips. With 16M
  tokens rows are fewer than chips before that; divided rows make it {binds_at(results, *FIXED[0][1:]):,} chips, and at
  1M, by keys and values, {binds_at(results, *FIXED[2][1:]):,}. That is without latency, and if all runs beside
  computing: what does not is added, up to {exposed:.0%} at 16,384 tokens.
- **At 1M tokens** keys and values go round {long["mesh"]["seq"]} chips, {by_class(long)["keys and values"]:.2f} s
  beside {compute_seconds(long, long["tokens"]):.2f} s. A chip meets all keys of its rows: more chips for a row have
  less to compute and no less to receive. `seq` lies over two axes of the torus in their order, not as a ring of
  neighbours, so that some hops pass several links. Keys that cannot meet a query travel all the same.
- **Lightning states**, one of every chip that shares a row: {by_class(long)["lightning states"]:.2f} s at 1M, but
  {by_class(short)["lightning states"]:.2f} s where rows of 8k lie over 16 chips, 512 tokens each. More chips for short
  rows are no remedy.
- **Between slices** go the sums of gradients alone, of which a chip has its part:
  {by_class(results["8k, two slices"])["between slices"]:.2f} s for two slices of 1,024 chips, twice that at most for
  many.
- The gradient of one of the experts' three matrices (`down`) and those of embedding and head are all-reduces of the
  whole where a reduce-scatter would do, half of their bytes: {wasted(base):.2f} s.

How good the extrapolation is, where it can be seen: from the program for 1,024 chips it gives
{guess["tokens to experts"]:.2f} s of tokens and {guess["weights and gradients"]:.2f} s of weights for 4,096 chips with
half of the tokens each; compiled, they are {wide["tokens to experts"]:.2f} and {wide["weights and gradients"]:.2f}
s."""


def wasted(program):
    """Seconds of all-reduces over the axes that divide parameters, above those of reduce-scatters."""
    return sum(
        seconds(load) / 2 for load in program["loads"] if load["kind"] == "all-reduce" and "fsdp" in load["axes"]
    )


def write_page(results, path=PAGE):
    heads = " | ".join(CLASSES)
    lines = [
        INTRODUCTION,
        "| program | chips | tokens a chip | peak memory | PFLOP a chip | computing | "
        f"{heads} | together | busiest axis |",
        "|---" * (8 + len(CLASSES)) + "|",
    ]
    for name, program in results.items():
        computing = compute_seconds(program, program["tokens"])
        chips = f"{program['chips']:,}, `{program['topology']}` | {program['tokens']:,}"
        chips += f" | {program['peak'] / 2**30:.1f} GiB | {computing * FLOPS_PER_SECOND / 1e15:.2f}"
        lines.append(f"{_row(PROGRAMS[name][0], chips, computing, by_class(program))} {busiest_axis(program):.2f} |")
    lines += ["", "Links of the first:", "", *_loads_table(results["8k"])]
    lines += ["", "Of two slices:", "", *_loads_table(results["8k, two slices"])]
    lines += ["", "Of rows of 1M:", "", *_loads_table(results["1M"])]
    lines += [findings(results), GROWING]
    lines += [f"| | chips | computing | {heads} | together |", "|---" * (4 + len(CLASSES)) + "|"]
    for name in ("8k", "128k", "1M"):
        program = results[name]
        for chips in CHIPS:
            title = f"{name}, {chips * program['tokens'] // MILLION}M tokens"
            computing = compute_seconds(program, program["tokens"])
            lines.append(_row(title, f"{chips:,}", computing, growing_batch(results, name, chips)))
    lines += [FIXED_TOKENS, f"| | chips | tokens a chip | computing | {heads} | together |"]
    lines.append("|---" * (5 + len(CLASSES)) + "|")
    for title, tokens, program_for in FIXED:
        for chips in CHIPS:
            each, computing, parts = fixed_batch(results, tokens, program_for, chips)
            lines.append(_row(title, f"{chips:,} | {each:,.0f}", computing, parts))
    lines += ["", "## Programs", ""]
    for name, program in results.items():
        title, topology, settings = PROGRAMS[name]
        flags = " ".join(f"--set {setting}" for setting in (*TEXT_01, *settings.split()))
        command = f"python train.py --dry_run --config=configs/minimax_text_01.py --topology={topology} {flags}"
        lines.append(f"- {title}: `{command}` ({program['versions']})")
    path.write_text("\n".join(lines) + "\n")


def growing_batch(results, name, chips):
    """{class: seconds} of a program with as many tokens a chip on other chips."""
    network = by_class(results["8k, two slices"])["between slices"]
    program = results[name]
    return extrapolate(program, chips=chips, tokens=program["tokens"], slices=slices_for(chips), network=network)


def busiest_axis(program):
    """Seconds of the axis of the torus, or of the network, that has most to carry."""
    axes = {}
    for load in program["loads"]:
        for axis in load["torus_axes"] or ["network"]:
            axes[axis] = axes.get(axis, 0.0) + seconds(load)
    return max(axes.values())


def _row(title, chips, computing, parts):
    cells = " | ".join(_cell(parts[kind]) for kind in CLASSES)
    return f"| {title} | {chips} | {computing:.2f} | {cells} | {sum(parts.values()):.2f} |"


def _cell(size):
    return f"{size:.2f}" if size >= 0.005 else ""


def _loads_table(program):
    yield "| collective | over the mesh's | over the torus's | a step | results, GB | over a link, GB | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for load in sorted(program["loads"], key=seconds, reverse=True):
        if seconds(load) >= 0.001:
            axes = ", ".join("xyz"[axis] for axis in load["torus_axes"]) or "network"
            yield (
                f"| {load['kind']}, {load['dtype']} | {', '.join(load['axes'])} | {axes} | {load['count']:,} | "
                f"{load['bytes'] / 1e9:.2f} | {load['link_bytes'] / 1e9:.2f} | {seconds(load):.3f} |"
            )


def draw(results, path=PLOT):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names, bottom = list(results), [0.0] * len(results)
    for kind in CLASSES:
        heights = [by_class(program)[kind] for program in results.values()]
        left.barh(range(len(names)), heights, left=bottom, label=kind)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for i, program in enumerate(results.values()):
        computing = compute_seconds(program, program["tokens"])
        left.plot([computing] * 2, [i - 0.4, i + 0.4], color="black", label=None if i else "computing")
    left.set_yticks(range(len(names)), [f"{PROGRAMS[name][0]}\n{results[name]['chips']:,} chips" for name in names])
    left.invert_yaxis()
    left.set_xlabel("seconds of a step, at the peak of chips and links")
    left.set_title("compiled programs")
    left.legend()
    for i, (title, tokens, program_for) in enumerate(FIXED):
        found = [fixed_batch(results, tokens, program_for, chips) for chips in CHIPS]
        right.plot(CHIPS, [computing for _, computing, _ in found], f"C{i}--")
        right.plot(CHIPS, [sum(parts.values()) for _, _, parts in found], f"C{i}-o", markersize=3, label=title)
    for i, names in enumerate((["8k", "8k, 4096 chips, seq=16"], [], ["1M"], [])):
        points = [(results[name]["chips"], sum(by_class(results[name]).values())) for name in names]
        right.plot(*zip(*points, strict=True), f"C{i}s", markersize=9) if points else None
    right.set(xscale="log", yscale="log", xlabel="chips", ylabel="seconds of a step")
    right.set_xticks(CHIPS, [f"{chips // 1024}k" for chips in CHIPS])
    right.set_xticks([], minor=True)
    right.set_title("tokens fixed: sending (solid, squares compiled),\ncomputing (dashed)")
    right.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of programs, with semicolons between them")
    parser.add_argument("--keep", help="folder of optimized programs")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    names = arguments.only.split(";") if arguments.only else list(PROGRAMS)
    if unknown := set(names) - set(PROGRAMS):
        parser.error(f"unknown {'; '.join(sorted(unknown))}; there are {'; '.join(PROGRAMS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if arguments.write else names:
        results[name] = measure(name, arguments.keep)
        results = {name: results[name] for name in PROGRAMS if name in results}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)
    draw(results)


if __name__ == "__main__":
    main()
