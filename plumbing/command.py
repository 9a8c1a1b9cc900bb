"""How every command ends: one line on an error, and the exit status that shells expect."""

import gc
import multiprocessing
import signal
import sys

import torch

KNOWN = {  # part of a RuntimeError of PyTorch's -> what it means for the user
    "DataLoader worker (pid": "a worker was killed, perhaps out of memory; use fewer --workers",
    "can't allocate memory": "there is not enough memory; lower --batch, or train by --micro-batch",
    "by peer": "another process of this run ended first; its message says why",  # under torchrun
}


def run_command(name, main, args, interrupted="interrupted"):
    """Run main(args), then exit. Every script and module ends here.

    Status: 0; 1 and one line on stderr for ValueError, OSError and KNOWN; 130 or 143 after Ctrl-C
    or SIGTERM, whether main is interrupted or returns the signal's number. interrupted: what the
    line then says, or a function of args.
    """
    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    on_signals(interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        stopped = main(args)
        sys.exit(128 + stopped if stopped else 0)
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt as error:
        said = interrupted(args) if callable(interrupted) else interrupted
        print(f"{name}: {said}", file=sys.stderr)
        sys.exit(128 + (error.args or (signal.SIGINT,))[0])
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"{name}: the GPU ran out of memory; give --micro-batch (train) or --device cpu")
    except RuntimeError as error:
        said = next((said for sign, said in KNOWN.items() if sign in str(error)), None)
        if said is None:
            raise
        sys.exit(f"{name}: {said}")
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler complains
        for worker in multiprocessing.active_children():
            worker.kill()  # it ignores SIGTERM, and Python would wait for it forever
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gc.collect()  # a model that still refers to the group may abort the process at its end
            torch.distributed.destroy_process_group()


def on_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def note_signals(at_once=True):
    """-> a list to which both signals are only appended from now on, so that a step can finish.

    at_once: a second Ctrl-C interrupts. (A second SIGTERM does not: `timeout` sends it twice.)
    """
    noted = []

    def note(number, _):
        if at_once and number == signal.SIGINT and number in noted:
            raise KeyboardInterrupt(number)
        noted.append(number)

    on_signals(note)
    return noted


def ignore_signals(*_):
    """For workers: signals reach every process of a run, but the main one decides what ends."""
    on_signals(signal.SIG_IGN)
