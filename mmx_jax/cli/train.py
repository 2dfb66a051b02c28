"""Trains a model: python train.py --config=configs/debug.py --workdir=runs/debug --set training.learning_rate=3e-4."""

import dataclasses
import re
import sys

from absl import app, flags, logging

from mmx_jax.cli import arguments, flags_parser, thread_errors

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "Config file: Python with a get_config() that returns a Config.")
flags.DEFINE_multi_string("set", [], "Override of one field of the config, field.path=value; may be given often.")
flags.DEFINE_string("data", None, "File or folder to train on, instead of the data sources of the config.")
flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/NAME with the name in the config.")
flags.DEFINE_integer("steps", 0, "Stop after this optimizer step of the run; 0: when the tokens are used up.", 0)
flags.DEFINE_string(
    "resume",
    "auto",
    "auto: continue the newest checkpoint of the workdir, if any; no: refuse a workdir that has one; "
    "a number: go back to that step and discard the later ones.",
)
flags.DEFINE_string(
    "init_from",
    None,
    "Start from the weights of this checkpoint, with a fresh optimizer: a Hugging Face folder, a converted one, a "
    "training run or a step of one. Its tokenizer is used where the config names none.",
)
flags.DEFINE_bool(
    "model_from_checkpoint",
    False,
    "With --init_from: the checkpoint says what the model is (shapes, layers, RoPE, norms), the config only how it is "
    "run and trained; --set still has the last word.",
)
flags.DEFINE_string(
    "wandb", None, "Also log to this Weights & Biases project (pip install wandb; WANDB_MODE=offline: to files only)."
)
flags.DEFINE_string("profile_steps", None, "FIRST:LAST optimizer steps to trace into WORKDIR/profile.")
flags.DEFINE_string(
    "distributed",
    None,
    "This process is one of several: auto, where SLURM, GKE, Open MPI or a TPU pod says which; elsewhere "
    "HOST:PORT,COUNT,INDEX with an address of process 0, the number of processes and the number of this one.",
)
flags.DEFINE_string(
    "topology",
    None,
    "With --dry_run or --plan: for this TPU topology, such as v5p:8x8x16, without having it; for --plan also a GPU, "
    "such as h100 or h200:2.",
)
flags.DEFINE_bool("dry_run", False, "Compile the step, print memory and parameters, and end; reads no data.")
flags.DEFINE_bool("plan", False, "Estimate memory and traffic without compiling.")


PROGRAM = flags_parser.Program(
    summary="Trains a model, or continues the run in --workdir. The folder of the run receives checkpoints, metrics, "
    "tokenizer and loss curve.",
    usage="--config=FILE [--set field.path=value ...] [--workdir=FOLDER]",
    examples=(
        "--config=configs/debug.py --workdir=runs/demo",
        "--config=configs/debug.py --data=books/ --steps=100 --set training.learning_rate=1e-3",
        "--config=configs/debug.py --workdir=runs/tuned --init_from=runs/demo --data=notes.txt",
        "--config=configs/small_1b.py --plan --topology=v5e:4x4 --set mesh.data=1 --set mesh.fsdp=16",
    ),
    module=__name__,
    groups={
        "What is trained": ("config", "set", "data", "init_from", "model_from_checkpoint"),
        "The run": ("workdir", "steps", "resume", "distributed"),
        "Watching it": ("wandb", "profile_steps"),
        "Without training": ("dry_run", "plan", "topology"),
    },
    positional=lambda argument: (
        f"the config file is named with --config={argument}"
        if argument.endswith(".py")
        else f"overrides are written --set {argument if '=' in argument else 'field.path=' + argument}"
    ),
)


@flags.validator("config", "--config is missing: name a config file, such as --config=configs/debug.py")
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
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # orbax logs the traceback of what it also raises
    # Imported late, so that --help and a mistyped flag answer at once.
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
            foretell(config)
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
        # Ours say what to do; of the others the traceback is worth having with --verbosity=0.
        if FLAGS["verbosity"].present:
            raise
        lost = isinstance(error, distributed.LostProcessError)
        distributed.leave(f"{name}: {type(error).__name__}: {error}", lost=lost)
    loss = "none" if result.loss is None else f"{result.loss:.4f}"
    held_out = "none" if result.eval_loss is None else f"{result.eval_loss:.4f}"
    print(
        f"{'stopped' if result.interrupted else 'finished'} at step {result.step}, {result.tokens_seen:,} tokens: "
        f"loss {loss}, held-out loss {held_out}, unigram entropy {result.unigram_entropy:.4f} nats per token"
    )


def read_config():
    """The config of the flags. Where the checkpoint says what the model is, --set comes after it."""
    from mmx_jax.config import SourceConfig
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


def foretell(config):
    """Prints what --plan or --dry_run knows."""
    from mmx_jax.analysis import aot_training, memory_model
    from mmx_jax.config import io as config_io

    if FLAGS.plan:
        print("\n".join(memory_model.training_lines(config, FLAGS.topology or "")))
        return
    if FLAGS.topology and (shortage := memory_model.shortage(config, FLAGS.topology)):
        print(f"{flags_parser.program_name()}: {shortage}", file=sys.stderr, flush=True)
    print(config_io.format_config(config))
    print("\n".join(aot_training.dry_run(config, FLAGS.topology or "")))


def profile_steps() -> tuple[int, ...]:
    return tuple(map(int, FLAGS.profile_steps.split(":"))) if FLAGS.profile_steps else ()


def run_main():
    """Entry point of train.py and of `mmx-train`."""
    arguments.check_or_exit(flags_parser.program_name(), sys.argv)
    flags.adopt_module_key_flags(sys.modules[__name__])
    app.run(main, flags_parser=flags_parser.make(PROGRAM))
