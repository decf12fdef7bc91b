"""`python -m experiments` lists the experiments.

`python -m experiments NAME [flags]` runs one, `NAME --help` explains it.

An experiment is a module in this folder whose name has no leading underscore. It is found by its
file, so the list imports none of them, and a new file is all that a new experiment takes
(`experiments/_run.py` says what is in it).
"""

from __future__ import annotations

import ast
import importlib
import linecache
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).parent


def discover(folder: Path = HERE) -> dict[str, str]:
    """Every experiment's name and the first line of its docstring, without importing any.

    >>> "train" in discover()
    True
    """
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return {path.stem.replace("_", "-"): _first_line(path) for path in files}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: those after the program's name; the process's own, if None.

    Returns:
        The exit code: 0, 1 for an error that a message explains, 2 for an unknown experiment (bad
            flags exit with 2 too).
    """
    name, *flags = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(_listing(discover()))
        return 0
    try:
        _known(name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _run(name, flags)
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        if not (isinstance(error, OSError) or _raised_by_us(error.__traceback__)):
            raise  # not one of our messages: a bug, which needs its traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(name: str, flags: list[str]) -> None:
    try:
        import tyro

        module = importlib.import_module(f"experiments.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("experiments", "fnn"):
            raise
        raise ValueError(
            f"The package {error.name!r} is missing. Install it: pip install -e '.[experiments]'."
        ) from None
    module.main(
        tyro.cli(
            module.Config,
            args=flags,
            prog=f"python -m experiments {name}",
            description=module.__doc__,
        )
    )


def _known(name: str) -> None:
    from fnn._validate import one_of  # here, so that the list does not wait for JAX

    one_of("experiment", name, discover())


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether a `raise` of the project's own did it, whose message explains itself.

    1 / 0 in a file of ours is a bug.
    """
    import fnn

    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    ours = any(Path(file).is_relative_to(package) for package in (HERE, *fnn.__path__))
    return ours and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise")


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _listing(found: dict[str, str]) -> str:
    width = max(map(len, found), default=0)
    lines = [f"  {name:<{width}}  {description}" for name, description in found.items()]
    return "\n".join(
        [
            "python -m experiments NAME [flags], where NAME is one of",
            "",
            *lines,
            "",
            "NAME --help explains one and its flags.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
