"""Ctrl-C and SIGTERM end all commands alike: one line, nothing half-written, and the exit status that shells expect, 130 or 143."""

import multiprocessing
import signal
import sys

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_signals():
    """From now on both raise KeyboardInterrupt, wherever the program is; `exit_interrupted` then ends it."""

    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    for number in NUMBERS:
        signal.signal(number, interrupt)


def note_signals(at_once=True):
    """From now on both are noted in the list that comes back, for a loop that ends after the step in hand.

    at_once: Ctrl-C for the second time interrupts like before. (SIGTERM does not: `timeout` sends it twice.)
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
    """In a worker process: Ctrl-C and often SIGTERM go to all processes of a run, but it is the first that decides what ends.

    A script that has such workers has to call `end_workers`.
    """
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """When a script ends: Python would send SIGTERM to the workers that are left, which they ignore, and wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain of killed workers
    for worker in multiprocessing.active_children():
        worker.kill()


def exit_interrupted(interrupt, message):
    """Print the message and exit with 128 + the number of the signal that the KeyboardInterrupt holds."""
    number = (interrupt.args or (signal.SIGINT,))[0]
    print(message, file=sys.stderr)
    sys.exit(128 + number)
