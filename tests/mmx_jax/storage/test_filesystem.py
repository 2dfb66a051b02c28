"""Paths, errors of a full disk, locks of folders and checksums in slices: what runs and conversions stand on."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mmx_jax.checkpoints import manager
from mmx_jax.storage import array_files, filesystem, locking


def test_a_home_folder_is_found_and_an_unknown_one_is_a_name(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(filesystem.expand("~/run")) == "/somewhere/run"
    assert str(filesystem.expand("~no_such_user_here/run")) == "~no_such_user_here/run"
    assert str(filesystem.destination("~/a [b]")) == "/somewhere/a [b]"


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://bucket/run", os.fsdecode(b"run\xff"), "a[0]/run", "a\\b"])
def test_a_folder_that_could_not_be_read_back_is_refused_by_name(name, tmp_path):
    with pytest.raises(filesystem.PathError) as error:
        filesystem.destination(name if "://" in name else tmp_path / name, arrays=True)
    str(error.value).encode()  # can be printed
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_known_by_number_by_text_and_by_cause():
    full = OSError(errno.ENOSPC, "No space left on device", "/run/x")
    caused = RuntimeError("cannot save")
    caused.__cause__ = full
    for error in (full, caused, ValueError("Error: No space left on device [OS error 28]"), OSError(errno.EDQUOT, "q")):
        assert filesystem.is_disk_full(error)
    assert not filesystem.is_disk_full(OSError(errno.EACCES, "Permission denied")) and not filesystem.is_disk_full(None)
    with pytest.raises(ValueError, match="^/run/x: disk full; make room"):
        with filesystem.full_disk("/run", ValueError, "make room"):
            raise full


def test_text_is_replaced_whole_and_a_failure_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    filesystem.write_text(path, "old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as error:
        filesystem.write_text(path, "new")
    assert error.value.filename == str(path) and path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


# -- locks ------------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_holder_who_is_named_and_leaves_nothing(tmp_path):
    path = tmp_path / "run.lock"
    with locking.held(path):
        with pytest.raises(locking.LockedError, match=f"in use by another process: process {os.getpid()} on "):
            locking.FolderLock(path)
    with locking.held(path) as lock:
        lock.check()
    assert os.listdir(tmp_path) == []


HOLDER = "import sys, pathlib, time; from mmx_jax.storage import locking\n"
HOLDER += "lock = locking.FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"


def test_a_killed_holder_never_blocks_the_next(tmp_path):
    path = tmp_path / "run.lock"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(locking.LockedError, match=f"process {process.pid} on "):
                locking.FolderLock(path)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert path.exists()
        with locking.held(path):
            pass


@pytest.fixture
def quick(monkeypatch):
    """Beats and waits of a few hundredths of a second."""
    monkeypatch.setattr(locking, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(locking, "_STALE_SECONDS", 1.0)


def as_another_host(monkeypatch):
    here = locking._this_process
    monkeypatch.setattr(locking, "_this_process", lambda: locking.dataclasses.replace(here(), host="elsewhere"))


def without_flock(monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", flock)


def test_a_holder_on_another_host_lives_as_long_as_its_beats_are_seen(tmp_path, monkeypatch, quick):
    path, lines = tmp_path / "run.lock", []
    without_flock(monkeypatch)
    lock = locking.FolderLock(path)
    as_another_host(monkeypatch)
    with pytest.raises(locking.LockedError):
        locking.FolderLock(path, lines.append)
    lock._stop.set()  # as if its machine had stopped
    lock._thread.join()
    with locking.held(path, lines.append):
        assert "watching for signs of life" in lines[0] and "no sign of life" in lines[-1]
        with pytest.raises(locking.LockedError, match="taken over by process .* on elsewhere"):
            lock.check()
    lock.release()


def test_without_flock_the_process_table_of_the_host_decides(tmp_path, monkeypatch, quick):
    path = tmp_path / "run.lock"
    without_flock(monkeypatch)
    lock = locking.FolderLock(path)
    with pytest.raises(locking.LockedError):
        locking.FolderLock(path)
    monkeypatch.setattr(locking, "_born", lambda pid: "another time")  # the id was given again
    with locking.held(path):
        pass
    lock.release()


def test_of_many_that_ask_at_once_one_gets_the_lock(tmp_path):
    path, got, refused, start = tmp_path / "run.lock", [], [], threading.Barrier(8)

    def ask():
        start.wait()
        try:
            got.append(locking.FolderLock(path))
        except locking.LockedError as error:
            refused.append(error)

    for _ in range(10):
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 7)
        got.pop().release()
        refused.clear()
    assert os.listdir(tmp_path) == []


# -- checksums --------------------------------------------------------------------------------------------------------


def oracle(x):
    unsigned = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    return sum(int(b) * (2 * i + 1) for i, b in enumerate(np.ascontiguousarray(x).reshape(-1).view(unsigned))) % 2**32


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_checksums_of_regions_add_up_to_that_of_the_array_on_devices(shape, dtype, monkeypatch):
    monkeypatch.setattr(array_files, "_SLICE_ELEMENTS", 7)
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=shape) * 100).astype(dtype)
    cuts = [sorted({0, size, size // 2}) for size in shape]
    total = 0
    for corner in itertools.product(*[range(len(cut) - 1) for cut in cuts]):
        region = tuple(slice(cut[i], cut[i + 1]) for cut, i in zip(cuts, corner, strict=True))
        total += array_files.region_checksum(np.asarray(x[region]), tuple(part.start for part in region), shape)
    assert total % 2**32 == oracle(x) == int(manager.array_checksums({"x": jnp.asarray(x)})["x"])
