"""Two and four processes, joined by jax.distributed on the CPU, do what one process does: steps, whole runs, imports.

A run goes on where it was whatever their number, and they end if one of them does.
"""

import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmx_jax import distributed, metrics
from mmx_jax.config.io import config_from_json
from mmx_jax.training import errors, same_run
from tests.support import fake_devices
from tests.support.paths import REPOSITORY
from tests.support.patience import HANG_SECONDS, wait_until
from tests.support.processes_worker import TINY

FSDP, SEQ = dict(data=1, fsdp=2), dict(data=1, seq=2)
MIXED = dict(layers=["lightning", "softmax"])
IMPORTS = {"fsdp": FSDP, "expert": dict(data=1, expert=2)}


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Workers:
    """tests/support/processes_worker.py started `count` times, on two devices in all or one each."""

    def __init__(self, folder, count, tasks):
        address = free_address()
        environment = fake_devices.environment(max(1, 2 // count))
        self._outputs, self.processes = [], []
        for index in range(count):
            command = [sys.executable, "-W", "error", "-m", "tests.support.processes_worker"]
            arguments = [str(folder), str(index), str(count), address, *map(json.dumps, tasks)]
            files = [open(folder / f"{time.monotonic_ns()}_{index}.{kind}", "w+") for kind in ("out", "err")]
            self._outputs.append(files)
            self.processes.append(
                subprocess.Popen(
                    [*command, *arguments], cwd=REPOSITORY, env=environment, stdout=files[0], stderr=files[1]
                )
            )

    def text(self, index, kind="err"):
        return pathlib.Path(self._outputs[index][kind == "err"].name).read_text()

    def wait(self, until=None):
        """Until all have ended, or `until()`; one that fails ends the others."""
        deadline = time.monotonic() + HANG_SECONDS
        try:
            while any(process.poll() is None for process in self.processes):
                assert time.monotonic() < deadline, "timeout\n" + self._errors()
                assert not any(process.poll() for process in self.processes), self._errors()
                if until is not None and until():
                    return
                time.sleep(0.05)
            assert not any(process.returncode for process in self.processes), self._errors()
        except BaseException:
            self.kill()
            raise

    def results(self):
        """[[result of each task] of each process]"""
        self.wait()
        self.kill()
        return [
            [json.loads(line) for line in self.text(i, "out").splitlines() if line.startswith("{")]
            for i in range(len(self.processes))
        ]

    def kill(self):
        for process, files in zip(self.processes, self._outputs, strict=True):
            process.kill()
            process.wait()
            for file in files:
                file.close()

    def _errors(self):
        return "\n".join(f"process {i} ({p.poll()}):\n{self.text(i)[-4000:]}" for i, p in enumerate(self.processes))


def start(folder, count, *tasks):
    return Workers(folder, count, tasks)


def read_arrays(path):
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training texts; the runs are written next to them."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    words = ["state", "decay", "query", "key", "value", "norm", "\n"]
    for number in range(20):
        text = " ".join(rng.choice(words, size=rng.integers(50, 400)))  # the processes get on at different rates
        (folder / "text" / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Results of the tasks in two processes, by name: [result of process 0, of process 1]."""
    tasks = {
        "steps fsdp": dict(task="steps", **FSDP),
        "steps seq": dict(task="steps", **MIXED, **SEQ),
        **{f"load {name}": dict(task="load", **mesh) for name, mesh in IMPORTS.items()},
        "straight": dict(task="train", name="straight", steps=6, mesh=FSDP),
        "half": dict(task="train", name="halves", steps=3, mesh=FSDP),
        "layouts": dict(task="train", name="layouts", steps=2, mesh=SEQ),
        "own rows": dict(task="rows", data=1, expert=2),
        "shared rows": dict(task="rows", **SEQ),
        "whole rows": dict(task="rows", data=1, tensor=2),
    }
    results = start(folder, 2, *tasks.values()).results()
    shutil.copytree(folder / "halves", folder / "by one")  # who will continue it
    return dict(zip(tasks, zip(*results, strict=True), strict=True))


@pytest.fixture(scope="module")
def one(folder, two):
    """Results in one process with two devices, which also continues the runs of two processes."""
    tasks = {
        "steps fsdp": dict(task="steps", **FSDP),
        "steps seq": dict(task="steps", **MIXED, **FSDP),
        "by one": dict(task="train", name="by one", steps=5, mesh=FSDP),
        "layouts": dict(task="train", name="layouts", steps=4, mesh=FSDP),
        "own rows": dict(task="rows", **SEQ),
    }
    (results,) = start(folder, 1, *tasks.values()).results()
    return {name: (result,) for name, result in zip(tasks, results, strict=True)}


@pytest.fixture(scope="module")
def four(folder, one):
    """Results of steps in four processes of one device, and of a run of two processes that one continued."""
    tasks = {
        "steps": dict(task="steps", data=2, seq=2),
        "layouts": dict(task="train", name="layouts", steps=6, mesh=dict(data=2, seq=2)),
    }
    results = start(folder, 4, *tasks.values()).results()
    return dict(zip(tasks, zip(*results, strict=True), strict=True))


@pytest.fixture(scope="module")
def resumed(folder, one):
    """Two new processes that finish the run of `half`, also where one process went on with it; then asked to stop."""
    tasks = {
        "other half": dict(task="train", name="halves", steps=6, mesh=FSDP),
        "by one": dict(task="train", name="by one", steps=6, mesh=FSDP),
        "endless": dict(task="train", name="endless", mesh=FSDP, total_tokens=10**9, save_every_steps=10**6),
    }
    workers = start(folder, 2, *tasks.values())
    workers.wait(until=lambda: len(metrics.read_rows(folder / "endless/metrics.jsonl")) >= 3)
    workers.processes[1].send_signal(signal.SIGTERM)
    results = workers.results()
    return dict(zip(tasks, zip(*results, strict=True), strict=True))


def assert_same_steps(results, alone):
    for result in results:
        assert result["losses"] == results[0]["losses"] and result["norms"] == results[0]["norms"]
    np.testing.assert_allclose(results[0]["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(results[0]["norms"], alone["norms"], rtol=1e-4)
    want = read_arrays(alone["params"])
    for result in results:
        got = read_arrays(result["params"])
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name, part", [("fsdp", [4, 32]), ("seq", [8, 16])])
def test_steps_of_two_processes_equal_those_of_one(one, two, name, part):
    """Each feeds half of the rows, or half of every row: documents cross the border, in both kinds of attention."""
    (alone,), results = one[f"steps {name}"], two[f"steps {name}"]
    assert [result["part"] for result in results] == [part] * 2
    assert_same_steps(results, alone)
    assert alone["sharded"] > 0 and {result["sharded"] for result in results} == {alone["sharded"]}


def test_steps_of_four_processes_that_share_rows_in_pairs_equal_those_of_one(one, four):
    assert [result["part"] for result in four["steps"]] == [[4, 16]] * 4
    assert_same_steps(four["steps"], one["steps fsdp"][0])


def read_item(workdir, step, name):
    return json.loads((workdir / "checkpoints" / str(step) / name / "metadata").read_text())


def rows_of(workdir):
    timed = "tokens_per_second", "mfu"
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_a_run_of_two_processes_writes_one_set_of_files(folder, two):
    workdir, (first, second) = folder / "straight", two["straight"]
    assert first["step"] == second["step"] == 6 and first["loss"] == second["loss"]
    assert first["eval_loss"] == second["eval_loss"] > 0
    left = {path.name for path in workdir.iterdir()}
    assert left == {"config.json", "tokenizer", "metrics.jsonl", "loss.png", "checkpoints", "tensorboard"}, left
    assert config_from_json((workdir / "config.json").read_text()).mesh.fsdp == 2
    assert {path.name for path in (workdir / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4", "6"}
    assert [row["step"] for row in rows_of(workdir)] == [1, 2, 3, 4, 5, 6, 6]
    assert [first["loss"], first["eval_loss"]] == [rows_of(workdir)[5]["loss"], rows_of(workdir)[6]["eval_loss"]]
    assert not set(sum(first["read"], [])) & set(sum(second["read"], []))  # each learns from texts of its own


def test_a_checkpoint_holds_the_position_of_every_shard(folder, two):
    state = read_item(folder / "straight", 6, "data")
    assert state["shards"].keys() == set("01234567")
    assert {shard["rows"] for shard in state["shards"].values()} == {6}


def test_a_run_of_two_processes_goes_on_as_if_it_had_not_stopped(folder, two, resumed):
    for whole, half, other in zip(two["straight"], two["half"], resumed["other half"], strict=True):
        # Six batches, then two to evaluate on; the first half evaluates as well, on the same two.
        assert half["batches"][:3] + other["batches"] == whole["batches"]
        assert (other["step"], other["loss"], other["eval_loss"]) == (6, whole["loss"], whole["eval_loss"])
    rows = [row for row in rows_of(folder / "halves") if (row["step"], "eval_loss" in row) != (3, True)]
    assert rows == rows_of(folder / "straight")
    assert read_item(folder / "halves", 6, "data") == read_item(folder / "straight", 6, "data")
    assert read_item(folder / "halves", 6, "checksums") == read_item(folder / "straight", 6, "checksums")


def batches_of(results):
    """The digests of all rows of each batch, as they lie on the devices of all processes."""
    assert all(result["batches"] == results[0]["batches"] for result in results)
    return results[0]["batches"]


@pytest.mark.parametrize("name, rtol", [("by one", 1e-6), ("layouts", 1e-5)])
def test_another_number_of_processes_goes_on_where_the_data_was(folder, two, one, four, resumed, name, rtol):
    """From two processes to one and back to two; from two that share rows to one and to four that share them in pairs.

    Losses, numbers of tokens and loads of experts are those of two processes that share nothing.
    """
    runs = {"by one": (one, resumed), "layouts": (two, one, four)}[name]
    whole, steps = batches_of(two["straight"]), rows_of(folder / "straight")
    assert [len(set(batch)) for batch in whole] == [8] * 8  # six to learn from, two to evaluate on
    parts = [batches_of(run[name]) for run in runs]
    learned = sum([part[:-2] for part in parts], [])
    assert learned == whole[6 - len(learned) : 6] and len(learned) == (6 if name == "layouts" else 3)
    assert all(part[-2:] == whole[6:] for part in parts)
    got = [row for row in rows_of(folder / name) if row["step"] == 6 or "loss" in row]
    assert [row.keys() for row in got] == [row.keys() for row in steps]
    for row, want in zip(got, steps, strict=True):
        for key in want:
            np.testing.assert_allclose(row[key], want[key], rtol=rtol, atol=1e-6, err_msg=f"{want['step']} {key}")
    params = read_arrays(folder / "straight.npz")
    for path, array in read_arrays(folder / f"{name}.npz").items():
        np.testing.assert_allclose(array, params[path], rtol=rtol, atol=rtol, err_msg=path)
    assert read_item(folder / name, 6, "data") == read_item(folder / "straight", 6, "data")


def test_processes_that_share_rows_read_the_same(two, four):
    (first, second), quarters = two["layouts"], four["layouts"]
    assert first["read"] == first["batches"] == second["read"]
    assert quarters[0]["read"] == quarters[1]["read"] and quarters[2]["read"] == quarters[3]["read"]
    halves = zip(quarters[0]["read"], quarters[2]["read"], strict=True)
    assert [upper + lower for upper, lower in halves] == quarters[0]["batches"]
    assert "2 processes, rows of 32 tokens: of every 8 each packs up to 8, and its devices hold 8" in first["out"]
    assert "4 processes, rows of 32 tokens: of every 8 each packs up to 4, and its devices hold 4" in quarters[0]["out"]


def test_rows_of_a_process_are_those_of_its_devices(one, two):
    assert one["own rows"] == ({"0": [0, 1, 2, 3, 4, 5, 6, 7]},)  # each device a half of every row
    assert two["own rows"] == ({"0": [0, 1, 2, 3], "1": [4, 5, 6, 7]},) * 2
    assert two["shared rows"] == two["whole rows"] == ({"0": list(range(8)), "1": list(range(8))},) * 2


def test_a_run_from_before_there_were_shards_is_refused():
    with pytest.raises(errors.TrainingError, match="position belongs to its processes.*continue with that version"):
        same_run.check_same_run({"data": {"seed": 0}}, {"data": {"seed": 0, "shards": 8}})


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder, resumed):
    first, second = resumed["endless"]
    assert first["interrupted"] and second["interrupted"]
    assert first["step"] == second["step"] == rows_of(folder / "endless")[-1]["step"]
    assert [path.name for path in (folder / "endless/checkpoints").iterdir()] == [str(first["step"])]
    assert f"SIGTERM: saving step {first['step']}, then stopping" in first["out"]


@pytest.mark.parametrize("mesh", IMPORTS)
def test_import_onto_a_mesh_reads_in_each_process_what_its_shards_need(two, mesh):
    file = load_file(TINY / "model.safetensors")
    file = {name: tensor for name, tensor in file.items() if not name.endswith(("_decay", "slope_rate"))}  # derived
    results = two[f"load {mesh}"]
    for result in results:
        got = read_arrays(result["values"])
        assert got.keys() == file.keys()
        for name, tensor in file.items():
            assert (got[name].dtype, got[name].tobytes()) == (tensor.dtype, tensor.tobytes()), name
    first, second = (read_arrays(result["touched"]) for result in results)
    assert any(results[0]["sharded"].values())
    for name, tensor in file.items():
        masks = [part.get(name, np.zeros(tensor.nbytes, bool)) for part in (first, second)]
        assert (masks[0] | masks[1]).all(), name
        if results[0]["sharded"][name]:
            assert not (masks[0] & masks[1]).any(), name  # no byte is read by both
        else:
            assert (masks[0] & masks[1]).all(), name
    if mesh == "expert":
        assert not any(".experts.2." in name or ".experts.3." in name for name in first)  # not even opened
        assert not any(".experts.0." in name or ".experts.1." in name for name in second)


def start_programs(*arguments):
    """python ARGUMENTS --distributed=ADDRESS,2,INDEX in two processes of one device."""
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, *arguments, f"--distributed={address},2,{index}"],
            cwd=REPOSITORY,
            env=fake_devices.environment(1),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]


def kill_all(programs):
    for program in programs:
        program.kill()
        program.communicate()


def test_a_killed_process_stops_the_other_and_train_py_goes_on_from_the_checkpoint(folder, two):
    command = ["train.py", f"--config={folder}/run.py", f"--workdir={folder}/killed", "--steps=6"]
    definition = (
        "import pathlib\nfrom tests.support import processes_worker\n{}\n"
        f"get_config = lambda: processes_worker.config_of_run(pathlib.Path({str(folder)!r}), data=1, fsdp=2)\n"
    )
    (folder / "run.py").write_text(definition.format("processes_worker.hang_before_step(4, index=1)"))
    programs = start_programs(*command)
    try:
        wait_until(
            lambda: len(metrics.read_rows(folder / "killed/metrics.jsonl")) >= 3,
            alive=lambda: programs[0].poll() is None,
        )
        time.sleep(1)  # process 0 waits in step 4
        programs[1].kill()
        out, err = programs[0].communicate(timeout=HANG_SECONDS)
    finally:
        kill_all(programs)
    assert programs[0].returncode not in (0, None), out
    (message,) = [line for line in err.splitlines() if "another process of this run" in line]
    assert message.endswith(
        "start all processes again with the same --workdir, and the run continues from step 2 in "
        f"{folder}/killed/checkpoints"
    )

    (folder / "run.py").write_text(definition.format(""))
    programs = start_programs(*command)
    try:
        outputs = [program.communicate(timeout=HANG_SECONDS) for program in programs]
    finally:
        kill_all(programs)
    assert [program.returncode for program in programs] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    assert "finished at step 6, 1,536 tokens" in outputs[0][0]
    assert rows_of(folder / "killed") == rows_of(folder / "straight")
    assert read_item(folder / "killed", 6, "checksums") == read_item(folder / "straight", 6, "checksums")


def test_a_process_that_is_silent_or_fails_stops_the_other():
    """A collective waits forever: jax aborts the program, which still says what to do."""
    *pairs, failing = [
        start_programs("-m", "tests.support.processes_worker", *task) for task in (["wait"], ["wait"], ["fail"])
    ]
    try:
        for silent, programs in enumerate(pairs):
            for program in programs:
                assert "waits\n" in iter(program.stdout.readline, "")
            programs[silent].send_signal(signal.SIGSTOP)
        silent = "another process of this run has ended or was silent for 15 s"
        lost = f"{silent} (see jax's lines above); this process stops too"
        for programs, other in zip(pairs, (1, 0), strict=True):
            _, err = programs[other].communicate(timeout=HANG_SECONDS)
            assert programs[other].returncode == -signal.SIGABRT
            assert err.splitlines()[-1] == f"{lost}: do this"
        errors = [program.communicate(timeout=HANG_SECONDS)[1] for program in failing]
        assert [program.returncode for program in failing] == [1, 1]
        assert re.search(r"LostProcessError: another process of this run has ended.*: do this\n$", errors[0]), errors[0]
        assert errors[1] == "my own failure\n"
    finally:
        kill_all(sum(pairs, failing))


def test_a_process_that_waits_in_vain_says_for_whom(monkeypatch):
    monkeypatch.setattr(distributed, "_JOIN_SECONDS", 0)
    with pytest.raises(RuntimeError, match=r"process 0 does not answer at 127\.0\.0\.1:1 after 0 s"):
        distributed.join("127.0.0.1:1,2,1")


@pytest.mark.parametrize("value", ["host", "host:1,2", "host:1,2,2", "host:x,2,1"])
def test_bad_addresses_are_refused(value):
    command = [sys.executable, "train.py", "--config=configs/debug.py", f"--distributed={value}"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode and "give auto, or HOST:PORT,COUNT,INDEX" in finished.stderr
