"""Converts checkpoints: mmx-convert import SRC DST, export SRC DST, or verify A B."""

import difflib
import re
import sys
from collections.abc import Sequence

from absl import flags, logging

from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import NAMINGS
from mmx_jax.cli import arguments, flags_parser, thread_errors
from mmx_jax.cli.flags_parser import CommandLineError

# Command -> its two arguments, and the flags that it takes.
COMMANDS = {
    "import": (("SRC", "DST"), ("overwrite",)),
    "export": (("SRC", "DST"), ("overwrite", "naming", "shard_size", "dtype")),
    "verify": (("A", "B"), ("all",)),
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

PROGRAM = flags_parser.Program(
    summary=(
        "Converts checkpoints. import: a safetensors folder to a checkpoint of this project. export: any checkpoint or "
        "training run to a safetensors folder, with the released names. verify: compares two checkpoints of any kind "
        "tensor by tensor; the exit status is 1 where they differ. An interrupted command continues when repeated."
    ),
    usage="import SRC DST | export SRC DST | verify A B",
    examples=(
        "import /weights/MiniMax-Text-01 /weights/mmx",
        "export runs/small exported --shard_size=5GB",
        "verify /weights/MiniMax-Text-01 /weights/mmx",
    ),
    module=__name__,
    groups={
        "Of import and export": ("overwrite",),
        "Of export": ("naming", "shard_size", "dtype"),
        "Of verify": ("all",),
    },
    positional=None,
)


class _SizeParser(flags.ArgumentParser):
    syntactic_help = "bytes, such as 5GB, 500MiB or 1000000"

    def parse(self, argument):
        return argument if isinstance(argument, int) else parse_size(argument)

    def flag_type(self):
        return "size"


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MiB" or "1000000".

    Raises:
      ValueError: the text is no size, or none above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size such as 5GB, 500MiB or 1000000")
    return size


def define_flags() -> flags.FlagValues:
    """The flags of the command, apart from those of the process, so that `main` can be called again."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may come after the arguments
    module = {"flag_values": values, "module_name": __name__}
    flags.DEFINE_bool("overwrite", False, "Replace DST, or an unfinished DST.partial of something else.", **module)
    flags.DEFINE_enum("naming", "original", list(NAMINGS), "Of config.json.", **module)
    size_help = "Bytes of a file at most, such as 5GB; without it those the checkpoint was imported from, or 5GB."
    flags.DEFINE(_SizeParser(), "shard_size", None, size_help, **module)
    flags.DEFINE_enum("dtype", "keep", ["keep", "float32", "bfloat16"], "Of all tensors but the routers.", **module)
    flags.DEFINE_bool("all", False, "Print a row for every tensor, not only where they differ.", **module)
    return values


def parse(argv: Sequence[str], values: flags.FlagValues) -> tuple[str, str, str]:
    """The command and its two arguments; sets `values`.

    Raises:
      CommandLineError: with the remedy.
    """
    command, *paths = flags_parser.parse_arguments(PROGRAM, list(argv), values)[1:] or [""]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CommandLineError(f"{command!r} is not a command{hint}" if command else "no command given")
    names, own = COMMANDS[command]
    if len(paths) != 2:
        raise CommandLineError(f"{command} takes two arguments, {' and '.join(names)}; it got {len(paths)}")
    for name in (flag for _, others in COMMANDS.values() for flag in others if flag not in own):
        if values[name].present:
            owners = " and ".join(other for other, (_, flags_of) in COMMANDS.items() if name in flags_of)
            raise CommandLineError(f"--{name} belongs to {owners}, not to {command}")
    return command, paths[0], paths[1]


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
      argv: the program and its arguments, as `sys.argv`.

    Returns:
      The exit status: 0, 1 for an error or for checkpoints that differ, 130 for an interrupt.

    Raises:
      SystemExit: help was asked for, or the command line is wrong.
    """
    values = define_flags()
    command, first, second = flags_parser.parse_or_exit(PROGRAM, argv, values, lambda: parse(argv, values))
    from mmx_jax.checkpoints import export_hf  # after the arguments: it loads jax and orbax
    from mmx_jax.convert import import_hf, verify

    logging.set_verbosity(logging.ERROR)  # orbax warns of metadata that the params of a training run do not need
    try:
        if command == "import":
            print(import_hf.import_checkpoint(first, second, overwrite=values.overwrite))
        elif command == "export":
            options = {name: values[name].value for name in COMMANDS["export"][1]}
            print(export_hf.export_checkpoint(first, second, **options))
        else:
            return 0 if verify.verify_checkpoints(first, second, show_all=bool(values["all"].value)) else 1
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


def run_main() -> None:
    """Entry point of `mmx-convert` and of `python -m mmx_jax.convert`."""
    arguments.check_or_exit(flags_parser.program_name(), sys.argv)
    thread_errors.report_in_one_line(flags_parser.program_name())
    sys.exit(main(sys.argv))
