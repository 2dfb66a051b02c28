"""Logging of a run: metrics.jsonl, TensorBoard, Weights & Biases, and a plot of the loss."""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from mmx_jax.storage import filesystem

StrPath = str | os.PathLike[str]


class Sink(Protocol):
    """Another destination for the rows of a `MetricsWriter`."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl and, where tensorboardX is installed, to WORKDIR/tensorboard.

    A row is a flat dict with an int "step". A number that is not finite is written as null, because JSON has no value
    for it. Lists are written to metrics.jsonl only.

    Args:
      workdir: folder of the run.
      resume_step: rows after this step are removed, because the run repeats their steps; 0 starts a new file.
    """

    def __init__(self, workdir: StrPath, resume_step: int = 0):
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        truncate_rows(self._path, resume_step or -1)  # a run that starts from a checkpoint has a row for step 0
        self._file = self._path.open("ab", buffering=0)  # unbuffered: close() has nothing left to write that could fail
        self._board = _tensorboard(self._path.parent / "tensorboard", resume_step)
        self._sinks: list[Sink] = []

    def add(self, sink: Sink) -> None:
        """Also passes every row to `sink.write`; `close` closes the sink."""
        self._sinks.append(sink)

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row everywhere; raises OSError if metrics.jsonl cannot be written."""
        line = json.dumps({key: _jsonable(value) for key, value in row.items()}, allow_nan=False) + "\n"
        _append(self._file, line.encode())
        if self._board is not None and not _has_writer(self._board):
            print(
                f"TensorBoard is off from step {row['step']} on: its writer thread has ended",
                file=sys.stderr,
                flush=True,
            )
            self._board = None
        if self._board is not None:
            for key, value in _scalars(row).items():
                self._board.add_scalar(key, value, row["step"])
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        self._file.close()
        if self._board is not None and _has_writer(self._board):
            self._board.close()
        for sink in self._sinks:
            sink.close()


class WandbRun:
    """A run of Weights & Biases; resumed training continues it by the id in WORKDIR/wandb_run_id.

    The first failure is reported on standard error and ends logging there; training goes on.

    Args:
      workdir: folder of the run; wandb's own files go to WORKDIR/wandb.
      project: of Weights & Biases.
      config: the resolved config as plain values.
    """

    def __init__(self, workdir: StrPath, project: str, *, name: str, config: dict[str, Any]):
        self._run = None
        file = pathlib.Path(workdir) / "wandb_run_id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        with self._tolerating():
            import wandb  # pyright: ignore[reportMissingImports]

            run_id = file.read_text(encoding="utf-8").strip()
            self._run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", dir=str(workdir), config=config
            )
            # Rows are ordered by their step, not by the order of calls: after going back, steps are logged again.
            self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            with self._tolerating():
                self._run.log({"step": row["step"], **_scalars(row)})

    def close(self) -> None:
        if self._run is not None:
            with self._tolerating():
                self._run.finish()

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            message = str(error) or type(error).__name__
            print(f"Weights & Biases failed, and the run goes on without it: {message}", file=sys.stderr, flush=True)


def check_wandb() -> None:
    """Raises ImportError if wandb is not installed, before a run starts that is meant to log there."""
    if importlib.util.find_spec("wandb") is None:
        raise ImportError("--wandb needs the package wandb: pip install mmx_jax[wandb], or leave the flag out")


def read_rows(path: StrPath) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. An incomplete last line, left by a killed run, is dropped.

    Raises:
      ValueError: another line is not JSON.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {path} is not JSON ({error}); repair or remove the file") from error
    return rows


def truncate_rows(path: StrPath, step: int) -> None:
    """Removes the rows after `step`; the file is replaced by one rename."""
    path = pathlib.Path(path)
    rows = [row for row in read_rows(path) if row["step"] <= step]
    filesystem.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _append(file, data):
    """Writes all of `data`; an OSError names the file."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def missing_lines() -> list[str]:
    """Lines to print at the start of a run that cannot plot its loss."""
    if importlib.util.find_spec("matplotlib") is not None:
        return []
    return ["loss.png will not be drawn: matplotlib is not installed (pip install matplotlib)"]


def plot_loss(
    rows: list[dict[str, Any]], path: StrPath, *, unigram_entropy: float | None = None, title: str = ""
) -> None:
    """Plots training and held-out loss over tokens seen into a PNG file (needs matplotlib).

    Args:
      rows: of metrics.jsonl: "tokens_seen" with "loss" or "eval_loss", nats per token.
      unigram_entropy: nats per token; drawn as a line, the loss of a model that knows token frequencies only.
    """
    # Not pyplot: it keeps global state and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(row["tokens_seen"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["tokens_seen"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ec5e8", linewidth=0.9, label="training loss, each logged step")
        axes.plot(*_smooth(train), color="#1f5f99", linewidth=1.8, label="training loss, running mean")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), "o-", color="#d1495b", linewidth=1.4, markersize=4, label="held-out loss"
        )
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#555555", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"unigram entropy {unigram_entropy:.3f}",
            (1.0, unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color="#555555",
            fontsize=9,
        )
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    temporary = pathlib.Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)


def _smooth(points, fraction: float = 0.05):
    """Running mean over the last `fraction` of all points, as (x, y) lists."""
    window = max(1, round(fraction * len(points)))
    xs, ys = zip(*points, strict=True)
    means = [sum(ys[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(ys))]
    return list(xs), means


def _scalars(row):
    """The finite numbers of a row, without its step."""
    return {
        key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _jsonable(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_jsonable(x) for x in value]
    return value


def _has_writer(board) -> bool:
    """Whether the writer thread of a SummaryWriter is alive. If it has died, on a full disk say, adding would block."""
    writer = getattr(board.file_writer, "event_writer", None)
    worker = getattr(writer, "_worker", None)
    return worker is None or worker.is_alive()


def _tensorboard(path, resume_step):
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(path), purge_step=resume_step + 1 if resume_step else None)
