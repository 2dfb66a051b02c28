"""How a run starts: alone in its folder, from which step, and whether there is anything left to do."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from mmx_jax import distributed, metrics
from mmx_jax.checkpoints.manager import Checkpointer, CheckpointError
from mmx_jax.config import Config
from mmx_jax.storage import locking
from mmx_jax.training import schedule
from mmx_jax.training.errors import TrainingError

LOCK = "run.lock"


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
        return None if self.eval_row is None else self.eval_row["eval_loss"]


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
    """The start of a run at a step of its checkpoints, the same in every process."""
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
    """The message of a run that is started again after its end."""
    at_end = schedule.plan_step(config.training, start.tokens_seen) is None
    more = "raise training.total_tokens" if at_end else "give a larger --steps"
    return f"the run in {workdir} is finished at step {start.step}: nothing is changed. To go on, {more}"


def how_to_continue(checkpointer: Checkpointer) -> str:
    """Advice about a run whose processes have ended."""
    steps = checkpointer.steps_on_disk()
    where = f"continues from step {steps[-1]} in" if steps else "begins anew: there is no checkpoint in"
    return f"start all processes again with the same --workdir, and the run {where} {checkpointer.directory}"


def resume_step(checkpointer: Checkpointer, resume: str) -> int:
    """The step that --resume names; 0: from the beginning."""
    steps = checkpointer.steps()
    if resume == "auto":
        return steps[-1] if steps else 0
    if resume == "no":
        if steps:
            raise TrainingError(
                f"{checkpointer.directory} holds steps {', '.join(map(str, steps))} and --resume=no was given: "
                "choose another --workdir, or --resume=auto"
            )
        return 0
    if not resume.isdigit() or int(resume) not in steps:
        raise CheckpointError(
            f"--resume={resume}: give auto, no or one of the steps of {checkpointer.directory}: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    return int(resume)
