"""The command line ``ito-sde``: one file a verb, each imported only when it is called."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
import warnings

import click

from neuralsde_ito.validation import ItoError, nearest

VERBS = {
    "train": "Train a ResNet (or take yours), recast it, fine-tune the members, and evaluate the ensemble.",
    "evaluate": "Let a run's ensemble vote on test images, beside the original ResNet.",
    "attack": "Attack a run's ensemble by FGSM or PGD, and the original ResNet beside it.",
    "suite": "Attack after attack on the images that the last ones left, for the ensemble and for the ResNet.",
    "audit": "Check whether a robustness figure is the model's strength or the attack's weakness.",
    "verify": "Recompute the figures of an evidence bundle on fresh noise, and say which claims stand.",
    "predict": "Label pictures, or abstain.",
    "compare": "Compare SDE solvers with a fine reference on the same paths.",
    "orders": "Measure strong and weak orders of solvers on problems with known solutions, beside theory.",
    "depth": "Read networks on finer grids: an SDE, or a ResNet in disguise?",
    "bench": "Measure what inferences, votes, attacks and training cost beside the plain network.",
}


class LazyGroup(click.Group):
    """Knows its verbs by name only, so that help and completion need not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order in which one meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the verb's file."""
        if name not in VERBS:
            raise click.UsageError(nearest("verb", name, VERBS), ctx)
        return importlib.import_module(f".{name}", __name__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Help from the table above, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ito-sde", prog_name="ito-sde")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Neural SDEs for robust deep learning: a trained ResNet as an ensemble of Itô processes.

    Begin with 'ito-sde train', which needs nothing but this program, then 'ito-sde attack'.
    """


def _sentence(text: str, width: int = 390) -> str:
    """A message on one line; of one that is too long the beginning (what is wrong) and the end (the mend)."""
    text = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return text if len(text) <= width else f"{text[: width // 2 - 3]} ... {text[2 - width // 2 :]}"


def main() -> None:
    """Entry point. Exit codes: 0, 1 failure, 2 usage or configuration, 130 interrupted."""
    # Threads that wait by spinning take the core from those they wait for: on two cores with a third process,
    # a small network's step took 25 times as long. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # a file name may hold what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv
    warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {_sentence(str(message))}", err=True)
    if not debug:  # one may write it anywhere
        warnings.simplefilter("ignore", category=DeprecationWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
    sys.argv[1:] = [*(["--debug"] if debug else []), *(word for word in sys.argv[1:] if word != "--debug")]
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if context is not None:
            click.echo(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n", err=True)
        click.echo(f"Error: {_sentence(error.format_message())}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {_sentence(str(error)) or type(error).__name__}", err=True)
        if not isinstance(error, ItoError) and not debug:
            click.echo("This was not foreseen; --debug shows where it happened.", err=True)
        sys.exit(2 if isinstance(error, ItoError) else 1)
