"""The command `gptnorm`.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 3 the run diverged, 130, 143 and 129 stopped by
Ctrl-C, SIGTERM and SIGHUP (a training run writes a checkpoint first).

Imports that bring torch stand inside the commands, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
import threading

import click

import gptnorm
from gptnorm.cli import data, listings, measure, plan, runs, study, theory, verify
from gptnorm.cli.output import is_first
from gptnorm.errors import EXIT_USER_ERROR, SharedError, UserError

EXIT_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(gptnorm.__version__, message="%(version)s")
def app() -> None:
    """Choose, train and understand how a GPT is normalised."""


for command in (
    runs.train,
    runs.resume,
    verify.verify,
    measure.inspect,
    measure.evaluate,
    measure.curvature,
    theory.theory,
    plan.plan,
    study.quickstart,
    study.study,
    data.data,
    listings.strategies,
    listings.recipes,
    listings.settings_,
):
    app.add_command(command)


def main() -> None:
    """Runs the command; every error that a person can mend is one line and exit code 2."""
    threading.excepthook = thread_failed
    try:
        code = app(prog_name="gptnorm", standalone_mode=False)
    except SharedError as error:
        code = complain(str(error)) if is_first() else EXIT_USER_ERROR
    except UserError as error:
        code = complain(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        code = EXIT_USER_ERROR
    except click.ClickException as error:
        code = complain(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        print("gptnorm: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`gptnorm settings | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        # A path that cannot even be looked at: too long, or in a folder that we may not enter.
        if error.filename is None:
            raise
        code = complain(f"{os.fsdecode(error.filename)}: cannot be used ({error.strerror})")
    sys.exit(code)


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Says nothing of a full disk in TensorBoard's own thread: the run meets it too, and says it in one line."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def complain(message: str) -> int:
    # Of several processes any may be the one that fails, and torchrun ends the others.
    who = "gptnorm" if is_first() else f"gptnorm (process {os.environ['RANK']})"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR
