"""Generates text: python infer.py --checkpoint=runs/demo/export --prompt='def main('.

Or tells what it would take: python infer.py --config=configs/small_1b.py --dry_run --topology=v5e:2x2 --dtype=bfloat16.
"""

import os
import pathlib
import sys

from absl import app, flags, logging

from mmx_jax.cli import arguments, flags_parser, text_input, thread_errors
from mmx_jax.cli.arguments import UsageError

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Folder: safetensors, a converted checkpoint, a training run or a step of one.")
flags.DEFINE_bool(
    "download", False, "Fetch --checkpoint=ORG/NAME or ORG/NAME@REVISION from the Hugging Face Hub into that folder."
)
flags.DEFINE_multi_string("prompt", [], "Text to continue; given often, the prompts run as one batch.")
flags.DEFINE_string("prompt_file", None, "UTF-8 file whose whole text is the prompt.")
flags.DEFINE_bool("chat", False, "Talk: a line on standard input is a turn; end with end-of-file.")
flags.DEFINE_string("system", None, "System message of --chat.")
flags.DEFINE_string("system_file", None, "UTF-8 file whose whole text is the system message of --chat.")
flags.DEFINE_string("score", None, "UTF-8 file to measure: log-probability, perplexity, bits per byte.")
flags.DEFINE_enum("template", None, ["text01", "m1"], "Chat template, instead of the tokenizer's own.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and computation.")
flags.DEFINE_integer("max_new_tokens", 128, "Most tokens of a continuation.", 1)
flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
flags.DEFINE_integer("top_k", None, "Draw from the k likeliest tokens.")
flags.DEFINE_float("top_p", None, "Draw from the fewest tokens with this probability together.")
flags.DEFINE_float("min_p", None, "Draw from tokens at least this probable relative to the likeliest.")
flags.DEFINE_float("repetition_penalty", 1.0, "Over 1 makes tokens of the context less likely.")
flags.DEFINE_integer("seed", 0, "Continuation i of a batch draws with seed + i.")
flags.DEFINE_integer("num_samples", 1, "Continuations of each prompt.", 1)
flags.DEFINE_list("stop_ids", [], "Token ids that end a continuation, besides the tokenizer's own.")
flags.DEFINE_multi_string("stop", [], "Text that ends a continuation and is not printed; may be given often.")
flags.DEFINE_integer("prefill_chunk", 1024, "Tokens of a prompt in one pass.", 1)
flags.DEFINE_bool("dry_run", False, "Compile prefill and decoding of --config, print memory and collectives, and end.")
flags.DEFINE_bool("plan", False, "Estimate memory and traffic without compiling.")
# Of --dry_run and --plan:
flags.DEFINE_string("config", None, "Config file, of which model and mesh count; no checkpoint is read.")
flags.DEFINE_multi_string("set", [], "Override of the config, field.path=value; may be given often.")
flags.DEFINE_string(
    "topology", None, "TPU topology to compile or plan for, such as v5p:8x8x16; for --plan also a GPU, such as h200:2."
)
flags.DEFINE_integer("batch", 1, "Sequences.", 1)
flags.DEFINE_integer("prompt_length", 1024, "Tokens of each prompt.", 1)
flags.DEFINE_integer("context", 2048, "Tokens of prompt and continuation.", 1)


PROGRAM = flags_parser.Program(
    summary="Generates text from a checkpoint, talks, or measures a text; or tells what generating would take.",
    usage="--checkpoint=FOLDER --prompt=TEXT",
    examples=(
        "--checkpoint=runs/demo --prompt='def main(' --temperature=0.7 --top_p=0.9",
        "--checkpoint=runs/demo --score=file.txt",
        "--checkpoint=/models/m1 --chat --template=m1 --dtype=bfloat16",
        "--config=configs/small_1b.py --dry_run --topology=v5e:2x2 --dtype=bfloat16",
    ),
    module=__name__,
    groups={
        "What to do": (
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
        "How to draw": (
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
        ),  # fmt: skip
        "Without a checkpoint": ("config", "set", "dry_run", "plan", "topology", "batch", "prompt_length", "context"),
    },
    positional=lambda argument: (
        f"a checkpoint is named with --checkpoint={argument}"
        if pathlib.Path(argument).is_dir()
        else f"a prompt is written --prompt={argument!r}"
    ),
)


@flags.multi_flags_validator(
    ["dry_run", "plan", "config", "checkpoint", "topology"],
    "give --checkpoint; or --config with --dry_run or --plan, which alone take --topology",
)
def _check_source(values):
    if values["dry_run"] or values["plan"]:
        return bool(values["config"]) and not values["checkpoint"]
    return bool(values["checkpoint"]) and not values["config"] and not values["topology"]


@flags.validator("stop_ids", "give token ids: --stop_ids=2,7")
def _check_stop_ids(value):
    return all(item.isdigit() for item in value)


def check_flags():
    modes = [name for name in ("prompt", "prompt_file", "chat", "score") if FLAGS[name].value]
    if len(modes) != 1:
        given = " and ".join(f"--{name}" for name in modes) or "none of them"
        raise UsageError(f"give one of --prompt, --prompt_file, --chat and --score; got {given}")
    if FLAGS.num_samples > 1 and FLAGS.temperature == 0:
        raise UsageError("--num_samples draws different texts only with --temperature above 0")
    if FLAGS.num_samples > 1 and (FLAGS.chat or FLAGS.score):
        raise UsageError("--num_samples goes with --prompt and --prompt_file")
    if FLAGS.system is not None and FLAGS.system_file is not None:
        raise UsageError("give --system or --system_file, not both")
    if not FLAGS.chat and (FLAGS.system is not None or FLAGS.system_file is not None):
        raise UsageError("--system and --system_file go with --chat")


def say(text: object = ""):
    """Standard output is the model's; everything else goes here."""
    print(text, file=sys.stderr, flush=True)


def session_settings():
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "prefill_chunk")
    return {name: FLAGS[name].value for name in names}


def stop_tokens(model):
    return tuple(sorted({*model.stop_ids, *map(int, FLAGS.stop_ids)}))


def complete(model, prompts):
    """Streams the one continuation there is, or prints several one after another."""
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


def chat(model, system):
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


def score(model, text):
    tokens = model.tokenizer.encode(text, parse_special=False)  # a document is data
    if len(tokens) < 2:
        raise UsageError(f"{FLAGS.score} has {len(tokens)} tokens; scoring needs two, for the first one is given")
    total = float(model.score([tokens], prefill_chunk=FLAGS.prefill_chunk).sum(dtype="float64"))
    print("\n".join(text_input.score_lines(total, len(tokens), len(text.encode()))))


def foretell():
    from mmx_jax.analysis import aot_inference, memory_model
    from mmx_jax.config import io as config_io

    config = config_io.apply_overrides(config_io.load_config(FLAGS.config), FLAGS.set)
    lines_of = memory_model.inference_lines if FLAGS.plan else aot_inference.dry_run
    lines = lines_of(
        config, dtype=FLAGS.dtype, batch=FLAGS.batch, prompt_length=FLAGS.prompt_length, context=FLAGS.context,
        chunk=FLAGS.prefill_chunk, topology=FLAGS.topology or "",
    )  # fmt: skip
    print("\n".join(lines))


def run():
    if FLAGS.dry_run or FLAGS.plan:
        foretell()
        return
    check_flags()
    text = text_input.read_text(FLAGS.prompt_file or FLAGS.score) if FLAGS.prompt_file or FLAGS.score else None
    system = text_input.read_text(FLAGS.system_file) if FLAGS.system_file else FLAGS.system
    # Imported late, so that --help and a mistyped flag answer at once.
    import mmx_jax
    from mmx_jax.checkpoints import hub

    checkpoint = hub.download(FLAGS.checkpoint, say) if FLAGS.download else FLAGS.checkpoint
    model = mmx_jax.from_pretrained(checkpoint, dtype=FLAGS.dtype)
    if model.tokenizer is None:
        raise UsageError(f"{FLAGS.checkpoint} holds no tokenizer.json; put the tokenizer's files beside the weights")
    if FLAGS.chat:
        chat(model, system)
    elif FLAGS.score:
        score(model, text)
    else:
        complete(model, FLAGS.prompt or [text])


def main(argv):
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # orbax logs what it also raises
        thread_errors.report_in_one_line(flags_parser.program_name())
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        # Ours say what to do; of the others the traceback is worth having with --verbosity=0.
        if FLAGS["verbosity"].present:
            raise
        sys.stdout.flush()
        # Orbax's unfinished reads of a damaged checkpoint bury the line under pages, at an orderly exit and before it.
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(stderr, f"{flags_parser.program_name()}: {arguments.printable(error)}\n".encode())
        os._exit(1)


def run_main():
    """Entry point of infer.py and of `mmx-infer`."""
    arguments.check_or_exit(flags_parser.program_name(), sys.argv)
    flags.adopt_module_key_flags(sys.modules[__name__])
    app.run(main, flags_parser=flags_parser.make(PROGRAM))
