"""python -m plumbing.download against a server on 127.0.0.1 that behaves, or misbehaves."""

import errno
import hashlib
import http.server
import os
import shutil
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from plumbing import download

WEIGHTS, VOCAB = bytes(range(250)) * 1200, b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; server.mood is how it misbehaves."""

    def log_message(self, *args):
        pass

    def guess_type(self, path):
        return "text/html" if self.server.mood == "web page" else "application/octet-stream"

    def copyfile(self, source, out):
        out.write(source.read()[: 1000 if self.server.mood == "cut" else None])


@pytest.fixture
def served(tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "model_base.pth").write_bytes(WEIGHTS)
    (tmp_path / "mirror" / "vocab.txt").write_bytes(VOCAB)
    return tmp_path / "mirror"


@pytest.fixture
def server(served):
    handler = partial(Handler, directory=served.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.mood = None
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    """Run the command -> the error it ends with, or None; its vocab.txt is the one served here."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "VOCAB_SHA256", hashlib.sha256(VOCAB).hexdigest())

    def fetch(name="model_base.pth", fails="vocab.txt"):
        url = f"http://127.0.0.1:{server.server_port}/mirror/"
        try:
            return download.main(SimpleNamespace(name=name, to=tmp_path / "new", base_url=url))
        except ValueError as error:
            assert "\n" not in str(error) and f"{url}{fails} cannot be fetched" in str(error)
            return str(error)

    return fetch


@pytest.fixture
def new(tmp_path):
    """What has been fetched -> names."""
    return lambda: sorted(path.name for path in (tmp_path / "new").iterdir())


def test_fetches_the_checkpoint_and_the_vocabulary(fetch, served, new, tmp_path, capsys):
    assert fetch("vocab.txt") is None and new() == ["vocab.txt"]
    assert fetch() is None and new() == ["model_base.pth", "vocab.txt"]
    for name in new():
        assert (tmp_path / "new" / name).read_bytes() == (served / name).read_bytes()
    assert capsys.readouterr().err == ""  # no progress bar where nobody watches
    shutil.rmtree(served)
    assert fetch() is None and capsys.readouterr().out.count("is there already") == 2


def test_fetches_clip_and_its_vocabulary(fetch, served, new, monkeypatch):
    bpe = "bpe_simple_vocab_16e6.txt.gz"
    for name in (bpe, "ViT-L-14.pt"):
        (served / name).write_bytes(WEIGHTS)
    sums = {name: (url, hashlib.sha256(WEIGHTS).hexdigest())
            for name, (url, _) in download.CLIP.items()}
    assert "invalid hash" in fetch("ViT-L-14.pt", bpe)
    monkeypatch.setattr(download, "CLIP", sums)
    assert fetch("ViT-L-14.pt") is None and new() == ["ViT-L-14.pt", bpe]
    assert set(download.CLIP) < set(download.CHECKPOINTS)


@pytest.mark.parametrize("mood, message", [("web page", "a web page"), ("cut", "was cut")])
def test_an_odd_answer_is_one_sentence(fetch, server, new, mood, message):
    fetch("vocab.txt")
    server.mood = mood
    assert message in fetch(fails="model_base.pth") and new() == ["vocab.txt"]


def test_a_wrong_vocabulary_is_refused(fetch, served, new):
    (served / "vocab.txt").write_bytes(VOCAB + b"dog\n")
    assert "invalid hash" in fetch() and new() == []


def test_what_is_not_there_is_one_sentence(fetch, server):
    assert "404: " in fetch("model_large.pth", "model_large.pth")
    server.shutdown()
    server.server_close()
    assert "refused); check the network" in fetch("model_large.pth", "model_large.pth")


def test_a_full_disk_is_one_sentence(fetch, new, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download, "disk_usage", lambda path: SimpleNamespace(free=5))
        assert "more than the disk has room for" in fetch()

    def full(url, part, *_, **options):
        open(part, "wb").write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "download_url_to_file", full)
    assert "No space left on device" in fetch() and new() == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_command_line(call_script):
    usage = call_script("-m", "plumbing.download", "model_tiny.pth")
    assert usage.status == 2 and "model_base.pth" in usage.message
    done = call_script("-m", "plumbing.download", "vocab.txt", "--base-url", "nonsense")
    assert done.status == 1 and done.message.startswith("plumbing.download: nonsense/vocab.txt ")
