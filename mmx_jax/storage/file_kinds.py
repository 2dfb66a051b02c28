"""Names the kind of a file that is not the weights, JSON or text that was expected."""

import errno
import os
import pathlib
import stat

HEAD_BYTES = 512  # of a file; enough for every kind below
_DOWNLOAD = "download the file itself: `hf download REPOSITORY FILE`"
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": f"a Git LFS pointer: run `git lfs pull`, or {_DOWNLOAD}",
    b"version https://hawser.github.com/spec/": f"a Git LFS pointer: run `git lfs pull`, or {_DOWNLOAD}",
    b"/annex/objects/": "a git-annex pointer: run `git annex get` on it",
    b"# xet version": f"a Xet pointer: run `git xet pull`, or {_DOWNLOAD}",
}
_PAGES = {b"<!doctype html": "an HTML page", b"<html": "an HTML page", b"<?xml": "an XML document"}
_MAGIC = {
    b"PK\x03\x04": "a zip archive, as `torch.save` writes",
    b"\x80\x02": "a Python pickle, as `torch.save` wrote",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"\x1f\x8b": "compressed by gzip: decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it first",
    b"\xfd7zXZ\x00": "compressed by xz: decompress it first",
    b"BZh": "compressed by bzip2: decompress it first",
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"\xef\xbb\xbf": "text with a byte order mark: save it as UTF-8 without one",
}


def recognize(head: bytes) -> str | None:
    """The kind of a file that could not be read as what it should be, with a remedy; None: not one that is known.

    Args:
      head: its first HEAD_BYTES.
    """
    if not head:
        return f"empty: {_DOWNLOAD}"
    if kind := pointer(head):
        return kind
    for start, kind in _PAGES.items():
        if head.lstrip()[: len(start)].lower() == start:
            return f"{kind}, perhaps of an error or a login: {_DOWNLOAD}"
    for start, kind in _MAGIC.items():
        if head.startswith(start):
            return kind
    if not any(head):
        return f"nothing but zeros at its beginning, as an interrupted copy is: {_DOWNLOAD}"
    return None


def pointer(head: bytes) -> str | None:
    """The kind of pointer that stands in the place of a large file, with a remedy; None: it is none."""
    return next((kind for start, kind in _POINTERS.items() if head.startswith(start)), None)


def quote(head: bytes) -> str | None:
    """The first line of something that looks like a message in plain text or JSON; None for binary data."""
    try:
        line = head.decode("utf-8", "strict" if len(head) < HEAD_BYTES else "ignore").strip().partition("\n")[0]
    except UnicodeDecodeError:
        return None
    return repr(line[:100]) if line and line.isprintable() else None


def not_regular(path: pathlib.Path) -> str | None:
    """Why `path` is no file that can be read from begin to end (a folder, a pipe, a broken link); None: it is one.

    Raises OSError where the file system does not say.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return _broken_link(path) if path.is_symlink() else "no such file"
    except NotADirectoryError:
        return "no such file"
    except ValueError:  # a NUL within
        return "no such file"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads to itself: download the file itself"
        if error.errno == errno.ENAMETOOLONG:
            return "no such file: its name is too long"
        raise
    if stat.S_ISREG(mode):
        return None
    return "a folder, not a file" if stat.S_ISDIR(mode) else "a pipe, socket or device, not a regular file"


def _broken_link(path: pathlib.Path) -> str:
    target = os.readlink(path)
    if "annex/objects" in target:
        return "a git-annex link whose content is not here: run `git annex get` on it"
    return f"a link to {target!r}, which does not exist: {_DOWNLOAD}"
