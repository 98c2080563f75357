"""A file in memory without reading it: torch views of its bytes, and pages that can be given back."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import torch

from .errors import FormatError

# Private writable pages are charged against RAM + swap when they are mapped, which would refuse a model
# larger than the machine's memory although nothing is ever written. Python 3.11 has no name for this flag.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """One file, mapped privately. Views stay valid for as long as they live, also after this object is gone.

    The mapping is private and writable because torch warns about memory that it may not write; a write into a
    view changes this process's copy of the page, never the file. It is never closed by hand: torch keeps the
    mmap object, not an exported buffer, so an explicit close would pull the memory from under live views.
    The file must not shrink while it is mapped (the kernel then kills the reader with SIGBUS).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise FormatError(self.path, "file", "expected a header, the file is empty")
            self.buffer = mmap.mmap(
                file.fileno(),
                self.size,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        self._bytes = torch.frombuffer(self.buffer, dtype=torch.uint8)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 view (nbytes,) of the file from `offset`; no copy. The caller has checked the range."""
        return self._bytes[offset : offset + nbytes]

    def expect(self, offset: int, nbytes: int) -> None:
        """Have the kernel read the bytes ahead; without this a file that is not in memory comes in small pieces, each
        waited for."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if nbytes > 0 and hasattr(mmap, "MADV_WILLNEED"):
            self.buffer.madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)

    def drop(self, offset: int, nbytes: int) -> None:
        """Give the whole pages inside [offset, offset + nbytes) back; a later read loads them again.

        Pages shared with a neighbour stay, so that a private change somebody made there is not reverted.
        """
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self.buffer.madvise(mmap.MADV_DONTNEED, start, length)
