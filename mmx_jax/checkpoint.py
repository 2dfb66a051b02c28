"""Checkpoints of a training run: orbax behind a few methods.

A step is one folder, FOLDER/<step>/{params, optimizer, position, data, config, checksums}, that gets its name by a
rename once everything in it is written: a kill leaves the older steps as they were, and what it leaves of its own is
removed when the run is opened again. The checksums are of the arrays' values, for the files have none: orbax reads a
flipped bit back without a word.
"""

import hashlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

_CHUNK_BYTES = 1 << 27


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the step, the cause and what is left."""


class Checkpointer:
    """The checkpoints of one run; keeps the newest `keep` and, if `keep_best`, the one with the lowest loss.

    Args:
      directory: made if missing.
      asynchronous: `save` returns once the arrays are copied off the devices; `wait` for the files.
    """

    def __init__(self, directory, *, keep: int = 3, keep_best: bool = True, asynchronous: bool = True):
        self.directory = pathlib.Path(directory).absolute()
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            # Sorted from high to low, the last one is the best.
            best = checkpoint_managers.BestN(
                get_metric_fn=_loss_of, reverse=True, n=1, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_loss_of,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=asynchronous,
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
                "checksums": ocp.JsonCheckpointHandler(),
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

    def save(self, step: int, state, *, position: dict, data, config: dict, eval_loss: float | None = None):
        """Saves the training state of `step`.

        Args:
          state: {"step", "params", "opt_state"} of `mmx_jax.training.step`.
          position: what the host counts (JSON). data: state of the data pipeline (JSON). config: JSON form.
          eval_loss: held-out loss of this very step; without it the step cannot be the best.

        Raises:
          CheckpointError: this save, or the asynchronous one before it, failed. Older steps are untouched.
        """
        args = ocp.args.Composite(
            params=_save_args(state["params"]),
            optimizer=_save_args(_optimizer_item(state)),
            position=ocp.args.JsonSave(position),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config),
            checksums=ocp.args.JsonSave(_checksums(state, position, data)),
        )
        try:
            self._manager.save(step, args=args, metrics=None if eval_loss is None else {"loss": eval_loss}, force=True)
        except Exception as error:  # orbax, tensorstore and the system each raise their own
            raise self._save_error(error) from error

    def wait(self):
        """Blocks until the last save is on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error

    def read_config(self, step: int) -> dict:
        """The configuration that was in force when `step` was saved."""
        self._check_exists(step)
        return self._read(step, config=ocp.args.JsonRestore())["config"]

    def restore(self, step: int, abstract_state):
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
            raise CheckpointError(f"{error}\n{remedy}") from error

    def discard_after(self, step: int) -> list[int]:
        """Deletes the steps after `step` and returns them: a run that went back must not meet them again."""
        later = [other for other in self.steps() if other > step]
        for other in later:
            self._manager.delete(other)
        return later

    def close(self):
        self._manager.close()

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
        found = _checksums(state, items["position"], items["data"])
        damaged = sorted(name for name in found if found[name] != items["checksums"].get(name))
        if damaged:
            raise self._read_error(step, ValueError(f"checksums differ, the files are damaged: {_listed(damaged)}"))
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
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory}: {_cause(error)}; "
            f"older steps are untouched: {_listed(self.steps_on_disk())}. Is the disk full?"
        )


def _save_args(tree):
    """Saves arrays in chunks of bounded size, so that an export need not hold a stacked parameter whole."""
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    return ocp.args.StandardSave(tree, save_args=chunked)


def _loss_of(metrics):
    return metrics["loss"]


@jax.jit
def _array_checksums(tree):
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


def _checksums(state, position, data):
    arrays = {"params": state["params"], "optimizer": _optimizer_item(state)}
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_array_checksums(arrays)))
    sums = {jax.tree_util.keystr(path, simple=True, separator="/"): int(leaf) for path, leaf in leaves}
    text = json.dumps([position, data], sort_keys=True)
    return sums | {"position and data": hashlib.sha256(text.encode()).hexdigest()}


def _optimizer_item(state):
    return {"step": state["step"], "adam": state["opt_state"]._asdict()}


def _shapes(tree):
    tree = getattr(tree, "tree", tree)  # newer orbax wraps the metadata
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in leaves
    }


def _listed(items):
    items = [str(item) for item in items]
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "") if items else "none"


def _cause(error):
    while error.__cause__ is not None:  # tensorstore's own message is at the root
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:400]}" if text else type(error).__name__
