"""A conversion in progress: `DST.partial` with a journal, which becomes `DST` when it is whole.

The journal goes last. So a folder `DST` that still holds one was put there by a process that was killed before it had
removed what it replaced: the next one finishes that first.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.safetensors import fsync_folder
from mmx_jax.storage import filesystem, json_io
from mmx_jax.storage.locking import FolderLock, LockedError

JOURNAL = "journal.jsonl"
# The last line of a journal whose parts are whole, by how DST makes way for them.
_BY_EXCHANGE, _BY_REPLACED = {"commit": "exchange"}, {"commit": "DST.replaced"}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Job:
    """Owns `DST.partial` and its journal: one JSON line for what is being made, then one for each finished part.

    Args:
      destination: the final folder.
      plan: what is being made from what, JSON-able. A journal with another plan is not continued.
      overwrite: replaces an existing destination, and discards a partial one with another plan.
      resumable: False discards any partial one.
    """

    def __init__(self, destination: Path, plan: dict, *, overwrite: bool, resumable: bool = True):
        if destination.name in ("", ".."):
            destination = destination.resolve()
        if not destination.name:
            raise ConversionError(f"{destination}: exists already, and nothing can replace it; give another folder")
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".partial")
        self.replaced = destination.with_name(destination.name + ".replaced")
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = FolderLock(destination.with_name(destination.name + ".lock"))
        except LockedError as error:
            raise ConversionError(
                f"{destination}: another process is converting into it: {error.holder}; wait for it"
            ) from None
        self._file = None
        try:
            self._open(plan, overwrite, resumable)
        except BaseException:
            self.close()
            raise

    def _open(self, plan, overwrite, resumable):
        self._finish_commit()
        if _exists(self.destination) and not overwrite:
            raise ConversionError(f"{self.destination}: exists already; give --overwrite to replace it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = open(self.folder / JOURNAL, "a+b", buffering=0)
        lines = self._read()
        self.finished: dict[str, dict] = {}
        self.resumed = bool(lines)
        if lines and resumable:
            difference = _first_difference(lines[0], plan)
            if not difference:
                self.finished = {line["part"]: line for line in lines[1:] if "part" in line}
                return
            if not overwrite:
                raise ConversionError(
                    f"{difference} changed since {self.folder} was begun; start over with --overwrite"
                )
        self.resumed = False
        self._clear()
        self._plan = plan

    def begin(self) -> None:
        """Records the plan, once the folder is ready to take parts. Nothing is resumed that did not get here."""
        if not self.resumed:
            self._append(self._plan)

    def record(self, part: str, **facts) -> None:
        """Notes that a part is finished and on disk."""
        self.finished[part] = {"part": part, **facts}
        self._append(self.finished[part])

    def commit(self) -> None:
        """Gives the folder its final name; a kill at any point leaves the old or the new folder there, or beside it."""
        for folder, _, _ in os.walk(self.folder):
            fsync_folder(Path(folder))
        self._append(_BY_EXCHANGE)
        if not _exists(self.destination):
            os.rename(self.folder, self.destination)
        elif not _exchange(self.folder, self.destination):
            if _exists(self.replaced):
                raise ConversionError(f"{self.replaced}: is in the way; move it, and run the same command again")
            self._append(_BY_REPLACED)
            os.rename(self.destination, self.replaced)
            os.rename(self.folder, self.destination)
        self._finish_commit()

    def discard(self) -> None:
        """Removes the unfinished folder: what is in it cannot be made good."""
        filesystem.remove(self.folder)

    def close(self) -> None:
        """Lets others convert into the destination."""
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def _finish_commit(self):
        """Does what is left of a commit, this one or one that was killed."""
        if way := _commit_of(self.destination / JOURNAL):
            # The new one is in its place. What it replaced has no journal, or lost it in an earlier commit.
            filesystem.remove(self.folder)
            if way == _BY_REPLACED:
                filesystem.remove(self.replaced)
            # Last: until here, a kill leaves something that the same command finishes.
            (self.destination / JOURNAL).unlink()
            fsync_folder(self.destination.parent)
        elif not _exists(self.destination) and _commit_of(self.folder / JOURNAL) == _BY_REPLACED:
            if _exists(self.replaced):  # it had made way, and the new one had not come
                os.rename(self.replaced, self.destination)

    def _append(self, line):
        self._file.write(json.dumps(line).encode() + b"\n")
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
            raise ConversionError(f"{damaged} ({error}); remove {self.folder} and start over") from None
        known = all(line in (_BY_EXCHANGE, _BY_REPLACED) or _is_part(line) for line in lines[1:])
        if lines and not (isinstance(lines[0], dict) and known):
            raise ConversionError(f"{damaged}; remove {self.folder} and start over")
        return lines

    def _clear(self):
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL:
                filesystem.remove(entry)
        self._file.truncate(0)


def _commit_of(journal):
    """The last line of a journal, if that is one of a commit."""
    try:
        last = json_io.loads(journal.read_bytes().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return last if last in (_BY_EXCHANGE, _BY_REPLACED) else None


def _exists(path):
    return os.path.lexists(path)


def _exchange(first, second) -> bool:
    """Lets two folders change names in one step; False where the system or its file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


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
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into ConversionError, a full disk with its remedy."""
    remedy = "free some space and run the same command again: it continues where it stopped"
    try:
        with filesystem.full_disk(folder, ConversionError, remedy):
            yield
    except OSError as error:
        raise ConversionError(f"{error.filename or folder}: {error.strerror or error}") from None


def check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"{folder}: disk full: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free some space and run the same command again"
        )
