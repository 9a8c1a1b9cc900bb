"""Files and folders that are complete or absent, however the process that writes them ends."""

import json
import os
import shutil
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two processes that fill one folder do not wait for each other
    fcntl = None


@contextmanager
def explained(path):
    """Turn an OSError in the block, such as a full disk, into a ValueError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides what went wrong: it then cannot close its archive, and reports only that
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        reason = f"cannot be written ({cause.strerror or cause}); what was saved before is intact"
        remedy = "make room or choose another place, then run the command again"
        raise ValueError(f"{path}: {reason}: {remedy}") from None


@contextmanager
def replacing(path):
    """A binary file to write, which replaces `path` when the block ends, unless it fails.

    Content reaches the disk before the name: a power cut leaves no empty file. Raises ValueError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix tells PIL the format
    with explained(path):
        try:
            with open(temporary, "wb") as file:
                yield file
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def flush(path):
    """Wait until the content of a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def write_json(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def log_row(path, row):
    """Append a dict to a log as a line of JSON, floats rounded to four places."""
    row = {name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}
    with explained(path), open(path, "a") as log:
        log.write(json.dumps(row) + "\n")


def cut_log(path, step):
    """Cut a log of JSON lines after the last checkpoint's `step`; later steps are logged again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    with replacing(path) as file:
        for line in lines:
            with suppress(ValueError):  # the process was killed while it wrote this line
                if json.loads(line)["step"] <= step:
                    file.write(line.encode())


@contextmanager
def locked(folder):
    """Hold an exclusive lock on `folder`, which is created.

    The lock is a byte of the file .lock beside it, and ends with its process, which can hold one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / ".lock", "a") as file:
        byte = zlib.crc32(os.fsencode(folder.name))
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            print(f"waiting for another process, which fills {folder}", file=sys.stderr, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
        except OSError:  # a file system without locks: starting one run at a time is up to the user
            pass
        folder.mkdir(exist_ok=True)
        yield


@contextmanager
def drafted(folder, notes=None):
    """A locked draft of `folder` to fill, which takes that name when the block ends.

    Yields None if another process completed the folder while this one waited. When the block fails,
    the draft is removed, unless it has files that match `notes`: they say how to resume it.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    with locked(draft):
        try:
            if folder.is_dir():
                yield None
            else:
                yield draft
                for path in draft.iterdir():
                    flush(path)
                draft.rename(folder)
        finally:
            if notes is None or not any(draft.glob(notes)):
                shutil.rmtree(draft, ignore_errors=True)


def check_folder(folder):
    """ValueError if `folder`, which need not exist, cannot be created or written to."""
    place = next(path for path in (Path(folder), *Path(folder).parents) if os.path.lexists(path))
    if not place.is_dir():
        raise ValueError(f"{place}: is a file, not a folder; move it or name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{place}: cannot be written to; fix permissions or name another place")


def check_output(path):
    """ValueError if the file `path` cannot be written; its folder need not exist."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file to write")
    check_folder(Path(path).parent)
