"""What fits where, compiled and not run: the page benchmarks/TOPOLOGIES.md.

    python benchmarks/topologies.py [--only=NAME,...] [--write]

Runs `--dry_run --topology` of train.py or infer.py for each configuration below in a process of its own, which needs
libtpu and no TPU, and keeps what it prints in benchmarks/results/topologies.json; the page is written anew from all
that is kept there. `--write` writes the page alone. A configuration of 456B parameters takes minutes on two cores.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results/topologies.json"
PAGE = REPOSITORY / "benchmarks/TOPOLOGIES.md"

TEXT_01 = "--config=configs/minimax_text_01.py --set mesh.data=1 --set model.expert_buffer=2.0"
TRAIN = f"train.py --dry_run {TEXT_01} --set training.stages=[] --topology=v5p:8x8x16"
INFER = f"infer.py --dry_run {TEXT_01} --dtype=bfloat16"
LONG = "--batch=1 --prompt_length=1048576 --context=1048704 --prefill_chunk=8192"
SERVED = "--batch=64 --context=131072"

# What is shown, and the arguments of python.
CONFIGURATIONS = {
    "small_1b": (
        "`small_1b` (2.66B parameters, 0.87B active), training, 8k",
        "train.py --dry_run --config=configs/small_1b.py --topology=v5e:4x4 --set mesh.data=1 --set mesh.fsdp=16 "
        "--set training.batch_tokens=131072 --set training.microbatch_rows=16",
    ),
    "train_8k": ("Text-01, training, 8k, 16M tokens a step", f"{TRAIN} --set mesh.fsdp=64 --set mesh.expert=16"),
    "train_8k_32m": (
        "Text-01, training, 8k, 32M tokens a step in two micro-batches",
        f"{TRAIN} --set mesh.fsdp=64 --set mesh.expert=16 --set training.batch_tokens=33554432 "
        "--set training.microbatch_rows=2048 --set training.batch_ramp=[]",
    ),
    "train_128k": (
        "Text-01, training, 128k, sequences over 8 chips",
        f"{TRAIN} --set mesh.fsdp=8 --set mesh.expert=16 --set mesh.seq=8 --set training.sequence_length=131072",
    ),
    "train_1m": (
        "Text-01, training, 1M, sequences over 64 chips",
        f"{TRAIN} --set mesh.fsdp=1 --set mesh.expert=16 --set mesh.seq=64 --set training.sequence_length=1048576",
    ),
    "infer_1m_v5p": (
        "Text-01, a prompt of 1M, and decoding behind it",
        f"{INFER} --topology=v5p:4x4x8 {LONG} --set mesh.expert=4 --set mesh.tensor=8 --set mesh.expert_tensor=4",
    ),
    "infer_64_v5p": (
        "Text-01, 64 sequences of up to 128k",
        f"{INFER} --topology=v5p:4x4x8 {SERVED} --prompt_length=8192 --prefill_chunk=8192 --set mesh.expert=4 "
        "--set mesh.tensor=8 --set mesh.expert_tensor=4",
    ),
    "infer_1m_v6e": (
        "Text-01, a prompt of 1M, and decoding behind it",
        f"{INFER} --topology=v6e:8x16 {LONG} --set mesh.tensor=8 --set mesh.expert_tensor=16",
    ),
    "infer_64_v6e": (
        "Text-01, 64 sequences of up to 128k",
        f"{INFER} --topology=v6e:8x8 {SERVED} --prompt_length=1024 --prefill_chunk=1024 --set mesh.tensor=8 "
        "--set mesh.expert_tensor=8",
    ),
}

_PEAK = re.compile(r"peak ([\d.]+) GiB of ([\d.]+) GiB: (fits|does not fit)")
_COMPILED = re.compile(r"lowered in .+? to ([\d,]+) HLO operations, compiled in (.+)")
# Lines that are kept from earlier versions say "a step and device".
_COLLECTIVE = re.compile(r"(\S+): ([\d,]+) (?:per device and|a) (?:step|piece)(?: and device)?, ([\d.]+) GiB")


def versions():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))


def compile_one(arguments):
    """The lines that the dry run prints, from the parameters on."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *shlex.split(arguments)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("parameters ")), None)
    if done.returncode or begin is None:
        raise SystemExit(f"python {arguments}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return lines[begin:]


def programs(lines):
    """(what, lines) of each program that was compiled: one for a step of training, two for inference."""
    begins = [i for i, line in enumerate(lines) if line.startswith(("prefill of", "decoding,"))] or [0]
    for begin, end in zip(begins, [*begins[1:], len(lines)], strict=True):
        what = lines[begin].split(",")[0] if begin else "a step"
        yield what.removesuffix(":"), lines[begin:end]


def row(title, what, lines):
    text = "\n".join(lines)
    peak, compiled = _PEAK.search(text), _COMPILED.search(text)
    sent = "<br>".join(
        f"{kind} {float(size):.3g} GiB in {count}"
        for kind, count, size in sorted(_COLLECTIVE.findall(text), key=lambda found: -float(found[2]))
    )
    memory = f"{peak[1]} of {peak[2]} GiB, {peak[3]}" if peak else lines[-1]
    operations, duration = compiled.groups() if compiled else ("", "")
    return f"| {title} | {what} | {memory} | {sent or 'none'} | {operations} | {duration} |"


def write_page(results):
    lines = [
        "# What fits where",
        "",
        "Compiled ahead of time for TPU topologies, with no TPU; written by `python benchmarks/topologies.py`. Peak "
        "memory and collectives (bytes of their results, and how many) are those of one device in one step. It proves "
        "that the programs compile and fit, not how fast they are. Training is with AdamW and float32 master weights.",
    ]
    for topology in dict.fromkeys(_topology(name) for name in CONFIGURATIONS if name in results):
        lines += ["", f"## {topology}", "", "| | program | peak memory | collectives | HLO operations | compiled in |"]
        lines.append("|---|---|---|---|---|---|")
        for name, (title, _) in CONFIGURATIONS.items():
            if name in results and _topology(name) == topology:
                lines += [row(title, what, own) for what, own in programs(results[name]["lines"])]
    lines += ["", "## Commands", ""]
    for name, (title, arguments) in CONFIGURATIONS.items():
        if name in results:
            lines.append(f"- {title} ({_topology(name)}; {results[name]['versions']}): `python {arguments}`")
    PAGE.write_text("\n".join(lines) + "\n")


def _topology(name):
    return re.search(r"--topology=(\S+)", CONFIGURATIONS[name][1])[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="names of configurations")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(CONFIGURATIONS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(CONFIGURATIONS)}")
    for name in [] if arguments.write else names:
        began = time.monotonic()
        print(f"{name}: python {CONFIGURATIONS[name][1]}", flush=True)
        lines = compile_one(CONFIGURATIONS[name][1])
        print("\n".join(lines), f"\n{time.monotonic() - began:.0f} s", flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = dict(lines=lines, versions=versions())
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(json.loads(RESULTS.read_text()) if RESULTS.exists() else {})


if __name__ == "__main__":
    main()
