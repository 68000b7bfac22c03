"""Files that a crash leaves whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def replace_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that after a crash at any moment either the old or the new content is there, whole.

    Args:
        path: the file; its folder must exist.
        write: called with an open binary file beside it, which is flushed to disk and then renamed over
            `path`.

    Raises:
        OSError: the new content could not be written (a full disk, say); the previous file is intact.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # one fixed name: what a killed process left is overwritten
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch reports a failed write as RuntimeError
            raise OSError(f"could not write {path}: {error} (the previous file, if any, is intact)") from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and the rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
