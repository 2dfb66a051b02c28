"""A conversion in progress: `DST.partial` with a journal, which becomes `DST` when it is whole."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

from mmx_jax import json_io
from mmx_jax.convert.errors import ConversionError
from mmx_jax.convert.safetensors_io import fsync_folder

JOURNAL = "journal.jsonl"


class Job:
    """Owns `DST.partial` and its journal: one JSON line for what is being made, then one for each finished part.

    Args:
      destination: the final folder.
      plan: what is being made from what, JSON-able. A journal with another plan is not continued.
      overwrite: replaces an existing destination, and discards a partial one with another plan.
      resumable: False discards any partial one.
    """

    def __init__(self, destination: Path, plan: dict, *, overwrite: bool, resumable: bool = True):
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".partial")
        if destination.exists() and not overwrite:
            raise ConversionError(f"{destination}: exists already; give --overwrite to replace it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / JOURNAL, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConversionError(f"{self.folder}: another process is converting into it; wait for it") from None
        lines = self._read()
        self.finished: dict[str, dict] = {}
        self.resumed = bool(lines)
        if lines and resumable:
            difference = _first_difference(lines[0], plan)
            if not difference:
                self.finished = {line["part"]: line for line in lines[1:]}
                return
            if not overwrite:
                self._file.close()
                raise ConversionError(
                    f"{difference} changed since {self.folder} was begun; begin anew with --overwrite"
                )
        self.resumed = False
        self._clear()
        self._plan = plan

    def begin(self):
        """Records the plan, once the folder is ready to take parts. Nothing is resumed that did not get here."""
        if not self.resumed:
            self._append(self._plan)

    def record(self, part: str, **facts):
        """Notes that a part is finished and on disk."""
        self.finished[part] = {"part": part, **facts}
        self._append(self.finished[part])

    def commit(self):
        """Gives the folder its final name."""
        for folder, _, _ in os.walk(self.folder):
            fsync_folder(Path(folder))
        if self.destination.exists():
            old = self.destination.with_name(self.destination.name + ".replaced")
            if old.exists():
                shutil.rmtree(old)
            os.rename(self.destination, old)
            os.rename(self.folder, self.destination)
            shutil.rmtree(old)
        else:
            os.rename(self.folder, self.destination)
        # Last: until here, a kill leaves something that the same command continues.
        (self.destination / JOURNAL).unlink()
        fsync_folder(self.destination.parent)

    def close(self):
        self._file.close()

    def _append(self, line):
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self):
        """The whole lines; a last one that a kill cut short is removed."""
        self._file.seek(0)
        raw = self._file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        damaged = f"{self.folder / JOURNAL}: damaged"
        try:
            lines = [json_io.loads(line) for line in whole.split(b"\n")[:-1]]
        except json_io.JsonError as error:
            raise ConversionError(f"{damaged} ({error}); remove {self.folder} and begin anew") from None
        if lines and not (isinstance(lines[0], dict) and all(map(_is_part, lines[1:]))):
            raise ConversionError(f"{damaged}; remove {self.folder} and begin anew")
        return lines

    def _clear(self):
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._file.truncate(0)


def _is_part(line):
    """Whether a line of a journal is one that `Job.record` wrote: a part, its sha256 and those of its tensors."""
    if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in ("part", "sha256")):
        return False
    tensors = line.get("tensors", {})
    return isinstance(tensors, dict) and all(isinstance(digest, str) for digest in tensors.values())


def _first_difference(old, new, name="the plan"):
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))  # tuples and lists are one in JSON
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), key)
    return name


@contextlib.contextmanager
def disk_errors(folder: Path):
    """Turns errors of the file system into ConversionError, a full disk with its remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"{error.filename or folder}: disk full; free some space and run the same command again: "
                "it continues where it stopped"
            ) from None
        raise ConversionError(f"{error.filename or folder}: {error.strerror or error}") from None


def check_free_space(folder: Path, needed: int):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"{folder}: disk full: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free some space and run the same command again"
        )
