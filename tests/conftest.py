"""What several test files share: a small pocket world on disk, pocket BLIP, and a run of train.py on that world."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the scripts that tests start

import pytest
import torch

import blip_lite
from pocket import world

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ISA_SHARED") or ROOT.parent / "shared")
DATA = SHARED / "data" if (SHARED / "data").is_dir() else SHARED  # the real annotations, where there are any
torch.set_num_threads(1)


def pytest_configure(config):
    """Whoever names these files, and none else, wants their slow tests too; plain `pytest` leaves them out (pyproject.toml)."""
    named = {Path(argument.split("::")[0]).name for argument in config.args}
    if named <= {"test_notebooks.py", "test_assignments.py"} and not any(a.startswith("-m") for a in config.invocation_params.args):
        config.option.markexpr = ""


@dataclass
class Finished:
    """A script that ended: its exit status, and what it printed. `message` is what a user reads last on stderr."""

    status: int
    out: str
    err: str

    @property
    def message(self):
        lines = self.err.splitlines()
        assert "Traceback" not in self.err, self.err
        return lines[-1] if lines else ""


def run_script(*arguments, cwd, **environment):
    """python SCRIPT ARGUMENTS in a process of its own, as a user runs it, in the folder `cwd`."""
    command = [sys.executable, str(ROOT / str(arguments[0])), *map(str, arguments[1:])]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call_script(tmp_path, monkeypatch, capsys):
    """The same in this process, which spares the seconds that `import torch` takes; the current folder is tmp_path.

    "-m" as the first argument runs the module that follows.
    """
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments):
        script, *rest = map(str, arguments)
        module = script == "-m" and rest.pop(0)
        monkeypatch.setattr(sys, "argv", [module or script, *rest])
        capsys.readouterr()
        status, said = 0, ""
        try:
            if module:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:  # what the interpreter makes of it: text is printed, and the status is 1
            status, said = (1, f"{stop.code}\n") if isinstance(stop.code, str) else (stop.code or 0, "")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err + said)

    return call


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The pocket world at a fiftieth of its size: some hundred training images, the three benchmarks, val and test."""
    out = tmp_path_factory.mktemp("small") / "world"
    world.write(out, seed=0, scale=0.02, workers=1)
    return out


@pytest.fixture(scope="session")
def pocket_blip():
    return blip_lite.load("pocket")


def with_large_weights(blip):
    """A new Blip -> the same, frozen, with weights so large that its answers depend on what it is shown."""
    for name, parameter in blip.named_parameters():
        if "embed" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return blip.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def trained(small_world, tmp_path_factory):
    """train.py as a user runs it: 4 steps on images of the small world -> where things are, and what it printed."""
    cwd = tmp_path_factory.mktemp("trained")
    (cwd / "images").mkdir()
    for path in sorted((small_world / "train").iterdir())[:160]:
        shutil.copy2(path, cwd / "images")
    options = ["--images", cwd / "images", "--epochs", 1, "--batch", 40, "--precision", "fp32", "--threads", 1]
    done = run_script("train.py", *options, "--name", "tiny", "--cache-dir", "features", cwd=cwd)
    assert done.status == 0, done.err
    run = cwd / "runs" / "tiny"
    return SimpleNamespace(cwd=cwd, run=run, isa=run / "isa.pt", last=run / "last.pt", log=run / "log.jsonl", options=options,
                           printed=done)  # fmt: skip
