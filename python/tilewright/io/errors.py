"""The one error that every reader raises for a file that is not what it claims to be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator


class FormatError(ValueError):
    """A file breaks its format. The message reads ``PATH: FIELD: what was expected, what came``.

    Attributes: path (the file), field (the entry in it), problem (the rest of the message), all str.
    """

    def __init__(self, path: str | os.PathLike[str], field: str, problem: str) -> None:
        self.path, self.field, self.problem = os.fspath(path), field, problem
        super().__init__(self.path, field, problem)

    def __str__(self) -> str:
        return f"{self.path}: {self.field}: {self.problem}"


@contextlib.contextmanager
def tokenizers_errors(make: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Turn what the tokenizers library raises into make(error).

    For bad input that is a bare Exception; for files that contradict themselves in ways its parser misses it is a
    Rust panic, which arrives as a BaseException of a class that has no public name.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, FormatError):
        raise
    except BaseException as err:
        raise make(err) from None
