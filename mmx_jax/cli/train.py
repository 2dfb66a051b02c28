"""Trains a model: python train.py --config=configs/debug.py --workdir=runs/debug --set training.learning_rate=3e-4."""

import dataclasses
import re
import sys

from absl import app, flags, logging

from mmx_jax.cli import arguments

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "Config file: Python with a get_config() that returns a Config.", required=True)
flags.DEFINE_multi_string("set", [], "Override, field.path=value; may be given often.")
flags.DEFINE_string("data", None, "File or folder to train on, instead of the data sources of the config.")
flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/NAME with the name in the config.")
flags.DEFINE_integer("steps", 0, "Stop after this optimizer step of the run; 0: when the tokens are used up.", 0)
flags.DEFINE_string(
    "resume",
    "auto",
    "auto: continue the newest checkpoint of the workdir, if any; no: refuse a workdir that has one; "
    "a number: go back to that step and discard the later ones.",
)
flags.DEFINE_string("profile_steps", None, "FIRST:LAST optimizer steps to trace into WORKDIR/profile.")
flags.DEFINE_string(
    "distributed",
    None,
    "This process is one of several: auto, where SLURM, GKE, Open MPI or a TPU pod says which; elsewhere "
    "HOST:PORT,COUNT,INDEX with an address of process 0, the number of processes and the number of this one.",
)
flags.DEFINE_string(
    "topology", None, "With --dry_run or --plan: for this TPU topology, such as v5p:8x8x16, without having it."
)
flags.DEFINE_bool("dry_run", False, "Compile the step, print memory and parameters, and end; reads no data.")
flags.DEFINE_bool("plan", False, "The same from formulas, in a second: compile nothing.")


@flags.validator("profile_steps", "give FIRST:LAST, two step numbers with 1 <= FIRST <= LAST")
def _check_profile_steps(value):
    if value is None:
        return True
    parts = value.split(":")
    return len(parts) == 2 and all(part.isdigit() for part in parts) and 1 <= int(parts[0]) <= int(parts[1])


@flags.validator("resume", "give auto, no or a step number")
def _check_resume(value):
    return value in ("auto", "no") or value.isdigit()


@flags.multi_flags_validator(
    ["topology", "dry_run", "plan"], "--topology is for --dry_run or --plan: nothing runs on devices that are not there"
)
def _check_topology(values):
    return values["dry_run"] or values["plan"] or not values["topology"]


@flags.validator("distributed", "give auto, or HOST:PORT,COUNT,INDEX with 0 <= INDEX < COUNT")
def _check_distributed(value):
    if value in (None, "auto"):
        return True
    match = re.fullmatch(r".+:\d+,(\d+),(\d+)", value)
    return match is not None and int(match[2]) < int(match[1])


def main(argv):
    if len(argv) > 1:
        sys.exit(f"train.py: {argv[1]!r} is not a flag; overrides are written --set {argv[1]}")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # orbax logs the traceback of what it also raises
    # Imported late, so that --help and a mistyped flag answer at once.
    from mmx_jax import config_io, plan
    from mmx_jax.config import SourceConfig
    from mmx_jax.training import dry_run, loop, processes

    try:
        if FLAGS.distributed is not None:
            processes.join(FLAGS.distributed)
        config = config_io.apply_overrides(config_io.load_config(FLAGS.config), FLAGS.set)
        if FLAGS.data:
            data = dataclasses.replace(config.data, sources=(SourceConfig(path=FLAGS.data),))
            config = dataclasses.replace(config, data=data)
        if FLAGS.plan:
            print("\n".join(plan.training_lines(config, FLAGS.topology or "")))
            return
        if FLAGS.dry_run:
            if FLAGS.topology and (shortage := plan.shortage(config, FLAGS.topology)):
                print(f"train.py: {shortage}", file=sys.stderr, flush=True)
            print(config_io.format_config(config))
            print("\n".join(dry_run.dry_run(config, FLAGS.topology or "")))
            return
        result = loop.train(
            config,
            FLAGS.workdir or f"runs/{config.name}",
            steps=FLAGS.steps,
            resume=FLAGS.resume,
            profile_steps=tuple(map(int, FLAGS.profile_steps.split(":"))) if FLAGS.profile_steps else (),
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # Ours say what to do; of the others the traceback is worth having with --verbosity=0.
        if FLAGS["verbosity"].present:
            raise
        lost = isinstance(error, processes.LostProcessError)
        processes.leave(f"train.py: {type(error).__name__}: {error}", lost=lost)
    loss = "none" if result.loss is None else f"{result.loss:.4f}"
    held_out = "none" if result.eval_loss is None else f"{result.eval_loss:.4f}"
    print(
        f"{'stopped' if result.interrupted else 'finished'} at step {result.step}, {result.tokens_seen:,} tokens: "
        f"loss {loss}, held-out loss {held_out}, unigram entropy {result.unigram_entropy:.4f} nats per token"
    )


def run_main():
    """Entry point of train.py and of `mmx-train`."""
    arguments.check_or_exit("train.py", sys.argv)
    flags.adopt_module_key_flags(sys.modules[__name__])
    app.run(main)
