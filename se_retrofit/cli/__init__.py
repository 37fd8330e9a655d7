"""The command line: ``se-retrofit COMMAND``. Each command is a file of its own in this folder."""

import sys

from .. import __version__
from ..errors import RetrofitError, extra

__all__ = ["main"]


def main() -> None:
    """Entry point of ``se-retrofit`` and ``python -m se_retrofit``."""
    if sys.argv[1:] == ["--version"]:  # without importing torch, which takes seconds
        print(f"se-retrofit {__version__}")
        return
    try:
        with extra("cli"):
            from .commands import run
    except RetrofitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # during the imports, which take seconds
        sys.exit(130)
    run()
