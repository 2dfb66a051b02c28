"""Trains a model: python train.py --config=configs/debug.py --workdir=runs/debug --set training.learning_rate=3e-4."""

import dataclasses
import re
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from mmx_jax.cli import arguments, flags_parser, thread_errors
from mmx_jax.config import Config, SourceConfig

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "Config file: a Python file that defines get_config(), which returns a Config.")
flags.DEFINE_multi_string("set", [], "Override one field of the config, as field.path=value; may be repeated.")
flags.DEFINE_string("data", None, "File or folder to train on, instead of the data sources in the config.")
flags.DEFINE_string("workdir", None, "Folder of the run (default: runs/NAME, where NAME is the name in the config).")
flags.DEFINE_integer(
    "steps", 0, "Stop after this optimizer step, counted from the start of the run; 0: train on all tokens.", 0
)
flags.DEFINE_string(
    "resume",
    "auto",
    "auto: continue from the newest checkpoint in the workdir, if there is one; no: refuse a workdir that has one; "
    "a number: go back to that step and discard later ones.",
)
flags.DEFINE_string(
    "init_from",
    None,
    "Start from the weights of this checkpoint, with a fresh optimizer: a Hugging Face folder, a converted "
    "checkpoint, a training run, or one step of a run. Its tokenizer is used if the config names none.",
)
flags.DEFINE_bool(
    "model_from_checkpoint",
    False,
    "With --init_from: take the model (shapes, layers, RoPE, norms) from the checkpoint, and only the training and "
    "runtime settings from the config. --set is applied last.",
)
flags.DEFINE_string(
    "wandb",
    None,
    "Also log to this Weights & Biases project (pip install wandb). WANDB_MODE=offline logs to files only.",
)
flags.DEFINE_string("profile_steps", None, "FIRST:LAST, the optimizer steps to trace into WORKDIR/profile.")
flags.DEFINE_string(
    "distributed",
    None,
    "Join the other processes of the run. auto: SLURM, GKE, Open MPI or a TPU pod provides the settings. Otherwise "
    "HOST:PORT,COUNT,INDEX: an address of process 0, the number of processes, and the index of this process.",
)
flags.DEFINE_string(
    "topology",
    None,
    "With --dry_run or --plan: the TPU topology to compile or estimate for, such as v5p:8x8x16; the hardware is not "
    "needed. --plan also takes GPUs, such as h100 or h200:2.",
)
flags.DEFINE_bool("dry_run", False, "Compile the training step, print its memory and collectives, and exit.")
flags.DEFINE_bool("plan", False, "Estimate memory and communication without compiling, and exit.")


PROGRAM = flags_parser.Program(
    summary="Trains a model, or continues the run in --workdir. Checkpoints, metrics, the tokenizer and the loss "
    "curve are written to that folder.",
    usage="--config=FILE [--set field.path=value ...] [--workdir=FOLDER]",
    examples=(
        "--config=configs/debug.py --workdir=runs/demo",
        "--config=configs/debug.py --data=books/ --steps=100 --set training.learning_rate=1e-3",
        "--config=configs/debug.py --workdir=runs/tuned --init_from=runs/demo --data=notes.txt",
        "--config=configs/small_1b.py --plan --topology=v5e:4x4 --set mesh.data=1 --set mesh.fsdp=16",
    ),
    module=__name__,
    groups={
        "Model and data": ("config", "set", "data", "init_from", "model_from_checkpoint"),
        "Run": ("workdir", "steps", "resume", "distributed"),
        "Logging and profiling": ("wandb", "profile_steps"),
        "Estimate without training": ("dry_run", "plan", "topology"),
    },
    positional=lambda argument: (
        f"give the config file as --config={argument}"
        if argument.endswith(".py")
        else f"write an override as --set {argument if '=' in argument else 'field.path=' + argument}"
    ),
)


@flags.validator("config", "--config is missing: give a config file, such as --config=configs/debug.py")
def _check_config(value):
    return value is not None


@flags.multi_flags_validator(
    ["model_from_checkpoint", "init_from"], "--model_from_checkpoint needs --init_from=CHECKPOINT"
)
def _check_init_from(values):
    return values["init_from"] or not values["model_from_checkpoint"]


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
    ["topology", "dry_run", "plan"], "--topology needs --dry_run or --plan: training runs on the devices of this host"
)
def _check_topology(values):
    return values["dry_run"] or values["plan"] or not values["topology"]


@flags.validator("distributed", "give auto, or HOST:PORT,COUNT,INDEX with 0 <= INDEX < COUNT")
def _check_distributed(value):
    if value in (None, "auto"):
        return True
    match = re.fullmatch(r".+:\d+,(\d+),(\d+)", value)
    return match is not None and int(match[2]) < int(match[1])


def main(argv: Sequence[str]) -> None:
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # orbax logs the traceback of an error that it also raises
    # Imported here, so that --help and errors in flags need no jax.
    from mmx_jax import distributed, metrics
    from mmx_jax.training import run

    name = flags_parser.program_name()
    if not FLAGS["verbosity"].present:
        thread_errors.report_in_one_line(name)
    try:
        if FLAGS.distributed is not None:
            distributed.join(FLAGS.distributed)
        config = read_config()
        if FLAGS.plan or FLAGS.dry_run:
            print_estimate(config)
            return
        if FLAGS.wandb:
            metrics.check_wandb()
        result = run.train(
            config,
            FLAGS.workdir or f"runs/{config.name}",
            steps=FLAGS.steps,
            resume=FLAGS.resume,
            init_from=FLAGS.init_from or "",
            watch=run.Watch(profile_steps=profile_steps(), wandb=FLAGS.wandb or ""),
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # The project's own messages say what to do. For other errors --verbosity=0 shows the traceback.
        if FLAGS["verbosity"].present:
            raise
        lost = isinstance(error, distributed.LostProcessError)
        distributed.exit_with_error(f"{name}: {type(error).__name__}: {error}", lost=lost)
    loss = "none" if result.loss is None else f"{result.loss:.4f}"
    held_out = "none" if result.eval_loss is None else f"{result.eval_loss:.4f}"
    print(
        f"{'stopped' if result.interrupted else 'finished'} at step {result.step}, {result.tokens_seen:,} tokens: "
        f"loss {loss}, held-out loss {held_out}, unigram entropy {result.unigram_entropy:.4f} nats per token"
    )


def read_config() -> Config:
    """The config that the flags give. --set is applied after --model_from_checkpoint."""
    from mmx_jax.config import io as config_io

    config = config_io.load_config(FLAGS.config)
    if FLAGS.model_from_checkpoint:
        from mmx_jax.training import initialize

        workdir = FLAGS.workdir or f"runs/{config.name}"
        config = initialize.with_model_of(config, FLAGS.init_from, workdir)
    config = config_io.apply_overrides(config, FLAGS.set)
    if FLAGS.data:
        data = dataclasses.replace(config.data, sources=(SourceConfig(path=FLAGS.data),))
        config = dataclasses.replace(config, data=data)
    return config


def print_estimate(config: Config) -> None:
    """Prints the lines of --plan or --dry_run."""
    from mmx_jax.analysis import aot_training, plan
    from mmx_jax.config import io as config_io

    if FLAGS.plan:
        print("\n".join(plan.training_lines(config, FLAGS.topology or "")))
        return
    if FLAGS.topology and (shortage := plan.shortage(config, FLAGS.topology)):
        print(f"{flags_parser.program_name()}: {shortage}", file=sys.stderr, flush=True)
    print(config_io.format_config(config))
    print("\n".join(aot_training.dry_run(config, FLAGS.topology or "")))


def profile_steps() -> tuple[int, ...]:
    """(first, last) step to trace; () for none."""
    return tuple(map(int, FLAGS.profile_steps.split(":"))) if FLAGS.profile_steps else ()


def run_main() -> None:
    """Entry point of train.py and of `mmx-train`."""
    arguments.check_or_exit(flags_parser.program_name(), sys.argv)
    flags.adopt_module_key_flags(sys.modules[__name__])
    app.run(main, flags_parser=flags_parser.make(PROGRAM))
