"""The command line of the mains: help, and errors that name the argument and the remedy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from mmx_jax.cli import flags_parser
from tests.support.paths import REPOSITORY


def make_program():
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "Config file.", flag_values=values)
    flags.DEFINE_multi_string("set", [], "Override.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_integer("steps", 7, "Steps.", flag_values=values)
    flags.DEFINE_float("rate", 0.5, "Rate.", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Do nothing.", flag_values=values)
    flags.register_validator("config", lambda v: v is not None, "--config is missing", flag_values=values)
    program = flags_parser.Program(
        summary="Does a thing.",
        usage="--config=FILE",
        examples=("--config=a.py",),
        module=__name__,
        groups={"First": ("config", "set"), "Second": ("dry_run", "rate")},
        positional=lambda argument: f"write --config={argument}",
    )
    return program, values


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/debug.py").touch()
    return "configs/debug.py"


def parse(*arguments):
    program, values = make_program()
    return flags_parser.parse_arguments(program, ["main", *arguments], values), values


def test_flags_are_read_with_a_space_or_with_an_equals_sign(config):
    spaced = "--config", config, "--set", "a.b=1", "--steps", "3", "--dry_run", "--set=c=2"
    joined = f"--config={config}", "--set=a.b=1", "--steps=3", "--dry_run=true", "--set", "c=2"
    for arguments in (spaced, joined):
        left, values = parse(*arguments)
        assert left == ["main"]
        assert (values.config, values.set, values.steps, values.dry_run) == (config, ["a.b=1", "c=2"], 3, True)
    assert parse("--nodry_run", "--config", config)[1].dry_run is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["configs/debug.py"], "'configs/debug.py' is not a flag; write --config=configs/debug.py"),
        (["--config=configs/debug.py", "-"], "'-' is not a flag"),
        (["--config=configs/debug.py", "--dry_run", "false"], "'false' is not a flag"),
        (["--config=configs/debug.py", "--", "rest"], "'rest' is not a flag"),
        (["--config=configs/debag.py"], "no such config file; the nearest is configs/debug.py"),
        (["--config=configs/debug.py", "--set", "a.b", "1"], "--set a.b: an override is one argument .*--set a.b=1$"),
        (["--config=configs/debug.py", "--set", "a.b", "--dry_run"], "--set a.b=VALUE"),
        (["--config=configs/debug.py", "--set"], "Missing value for flag --set"),
        (["--config=configs/debug.py", "--workdri=a"], "unknown flag --workdri; did you mean --workdir"),
        (["--config=configs/debug.py", "--dry-run"], "did you mean --dry_run"),
        (["--config=configs/debug.py", "--workdri", "a"], "did you mean --workdir"),
        (["--config=configs/debug.py", "--learning_rate=1"], "--set training.learning_rate=VALUE"),
        (["--config=configs/debug.py", "--model.num-heads=1"], "--set model.num_heads=VALUE"),
        (["--config=configs/debug.py", "--xyz"], "unknown flag --xyz"),
        (["--config=configs/debug.py", "--steps=ten"], "^--steps=ten: give a whole number$"),
        (["--config=configs/debug.py", "--rate=ten"], "^--rate=ten: give a number$"),
        (["--config=configs/debug.py", "--dtype=int8"], "--dtype=int8: .*float32|bfloat16"),
    ],
)
def test_an_error_names_the_argument_and_the_remedy(config, arguments, message):
    with pytest.raises(flags_parser.CommandLineError, match=message) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)


def test_without_a_folder_of_configs_an_error_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flags_parser.CommandLineError, match="get_config.*configs/ of its source tree"):
        parse("--config=configs/debug.py")


def test_flags_that_do_not_go_together_are_named_by_the_message_alone(config):
    program, values = make_program()
    flags.register_multi_flags_validator(
        ["workdir", "dry_run"], lambda v: not v["dry_run"], "--dry_run: not with --workdir", flag_values=values
    )
    with pytest.raises(flags_parser.CommandLineError, match="^--dry_run: not with --workdir$"):
        flags_parser.parse_arguments(program, ["main", f"--config={config}", "--dry_run", "--workdir=a:b"], values)


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["--steps=3", "--help"], ["--workdir", "x", "-help"]])
def test_help_lists_every_flag_once_with_its_default_and_exits_with_0(arguments, capsys):
    program, values = make_program()
    with pytest.raises(SystemExit) as stopped:
        flags_parser.make(program, values)(["main", *arguments])
    assert stopped.value.code == 0
    out, err = capsys.readouterr()
    names = re.findall(r"^  --(?:\[no\])?(\w+)", out, re.MULTILINE)
    assert sorted(names) == ["config", "dry_run", "dtype", "rate", "set", "steps", "workdir"] and not err
    assert "(default: 7)" in out and "(default: 0.5)" in out and "float32|bfloat16" in out and "Does a thing." in out
    assert out.index("First:") < out.index("--config=TEXT") < out.index("Second:") < out.index("Other:")


def test_help_as_the_value_of_a_flag_is_no_request(config):
    assert parse("--config", config, "--workdir", "--help")[1].workdir == "--help"


def test_an_error_is_two_lines_and_status_1(capsys):
    program, values = make_program()
    with pytest.raises(SystemExit) as stopped:
        flags_parser.make(program, values)(["main", "--stepps=3"])
    lines = stopped.value.code.splitlines()  # which the interpreter writes to standard error, with status 1
    assert len(lines) == 2 and "did you mean --steps" in lines[0] and lines[1].startswith("usage: ")


@pytest.mark.parametrize("main", ["train.py", "infer.py"])
def test_the_mains_have_the_help_and_no_other_noise(main):
    done = subprocess.run([sys.executable, main, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert f"  {main} --" in done.stdout and "--config=" in done.stdout and "Other:" not in done.stdout
    full = subprocess.run([sys.executable, main, "--helpfull"], cwd=REPOSITORY, capture_output=True, text=True)
    assert full.returncode == 0 and "--verbosity" in full.stdout and "--[no]dry_run" in full.stdout
    wrong = subprocess.run([sys.executable, main, "--nonsense"], cwd=REPOSITORY, capture_output=True, text=True)
    assert wrong.returncode == 1 and not wrong.stdout and len(wrong.stderr.splitlines()) == 2
    assert wrong.stderr.startswith(f"{main}: unknown flag --nonsense") and "FATAL" not in wrong.stderr
