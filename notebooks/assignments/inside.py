"""What the grader runs inside a submission's kernel: state is put back, tests have their own names.

A student's cells share one Python process with the tests. Whatever a cell changes there (the
working directory, PyTorch's defaults, a name of the set-up, the content of a given tensor) is put
back right after it and reported, so that it costs no other test's points. A test runs in a copy of
the notebook's names: its own variables replace none of the student's.

grading.py loads this file into the kernel; it is not imported anywhere else.
"""

import builtins
import json
import math
import os
import random
import sys
import types
import warnings

import torch
import torch.nn.functional as F

PATCHABLE = {"builtins": builtins, "torch": torch, "F": F, "torch.Tensor": torch.Tensor,
             "torch.autograd": torch.autograd, "math": math, "os": os, "random": random}
SETTINGS = {  # what it is called -> how to read it, how to set it
    "the working directory": (os.getcwd, os.chdir),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, torch.set_default_device),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic mode": (torch.are_deterministic_algorithms_enabled,
                                   torch.use_deterministic_algorithms),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "sys.stdout": (lambda: sys.stdout, lambda old: setattr(sys, "stdout", old)),
    "sys.stderr": (lambda: sys.stderr, lambda old: setattr(sys, "stderr", old)),
    "the warnings' filters": (lambda: list(warnings.filters),
                              lambda old: warnings.filters.__setitem__(slice(None), old)),
    "the environment variables": (lambda: dict(os.environ),
                                  lambda old: (os.environ.clear(), os.environ.update(old))),
}
NOT_THEIRS = {"_", "input", "Storage"}  # set by IPython for each cell; by torch with its dtype
LEFT_OVER = {"package", "version", "isa", "checks"}  # loop variables; modules loaded for each test

namespace = {}  # the notebook's names; begin() puts them here
names, tensors, modes = {}, [], []  # of the set-up; run_setup() fills them
settings, patchable = {}, {}
memory = {"room": 0, "before": 0}
_print, _open = print, open


def begin(of_the_notebook):
    global namespace
    namespace = of_the_notebook
    namespace["exit"] = namespace["quit"] = sys.exit  # IPython's end the whole kernel


def run_setup(text):
    """Run a set-up cell; note the names that it defines and what its tensors contain."""
    old = dict(namespace)
    exec(compile(text, "setup", "exec"), namespace)
    for name, value in list(namespace.items()):
        if name.startswith("_") or name in LEFT_OVER or old.get(name) is value:
            continue
        names[name] = value
        found = {name: value} if isinstance(value, torch.Tensor) else {}
        if isinstance(value, torch.nn.Module):
            found = {f"{name}.{key}": w for key, w in value.state_dict(keep_vars=True).items()}
            modes.append((name, value, value.training))
        tensors.extend([title, x, x._version, x.detach().clone(), x.requires_grad]
                       for title, x in found.items())
    settings.update({what: read() for what, (read, _) in SETTINGS.items()})
    patchable.update({title: dict(vars(module)) for title, module in PATCHABLE.items()})


def restore():
    """Put back whatever changed since run_setup() -> a list of what it was."""
    changed = []
    for title, old in patchable.items():
        module = PATCHABLE[title]
        for name, value in old.items():
            if vars(module).get(name, old) is not value and name not in NOT_THEIRS:
                setattr(module, name, value)
                changed.append(f"{title}.{name}")
    for name in set(vars(torch.Tensor)) - set(patchable.get("torch.Tensor", vars(torch.Tensor))):
        delattr(torch.Tensor, name)  # it hides a method of the class below
        changed.append(f"torch.Tensor.{name}")
    for name in [n for n in namespace if hasattr(builtins, n) and not n.startswith("_")]:
        if not callable(namespace[name]):
            del namespace[name]
            changed.append(f"the built-in {name}")
    for what, (read, put) in SETTINGS.items():
        if settings and _differs(read, settings[what]):
            put(settings[what])
            changed.append(what)
    for name, value in names.items():
        if namespace.get(name, names) is not value:
            namespace[name] = value
            changed.append(f"the name {name}")
    return changed + _restore_tensors()


def _differs(read, old):
    try:
        return read() != old
    except Exception:  # the working directory was deleted, say
        return True


def _restore_tensors():
    changed = []
    with torch.no_grad():
        for record in tensors:
            title, x, version, content, learnt = record
            if x._version != version:
                x.copy_(content)
                changed.append(f"the content of {title}")
            if x.requires_grad != learnt and x.is_leaf:
                x.requires_grad_(learnt)
                changed.append(f"requires_grad of {title}")
            x.grad = None
            record[2] = x._version
    for title, module, training in modes:
        if module.training != training:
            module.train(training)
            changed.append(f"the mode of {title}")
    return changed if len(changed) < 8 else [*changed[:6], f"{len(changed) - 6} more"]


def limit_memory(megabytes):
    """From now on this process may allocate that much more (where the system can limit it)."""
    try:
        import resource

        memory["before"] = _address_space()
        memory["room"] = megabytes * 2**20
        most = memory["before"] + memory["room"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):  # Windows, macOS
        memory["room"] = 0


def _address_space():
    with _open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def hoards():
    """Does the process keep more than half of its memory after a cell?"""
    return bool(memory["room"]) and _address_space() - memory["before"] > memory["room"] / 2


def after_cell(end):
    """Put state back after a student's cell; say what it was."""
    changed = restore()
    _print(end + json.dumps({"changed": changed, "hoards": hoards()}), file=sys.stdout, flush=True)


def load(name, text):
    """A module made from its text, whatever was changed in an earlier one."""
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    return module


def run_test(text, modules, end):
    """Run a test in a copy of the notebook's names; say which of its parts failed, and notes.

    modules: pairs (name, text) of isa and checks. A test that calls globals() gets the student's
    names, where checks.using puts stand-ins. Only a test that ends reaches the last line.
    """
    restore()
    namespace.update({name: load(name, source) for name, source in modules})
    checks = namespace["checks"]
    checks.grading = True
    sys.modules["notebooks.assignments.checks"] = checks
    exec(compile(text, "test", "exec"), {**namespace, "globals": lambda: namespace})
    said = {"lost": checks.lost, "notes": checks.notes, "changed": restore()}
    _print(end + json.dumps(said), file=sys.stdout, flush=True)
