"""One process at a time in a folder, on this host and on others that share its storage.

The lock is flock, which the kernel releases however its holder ends. Some file systems know no flock, and some keep it
to one host. So the lock file also says who holds it, with a count that the holder raises every few seconds: a holder
on another host lives as long as its count rises.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

_BEAT_SECONDS = 10
_STALE_SECONDS = 60  # several beats, and longer than NFS keeps attributes
_RECORD_BYTES = 1024  # one block, written at once
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(RuntimeError):
    """The folder is in use; the message names the holder and the remedy.

    Attributes:
      holder: who has it, in words.
    """

    def __init__(self, message: str, holder: str = "another process"):
        super().__init__(message)
        self.holder = holder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, as its file says."""

    host: str
    kernel: str  # boot and process namespace: what a process id is good for
    pid: int
    born: str  # start time of the process, for its id may be given again
    since: str
    token: str  # of this one acquisition
    beat: int = 0

    def __str__(self):
        return f"process {self.pid} on {self.host} (since {self.since})"


class FolderLock:
    """Holds `path`, a file that is there while the lock is held.

    Args:
      path: the lock file; its folder exists.
      message: called while another host is watched for signs of life.

    Raises:
      LockedError: another process holds it.
      OSError: the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, message: Callable[[str], None] = lambda line: None):
        self.path = path
        self._file = _claim(path, message)
        self.holder = _this_process()
        self._stop = threading.Event()
        try:
            _write(self._file, self.holder)
        except BaseException:
            path.unlink(missing_ok=True)
            self._file.close()
            raise
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lock {path.name}")
        self._thread.start()

    def check(self) -> None:
        """Raises LockedError where another process has taken the folder over from this one, held up for too long."""
        found = _read(self.path)
        if found is not None and found.token != self.holder.token:
            raise LockedError(
                f"{self.path.parent}: was taken over by {found}: this process gave no sign of life for too long, "
                "or its lock file was removed; it writes nothing more"
            )

    def release(self) -> None:
        """Gives the folder back; the file goes."""
        self._stop.set()
        self._thread.join()
        found = _read(self.path)
        if found is not None and found.token == self.holder.token:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _beat(self):
        while not self._stop.wait(_BEAT_SECONDS):
            self.holder = dataclasses.replace(self.holder, beat=self.holder.beat + 1)
            # Who took over has another token, and its record must stay.
            found = _read(self.path)
            if found is not None and found.token == self.holder.token:
                with contextlib.suppress(OSError):  # the holder meets the same error where it matters
                    _write(self._file, self.holder)


@contextlib.contextmanager
def held(path: pathlib.Path, message: Callable[[str], None] = lambda line: None) -> Iterator[FolderLock]:
    """`FolderLock` for the length of a block."""
    lock = FolderLock(path, message)
    try:
        yield lock
    finally:
        lock.release()


def _claim(path, message):
    """The open lock file, once nobody else holds it."""
    while True:
        created = True
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            created = False
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # released in between
        file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            flocked = _flock(file, path)
            if not created:
                _refuse_living(path, flocked, message)
        except BaseException:
            file.close()
            raise
        if _is_at(file, path):
            return file
        file.close()  # it was released, and perhaps made anew, in between


def _flock(file, path) -> bool:
    """Takes the kernel's lock; False where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, _read(path)) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _refuse_living(path, flocked, message):
    """Raises LockedError if the holder on record lives, though flock did not say so."""
    holder, here = _read(path), _this_process()
    if holder is None:
        return
    if (holder.host, holder.kernel) == (here.host, here.kernel):
        # Of this host flock knows everything, and where there is none the process table does.
        if not flocked and _born(holder.pid) == holder.born:
            raise _in_use(path, holder)
        return
    message(f"{path}: held by {holder}; watching for signs of life for {_STALE_SECONDS} s")
    deadline = time.monotonic() + _STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _STALE_SECONDS / 10))
        found = _read(path)
        if found is None and not path.exists():
            return
        if found is not None and found != holder:
            raise _in_use(path, found)
    message(f"{path}: no sign of life of {holder}; taken over")


def _in_use(path, holder):
    who = str(holder) if holder else "another process"
    remedy = "wait for it or end it, or choose another folder"
    return LockedError(f"{path.parent}: in use by another process: {who} holds {path.name}; {remedy}", who)


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _read(path) -> Holder | None:
    """The record, opened anew, so that NFS looks for the newest one; None where there is none or half of one."""
    try:
        return Holder(**json.loads(path.read_bytes()[:_RECORD_BYTES]))
    except (OSError, ValueError, TypeError):
        return None


def _write(file, holder):
    """Writes the record; raises OSError, with the name of the file, where the disk is full."""
    text = json.dumps(dataclasses.asdict(holder)).encode()
    try:
        os.pwrite(file.fileno(), text.ljust(_RECORD_BYTES), 0)
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def _this_process():
    return Holder(
        host=socket.gethostname(),
        kernel=_text("/proc/sys/kernel/random/boot_id") + _link("/proc/self/ns/pid"),
        pid=os.getpid(),
        born=_born(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        token=uuid.uuid4().hex,
    )


def _born(pid):
    """The start time of a living process, in ticks since boot; "" where there is none."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _text(path):
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""
