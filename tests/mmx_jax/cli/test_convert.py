"""The command line of mmx-convert; what its commands do is tested with their modules."""

import subprocess
import sys

import pytest

from mmx_jax.checkpoints.hf_config import NAMINGS
from mmx_jax.cli import convert
from mmx_jax.cli.flags_parser import CommandLineError
from tests.support.paths import REPOSITORY


def parse(*arguments):
    values = convert.define_flags()
    return convert.parse(["mmx-convert", *arguments], values), values


def test_flags_may_come_before_between_and_after_the_arguments():
    for order in (
        ["--overwrite", "--shard_size=1.5MiB", "export", "a", "b"],
        ["export", "--overwrite", "a", "--shard_size", "1.5 MiB", "b"],
        ["export", "a", "b", "--shard_size=1572864", "--overwrite=true"],
    ):
        command, values = parse(*order)
        assert command == ("export", "a", "b")
        assert (values.overwrite, values.shard_size, values.naming, values.dtype) == (
            True,
            3 * 2**19,
            "original",
            "keep",
        )
    assert parse("import", "a", "--", "--b")[0] == ("import", "a", "--b")


def test_a_second_call_knows_nothing_of_the_first():
    assert parse("verify", "a", "b", "--all")[1]["all"].value
    assert not parse("verify", "a", "b")[1]["all"].value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command given"),
        (["exprot", "a", "b"], "'exprot' is not a command; did you mean export?"),
        (["7", "a", "b"], "'7' is not a command"),
        (["import", "a"], "import takes two arguments, SRC and DST; it got 1"),
        (["verify", "a", "b", "c"], "verify takes two arguments, A and B; it got 3"),
        (["import", "a", "b", "--all"], "--all belongs to verify, not to import"),
        (["verify", "a", "b", "--overwrite"], "--overwrite belongs to import and export, not to verify"),
        (["import", "a", "b", "--dtype=float32"], "--dtype belongs to export, not to import"),
        (["export", "a", "b", "--shard-size=5GB"], "unknown flag --shard-size; did you mean --shard_size?"),
        (["export", "a", "b", "--dtype=int8"], "--dtype=int8: value should be one of <keep|float32|bfloat16>"),
        *(
            (["export", "a", "b", f"--shard_size={text}"], f"'{text}' is not a size such as 5GB, 500MiB or 1000000")
            for text in ("-1", "5 apples", "0", "1e9", "")
        ),
    ],
)
def test_errors_name_the_argument_and_the_remedy(arguments, message):
    with pytest.raises(CommandLineError) as error:
        parse(*arguments)
    assert message in str(error.value)


def run(*arguments):
    command = [sys.executable, "-m", "mmx_jax.convert", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_help_names_every_command_and_flag():
    done = run("export", "--help")
    assert done.returncode == 0 and not done.stderr
    assert "usage: python -m mmx_jax.convert import SRC DST | export SRC DST | verify A B" in done.stdout
    for text in (
        "--[no]overwrite",
        "--naming=" + "|".join(NAMINGS),
        "--shard_size=",
        "--dtype=keep|float32|bfloat16",
        "--[no]all",
    ):
        assert text in done.stdout


def test_an_error_takes_two_lines():
    done = run("import", "somewhere")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "python -m mmx_jax.convert: import takes two arguments, SRC and DST; it got 1"
    assert second.startswith("usage: python -m mmx_jax.convert import SRC DST |") and second.endswith("--help)")
