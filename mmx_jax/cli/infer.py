"""Generates text: python infer.py --checkpoint=runs/demo/export --prompt='def main('.

Or reports the memory that this needs, without running it:
python infer.py --config=configs/small_1b.py --dry_run --topology=v5e:2x2 --dtype=bfloat16.
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from mmx_jax.cli import arguments, flags_parser, text_input, thread_errors
from mmx_jax.cli.arguments import UsageError

if TYPE_CHECKING:
    from mmx_jax.inference.model import Model

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "checkpoint", None, "Folder of safetensors, a converted checkpoint, a training run, or one step of a run."
)
flags.DEFINE_bool(
    "download", False, "Download --checkpoint=ORG/NAME or ORG/NAME@REVISION from the Hugging Face Hub to that folder."
)
flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated, to run several prompts as one batch.")
flags.DEFINE_string("prompt_file", None, "UTF-8 file whose whole text is the prompt.")
flags.DEFINE_bool("chat", False, "Interactive chat, one turn a line; end with end-of-file (Ctrl-D).")
flags.DEFINE_string("system", None, "System message for --chat.")
flags.DEFINE_string("system_file", None, "UTF-8 file whose whole text is the system message for --chat.")
flags.DEFINE_string("score", None, "UTF-8 file to score: log-probability, perplexity, bits per byte.")
flags.DEFINE_enum("template", None, ["text01", "m1"], "Chat template, instead of the tokenizer's own.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of weights, caches and computation.")
flags.DEFINE_integer("max_new_tokens", 128, "Maximum number of new tokens.", 1)
flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 is greedy decoding.")
flags.DEFINE_integer("top_k", None, "Sample from the k most likely tokens.")
flags.DEFINE_float("top_p", None, "Sample from the fewest tokens whose probabilities add up to this.")
flags.DEFINE_float("min_p", None, "Sample from tokens whose probability is at least this fraction of the highest.")
flags.DEFINE_float("repetition_penalty", 1.0, "Values over 1 make tokens of the context less likely.")
flags.DEFINE_integer("seed", 0, "Sampling seed; continuation i of a batch uses seed + i.")
flags.DEFINE_integer("num_samples", 1, "Number of continuations of each prompt.", 1)
flags.DEFINE_list("stop_ids", [], "Token ids that end a continuation, in addition to the tokenizer's own.")
flags.DEFINE_multi_string("stop", [], "Text that ends a continuation and is not printed; may be repeated.")
flags.DEFINE_integer("prefill_chunk", 1024, "Maximum number of tokens of a prompt in one pass.", 1)
flags.DEFINE_bool("dry_run", False, "Compile prefill and decoding, print their memory and collectives, and exit.")
flags.DEFINE_bool("plan", False, "Estimate memory and communication without compiling, and exit.")
# For --dry_run and --plan:
flags.DEFINE_string("config", None, "Config file that describes model and mesh; no checkpoint is read.")
flags.DEFINE_multi_string("set", [], "Override one field of the config, as field.path=value; may be repeated.")
flags.DEFINE_string(
    "topology",
    None,
    "TPU topology to compile or estimate for, such as v5p:8x8x16; the hardware is not needed. --plan also takes GPUs, "
    "such as h200:2.",
)
flags.DEFINE_integer("batch", 1, "Number of sequences.", 1)
flags.DEFINE_integer("prompt_length", 1024, "Number of tokens of each prompt.", 1)
flags.DEFINE_integer("context", 2048, "Number of tokens of prompt and continuation together.", 1)


PROGRAM = flags_parser.Program(
    summary="Generates text from a checkpoint, chats, or scores a text. With --plan or --dry_run it reports the memory "
    "and communication of a configuration, without a checkpoint.",
    usage="--checkpoint=FOLDER --prompt=TEXT",
    examples=(
        "--checkpoint=runs/demo --prompt='def main(' --temperature=0.7 --top_p=0.9",
        "--checkpoint=runs/demo --score=file.txt",
        "--checkpoint=/models/m1 --chat --template=m1 --dtype=bfloat16",
        "--config=configs/small_1b.py --dry_run --topology=v5e:2x2 --dtype=bfloat16",
    ),
    module=__name__,
    groups={
        "Model and task": (
            "checkpoint",
            "download",
            "prompt",
            "prompt_file",
            "chat",
            "system",
            "system_file",
            "score",
            "template",
            "dtype",
        ),
        "Sampling": (
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "seed",
            "num_samples",
            "stop",
            "stop_ids",
            "prefill_chunk",
        ),
        "Estimate without a checkpoint": (
            "config",
            "set",
            "dry_run",
            "plan",
            "topology",
            "batch",
            "prompt_length",
            "context",
        ),
    },
    positional=lambda argument: (
        f"give the checkpoint as --checkpoint={argument}"
        if pathlib.Path(argument).is_dir()
        else f"write a prompt as --prompt={argument!r}"
    ),
)


@flags.multi_flags_validator(
    ["dry_run", "plan", "config", "checkpoint", "topology"],
    "give --checkpoint; or --config with --dry_run or --plan (only these take --topology)",
)
def _check_source(values):
    if values["dry_run"] or values["plan"]:
        return bool(values["config"]) and not values["checkpoint"]
    return bool(values["checkpoint"]) and not values["config"] and not values["topology"]


@flags.validator("stop_ids", "give token ids: --stop_ids=2,7")
def _check_stop_ids(value):
    return all(item.isdigit() for item in value)


def check_flags() -> None:
    """Raises UsageError where flags contradict each other."""
    modes = [name for name in ("prompt", "prompt_file", "chat", "score") if FLAGS[name].value]
    if len(modes) != 1:
        given = " and ".join(f"--{name}" for name in modes) or "none of them"
        raise UsageError(f"give one of --prompt, --prompt_file, --chat and --score; got {given}")
    if FLAGS.num_samples > 1 and FLAGS.temperature == 0:
        raise UsageError(
            "--num_samples above 1 needs --temperature above 0: greedy decoding gives the same text each time"
        )
    if FLAGS.num_samples > 1 and (FLAGS.chat or FLAGS.score):
        raise UsageError("--num_samples above 1 needs --prompt or --prompt_file")
    if FLAGS.system is not None and FLAGS.system_file is not None:
        raise UsageError("give --system or --system_file, not both")
    if not FLAGS.chat and (FLAGS.system is not None or FLAGS.system_file is not None):
        raise UsageError("--system and --system_file need --chat")


def say(text: object = "") -> None:
    """Prints to standard error; standard output holds only text of the model."""
    print(text, file=sys.stderr, flush=True)


def session_settings() -> dict[str, Any]:
    """Keyword arguments that `complete` and `Conversation` share."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "prefill_chunk")
    return {name: FLAGS[name].value for name in names}


def stop_tokens(model: "Model") -> tuple[int, ...]:
    """Token ids that end a continuation: the model's and those of --stop_ids."""
    return tuple(sorted({*model.stop_ids, *map(int, FLAGS.stop_ids)}))


def complete(model: "Model", prompts: Sequence[str]) -> None:
    """Streams a single continuation; prints several one after another when all are complete."""
    from mmx_jax.inference import complete as text_completion
    from mmx_jax.inference.speed import Speed

    prompts = [prompt for prompt in prompts for _ in range(FLAGS.num_samples)]
    speed, texts = Speed(), [""] * len(prompts)
    for row, text in text_completion.complete(
        model,
        prompts,
        max_new_tokens=FLAGS.max_new_tokens,
        stop_tokens=stop_tokens(model),
        stop_strings=FLAGS.stop,
        speed=speed,
        **session_settings(),
    ):
        texts[row] += text
        if len(prompts) == 1:
            print(text, end="", flush=True)
    if len(prompts) == 1:
        print(flush=True)
    else:
        for row, text in enumerate(texts):
            print(f"--- prompt {row // FLAGS.num_samples + 1}, sample {row % FLAGS.num_samples + 1}\n{text}")
    say(speed)


def chat(model: "Model", system: str | None) -> None:
    """Reads turns from standard input and streams the replies."""
    from mmx_jax.inference.chat import Conversation

    conversation = Conversation(
        model,
        template=FLAGS.template,
        system=system,
        max_new_tokens=FLAGS.max_new_tokens,
        stop_tokens=stop_tokens(model),
        stop_strings=FLAGS.stop,
        **session_settings(),
    )
    for turn in text_input.turns(sys.stdin.buffer, say):
        try:
            for text in conversation.reply(turn):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            say("\n(interrupted)")
        print(flush=True)
        say(conversation.speed)


def score(model: "Model", text: str) -> None:
    """Prints log-probability, perplexity and bits per byte of a text."""
    assert model.tokenizer is not None  # `run` has checked it
    tokens = model.tokenizer.encode(text, parse_special=False)  # a document holds no control tokens
    if len(tokens) < 2:
        raise UsageError(
            f"{FLAGS.score} has {len(tokens)} tokens; scoring needs at least two, because the first one is given"
        )
    total = float(model.score([tokens], prefill_chunk=FLAGS.prefill_chunk).sum(dtype="float64"))
    print("\n".join(text_input.score_lines(total, len(tokens), len(text.encode()))))


def print_estimate() -> None:
    """Prints the lines of --plan or --dry_run."""
    from mmx_jax.analysis import aot_inference, plan
    from mmx_jax.analysis.workload import InferenceWorkload
    from mmx_jax.config import io as config_io

    config = config_io.apply_overrides(config_io.load_config(FLAGS.config), FLAGS.set)
    workload = InferenceWorkload(
        dtype=FLAGS.dtype,
        batch=FLAGS.batch,
        prompt_length=FLAGS.prompt_length,
        context=FLAGS.context,
        prefill_chunk=FLAGS.prefill_chunk,
    )
    lines_of = plan.inference_lines if FLAGS.plan else aot_inference.dry_run
    print("\n".join(lines_of(config, workload, FLAGS.topology or "")))


def run() -> None:
    """Runs the mode that the flags select."""
    if FLAGS.dry_run or FLAGS.plan:
        print_estimate()
        return
    check_flags()
    file = FLAGS.prompt_file or FLAGS.score
    text = text_input.read_text(file) if file else ""
    system = text_input.read_text(FLAGS.system_file) if FLAGS.system_file else FLAGS.system
    # Imported here, so that --help and errors in flags need no jax.
    import mmx_jax
    from mmx_jax.checkpoints import hub

    checkpoint = hub.download(FLAGS.checkpoint, say) if FLAGS.download else FLAGS.checkpoint
    model = mmx_jax.from_pretrained(checkpoint, dtype=FLAGS.dtype)
    if model.tokenizer is None:
        raise UsageError(f"{FLAGS.checkpoint} holds no tokenizer.json; put the tokenizer files next to the weights")
    if FLAGS.chat:
        chat(model, system)
    elif FLAGS.score:
        score(model, text)
    else:
        complete(model, FLAGS.prompt or [text])


def main(argv: Sequence[str]) -> None:
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # orbax logs errors that it also raises
        thread_errors.report_in_one_line(flags_parser.program_name())
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        # The project's own messages say what to do. For other errors --verbosity=0 shows the traceback.
        if FLAGS["verbosity"].present:
            raise
        sys.stdout.flush()
        # Orbax's unfinished reads of a damaged checkpoint print pages of errors, before and during a normal exit. Close
        # standard error to them, so that the message stays visible.
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(stderr, f"{flags_parser.program_name()}: {arguments.printable(error)}\n".encode())
        os._exit(1)


def run_main() -> None:
    """Entry point of infer.py and of `mmx-infer`."""
    arguments.check_or_exit(flags_parser.program_name(), sys.argv)
    flags.adopt_module_key_flags(sys.modules[__name__])
    app.run(main, flags_parser=flags_parser.make(PROGRAM))
