"""Writing that survives: a file is whole or as it was before, a folder complete or a draft, however the process ends.

    with replacing("runs/a/isa.pt") as file:
        torch.save(state, file)
"""

import json
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there two processes that fill one draft do not wait for each other
    fcntl = None


ABANDONED = 7 * 24 * 3600  # seconds after which a draft that nobody writes is removed


@contextmanager
def explained(path):
    """An OSError inside, a full disk above all, becomes a ValueError of one sentence that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError | KeyboardInterrupt):
            error = error.__context__  # torch.save then fails to end its archive, and tells of that alone
        if not isinstance(error, OSError):
            raise error
        raise ValueError(
            f"{path}: cannot be written ({error.strerror or error}); what was saved before is whole: make room or choose "
            "another place, then run the command again"
        ) from None


@contextmanager
def replacing(path):
    """A binary file to write, beside `path` under a hidden name; it takes the place of `path` when the block ends well.

    When the block fails it is removed, and `path` stays as it was. The content is on the disk before the name is, so that not
    even a power cut leaves an empty file. Raises ValueError, one sentence, where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix tells PIL the format
    with explained(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def cut_log(path, step):
    """Keep the lines of a log (JSON with a "step") up to a step: what a killed run did after its last checkpoint is told again."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:  # the process was killed in the middle of it
            break
        kept.append(line)
    with replacing(path) as file:
        file.write("".join(kept).encode())


def log_row(path, row):
    """Append a dict to a log as a line of JSON, its floats rounded to four places."""
    row = {k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()}
    with explained(path), open(path, "a") as log:
        log.write(json.dumps(row) + "\n")


@contextmanager
def locked(draft, wait=True):
    """Inside, no other process is inside for this folder, which is made, and removed again if it is left empty. Yields whether that
    is so: always, unless wait=False. The lock ends with its process, however that ends.
    """
    while True:
        draft.mkdir(parents=True, exist_ok=True)
        try:
            file = open(draft / "lock", "w")
        except FileNotFoundError:  # its owner has just removed or renamed the folder
            continue
        with file:
            if not _take(file, draft, wait):
                yield False
                return
            if not (draft / "lock").exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(draft / "lock")):
                continue  # while we waited it was finished or removed
            os.utime(draft)  # in use, so not abandoned
            try:
                yield True
            finally:
                with suppress(OSError):
                    if os.listdir(draft) == ["lock"]:
                        (draft / "lock").unlink()
                        draft.rmdir()
            return


def _take(file, draft, wait):
    """Lock the open file -> whether that is done. Where a file system knows no locks, two runs at once are the user's affair."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            return False
        print(f"waiting for another process, which fills {draft}", file=sys.stderr, flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:
        pass
    return True


def clear(draft):
    """Remove everything from a locked draft but its lock."""
    for path in draft.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def complete(draft, folder):
    """Give a locked draft its name, in the place of what had it; its files are on the disk before."""
    for path in draft.iterdir():
        if path.name != "lock":  # closing it would open the lock
            flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    (folder / "lock").unlink()  # after the rename: whoever waits for it sees that it is gone and looks for the folder


def flush(path):
    """Wait until the content of a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def remove_abandoned(parent):
    """Remove drafts in a folder that no process writes and that have not changed for a week; younger ones may be gone on with."""
    for draft in Path(parent).glob("*.tmp"):
        if draft.is_dir() and time.time() - draft.stat().st_mtime > ABANDONED:
            with locked(draft, wait=False) as mine:
                if mine:
                    print(f"removing {draft}, unfinished for a week")
                    clear(draft)


def write_json(path, value):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def check_folder(folder):
    """ValueError where `folder`, which may not be there yet, could not be made or written to."""
    for place in (Path(folder), *Path(folder).parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{place}: cannot be written to; change its permissions, or name another place")
            return
        if os.path.lexists(place):
            raise ValueError(f"{place}: is a file, where a folder is needed; move it, or name another place")


def check_output(path):
    """ValueError where the file `path` could not be written; its folder may have to be made."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file to write")
    check_folder(Path(path).parent)
