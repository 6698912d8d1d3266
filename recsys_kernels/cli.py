"""The command line: `recsys-kernels compress` and `recsys-kernels doctor`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from .jobs.compress.run import JobResult, JobSettings

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
# What the extra `demo` brings; anything else that cannot be imported is a fault of this package.
DEMO_MODULES = ("jinja2", "matplotlib", "pandas", "platformdirs", "pyarrow", "rich", "safetensors", "sklearn")
LARGEST_SEED = 2**64 - 1

# What the RuntimeErrors of torch's allocators say.
_OUT_OF_MEMORY = ("allocate memory", "could not be allocated")

_COMPRESS_HELP = """\
Trains a ranking model (a DLRM), compresses its embedding tables to 8 and 4 bits, its MLPs to 8 bits, prunes them, and
reports for each form: AUC, log loss, bytes, and the time of a call beside the same model on plain torch modules.

Without --data it uses MovieLens 100k: the files of an installed recbole, else the cache, else one
download of the recbole wheel by pip, checked against its SHA-256.
"""
_COMPRESS_EXAMPLES = """\
examples:
  recsys-kernels compress                              the whole job on MovieLens 100k, under a minute
  recsys-kernels compress --out report                 also write report/report.html and the model
  recsys-kernels compress --rows 1000000               also time tables of production size
  recsys-kernels compress --data ml-20m --epochs 1     your own data

then, in Python:
  import recsys_kernels as rk
  model = rk.load_model("report")
  model.predict([{"user": "196", "item": "242", "liked_items": ["302", "377"]}])
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for bad input, 130 or 143 when stopped.

    Where argparse has the last word (`--help`, `--version`, wrong usage) it raises SystemExit instead.

    Args:
        arguments: without the program's name; `sys.argv[1:]` by default.
    """
    try:
        return _run(parser(), arguments)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED)
    finally:
        _print("")  # what argparse printed, too, meets a closed pipe here and not at exit


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    if options.command == "doctor":
        return _doctor()
    out = Path(options.out) if options.out else None
    before = _identity(out)
    with _stop_on_sigterm():
        try:
            return _compress(options)
        except KeyboardInterrupt:
            return _fail(f"interrupted; {_left(out, before)}", INTERRUPTED)
        except _TerminatedError:
            return _fail(f"terminated; {_left(out, before)}", TERMINATED)


def _identity(folder: Path | None) -> tuple[int, int] | None:
    """Which folder stands at a path now; a report comes in a new one, which takes the old one's place."""
    if folder is None or not folder.exists():
        return None
    found = folder.stat()
    return found.st_dev, found.st_ino


def _left(out: Path | None, before: tuple[int, int] | None) -> str:
    return "nothing was written" if _identity(out) == before else f"the report in {out} is complete"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands and options."""
    parser = argparse.ArgumentParser(
        prog="recsys-kernels", description="Fused kernels that make recommender models cheap to run."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("doctor", help="what this machine has, and what each operator will run on")
    compress = commands.add_parser(
        "compress",
        help="train, compress and measure a recommender model on real data",
        description=_COMPRESS_HELP,
        epilog=_COMPRESS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input_options(compress)
    _add_model_options(compress)
    _add_output_options(compress)
    return parser


def _add_input_options(compress: argparse.ArgumentParser) -> None:
    data = compress.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="a MovieLens folder (100k, RecBole files, 1M, 20M or latest) or a Criteo TSV file, plain or .gz",
    )
    data.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help="use the latest N ratings, or the first N Criteo lines (46 million take some 16 GB)",
    )
    data.add_argument(
        "--cache", type=Path, metavar="DIR", help="where fetched data is kept (default: your cache folder)"
    )


def _add_model_options(compress: argparse.ArgumentParser) -> None:
    model = compress.add_argument_group("model and training")
    model.add_argument("--epochs", type=_positive, default=5, metavar="N", help="passes over the data (default: 5)")
    model.add_argument(
        "--batch-size", type=_positive, metavar="N", help="rows a step (default: by the size of the data)"
    )
    model.add_argument("--dim", type=_positive, default=64, metavar="N", help="width of the rows (default: 64)")
    model.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="the same seed gives the same model (default: 0)"
    )
    pruning = compress.add_argument_group("pruned MLPs")
    pruning.add_argument(
        "--sparsity",
        type=float,
        metavar="SHARE",
        help="share of the weights that is dropped, from 0 to below 1 (default: 0.8, or what the pattern fixes)",
    )
    pruning.add_argument(
        "--pattern",
        metavar="NAME",
        default="block4x1",
        help="which weights are dropped together: unstructured (each by itself), block4x1 (4 outputs of one input; "
        "also 1, 4 or 16 by 1, 4 or 16), 2:4 (2 of every 4 inputs) (default: block4x1)",
    )


def _add_output_options(compress: argparse.ArgumentParser) -> None:
    cost = compress.add_argument_group("cost")
    cost.add_argument(
        "--rows",
        type=_positive,
        metavar="N",
        help="also time the model with every table grown to N rows of random weights (cost only, no quality)",
    )
    cost.add_argument("--threads", type=_positive, default=1, metavar="N", help="torch threads (default: 1)")
    out = compress.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", help="write report.html, report.json, overview.png and the model here")
    out.add_argument(
        "--save",
        metavar="FORM",
        help="form of the model to save: fp32, int8, int4, int8-mlp, int8-mlp-static, int8-mlp-qat, pruned, "
        "int8-pruned, int4-mlp (default: the smallest that surely keeps the AUC within 0.001)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


_positive.__name__ = _natural.__name__ = "number"  # argparse then says: invalid number value: 'x'


def _doctor() -> int:
    from .backends.diagnosis import doctor

    try:
        doctor()
    except BrokenPipeError:
        _mute()
    return 0


def _compress(options: argparse.Namespace) -> int:
    try:
        import safetensors  # noqa: F401 - the package imports it at first use: when the model is saved

        from . import data, models
        from .jobs.compress import report, variants
        from .jobs.compress import terminal as table
    except ImportError as error:
        module = (error.name or "").split(".")[0]
        if module not in DEMO_MODULES:
            raise
        return _fail(f'the command compress needs {module}: pip install "recsys_kernels[demo]"')
    names = [variant.name for variant in variants.VARIANTS]
    if options.save is not None and options.save not in names:
        return _fail(f"--save {options.save}: no such form; there are {', '.join(names)}")
    if options.save is not None and options.out is None:
        return _fail("--save: needs --out DIR")
    if wrong := _wrong_pruning(options):
        return _fail(wrong)
    if options.threads > (os.cpu_count() or 1):
        return _fail(f"--threads {options.threads}: this machine has {os.cpu_count()} cores")
    if options.seed > LARGEST_SEED:
        return _fail(f"--seed {options.seed}: is above {LARGEST_SEED}, the largest that torch takes")
    if options.out == "":
        return _fail("--out: is empty; name a folder")
    out = None if options.out is None else Path(options.out)
    try:
        if out is not None:
            models.files.check_out(out, report.FILES)
        result = _run_with_progress(_settings(options))
        _print_table(table.summary(result))
        if out is not None:
            report.write_report(result, out, options.save or result.chosen)
            _print(f"report: {out / report.PAGE}\n")
    except data.DataError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        return _fail("not enough memory; try --limit N, or a smaller --dim or --rows")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}")
    return 0


def _wrong_pruning(options: argparse.Namespace) -> str | None:
    """What is wrong with the options of pruned MLPs."""
    from .ops.linear.sparse.patterns import check_sparsity, parse_pattern

    try:
        pattern = parse_pattern(options.pattern)
    except ValueError as error:
        return f"--pattern: {error}"
    try:
        if options.sparsity is not None:
            check_sparsity(options.sparsity, pattern)
    except ValueError as error:
        return f"--sparsity: {error}"
    return None


def _settings(options: argparse.Namespace) -> JobSettings:
    from .jobs.compress.run import JobSettings
    from .models.train import TrainSettings

    training = TrainSettings(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
    return JobSettings(
        data=options.data,
        cache=options.cache,
        limit=options.limit,
        rows=options.rows,
        dim=options.dim,
        threads=options.threads,
        sparsity=options.sparsity,
        pattern=options.pattern,
        training=training,
    )


def _run_with_progress(settings: JobSettings) -> JobResult:
    """Runs the job with a progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from .jobs.compress.run import run

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def on_stage(stage: str) -> None:
            progress.update(task, description=stage, total=None, completed=0)

        def on_step(done: int, steps: int) -> None:
            progress.update(task, total=steps, completed=done)

        return run(settings, on_stage, on_step)


def _print_table(summary: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 100  # a pipe has no width of its own
    with console.capture() as text:  # rich would exit on a closed pipe, before the report is written
        console.print(summary)
    _print(text.get())


def _print(text: str) -> None:
    """Prints and flushes; a reader who has gone (`| head`) neither stops the job nor is worth an error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _mute()


def _mute() -> None:
    """Sends what else is printed nowhere; Python would complain at exit about what it cannot flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _fail(message: str, code: int = BAD_INPUT) -> int:
    print("recsys-kernels: " + " ".join(message.split()), file=sys.stderr)
    return code


class _TerminatedError(BaseException):
    """SIGTERM, raised where the program stands so that scratch folders are removed on the way out."""


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever runs us keeps its own handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
