"""How every command ends: one line on an error, nothing half-written, the exit status that shells
expect."""

import multiprocessing
import signal
import sys

import torch

NUMBERS = (signal.SIGINT, signal.SIGTERM)
KNOWN = {  # a sign in PyTorch's RuntimeErrors -> what it means for the user
    "DataLoader worker": "a worker was killed, perhaps out of memory; use fewer --workers",
    "by peer": "another process of this run ended first; its message says why",  # under torchrun
}


def run_command(name, main, args, interrupted="interrupted"):
    """Run main(args) as the command `name`, then exit. Every script and module ends here.

    Exit status: 0; 1 and one line on stderr for ValueError, OSError and known failures of PyTorch;
    130 or 143 after Ctrl-C or SIGTERM, whether they raise KeyboardInterrupt or main returns the
    number of the signal that stopped it. interrupted: what that line says, or a function of args.
    """
    interrupt_on_signals()
    try:
        stopped = main(args)
        sys.exit(128 + stopped if stopped else 0)
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt as interrupt:
        said = interrupted(args) if callable(interrupted) else interrupted
        print(f"{name}: {said}", file=sys.stderr)
        sys.exit(128 + (interrupt.args or (signal.SIGINT,))[0])
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"{name}: the GPU ran out of memory; lower --batch, or give --cache full")
    except RuntimeError as error:
        said = next((said for sign, said in KNOWN.items() if sign in str(error)), None)
        if said is None:
            raise
        sys.exit(f"{name}: {said}")
    finally:
        end_workers()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def interrupt_on_signals():
    """From now on Ctrl-C and SIGTERM raise KeyboardInterrupt(number) wherever the program is."""

    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    for number in NUMBERS:
        signal.signal(number, interrupt)


def note_signals(at_once=True):
    """From now on both signals are only recorded, for a loop that finishes its current step first.

    Returns the list that they are appended to. at_once: a second Ctrl-C interrupts immediately.
    (A second SIGTERM does not: `timeout` sends it twice.)
    """
    noted = []

    def note(number, _):
        if at_once and number == signal.SIGINT and number in noted:
            raise KeyboardInterrupt(number)
        noted.append(number)

    for number in NUMBERS:
        signal.signal(number, note)
    return noted


def ignore_signals(*_):
    """For worker processes: signals reach every process of a run, but the main one decides what
    ends."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill the workers that are left: they ignore Python's SIGTERM, and it would wait for them
    forever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler complains
    for worker in multiprocessing.active_children():
        worker.kill()
