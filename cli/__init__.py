"""The command line ``ito-sde``: one file for each verb, imported only when the verb is called."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import traceback
import warnings

import click

from neuralsde_ito.distributed import Lost, is_first_to_fail, launched, world
from neuralsde_ito.validation import ItoError, nearest, shown

VERBS = {
    "train": "Train a ResNet (or take yours), recast it, fine-tune the members, and evaluate the ensemble.",
    "evaluate": "Let a run's ensemble vote on test images, beside the original ResNet.",
    "attack": "Attack a run's ensemble by FGSM or PGD, and the original ResNet beside it.",
    "suite": "Attack after attack on the images that the last ones left, for the ensemble and for the ResNet.",
    "audit": "Check whether a robustness figure is the model's strength or the attack's weakness.",
    "certify": "Prove L2 radii in which the smoothed vote of a run's ensemble keeps its class.",
    "frontier": "Draw the honest accuracy of several runs against their clean accuracy, from their suites' records.",
    "verify": "Recompute the figures of an evidence bundle on fresh noise, and say which claims stand.",
    "reproduce": "Reproduce the paper's tables and figures, each number beside weak and the strongest attacks.",
    "predict": "Label pictures, or abstain.",
    "compare": "Compare SDE solvers with a fine reference on the same paths.",
    "orders": "Measure strong and weak orders of solvers on problems with known solutions, beside theory.",
    "depth": "Read networks on finer grids: an SDE, or a ResNet in disguise?",
    "bench": "Measure what inferences, votes, attacks and training cost beside the plain network.",
}


# The verbs that several processes share, and how each goes on after one of them was lost.
SHARED = {
    "train": "What is trained is saved; go on: ito-sde train --resume, with any number of processes.",
    "evaluate": "Give the command again.",
    "attack": "Give the command again.",
    "suite": "Finished attacks are kept; go on: the same command with --resume, with any number of processes.",
    "certify": "Finished batches are kept; go on: the same command with --resume, with any number of processes.",
    "reproduce": "Finished work is kept; go on: the same command, with any number of processes.",
}


# Options that became verbs: the verb before, the option, the words to drop, and the verb now.
MOVED: tuple[tuple[str, str, list[str], str], ...] = (
    ("attack", "--suite", ["--suite", "standard"], "suite"),
    ("compare", "--problem", [], "orders"),
    ("compare", "--depth", ["--depth"], "depth"),
)


# Options of a verb that only made sense together with those above: the verb that has them now.
MOVED_ALONG: dict[str, dict[str, tuple[str, ...]]] = {
    "attack": {"suite": ("--noise", "--repeat", "--effort", "--resume", "--bundle", "--peer")},
    "compare": {"orders": ("--peer",), "depth": ("--versus", "--schedule", "--horizon")},
}


def forwarded(words: list[str]) -> list[str]:
    """The words of a command line with today's verb; a line on stderr names it if they are in an earlier form.

    Raises:
        click.UsageError: another suite than the standard one, or an option that another verb has now.
    """
    verb, *rest = words
    options = [word.partition("=")[0] for word in rest]
    for before, option, dropped, now in MOVED:
        if verb == before and option in options:
            click.echo(f"'ito-sde {verb} {option}' is now 'ito-sde {now}'.", err=True)
            return [now, *(_without(rest, dropped) if dropped else rest)]
    for now, moved in MOVED_ALONG.get(verb, {}).items():
        if typed := [option for option in options if option in moved]:
            raise click.UsageError(f"'ito-sde {verb}' has no {typed[0]}: it is an option of 'ito-sde {now}'.")
    return words


def _without(words: list[str], dropped: list[str]) -> list[str]:
    """The words without an option and its value, however often they stand there."""
    option, *value = dropped
    left = [part for word in words for part in (word.split("=", 1) if word.startswith(f"{option}=") else [word])]
    while option in left:
        at = left.index(option)
        end = at + len(dropped)
        if left[at + 1 : end] != value:
            typed = shown(" ".join(left[at + 1 : end]))
            raise click.UsageError(f"Unknown suite {typed}; the only one, standard, is now 'ito-sde suite'.")
        del left[at:end]
    return left


class LazyGroup(click.Group):
    """A group that knows its verbs by name only, so that help and completion do not import torch."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb and its words, of a command line in today's form or an older one."""
        words = args if ctx.resilient_parsing else forwarded(args)
        if words[0] in VERBS and words[0] not in SHARED and launched() > 1:
            raise click.UsageError(
                f"'ito-sde {words[0]}' has no work for {launched()} processes: start it alone, without torchrun or "
                "accelerate launch."
            )
        return super().resolve_command(ctx, words)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order in which a user needs them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the file of a verb."""
        if name not in VERBS:
            raise click.UsageError(nearest("verb", name, VERBS), ctx)
        return importlib.import_module(f".{name}", __name__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help of the verbs, from the table above: nothing is imported."""
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
    """A message on one line. If it is too long, its beginning (what is wrong) and its end (how to fix it)."""
    text = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return text if len(text) <= width else f"{text[: width // 2 - 3]} ... {text[2 - width // 2 :]}"


class _Ended(BaseException):
    """The launcher ends this process: another one was lost, or the user ends the command."""


def _end(*_: object) -> None:
    raise _Ended


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 failure, 2 wrong usage or configuration, 130 interrupted.

    Of several processes (`neuralsde_ito.distributed`), process 0 speaks; of those that fail, the first one.
    """
    # By default a thread that waits keeps its core busy, and the threads that it waits for get less: on two cores with
    # a third process, a small network's step took 25 times as long. This must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # But to wake a thread takes longer than a small layer does: it waits for about a tenth of a millisecond first. An
    # audit of digits takes 0.85 of the time so, and a training beside another program 1.1 times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for stream in (sys.stdout, sys.stderr):  # a file name may hold characters that the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv
    warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {_sentence(str(message))}", err=True)
    if not debug:
        warnings.simplefilter("ignore", category=DeprecationWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
    # A user may write --debug behind the verb; click takes it only before.
    sys.argv[1:] = [*(["--debug"] if debug else []), *(word for word in sys.argv[1:] if word != "--debug")]
    errors = sys.stderr
    try:
        _meet_the_others()
        if code := cli.main(standalone_mode=False):
            is_first_to_fail()  # the others do not wait for this process
        else:
            world().leave()  # a process that ends early must not end process 0 before it has written the results
        _exit(code or 0)
    except BrokenPipeError:
        sys.stderr.close()
        _exit(1)
    except (Exception, KeyboardInterrupt, _Ended) as error:
        code, lines = _said(error, debug)
        if is_first_to_fail():
            for line in lines:
                click.echo(line, errors)
        _exit(code)


def _meet_the_others() -> None:
    """If this is one of several processes, find the others; all but process 0 become silent."""
    if launched() == 1:
        if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
            click.echo(
                "Warning: accelerate launch --cpu starts one process, whatever --num_processes says; accelerate launch "
                "--multi_gpu starts as many as it says, also without a GPU, and so does torchrun.",
                err=True,
            )
        return
    among = world()
    signal.signal(signal.SIGTERM, _end)
    if not among.first:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def _said(error: BaseException, debug: bool) -> tuple[int, list[str]]:
    """The exit code for an exception that ended the program, and what stderr says of it."""
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        usage = [f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n"] if context else []
        return error.exit_code, [*usage, f"Error: {_sentence(error.format_message())}"]
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return 130, ["Interrupted."]
    if isinstance(error, Lost | _Ended):
        how = next((SHARED[word] for word in sys.argv[1:] if word in SHARED), "")
        return 1, [f"Error: One of {launched()} processes was lost, or the command was ended from outside. {how}"]
    lines = [traceback.format_exc()] if debug else []
    lines.append(f"Error: {_sentence(str(error)) or type(error).__name__}")
    if not isinstance(error, ItoError) and not debug:
        lines.append("This was not foreseen; --debug shows where it happened.")
    return 2 if isinstance(error, ItoError) else 1, lines


def _exit(code: int) -> None:
    """End this process. One of several leaves out Python's own end, where threads of gloo have aborted it."""
    if launched() > 1:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None and not stream.closed:
                stream.flush()
        os._exit(code)
    sys.exit(code)
