"""The command line of the mains: help that lists the program's own flags, and two-line errors that name the remedy.

`app.run(main, flags_parser=flags_parser.make(program))` replaces absl's parser. The errors of absl's parser begin with
FATAL, and its help lists only the flags of the file that was started.
"""

import dataclasses
import difflib
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from absl import flags

_WIDTH = 100
_PLACEHOLDERS = {"int": "N", "float": "X", "comma separated list of strings": "A,B", "size": "SIZE"}
_HELP = ("-h", "-help", "--help", "-?", "--helpshort")
_FULL_HELP = ("-helpfull", "--helpfull")
_Parsed = TypeVar("_Parsed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The texts of one main's help and errors.

    Attributes:
      usage: the flags that every call needs.
      examples: without the name of the program.
      module: the module that defines the flags.
      groups: {title: flags}; flags without a group come last.
      positional: returns the remedy for an argument that is not a flag; None: such arguments are taken.
    """

    summary: str
    usage: str
    examples: tuple[str, ...]
    module: str
    groups: dict[str, tuple[str, ...]]
    positional: Callable[[str], str] | None


class CommandLineError(ValueError):
    """An invalid command line; the message names the argument and the remedy."""


def program_name() -> str:
    """The name of the program that was started: train.py, mmx-train, or `python -m mmx_jax.convert`."""
    path = pathlib.Path(sys.argv[0])
    return f"python -m {'.'.join(path.parts[-3:-1])}" if path.name == "__main__.py" else path.name


def make(program: Program, values: flags.FlagValues = flags.FLAGS) -> Callable[[Sequence[str]], list[str]]:
    """A parser for `app.run`; it sets the flags, or exits with help (status 0) or an error (status 1)."""
    return lambda argv: parse_or_exit(program, argv, values, lambda: parse_arguments(program, list(argv), values))


def parse_or_exit(
    program: Program, argv: Sequence[str], values: flags.FlagValues, parse: Callable[[], _Parsed]
) -> _Parsed:
    """The result of `parse`; exits with help (status 0) where `argv` asks for it, or with an error (status 1)."""
    argv = list(argv)
    if request := _help_request(argv, values):
        print(help_text(program, values))
        if request in _FULL_HELP:
            print("\nFlags of every module:\n" + values.get_help())
        sys.exit(0)
    try:
        return parse()
    except CommandLineError as error:
        name = program_name()
        sys.exit(f"{name}: {error}\nusage: {name} {program.usage} (see {name} --help)")


def parse_arguments(program: Program, argv: list[str], values: flags.FlagValues) -> list[str]:
    """Sets `values` from `argv`, which begins with the name of the program; returns what `values(argv)` returns.

    Raises:
      CommandLineError: the message names the remedy.
    """
    _check_overrides(argv, values)
    # Checked before absl parses: absl would report a missing flag first.
    if program.positional and (stray := _first_positional(argv, values)):
        raise CommandLineError(f"{stray!r} is not a flag; {program.positional(stray)}")
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise CommandLineError(_unknown_flag(error.flagname, values.get_flags_for_module(program.module))) from None
    except flags.Error as error:
        raise CommandLineError(_readable(str(error))) from None
    if "config" in values and values["config"].value is not None:
        check_config_file(values["config"].value)
    return rest


def check_config_file(path: str) -> None:
    """Raises CommandLineError if there is no such file; the message lists the configs, or says where to find them."""
    if pathlib.Path(path).is_file():
        return
    here = sorted(map(str, pathlib.Path("configs").glob("*.py")))
    if here:
        (nearest,) = difflib.get_close_matches(path, here, n=1, cutoff=0)
        hint = f"the nearest is {nearest}; this folder has {', '.join(here)}"
    else:
        hint = (
            "a config is a Python file that defines get_config(). The project keeps its own in configs/ of its source "
            "tree, which is not part of an installation"
        )
    raise CommandLineError(f"--config={path}: no such config file; {hint}")


# Help.


def help_text(program: Program, values: flags.FlagValues) -> str:
    """Summary, usage, examples and the program's own flags with their defaults."""
    name = program_name()
    own = {flag.name: flag for flag in values.get_flags_for_module(program.module)}
    grouped = {flag for names in program.groups.values() for flag in names}
    groups = program.groups | {"Other": tuple(sorted(own.keys() - grouped))}
    lines = [*textwrap.wrap(program.summary, _WIDTH), "", f"usage: {name} {program.usage}", ""]
    lines += ["examples:", *(f"  {name} {example}" for example in program.examples)]
    for title, names in groups.items():
        if names:
            lines += ["", f"{title}:", *(line for flag in names for line in _describe(own[flag]))]
    every = "; --helpfull adds the flags of every module, such as --verbosity" if values is flags.FLAGS else ""
    lines += ["", "  -h, --help", f"      This text{every}."]
    return "\n".join(lines)


def _describe(flag: flags.Flag) -> Iterator[str]:
    if flag.boolean:
        yield f"  --[no]{flag.name}"
    else:
        yield f"  --{flag.name}={_placeholder(flag)}"
    text = " ".join((flag.help or "").split()).removesuffix("; repeat this option to specify a list of values")
    text = re.sub(r"^<[^>]*>: ", "", text)  # absl repeats the values of an enum, which the placeholder shows
    if flag.default not in (None, "", [], False):
        text += f" (default: {flag.default})"
    yield from textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _placeholder(flag: flags.Flag) -> str:
    if values := getattr(flag.parser, "enum_values", None):
        return "|".join(values)
    return _PLACEHOLDERS.get(flag.flag_type(), "TEXT")


def _help_request(argv: list[str], values: flags.FlagValues) -> str:
    """The argument that asks for help, or "". The value of a flag does not count."""
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument == "--":
            return ""
        if argument in _HELP + _FULL_HELP:
            return argument
        if _takes_next(argument, values):
            next(arguments, None)
    return ""


def _first_positional(argv: list[str], values: flags.FlagValues) -> str:
    """The first argument that is neither a flag nor a flag's value; "" if there is none, or after an unknown flag."""
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument == "--":
            return next(arguments, "")
        if not argument.startswith("-") or argument == "-":
            return argument
        if _takes_next(argument, values):
            next(arguments, None)
        elif "=" not in argument and {name := argument.lstrip("-"), name.removeprefix("no")}.isdisjoint(values):
            return ""
    return ""


def _takes_next(argument: str, values: flags.FlagValues) -> bool:
    name = argument.lstrip("-")
    return argument.startswith("-") and name in values and not values[name].boolean


# Errors.


def _check_overrides(argv: list[str], values: flags.FlagValues) -> None:
    """Raises CommandLineError for `--set path value`; absl would read the path as the whole override."""
    for flag, path, *rest in (argv[i : i + 3] for i in range(1, len(argv) - 1)):
        if flag in ("--set", "-set") and "set" in values and "=" not in path:
            value = rest[0] if rest and not rest[0].startswith("--") else "VALUE"
            raise CommandLineError(
                f"--set {path}: an override is one argument with an equals sign: --set {path}={value}"
            )


def _unknown_flag(name: str, own: Sequence[flags.Flag]) -> str:
    names = [flag.name for flag in own]
    if near := difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.7):
        return f"unknown flag --{name}; did you mean --{near[0]}?"
    if "set" in names and (paths := _config_paths(name)):
        return f"unknown flag --{name}; fields of the config are set with --set {' or --set '.join(paths)}"
    hint = f"; the nearest is --{near[0]}" if (near := difflib.get_close_matches(name, names, n=1, cutoff=0.4)) else ""
    return f"unknown flag --{name}{hint}"


def _config_paths(name: str) -> list[str]:
    """Overrides of all config fields whose path, or its last part, is `name`."""
    from mmx_jax.config import io as config_io

    name = name.replace("-", "_")
    return [f"{path}=VALUE" for path in config_io.field_paths() if name in (path, path.rpartition(".")[2])]


def _readable(message: str) -> str:
    """An absl error without the values of flags that were not given, and without Python's wording."""
    message = re.sub(r"^flags? (--)?\w+=None: ", "", message.strip())
    message = re.sub(r"^flags \w+=.*?: ", "", message)
    message = re.sub(r"^flag (--\w+=)", r"\1", message)
    message = re.sub(r"invalid literal for int\(\) with base 10: .*", "give a whole number", message)
    return re.sub(r"could not convert string to float: .*", "give a number", message)
