"""Runs one target: damaged inputs one after the other, each within limits of CPU time and memory."""

import dataclasses
import hashlib
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, Target

INPUT_CPU_SECONDS = 5  # of this process; the slowest valid input needs a tenth
LEAST_INPUTS = 20  # of a target, however busy the machine is
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # files that live for one input need no disk
MEMORY_BYTES = 2**30  # beside what is taken when the first input is read


class Overtime(BaseException):
    """An input that takes too long. Not an Exception: nothing that is fuzzed may catch it."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """An input that ended in an error of somebody else."""

    data: bytes
    error: str
    place: str  # where it was raised, to tell one fault from another


class Prepared:
    """A target ready to read inputs, in a temporary folder of its own."""

    def __init__(self, target: Target, folder: Path):
        self.corpus, self._read, self._errors = target.prepare(folder)
        for data in self.corpus:
            try:
                self._read(data)
            except self._errors:  # a valid file that belongs to another model, say
                pass

    def failure(self, data: bytes) -> Failure | None:
        """Reads one input; None where that succeeds or ends in an error of the project."""
        signal.setitimer(signal.ITIMER_PROF, INPUT_CPU_SECONDS)
        try:
            self._read(data)
        except self._errors:
            return None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            signal.setitimer(signal.ITIMER_PROF, 0)
            frames = traceback.extract_tb(error.__traceback__)
            own = [f"{frame.filename}:{frame.lineno}" for frame in frames if "/mmx_jax/" in frame.filename]
            return Failure(data, f"{type(error).__name__}: {str(error)[:300]}", own[-1] if own else "?")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return None


def _overtime(signum, frame):
    raise Overtime(f"more than {INPUT_CPU_SECONDS} s of CPU time")


def limit(cpu_seconds: float):
    """Limits this process: an input that hangs in C code, or takes all memory, must not take the machine along."""
    signal.signal(signal.SIGPROF, _overtime)
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + cpu_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


def damaged(name: str, seed: int, number: int, corpus: list[bytes]) -> bytes:
    """Input `number` of a target; depends on its arguments alone."""
    draw = random.Random(f"{name} {seed} {number}")
    return mutate(draw, draw.choice(corpus), corpus, TARGETS[name].form)


def run(name: str, seconds: float, seed: int, out: Path) -> tuple[int, list[tuple[Path, Failure]]]:
    """Reads damaged inputs for `seconds`, and LEAST_INPUTS at least; the first input of each fault is kept in `out`.

    Returns:
      The number of inputs, and (file, failure) of each fault.
    """
    out.mkdir(parents=True, exist_ok=True)
    faults, number = {}, 0
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        prepared = Prepared(TARGETS[name], Path(folder))
        limit(seconds + 10 * INPUT_CPU_SECONDS)
        current, end = out / f"{name}-current", time.monotonic() + seconds
        while number < LEAST_INPUTS or time.monotonic() < end:
            data = damaged(name, seed, number, prepared.corpus)
            current.write_bytes(data)  # what is left of a process that is killed
            number += 1
            if (failure := prepared.failure(data)) and (
                key := (failure.error.split(":")[0], failure.place)
            ) not in faults:
                file = out / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
                file.write_bytes(data)
                faults[key] = file, failure
    (out / f"{name}-current").unlink()
    return number, list(faults.values())


def replay(name: str, file: Path) -> Failure | None:
    """Reads one input that `run` kept."""
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        prepared = Prepared(TARGETS[name], Path(folder))
        limit(10 * INPUT_CPU_SECONDS)
        return prepared.failure(file.read_bytes())
