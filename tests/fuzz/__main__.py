"""`python -m tests.fuzz`: reads damaged inputs with every parser, each target in a process of its own."""

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz import runner
from tests.fuzz.targets import TARGETS

HANG_SECONDS = 600  # of a whole target beyond its time: its own limit of CPU time should end it long before


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    out.add_argument("--seconds", type=float, default=5, help="for each target")
    out.add_argument("--target", choices=sorted(TARGETS), help="this one only")
    out.add_argument("--seed", type=int, default=0, help="other inputs")
    out.add_argument("--replay", type=Path, help="read this input with --target, and show where it fails")
    out.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where inputs that fail are kept")
    out.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return out


def _run_here(name: str, args: argparse.Namespace) -> int:
    count, faults = runner.run(name, args.seconds, args.seed, args.out)
    print(f"{name}: {count} inputs, {len(faults)} faults", flush=True)
    for file, failure in faults:
        print(f"  {failure.error}\n    at {failure.place}\n    {_command(name, file)}", flush=True)
    return 1 if faults else 0


def _command(name, file):
    return f"python -m tests.fuzz --target={name} --replay={file}"


def _run_apart(name: str, args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "tests.fuzz", "--here", f"--target={name}", f"--seconds={args.seconds}"]
    command += [f"--seed={args.seed}", f"--out={args.out}"]
    try:
        status = subprocess.run(command, timeout=args.seconds + HANG_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        status = "no answer"
    if status not in (0, 1):
        print(
            f"{name}: its process ended with {status}\n    {_command(name, args.out / f'{name}-current')}", flush=True
        )
    return 0 if status == 0 else 1


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.replay:
        if not args.target:
            parser().error("--replay needs --target")
        failure = runner.replay(args.target, args.replay)
        print(f"{args.target}: " + (f"{failure.error}\n    at {failure.place}" if failure else "no fault"))
        return 1 if failure else 0
    names = [args.target] if args.target else list(TARGETS)
    if args.here:
        return max(_run_here(name, args) for name in names)
    return max([_run_apart(name, args) for name in names])


if __name__ == "__main__":
    sys.exit(main())
