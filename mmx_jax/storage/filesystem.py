"""Paths that users give, and what the file system answers."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

# Orbax takes a folder with [ for a pattern when it merges what processes wrote, and tensorstore reads \ as /.
_NOT_FOR_ARRAYS = "[\\"


class PathError(ValueError):
    """A path that cannot be written to; the message names it and the remedy."""


def expand(path: str | os.PathLike) -> pathlib.Path:
    """The path with a leading ~ or ~user replaced: shells leave it in `--workdir=~/run`."""
    return pathlib.Path(os.path.expanduser(path))


def destination(path: str | os.PathLike, *, arrays: bool = False) -> pathlib.Path:
    """`expand`, for a folder that is to be written.

    Args:
      arrays: it will hold arrays that orbax and tensorstore write, which do not serve every name.

    Raises:
      PathError: no folder of that name can be written and read back; nothing is made.
    """
    expanded = expand(path)
    text = os.fspath(path)
    if "://" in text:
        raise PathError(f"{text}: is not a folder of this machine: mount the bucket, and give the folder it is at")
    whole = str(expanded.absolute())
    try:
        whole.encode("utf-8")
    except UnicodeEncodeError:
        raise PathError(f"{ascii(whole)}: is not UTF-8, and could not be read back: choose another name") from None
    if arrays and (found := sorted(set(_NOT_FOR_ARRAYS) & set(whole))):
        raise PathError(
            f"{whole}: checkpoints in a folder with {' and '.join(found)} in its path could not be read back: "
            "choose another name"
        )
    return expanded


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that of a full disk or quota; libraries give no more than a text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error).lower()
        if any(words in text for words in ("no space left on device", "disk quota exceeded", "os error 28)")):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def full_disk(folder: pathlib.Path, kind: Callable[[str], Exception], remedy: str) -> Iterator[None]:
    """Turns the OSError of a full disk into `kind`: one line that names the file, or else `folder`."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise kind(f"{error.filename or folder}: disk full; {remedy}") from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file by one rename, once it is on disk; the OSError of a failure names the file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove(path: pathlib.Path) -> None:
    """Removes a folder with all in it, a file or a link; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
