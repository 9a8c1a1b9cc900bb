"""python -m blip_lite.download against a server on 127.0.0.1 that behaves, and that misbehaves in the usual ways."""

import base64
import hashlib
import http.server
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blip_lite import download

ROOT = Path(download.__file__).resolve().parents[1]
WEIGHTS = random.Random(0).randbytes(3_000_000)  # three chunks
VOCAB = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; server.mood is how it misbehaves, server.ranges what it was asked for."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        name, mood = self.path.rsplit("/", 1)[-1], self.server.mood
        self.server.ranges.append((name, self.headers.get("Range")))
        content = self.server.files.get(name)
        if content is None:
            return self.send_error(404)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted and mood != "ignores ranges" else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            stated = start + 7 if mood == "another range" else start
            self.send_header("Content-Range", f"bytes {stated}-{len(content) - 1}/{len(content)}")
        if mood != "no size":
            self.send_header("Content-Length", str(len(body)))
        if mood == "web page":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if mood == "Google":
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", "md5=" + base64.b64encode(hashlib.md5(WEIGHTS).digest()).decode())
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mood == "cuts the connection" and name != "vocab.txt" else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "VOCAB_SHA256", hashlib.sha256(VOCAB).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files = {"model_base.pth": WEIGHTS, "vocab.txt": VOCAB}
        server.mood, server.ranges = None, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(server, folder, name="model_base.pth"):
    """Run the command -> its one line of error, or None."""
    url = f"http://127.0.0.1:{server.server_port}/mirror/"
    try:
        download.main([name, "--to", str(folder), "--base-url", url])
    except SystemExit as stop:
        assert isinstance(stop.code, str) and "\n" not in stop.code  # a string: printed on stderr, exit status 1
        return stop.code
    return None


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetches_the_checkpoint_and_the_vocabulary(server, tmp_path, capsys):
    folder = tmp_path / "new" / "weights"
    assert fetch(server, folder) is None
    assert names(folder) == ["model_base.pth", "vocab.txt"]
    assert (folder / "model_base.pth").read_bytes() == WEIGHTS and (folder / "vocab.txt").read_bytes() == VOCAB
    assert capsys.readouterr().err == ""  # no progress bar where nobody watches
    server.ranges.clear()
    assert fetch(server, folder) is None and server.ranges == []  # both are there
    assert "there already" in capsys.readouterr().out


def test_vocabulary_alone(server, tmp_path):
    assert fetch(server, tmp_path, "vocab.txt") is None
    assert names(tmp_path) == ["vocab.txt"]


def test_resumes_after_a_cut_connection(server, tmp_path):
    server.mood = "cuts the connection"
    assert "ended after 1500000 of 3000000 bytes of model_base.pth; run again" in fetch(server, tmp_path)
    assert names(tmp_path) == ["model_base.pth.part", "vocab.txt"]
    assert (tmp_path / "model_base.pth.part").read_bytes() == WEIGHTS[:1_500_000]
    assert "ended after 2249999 of" in fetch(server, tmp_path)  # goes on, and is cut again
    server.mood = None
    assert fetch(server, tmp_path) is None
    assert names(tmp_path) == ["model_base.pth", "vocab.txt"]
    assert (tmp_path / "model_base.pth").read_bytes() == WEIGHTS
    assert [r for name, r in server.ranges if name != "vocab.txt"] == [None, "bytes=1499999-", "bytes=2249998-"]


@pytest.mark.parametrize("stored", [WEIGHTS, WEIGHTS + b"too long", WEIGHTS[:1], b""])
def test_resumes_from_any_part(server, tmp_path, stored):
    """A .part that only lacks its last name, one of another file, and one of next to nothing."""
    (tmp_path / "model_base.pth.part").write_bytes(stored)
    assert fetch(server, tmp_path) is None
    assert (tmp_path / "model_base.pth").read_bytes() == WEIGHTS and len(names(tmp_path)) == 2


def test_starts_over_where_the_server_ignores_ranges(server, tmp_path):
    server.mood = "ignores ranges"
    (tmp_path / "model_base.pth.part").write_bytes(b"?" * 1_000_000)
    assert fetch(server, tmp_path) is None
    assert (tmp_path / "model_base.pth").read_bytes() == WEIGHTS


def test_google_states_an_md5_and_it_is_checked(server, tmp_path):
    server.mood = "Google"
    server.files.pop("vocab.txt")
    (tmp_path / "vocab.txt").write_bytes(VOCAB)
    (tmp_path / "model_base.pth.part").write_bytes(b"?" * 1_000_000)  # of another version of the file
    assert "md5 differs" in fetch(server, tmp_path)
    assert names(tmp_path) == ["vocab.txt"]
    assert fetch(server, tmp_path) is None
    assert (tmp_path / "model_base.pth").read_bytes() == WEIGHTS


def test_a_wrong_vocabulary_is_refused(server, tmp_path):
    server.files["vocab.txt"] = VOCAB + b"dog\n"
    assert "sha256 differs" in fetch(server, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "mood, message, left",
    [
        ("no size", "does not state the file's size", []),
        ("web page", "answers with a web page", []),
        ("another range", "answers with another range", ["model_base.pth.part"]),
    ],
)
def test_an_odd_server_is_one_sentence(server, tmp_path, mood, message, left):
    (tmp_path / "vocab.txt").write_bytes(VOCAB)
    if left:
        (tmp_path / left[0]).write_bytes(WEIGHTS[:1000])
    server.mood = mood
    assert message in fetch(server, tmp_path)
    assert names(tmp_path) == [*left, "vocab.txt"]


def test_what_cannot_be_reached_is_one_sentence(server, tmp_path):
    assert "answers 404 Not Found" in fetch(server, tmp_path, "model_large.pth")
    server.shutdown()
    server.server_close()
    assert "cannot be reached" in fetch(server, tmp_path, "model_large.pth")
    (tmp_path / "file").write_text("")
    assert "file" in fetch(server, tmp_path / "file")


def test_a_full_disk_is_known_beforehand(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    assert "more than" in fetch(server, tmp_path) and names(tmp_path) == ["vocab.txt"]


def test_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as usage:
        download.main(["model_tiny.pth", "--to", str(tmp_path)])
    assert usage.value.code == 2 and "model_base.pth" in capsys.readouterr().err
    command = [
        sys.executable,
        "-m",
        "plumbing.download",
        "vocab.txt",
        "--to",
        tmp_path,
        "--base-url",
        "http://127.0.0.1:1",
    ]
    environment = os.environ | {"no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "cannot be reached" in refused.stderr
