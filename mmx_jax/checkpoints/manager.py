"""Checkpoints of a training run: orbax behind a few methods.

A step is one folder, FOLDER/<step>/{params, optimizer, position, data, config, checksums}, that gets its name by a
rename once everything in it is written, and loses it by a rename before anything in it is deleted: a kill leaves the
other steps as they were, and what it leaves of its own is removed when the run is opened again. The checksums are of
the arrays' values, for the files have none: orbax reads a flipped bit back without a word.

A step counts once its essentials were read back; only then are older ones deleted. What is saved is finite.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mmx_jax.storage import filesystem, json_io
from mmx_jax.storage.array_files import ArrayFolder, region_checksum

_CHUNK_BYTES = 1 << 27
_DISCARDED = "discarded"  # folder of steps that are being deleted
_FINITE = "all values are finite"  # mark among the checksums; older versions did not look


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the step, the cause and what is left."""


class NotFiniteError(CheckpointError):
    """A state that is not saved, for values in it are not finite."""


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A step that was handed to orbax and has not been read back yet."""

    step: int
    shapes: dict[str, dict]  # of params and optimizer
    texts: dict[str, object]  # what the JSON items hold


class Checkpointer:
    """The checkpoints of one run; keeps the newest `keep` and, if `keep_best`, the one with the lowest held-out loss.

    Args:
      directory: made if missing.
      asynchronous: `save` returns once the arrays are copied off the devices; `wait` for the files.

    Raises:
      files.PathError: what is written into a folder of that name could not be read back.
    """

    def __init__(self, directory, *, keep: int = 3, keep_best: bool = True, asynchronous: bool = True):
        self.directory = filesystem.destination(directory, arrays=True).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._unread: _Saved | None = None
        self._losses: dict[int, float] = {}
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _DISCARDED, ignore_errors=True)
        items = ("position", "data", "config", "checksums")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None,  # see _evict
                todelete_subdir=_DISCARDED,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=asynchronous,
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                **{name: ocp.JsonCheckpointHandler() for name in items},
            },
        )

    def steps(self) -> list[int]:
        """Steps that are whole, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps_on_disk(self) -> list[int]:
        """Steps that are whole by the names of their folders: what orbax believes it holds includes one that failed."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def save(
        self, step: int, state: Any, *, position: dict, data: Any, config: dict, eval_loss: float | None = None
    ) -> None:
        """Saves the training state of `step`.

        Args:
          state: {"step", "params", "opt_state"} of `mmx_jax.training.train_step`.
          position: what the host counts (JSON). data: state of the data pipeline (JSON). config: JSON form.
          eval_loss: held-out loss of this very step, where it is known; see `note_loss`.

        Raises:
          NotFiniteError: a parameter or moment is not finite; nothing is written.
          CheckpointError: this save, or the asynchronous one before it, failed or cannot be read back. Older steps
            are untouched.
        """
        self.wait()
        sums, not_finite = _checksums(state, position, data)
        if not_finite:
            raise NotFiniteError(f"step {step} is not saved: not finite are {_listed(not_finite)}")
        trees = {"params": state["params"], "optimizer": _optimizer_item(state)}
        texts = {"position": position, "data": data, "config": config, "checksums": sums | {_FINITE: True}}
        args = ocp.args.Composite(
            **{name: _save_args(tree) for name, tree in trees.items()},
            **{name: ocp.args.JsonSave(value) for name, value in texts.items()},
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # orbax, tensorstore and the system each raise their own
            raise self._save_error(error) from error
        self._unread = _Saved(step, {name: _shapes(tree) for name, tree in trees.items()}, _as_json(texts))
        if eval_loss is not None:
            self.note_loss(step, eval_loss)
        self.poll()

    def note_loss(self, step: int, eval_loss: float) -> None:
        """Notes the held-out loss of `step`, saved or being saved. Without it, or not finite, it cannot be the best."""
        if math.isfinite(eval_loss):
            self._losses[step] = eval_loss
            if self._unread is None:
                self._settle(step)

    def poll(self) -> None:
        """Reads the last save back if it has ended by now; raises CheckpointError as `wait` does."""
        # Several processes do so together, in `wait`.
        if self._unread is not None and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save is on disk and was read back; raises CheckpointError if either failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._unread = None
            raise self._save_error(error) from error
        if self._unread is not None:
            saved, self._unread = self._unread, None
            if jax.process_index() == 0:  # others may not see a new file at once, on storage that they share
                self._read_back(saved)
            self._settle(saved.step)

    def last_good(self, before: int | None = None) -> int | None:
        """The newest step, of those before `before`, that was saved, read back and finite; None if there is none."""
        for step in reversed([step for step in self.steps_on_disk() if before is None or step < before]):
            with contextlib.suppress(OSError, json_io.JsonError):
                if json_io.read_object(self._item(step, "checksums")).get(_FINITE) is True:
                    return step
        return None

    def read_position(self, step: int) -> dict:
        """The `position` that `step` was saved with."""
        self._check_exists(step)
        return self._read(step, position=ocp.args.JsonRestore())["position"]

    def read_config(self, step: int) -> dict:
        """The configuration that was in force when `step` was saved."""
        self._check_exists(step)
        return self._read(step, config=ocp.args.JsonRestore())["config"]

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, Any, Any]:
        """Restores `step` onto the shardings of `abstract_state`, whatever mesh it was saved from.

        Args:
          abstract_state: the training state as jax.ShapeDtypeStruct with shardings.

        Returns:
          (state, position, data).

        Raises:
          CheckpointError: a file is missing or damaged (names the newest older step that can be read), or the
            parameters are not exactly those of the model (names the differences).
        """
        self._check_exists(step)
        try:
            return self._restore(step, abstract_state)
        except CheckpointError as error:
            older = self._newest_readable(abstract_state, before=step)
            remedy = (
                f"step {older} was read through and is good: continue from it with --resume={older}"
                if older is not None
                else "no older step can be read"
            )
            if later := [other for other in self.steps() if other > step]:
                remedy += f"; later steps are untouched: {_listed(later)}"
            raise CheckpointError(f"{error}\n{remedy}") from error

    def discard_after(self, step: int) -> list[int]:
        """Deletes the steps after `step` and returns them: a run that went back must not meet them again."""
        later = [other for other in self.steps() if other > step]
        self._discard(reversed(later))  # newest first: a kill in between leaves a run that went less far
        return later

    def close(self) -> None:
        self._manager.close()

    def _item(self, step, name):
        return self.directory / str(step) / name / "metadata"

    def _read_back(self, saved):
        """Raises CheckpointError unless the JSON items are whole, all arrays there, and a small one what it was."""
        folder = self.directory / str(saved.step)
        try:
            for name, value in saved.texts.items():
                if json_io.loads(self._item(saved.step, name).read_bytes()) != value:
                    raise ValueError(f"{name} is not what was written")
            sums = saved.texts["checksums"]
            for item, shapes in saved.shapes.items():
                _check_arrays(ArrayFolder(folder / item), shapes, {key: sums[f"{item}/{key}"] for key in shapes})
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"step {saved.step} was written to {self.directory} and cannot be read back: {_cause(error)}; older "
                f"steps are untouched: {_listed([step for step in self.steps_on_disk() if step != saved.step])}"
            ) from error

    def _settle(self, step):
        """Files the loss of a step that is on disk, and deletes the steps that need not be kept."""
        if step in self._losses and step in self.steps() and jax.process_index() == 0:
            self._loss_file(step).parent.mkdir(exist_ok=True)
            filesystem.write_text(self._loss_file(step), json.dumps({"loss": self._losses[step]}))
        self._evict()

    def _loss_file(self, step):
        return self.directory / str(step) / "metrics" / "metrics"  # where orbax puts metrics that it is given

    def _loss(self, step):
        """Held-out loss; None where it is unknown or not finite."""
        if step not in self._losses:
            loss = math.nan
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                loss = float(json.loads(self._loss_file(step).read_text())["loss"])
            self._losses[step] = loss
        return self._losses[step] if math.isfinite(self._losses[step]) else None

    def _evict(self):
        steps = self.steps()
        kept = set(steps[-self._keep :])
        losses = {step: loss for step in steps if (loss := self._loss(step)) is not None}
        if self._keep_best and losses:
            kept.add(min(reversed(steps), key=lambda step: losses.get(step, math.inf)))
        self._discard([step for step in steps if step not in kept])

    def _discard(self, steps):
        """Deletes steps: each first loses its name, so that half of one is never taken for a whole one."""
        for step in steps:
            self._manager.delete(step)
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _DISCARDED, ignore_errors=True)

    def _check_exists(self, step):
        if step not in self.steps():
            raise CheckpointError(f"{self.directory} holds no step {step}; it holds {_listed(self.steps())}")

    def _restore(self, step, abstract_state):
        wanted = {"params": abstract_state["params"], "optimizer": _optimizer_item(abstract_state)}
        self._check_keys(step, wanted)
        items = self._read(
            step,
            params=ocp.args.StandardRestore(wanted["params"]),
            optimizer=ocp.args.StandardRestore(wanted["optimizer"]),
            position=ocp.args.JsonRestore(),
            data=ocp.args.JsonRestore(),
            checksums=ocp.args.JsonRestore(),
        )
        adam = type(abstract_state["opt_state"])(**items["optimizer"]["adam"])
        state = {"step": items["optimizer"]["step"], "params": items["params"], "opt_state": adam}
        found, not_finite = _checksums(state, items["position"], items["data"])
        damaged = sorted(name for name in found if found[name] != items["checksums"].get(name))
        if damaged:
            raise self._read_error(step, ValueError(f"checksums differ, the files are damaged: {_listed(damaged)}"))
        if not_finite:
            raise self._read_error(step, ValueError(f"not finite are {_listed(not_finite)}"))
        return state, items["position"], items["data"]

    def _read(self, step, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._read_error(step, error) from error

    def _check_keys(self, step, wanted):
        """Orbax's own message on a different tree does not say which leaf; this one does."""
        try:
            stored = self._manager.item_metadata(step)
            stored = {name: _shapes(stored[name]) for name in wanted}
        except Exception as error:
            raise self._read_error(step, error) from error
        for name, tree in wanted.items():
            expected = _shapes(tree)
            missing = sorted(expected.keys() - stored[name].keys())
            unknown = sorted(stored[name].keys() - expected.keys())
            shapes = [
                f"{key} {stored[name][key]} instead of {expected[key]}"
                for key in sorted(expected.keys() & stored[name].keys())
                if expected[key] != stored[name][key]
            ]
            if missing or unknown or shapes:
                raise CheckpointError(
                    f"{name} of step {step} in {self.directory} are not those of the model: "
                    f"missing {_listed(missing)}; unknown {_listed(unknown)}; "
                    f"of another shape or dtype {_listed(shapes)}"
                )

    def _newest_readable(self, abstract_state, before):
        for step in reversed([step for step in self.steps() if step < before]):
            try:
                self._restore(step, abstract_state)
            except CheckpointError:
                continue
            return step
        return None

    def _read_error(self, step, error):
        return CheckpointError(
            f"step {step} in {self.directory} cannot be read: {_cause(error)}; "
            f"older steps: {_listed([other for other in self.steps() if other < step])}"
        )

    def _save_error(self, error):
        older = f"older steps are untouched: {_listed(self.steps_on_disk())}"
        if filesystem.is_disk_full(error):
            return CheckpointError(
                f"{self.directory}: disk full: a checkpoint could not be written; {older}; free some space and start "
                "the run again: it continues from the newest step"
            )
        return CheckpointError(f"a checkpoint could not be written to {self.directory}: {_cause(error)}; {older}")


def _save_args(tree):
    """Saves arrays in chunks of bounded size, so that an export need not hold a stacked parameter whole."""
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    return ocp.args.StandardSave(tree, save_args=chunked)


def _as_json(value):
    return json.loads(json.dumps(value))


def _check_arrays(folder, shapes, sums):
    """Raises ValueError unless all arrays are there, and the smallest has its checksum."""
    for key, (shape, dtype) in shapes.items():
        found = folder.open(key.replace("/", "."))
        if (tuple(found.shape), found.dtype.name) != (shape, dtype):
            raise ValueError(f"{folder.folder.name}/{key} is {found.dtype.name}{list(found.shape)}")
    smallest = min(shapes, key=lambda key: math.prod(shapes[key][0]))
    values = np.asarray(folder.open(smallest.replace("/", ".")).read().result())
    if region_checksum(values, (0,) * values.ndim, values.shape) != sums[smallest]:
        raise ValueError(f"the values of {folder.folder.name}/{smallest} are not those that were written")


@jax.jit
def array_checksums(tree: Any) -> Any:
    """Per leaf, the sum of its bits times an odd number for each position, modulo 2^32.

    A sum of integers is the same on every mesh, and one flipped bit always changes this one.
    """

    def checksum(x):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        position = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            stride = math.prod(x.shape[axis + 1 :]) % 2**32
            position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


@jax.jit
def _look_through(tree):
    """(checksums, whether all values are finite), per leaf."""
    return array_checksums(tree), jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)


def _checksums(state, position, data):
    """(checksums by name, names of the leaves that are not finite)."""
    arrays = {"params": state["params"], "optimizer": _optimizer_item(state)}
    sums, finite = (_by_name(tree) for tree in jax.device_get(_look_through(arrays)))
    sums: dict[str, int | str] = {name: int(value) for name, value in sums.items()}
    text = json.dumps([position, data], sort_keys=True)
    sums["position and data"] = hashlib.sha256(text.encode()).hexdigest()
    return sums, [name for name, value in finite.items() if not value]


def _by_name(tree, is_leaf=None):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _optimizer_item(state):
    return {"step": state["step"], "adam": state["opt_state"]._asdict()}


def _shapes(tree):
    tree = getattr(tree, "tree", tree)  # newer orbax wraps the metadata
    leaves = _by_name(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves.items()}


def _listed(items):
    items = [str(item) for item in items]
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "") if items else "none"


def _cause(error):
    while error.__cause__ is not None:  # tensorstore's own message is at the root
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:400]}" if text else type(error).__name__
