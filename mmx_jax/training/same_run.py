"""Whether a configuration continues the run that another one began."""

from mmx_jax.config import ConfigError
from mmx_jax.config import io as config_io
from mmx_jax.data import identity
from mmx_jax.training.errors import TrainingError

# Fields that may differ, besides the resumable ones, from a step that --resume=N names: they steer the optimizer and
# the order of the data from there on, and leave what was learned so far as it is.
BRANCH_FIELDS = (
    "training.learning_rate",  # and its phases
    "training.adam_",
    "training.weight_decay",
    "training.gradient_clip",
    "training.z_loss_coef",
    "training.aux_loss_",
    "training.microbatch_rows",
    "training.total_tokens",
    "model.router_aux_loss_coef",
    "data.seed",
)


def check_same_run(stored: dict, current: dict, *, branch: bool = False) -> list[str]:
    """The fields that differ and may, as "field: old -> new"; see `mmx_jax.config.Config.resumable`.

    Args:
      stored, current: configs as `config_to_json` writes them, parsed.
      branch: the step was named, with --resume=N: `BRANCH_FIELDS` may differ too.

    Raises:
      ConfigError: any other difference.
      TrainingError: the run was saved before there were shards.
    """
    if "shards" not in stored.get("data", {}):
        raise TrainingError(
            "the run in this folder was saved by a version whose data position belongs to its processes, and "
            "which this one does not read: continue with that version, or start in a new --workdir"
        )
    config = config_io.from_plain(current)
    old, new = (_flatten(identity.with_numbered_sources(config_io.resolved(plain))) for plain in (stored, current))
    allowed = config.resumable
    if _same_rates_so_far(old, new):
        allowed += ("training.total_tokens", "training.learning_rate_phases")
        for flat in (old, new):  # where they end says no more than the length of the run does
            flat["training.learning_rate_phases"] = [
                {name: phase[name] for name in ("shape", "start", "end")}
                for phase in flat["training.learning_rate_phases"]
            ]
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    allowed += BRANCH_FIELDS if branch else ()
    lines = {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in differing}
    harmful = [line for key, line in lines.items() if not (key.startswith(allowed) or identity.is_place(key))]
    if harmful:
        could_branch = any(line.startswith(BRANCH_FIELDS) for line in harmful) and not branch
        fields = ", ".join(field.rstrip("_") for field in BRANCH_FIELDS)
        raise ConfigError(
            "the run in this folder was made with another configuration and would not continue as itself:\n  "
            + "\n  ".join(harmful)
            + "\nundo these changes, or start in a new --workdir"
            + (f"; from a step that is named, with --resume=N, these may change: {fields}" if could_branch else "")
        )
    return [line for key, line in lines.items() if key in old]  # the others did not exist when it was saved


def _same_rates_so_far(old: dict, new: dict) -> bool:
    """Whether two runs, resolved and flattened, have the same learning rates up to the end of the shorter one."""
    if old["training.stages"] or new["training.stages"]:
        return False
    end = min(flat["training.total_tokens"] for flat in (old, new))
    return _rates_until(old, end) == _rates_until(new, end)


def _rates_until(flat: dict, end: int) -> list[dict]:
    """The phases of the learning rate that begin before `end` tokens, constant ones cut there."""
    phases, begin = [], 0
    for phase in flat["training.learning_rate_phases"]:
        if begin < end:
            cut = phase["shape"] == "constant" and phase["end_tokens"] > end
            phases.append(phase | {"end_tokens": end} if cut else phase)
        begin = phase["end_tokens"]
    if begin < end:  # the value at the end of the last phase stays
        phases.append(phase | {"shape": "constant", "end_tokens": end, "start": phase["end"]})
    return phases


def _flatten(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: tree}
