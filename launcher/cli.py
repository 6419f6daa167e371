"""`yuan VERB recipe=NAME key=value …`: the verbs, and how a mistake is shown."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys

# Ctrl-C during the imports below (0.2 s, a second from a cold disk) ends the process as it ends any other, not with a
# traceback; what was to come of it, if anything, stands again behind them.
ON_CTRL_C = signal.getsignal(signal.SIGINT)
if ON_CTRL_C is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from importlib.metadata import version
from typing import Annotated, Any, Optional

import typer
import typer.core

from data_tools.errors import DataError
from launcher.completion import SHELL_ENV, answer
from launcher.console import wrapped
from launcher.errors import UserError, of_system
from launcher.launch.torchrun import STOPPED

VERBS = {
    "recipes": "List, show and copy recipes; explain every key.",
    "check": "Say whether a recipe would run here.",
    "plan": "Find the layouts that fit on so many GPUs, the fastest first.",
    "migrate": "Turn an old command line or script into a recipe.",
    "tokenizer": "Train a tokenizer, or look at one.",
    "preprocess": "Text to token ids: JSONL into .bin and .idx.",
    "data": "Look at .bin and .idx: inspect, verify, repair, merge, index.",
    "pretrain": "Train from random weights, or resume a run.",
    "sft": "Fine-tune on questions and answers.",
    "convert": "Checkpoints into other formats and layouts.",
    "inspect": "Tell what a checkpoint is, and what is wrong with it.",
    "generate": "Answer a file of prompts from a checkpoint.",
    "doctor": "Look this machine over: versions, devices, speed.",
}

TYPES = {"<int range>": "<int>", "<list[str]>": "<str>"}  # in help: the range stands behind, and what may be given again says so

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}  # told without a file's name where a file is being written

STORY = """\
\b
A story, from text to answers:
  yuan recipes list                                see what there is
  yuan preprocess --input data/corpus.jsonl        text to token ids
  yuan check recipe=345m_1dp                       would it run?
  yuan pretrain recipe=345m_1dp                    train; again: resume
  yuan generate --input pred_input.jsonl           answers to output.txt
\b
Any value of a recipe is set by key=value, such as training.train_iters=100.
"""


class Verb(typer.core.TyperCommand):
    """A verb whose help calls an argument what its metavar says (typer puts brackets around that and Python's type behind it), and
    which knows what an option that it has not was meant to be."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for one in self.params:
            if one.param_type_name == "argument":
                shown = one.metavar or one.name
                vars(one).update(_usage_display_name=lambda shown=shown: shown, display_type_rich=lambda ctx: "")
            else:
                typed = one.display_type_rich
                vars(one).update(display_type_rich=lambda ctx, typed=typed: TYPES.get(typed(ctx), typed(ctx)))

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's NoSuchOption: in whose module it is depends on typer's version
            if not hasattr(error, "possibilities"):
                raise
            raise UserError(f"no such option: {error.option_name}", "command line", self._meant(ctx, error)) from None

    def _meant(self, ctx: typer.Context, error: Any) -> str:
        """What to write instead: an option of a similar name, or the recipe's key that one of Megatron-LM's options is here."""
        from launcher.recipe.keys import suggest

        if error.possibilities:
            return f"did you mean {' or '.join(sorted(error.possibilities))}?"
        if any("KEY=VALUE" in (one.metavar or "") for one in self.params):
            if error.option_name == "--recipe":
                return "did you mean recipe=NAME?"
            if (meant := suggest(error.option_name.lstrip("-"))).startswith("did"):
                return f"values of a recipe are words without dashes, such as training.seed=1; {meant}"
        return f"`{ctx.command_path} --help` lists them"


class InStoryOrder(typer.core.TyperGroup):
    """Help lists the verbs in the order in which one meets them."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(VERBS)


# typer's rich panels would cost 0.1 s of every start and break when copied; plain text does neither
app = typer.Typer(
    name="yuan",
    cls=InStoryOrder,
    help="One recipe carries a language model from raw text to answers, on Megatron.",
    epilog=STORY,
    no_args_is_help=True,
    add_completion=False,  # ours, in launcher.completion
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"yuan {version('yuan')} (megatron-core {version('megatron-core')}, torch {version('torch')})")
        raise typer.Exit()


def _install_completion(wanted: bool) -> None:
    if wanted:
        from launcher.completion_scripts import install

        print(install())
        raise typer.Exit()


def _show_completion(wanted: bool) -> None:
    if wanted:
        from launcher.completion_scripts import script

        print(script(), end="")
        raise typer.Exit()


@app.callback()
def _options(
    show_version: Annotated[
        Optional[bool], typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions.")
    ] = None,
    install_completion: Annotated[
        Optional[bool],
        typer.Option("--install-completion", callback=_install_completion, is_eager=True, help="Let this shell complete verbs, recipes and keys."),
    ] = None,
    show_completion: Annotated[
        Optional[bool], typer.Option("--show-completion", callback=_show_completion, is_eager=True, help="Print what that would install.")
    ] = None,
) -> None:
    pass


def _register() -> None:
    """Every verb is launcher/commands/<verb>.py: a function of that name, or an `app` with verbs of its own; `CONTEXT`
    is what click is to know besides."""
    for verb, line in VERBS.items():
        module = importlib.import_module(f"launcher.commands.{verb}")
        if hasattr(module, "app"):
            for one in module.app.registered_commands:
                one.cls = Verb
            app.add_typer(module.app, name=verb, short_help=line)
        else:
            app.command(verb, cls=Verb, short_help=line, context_settings=getattr(module, "CONTEXT", None))(getattr(module, verb))


_register()
if ON_CTRL_C is signal.default_int_handler:
    signal.signal(signal.SIGINT, ON_CTRL_C)


def main() -> None:
    """Run `yuan`: exit code 0, 2 for a mistake of the user or what the system refuses of a file, 130 for Ctrl-C; a bug of ours shows
    its traceback."""
    if SHELL_ENV in os.environ:
        print(answer(app, sys.argv[1]))
        return
    try:
        app()
    except KeyboardInterrupt:  # typer answers it only where it runs a verb
        sys.exit(130)
    except SystemExit as ending:
        if ending.code in (STOPPED, 130):  # a further Ctrl-C, while Python waits for worker processes, is to end that too
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise
    except UserError as error:
        print_errors(error)
        sys.exit(2)
    except DataError as error:
        print_errors(UserError(error.what, error.where, error.fix))
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno not in OF_THE_DISK:
            raise
        print_errors(of_system(error))
        sys.exit(2)


def print_errors(error: UserError) -> None:
    """Print each mistake as plain lines on stderr, `error:` in red where a person looks on and NO_COLOR is not set."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    mark = "\033[1;31merror:\033[0m" if colour else "error:"
    for one in error.each:
        print(wrapped(f"error: {one}", sys.stderr).replace("error:", mark, 1), file=sys.stderr)


if __name__ == "__main__":
    main()
