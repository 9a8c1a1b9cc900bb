"""What test files share: a small pocket world, pocket BLIP, and a run of train.py."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in scripts

import pytest
import torch

import blip_lite
import clip_lite
from pocket import world

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ISA_SHARED") or ROOT.parent / "shared")
DATA = SHARED / "data" if (SHARED / "data").is_dir() else SHARED  # the real annotations, if any
torch.set_num_threads(1)


def pytest_configure(config):
    """Naming only these files runs their slow tests too."""
    named = {Path(argument.split("::")[0]).name for argument in config.args}
    marked = any(a.startswith("-m") for a in config.invocation_params.args)
    theirs = {path.name for path in (ROOT / "tests/notebooks").glob("test_*.py")}
    if named <= {"notebooks", *theirs} and not marked:
        config.option.markexpr = ""


@dataclass
class Finished:
    status: int
    out: str
    err: str

    @property
    def message(self):
        """The last line of stderr."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err, self.err
        return lines[-1] if lines else ""


def run_script(*arguments, cwd, **environment):
    """python SCRIPT ARGUMENTS, as a user runs it, in `cwd`."""
    command = [sys.executable, str(ROOT / str(arguments[0])), *map(str, arguments[1:])]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=900)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call_script(tmp_path, monkeypatch, capsys):
    """The same in this process, which spares `import torch`, in tmp_path; or "-m", MODULE, ..."""
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
        except SystemExit as stop:
            code = stop.code or 0  # text is printed, with status 1
            status, said = (1, f"{code}\n") if isinstance(code, str) else (code, "")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err + said)

    return call


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """The pocket world and its benchmarks at a fiftieth of their size."""
    out = tmp_path_factory.mktemp("small") / "world"
    world.write(out, seed=0, scale=0.02, workers=1)
    return out


@pytest.fixture(scope="session")
def images(small_world, tmp_path_factory):
    """A folder of 24 images."""
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((small_world / "train").iterdir())[:24]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def pocket_blip():
    return blip_lite.load("pocket")


@pytest.fixture(scope="session")
def pocket_clip():
    return clip_lite.load("pocket")


def with_large_weights(blip):
    """Freeze a new Blip, with weights so large that its answers depend on what it sees."""
    for name, parameter in blip.named_parameters():
        if "embed" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return blip.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def trained(small_world, tmp_path_factory):
    """train.py as a user runs it, 4 steps -> where things are, and what it printed."""
    cwd = tmp_path_factory.mktemp("trained")
    (cwd / "images").mkdir()
    for path in sorted((small_world / "train").iterdir())[:160]:
        shutil.copy2(path, cwd / "images")
    options = ["--images", cwd / "images", "--epochs", 1, "--batch", 40, "--precision", "fp32",
               "--threads", 1]
    done = run_script("train.py", *options, "--name", "tiny", "--cache-dir", "features", cwd=cwd)
    assert done.status == 0, done.err
    run = cwd / "runs/tiny"
    return SimpleNamespace(cwd=cwd, run=run, isa=run / "isa.pt", last=run / "last.pt",
                           log=run / "log.jsonl", options=options, printed=done)


def weights(run, file="isa.pt"):
    return torch.load(run / file, weights_only=True)["query_model"]


def same(a, b):
    """Whether two state dicts are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("no browser: Debian's chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()
