"""Two processes, joined by jax.distributed on the CPU, do what one process does: steps, whole runs, imports."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmx_jax import metrics
from mmx_jax.config_io import config_from_json
from mmx_jax.training import processes
from tests import fake_devices
from tests.processes_worker import TINY

REPOSITORY = pathlib.Path(__file__).parent.parent
MESHES = {"data": dict(data=2), "fsdp": dict(data=1, fsdp=2)}
IMPORTS = {"fsdp": dict(data=1, fsdp=2), "expert": dict(data=1, expert=2)}


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Workers:
    """tests/processes_worker.py started `count` times on two devices in all."""

    def __init__(self, folder, count, tasks):
        address = free_address()
        environment = fake_devices.environment(2 // count)
        self._outputs, self.processes = [], []
        for index in range(count):
            command = [sys.executable, "-W", "error", "-m", "tests.processes_worker"]
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

    def wait(self, until=None, timeout=150):
        """Until all have ended, or `until()`; one that fails, or all after `timeout`, end the others."""
        deadline = time.monotonic() + timeout
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
    """Texts to learn from; the runs go beside them."""
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
    """What two processes make of the tasks, by name: [result of process 0, of process 1]."""
    tasks = {
        **{f"steps {name}": dict(task="steps", **mesh) for name, mesh in MESHES.items()},
        **{f"load {name}": dict(task="load", **mesh) for name, mesh in IMPORTS.items()},
        "straight": dict(task="train", name="straight", steps=6, mesh=MESHES["fsdp"]),
        "half": dict(task="train", name="halves", steps=3, mesh=MESHES["fsdp"]),
        "shared rows": dict(task="train", name="tensor", steps=1, mesh=dict(data=1, tensor=2)),
    }
    results = start(folder, 2, *tasks.values()).results()
    return dict(zip(tasks, zip(*results, strict=True), strict=True))


@pytest.fixture(scope="module")
def one(folder, two):
    """What one process with two devices makes of them; it also tries to continue the run of two processes."""
    tasks = {
        **{f"steps {name}": dict(task="steps", **mesh) for name, mesh in MESHES.items()},
        "straight": dict(task="train", name="straight", steps=8, mesh=MESHES["fsdp"]),
        "alone": dict(task="train", name="alone", steps=2, mesh=MESHES["fsdp"]),
    }
    (results,) = start(folder, 1, *tasks.values()).results()
    return dict(zip(tasks, results, strict=True))


@pytest.fixture(scope="module")
def resumed(folder, one):
    """Two new processes that finish the run of `half`, try the one of one process, and are asked to stop."""
    tasks = {
        "other half": dict(task="train", name="halves", steps=6, mesh=MESHES["fsdp"]),
        "alone": dict(task="train", name="alone", steps=4, mesh=MESHES["fsdp"]),
        "endless": dict(
            task="train", name="endless", mesh=MESHES["fsdp"], total_tokens=10**9, save_every_steps=10**6
        ),
    }  # fmt: skip
    workers = start(folder, 2, *tasks.values())
    workers.wait(until=lambda: len(metrics.read_rows(folder / "endless/metrics.jsonl")) >= 3)
    workers.processes[1].send_signal(signal.SIGTERM)
    results = workers.results()
    return dict(zip(tasks, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_steps_of_two_processes_equal_those_of_one(one, two, mesh):
    alone, (first, second) = one[f"steps {mesh}"], two[f"steps {mesh}"]
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    assert (first["sharded"] > 0) == (mesh == "fsdp") and first["sharded"] == alone["sharded"]
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(first["norms"], alone["norms"], rtol=1e-4)
    want = read_arrays(alone["params"])
    for result in (first, second):
        got = read_arrays(result["params"])
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)


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
    assert not set(first["batches"]) & set(second["batches"])  # each process learns from texts of its own


def test_a_checkpoint_holds_the_position_of_every_process(folder, two):
    states = read_item(folder / "straight", 6, "data")
    assert [state["identity"]["process"] for state in states] == [[0, 2], [1, 2]]
    assert states[0]["iterator"] != states[1]["iterator"]


def test_a_run_of_two_processes_goes_on_as_if_it_had_not_stopped(folder, two, resumed):
    for whole, half, other in zip(two["straight"], two["half"], resumed["other half"], strict=True):
        # Six batches, then two to evaluate on; the first half evaluates as well, on the same two.
        assert half["batches"][:3] + other["batches"] == whole["batches"]
        assert (other["step"], other["loss"], other["eval_loss"]) == (6, whole["loss"], whole["eval_loss"])
    rows = [row for row in rows_of(folder / "halves") if (row["step"], "eval_loss" in row) != (3, True)]
    assert rows == rows_of(folder / "straight")
    assert read_item(folder / "halves", 6, "data") == read_item(folder / "straight", 6, "data")
    assert read_item(folder / "halves", 6, "checksums") == read_item(folder / "straight", 6, "checksums")


def test_another_number_of_processes_is_refused(one, resumed):
    assert one["straight"]["error"].startswith("TrainingError: step 6 holds the data positions of 2 process(es), and 1")
    assert one["alone"]["step"] == 2
    for result in resumed["alone"]:
        assert result["error"].startswith("TrainingError: step 2 holds the data positions of 1 process(es), and 2")


def test_one_process_saves_its_position_as_it_is(folder, one):
    assert read_item(folder / "alone", 2, "data")["identity"]["process"] == [0, 1]


def test_processes_that_would_share_rows_are_refused(folder, two):
    for result in two["shared rows"]:
        assert result["error"].startswith("ConfigError: mesh.*: the 1 batch shards"), result


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
            cwd=REPOSITORY, env=fake_devices.environment(1), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]  # fmt: skip


def kill_all(programs):
    for program in programs:
        program.kill()
        program.communicate()


def test_a_killed_process_stops_the_other_and_train_py_goes_on_from_the_checkpoint(folder, two):
    command = ["train.py", f"--config={folder}/run.py", f"--workdir={folder}/killed", "--steps=6"]
    definition = (
        "import pathlib\nfrom tests import processes_worker\n{}\n"
        f"get_config = lambda: processes_worker.config_of_run(pathlib.Path({str(folder)!r}), data=1, fsdp=2)\n"
    )
    (folder / "run.py").write_text(definition.format("processes_worker.hang_before_step(4, index=1)"))
    programs = start_programs(*command)
    try:
        deadline = time.monotonic() + 100
        while len(metrics.read_rows(folder / "killed/metrics.jsonl")) < 3:
            assert time.monotonic() < deadline and programs[0].poll() is None
            time.sleep(0.1)
        time.sleep(1)  # process 0 waits in step 4
        programs[1].kill()
        out, err = programs[0].communicate(timeout=60)
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
        outputs = [program.communicate(timeout=150) for program in programs]
    finally:
        kill_all(programs)
    assert [program.returncode for program in programs] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    assert "finished at step 6, 1,536 tokens" in outputs[0][0]
    assert rows_of(folder / "killed") == rows_of(folder / "straight")
    assert read_item(folder / "killed", 6, "checksums") == read_item(folder / "straight", 6, "checksums")


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_stops_the_other(silent):
    """Where a collective waits for ever: jax aborts the program, which says what to do all the same."""
    programs = start_programs("-m", "tests.processes_worker", "wait")
    try:
        for program in programs:
            assert "waits\n" in iter(program.stdout.readline, "")
        programs[silent].send_signal(signal.SIGSTOP)
        _, err = programs[1 - silent].communicate(timeout=30)
    finally:
        kill_all(programs)
    assert programs[1 - silent].returncode == -signal.SIGABRT
    lost = "another process of this run has ended or was silent for 6 s (see jax's lines above), and so ends this"
    assert err.splitlines()[-1] == f"{lost}: do this"


def test_a_process_that_waits_in_vain_says_for_whom(monkeypatch):
    monkeypatch.setattr(processes, "_JOIN_SECONDS", 0)
    with pytest.raises(RuntimeError, match=r"process 0 does not answer at 127\.0\.0\.1:1 after 0 s"):
        processes.join("127.0.0.1:1,2,1")


@pytest.mark.parametrize("value", ["host", "host:1,2", "host:1,2,2", "host:x,2,1"])
def test_bad_addresses_are_refused(value):
    command = [sys.executable, "train.py", "--config=configs/debug.py", f"--distributed={value}"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode and "give auto, or HOST:PORT,COUNT,INDEX" in finished.stderr
