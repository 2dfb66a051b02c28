"""How a run starts: alone in its folder, from which step, and whether there is anything left to do."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from mmx_jax import distributed, metrics
from mmx_jax.checkpoints.manager import Checkpointer
from mmx_jax.config import Config
from mmx_jax.storage import locking
from mmx_jax.training import schedule

LOCK = "run.lock"

# Fields that may differ, besides the harmless ones, from a step that --resume=N names: they steer the optimizer and the
# order of the data from there on, and leave what was learned so far as it is.
BRANCH_FIELDS = (
    "training.learning_rate",  # and its phases
    "training.adam_",
    "training.weight_decay",
    "training.gradient_clip",
    "training.z_loss_coef",
    "training.aux_loss_",
    "training.total_tokens",
    "model.router_aux_loss_coef",
    "data.seed",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The step that a run continues from, and what is known of it without its arrays."""

    step: int = 0  # 0: from the beginning
    tokens_seen: int = 0
    init_from: str = ""  # step 0: the checkpoint whose weights it begins with
    data_begins_anew: bool = False  # with another data.seed
    eval_row: dict | None = None  # of metrics.jsonl
    loss: float | None = None

    @property
    def eval_loss(self) -> float | None:
        return self.eval_row and self.eval_row["eval_loss"]


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path, message: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Holds the lock of the folder, in process 0; gives a check that it is still held.

    Raises:
      locking.LockedError: in all processes, where another run has it.
    """
    lock, error = None, None
    if distributed.is_first():
        try:
            lock = locking.FolderLock(workdir / LOCK, message)
        except (locking.LockedError, OSError) as failure:
            error = failure
    try:
        refusal = distributed.gather(None if error is None else str(error))[0]
        if refusal is not None:
            raise error or locking.LockedError(refusal)
        yield lock.check if lock is not None else _nothing
    finally:
        if lock is not None:
            lock.release()


def _nothing():
    pass


def look_at(checkpointer: Checkpointer, step: int, workdir: pathlib.Path, *, data_begins_anew: bool) -> Start:
    """What is known of the step of a run, the same in every process."""
    rows = metrics.read_rows(workdir / "metrics.jsonl") if distributed.is_first() else []
    rows = distributed.gather([row for row in rows if row.get("step") == step])[0]
    return Start(
        step=step,
        tokens_seen=checkpointer.read_position(step)["tokens_seen"],
        data_begins_anew=data_begins_anew,
        eval_row=next((row for row in rows if "eval_loss" in row), None),
        loss=next((row["loss"] for row in rows if "loss" in row), None),
    )


def is_finished(config: Config, start: Start, steps: int) -> bool:
    """Whether a run that starts there would add neither a step nor an evaluation."""
    if schedule.plan_step(config.training, start.tokens_seen) is not None and not (steps and start.step >= steps):
        return False
    return start.step > 0 and (start.eval_row is not None or not config.data.eval_fraction)


def finished_line(config: Config, start: Start, workdir: pathlib.Path) -> str:
    """What is said of a run that is started again after its end."""
    at_end = schedule.plan_step(config.training, start.tokens_seen) is None
    more = "raise training.total_tokens" if at_end else "give a larger --steps"
    return f"the run in {workdir} is finished at step {start.step}: nothing is changed. To go on, {more}"
