"""The fuzzer itself: one seed gives the same inputs, valid files are read, and a fault is found and replayed."""

import pathlib

import pytest

from tests.fuzz import __main__ as cli
from tests.fuzz import runner, targets

HERE = sorted(set(targets.TARGETS) - {"template"})  # whose valid contents each start a process


@pytest.mark.parametrize("name", HERE)
def test_every_valid_content_is_read_and_damage_is_reproducible(name, tmp_path):
    target = targets.TARGETS[name]
    corpus, read, _ = target.prepare(tmp_path)
    if name not in ("index", "overrides", "manifest"):  # some of whose contents fit another folder or config
        for data in corpus:
            read(data)
    inputs = [runner.damaged(name, 0, number, corpus) for number in range(30)]
    assert inputs == [runner.damaged(name, 0, number, corpus) for number in range(30)]
    assert len(set(inputs)) > 20 and inputs != [runner.damaged(name, 1, number, corpus) for number in range(30)]


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), SystemExit(1), MemoryError()], ids=repr)
def test_a_foreign_error_is_kept_with_the_command_that_replays_it(error, tmp_path, monkeypatch, capsys):
    class Own(ValueError):
        pass

    def read(data):
        if data != b'{"a": 1}':
            raise error if b"a" in data else Own

    target = targets.Target("json", lambda folder: ([b'{"a": 1}'], read, (Own,)))
    monkeypatch.setitem(targets.TARGETS, "planted", target)
    monkeypatch.setattr(runner, "limit", lambda seconds: None)  # of a process of its own
    assert cli.main(["--here", "--target=planted", "--seconds=0.3", f"--out={tmp_path}"]) == 1
    said = capsys.readouterr().out
    assert type(error).__name__ in said and "1 faults" in said
    (file,) = tmp_path.iterdir()
    replay = said.strip().splitlines()[-1].split()[3:]
    assert replay == ["--target=planted", f"--replay={file}"]
    assert cli.main(replay) == 1 and type(error).__name__ in capsys.readouterr().out
    pathlib.Path(file).write_bytes(b'{"a": 1}')
    assert cli.main(replay) == 0


def test_a_process_that_is_killed_leaves_its_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.sys, "executable", "/bin/false")
    assert cli.main(["--target=header", f"--out={tmp_path}"]) == 1
    monkeypatch.setattr(cli.subprocess, "run", lambda *args, **kw: type("Done", (), {"returncode": -9}))
    assert cli.main(["--target=header", f"--out={tmp_path}"]) == 1
    assert "ended with -9" in capsys.readouterr().out
