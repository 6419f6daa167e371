"""The frame: help, mistakes, exit codes, and what is not imported."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import typer.main

from launcher.cli import VERBS, app
from launcher.console import labelled, wrapped
from launcher.errors import UserError

YUAN = [sys.executable, "-m", "launcher.cli"]


def yuan(*words: str, cwd=None, code: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run `yuan` as its own process; `code` runs before it."""
    command = [*YUAN, *words] if code is None else [sys.executable, "-c", code, *words]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


HEAVY = """
import atexit, sys
@atexit.register
def tell():
    print("heavy:", sorted({"torch", "megatron", "transformers"} & set(sys.modules)))
from launcher.cli import main
main()
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["recipes", "list"], 0),
        (["recipes", "show", "345m_1dp"], 0),
        (["check", "recipe=345m_1dp"], 2),  # no data here
        (["pretrain", "recipe=nowhere"], 2),
        (["pretrain", "--help"], 0),
        (["preprocess", "--help"], 0),
    ],
)
def test_no_verb_imports_torch_before_it_must(words, code, tmp_path):
    run = yuan(*words, code=HEAVY, cwd=tmp_path)
    assert run.returncode == code, run.stderr
    assert run.stdout.splitlines()[-1] == "heavy: []"


def test_help_has_one_line_for_each_verb_and_a_story(tmp_path):
    run = yuan("--help", cwd=tmp_path)
    lines = run.stdout.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.startswith("  ")][: len(VERBS)]
    assert listed == list(VERBS)
    for verb, text in VERBS.items():
        assert any(line.split() == f"{verb} {text}".split() for line in lines), verb
    assert "  A story, from text to answers:" in lines
    assert sum(line.strip().startswith("yuan ") for line in lines) >= 5


def helps(command, parent=None, name="yuan"):
    """(verb, its help at 80 columns) of a command and of all below it."""
    context = command.context_class(command, info_name=name, parent=parent, terminal_width=80)
    yield context.command_path, command.get_help(context)
    for verb, below in getattr(command, "commands", {}).items():
        yield from helps(below, context, verb)


def test_help_fits_80_columns_and_shows_no_types_of_python():
    found = dict(helps(typer.main.get_command(app)))
    assert len(found) > 20 and "yuan recipes copy [OPTIONS] NAME [FILE]\n" in found["yuan recipes copy"]
    for verb, text in found.items():
        assert [line for line in text.splitlines() if len(line) > 80] == [], verb
        assert not re.search(r"list\[|range>|\[\[|\{", text), verb


def test_version(tmp_path):
    run = yuan("--version", cwd=tmp_path)
    assert run.returncode == 0 and "megatron-core 0.16" in run.stdout


def test_a_wrong_verb_gets_a_suggestion(tmp_path):
    run = yuan("pretrian", cwd=tmp_path)
    assert run.returncode == 2 and "Did you mean 'pretrain'?" in run.stderr


@pytest.mark.parametrize(
    ("words", "option", "meant"),
    [
        ("pretrain --dryrun", "--dryrun", "did you mean --dry-run?"),
        ("pretrain --train-iters 5", "--train-iters", "training.seed=1; did you mean training.train_iters?"),
        ("check --recipe=345m", "--recipe", "did you mean recipe=NAME?"),
        ("recipes list --nothing", "--nothing", "`yuan recipes list --help` lists them"),
    ],
)
def test_an_option_that_is_none_is_told_as_what_it_was_meant(words, option, meant):
    with pytest.raises(UserError) as told:
        typer.main.get_command(app)(words.split(), prog_name="yuan", standalone_mode=False)
    assert told.value.what == f"no such option: {option}" and told.value.fix.endswith(meant)


def test_mistakes_are_plain_lines_and_exit_code_2(tmp_path):
    run = yuan("recipes", "show", "345m_1dp", "training.train_itres=1", "seed=2", cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.splitlines() == [
        "error: unknown key training.train_itres",
        "  where: command line",
        "  fix:   did you mean training.train_iters or training.train_tokens or training.train_samples?",
        "error: unknown key seed",
        "  where: command line",
        "  fix:   did you mean training.seed or generate.seed?",
    ]


@pytest.mark.skipif(os.name != "posix", reason="a terminal of one's own is POSIX's")
@pytest.mark.parametrize(("columns", "widest"), [(100, 100), (20, 60)])
def test_a_mistake_is_wrapped_at_a_terminal_and_nowhere_else(monkeypatch, columns, widest):
    """At 60 columns at least; not a word is lost, and no word is broken, so that it can be copied."""
    text = str(UserError("a fault " * 20, "recipes/a.yaml", "change " * 20 + "optimizer.lr_decay_style=cosine-and-more"))
    main, side = os.openpty()
    with os.fdopen(side, "w") as terminal, os.fdopen(main, "rb"):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = wrapped(text, terminal)
        line = labelled("train      " + "samples " * 30, terminal).splitlines()
    assert len(line) > 2 and all(len(one) <= widest and one[:11].strip() in ("train", "") for one in line)
    assert widest - 20 < max(map(len, shown.splitlines())) <= widest
    assert shown.split() == text.split()
    assert wrapped(text, io.StringIO()) == text


CTRL_C_AT_AN_IMPORT = """
import os, signal, sys
class AtAnImport:
    def find_spec(self, name, *_):
        if name == "launcher.commands.sft":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, AtAnImport())
import launcher.cli as cli
cli.main()
"""


def test_ctrl_c_while_the_verbs_are_imported_leaves_no_traceback(tmp_path):
    run = yuan("--help", code=CTRL_C_AT_AN_IMPORT, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")


CTRL_C_AT_THE_END = """
import atexit, os, signal, sys, launcher.cli as cli
def stopped(): sys.exit(3)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
cli.app = stopped
cli.main()
"""


def test_ctrl_c_after_a_stop_leaves_no_traceback_either(tmp_path):
    run = yuan(code=CTRL_C_AT_THE_END, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (-signal.SIGINT, "")


RAISING = """
import sys, launcher.cli as cli
def boom(): raise {error}
cli.app.registered_commands[:] = []
cli.app.command("check")(boom)
cli.main()
"""


@pytest.mark.parametrize(
    ("error", "code", "on_stderr", "traceback"),
    [
        ("KeyboardInterrupt", 130, "", False),
        ("cli.UserError('no', 'here', 'do')", 2, "error: no\n  where: here\n  fix:   do\n", False),
        ("cli.DataError('no', 'here')", 2, "error: no\n  where: here\n", False),
        ("OSError(28, 'No space left on device', 'runs/x')", 2, "error: cannot read or write: No space left on device\n  where: runs/x\n  fix:   see to the space and the rights there\n", False),
        ("ConnectionResetError(104, 'Connection reset by peer')", 1, "ConnectionResetError: [Errno 104] Connection reset by peer\n", True),
        ("RuntimeError('a bug')", 1, "RuntimeError: a bug\n", True),
    ],
)
def test_exit_codes(error, code, on_stderr, traceback, tmp_path):
    run = yuan("check", code=RAISING.format(error=error), cwd=tmp_path)
    assert run.returncode == code
    assert run.stderr.endswith(on_stderr) and ("Traceback" in run.stderr) == traceback


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_people_who_want_it(no_color, coloured, capsys, monkeypatch):
    from launcher.cli import print_errors
    from launcher.errors import UserError

    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    print_errors(UserError("no"))
    assert ("\033[" in capsys.readouterr().err) == coloured
