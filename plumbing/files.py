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
except ImportError:  # Windows: there, processes that fill one folder do not wait for each other
    fcntl = None


@contextmanager
def explained(path):
    """Turn an OSError in the block, such as a full disk, into a ValueError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save reports only that it could not close its archive, not why
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise ValueError(f"{path}: cannot be written ({cause.strerror or cause}); what was saved "
                         "before is intact: make room or choose another place") from None


@contextmanager
def replacing(path):
    """A binary file that replaces `path` when the block ends without an error, its folder made.

    Its content reaches the disk before its name: a power cut leaves no empty file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix tells PIL the format
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def flush(path):  # to the disk
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def write_json(path, value):
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def log_row(path, row):
    """Append a dict to a log as a line of JSON."""
    row = {name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}
    with explained(path), open(path, "a") as log:
        log.write(json.dumps(row) + "\n")


def cut_log(path, step):
    """Drop the lines of a log after the last checkpoint's `step`: those steps run again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with replacing(path) as file:
        for line in lines:
            with suppress(ValueError):  # cut by a kill
                if json.loads(line)["step"] <= step:
                    file.write(line)


@contextmanager
def locked(folder):
    """Create `folder` and lock it, by a byte of .lock beside it; a process can hold one lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / ".lock", "a") as file:
        byte = zlib.crc32(os.fsencode(folder.name))
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            print(f"waiting for another process, which fills {folder}", file=sys.stderr, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
        except OSError:  # a file system without locks
            pass
        folder.mkdir(exist_ok=True)
        yield


@contextmanager
def drafted(folder, notes=None):
    """A locked draft of `folder`, which takes that name when the block ends.

    None if meanwhile another process has filled it. If the block fails the draft is removed, unless
    files that match `notes` say how to resume it.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    with locked(draft):
        try:
            if folder.is_dir():
                yield None
                return
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
    """check_folder for a file to write."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file to write")
    check_folder(Path(path).parent)
