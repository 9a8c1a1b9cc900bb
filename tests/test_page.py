"""search.py --serve: the page in a real browser, and a server that strangers may talk to."""

import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import isa
import query_side
import search
from baselines.page import Page
from plumbing import page
from pocket import specs, suggestions

FAST = ["--precision", "fp32", "--workers", "0"]


@pytest.fixture(scope="module")
def opened(small_world, tmp_path_factory):
    """A server of 48 pocket images in a thread of this process -> port, Page, their specs."""
    cwd = tmp_path_factory.mktemp("page")
    (cwd / "photos").mkdir()
    for path in sorted((small_world / suggestions.PHOTOS).iterdir()):
        shutil.copy(path, cwd / "photos")
    drawn = suggestions.read_gallery(small_world)
    options = ["--serve", "--gallery", str(cwd / "photos"), "--port", "0", *FAST]
    args = search.parse_args([*options, "--cache-dir", str(cwd / "cache")])
    server, (root, paths) = page.open_server(0), search.open_gallery(args)
    models = search.open_models(args)
    photos, v = search.index(models[0], paths, root, args.precision, args.cache_dir, 0)
    steps = search.speak, search.listen, search.find
    shown = Page(args, *steps, *models, photos, v, drawn)
    thread = threading.Thread(target=page.serve, args=(server, shown), daemon=True)
    thread.start()
    yield server.server_address[1], shown, [drawn[Path(path).stem] for path in photos]
    server.shutdown()
    thread.join()


@pytest.fixture
def port(opened):
    return opened[0]


def test_line_ends_of_windows(opened, tmp_path, monkeypatch):
    """A browser makes them \\n before it compares hashes."""
    monkeypatch.setattr(page, "HTML", tmp_path / "page.html")
    text = (ROOT / "plumbing/page.html").read_bytes()
    page.HTML.write_bytes(text.replace(b"\n", b"\r\n"))
    server = page.open_server(0)
    thread = threading.Thread(target=page.serve, args=(server, opened[1]), daemon=True)
    thread.start()
    assert ask(server.server_address[1], "GET", "/")[2] == text
    server.shutdown()
    thread.join()


def ask(port, method, path, body=None, **headers):
    """-> status, headers, body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.headers, reply.read()


def post(port, body, **headers):
    """-> status, the JSON answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content_Type": "application/json"} | headers
    status, _, answer = ask(port, "POST", "/search", body, **headers)
    return status, json.loads(answer)


def raw(port, sent, wait=30):
    """Bytes as they are, and the end of sending -> all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as wire:
        wire.sendall(sent)
        wire.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: wire.recv(65536), b""))


def error_of(reply):
    """A raw answer -> its status and sentence; it has to be JSON."""
    head, body = reply.split(b"\r\n\r\n", 1)
    assert b"application/json" in head and b"Traceback" not in body
    return int(head.split()[1]), json.loads(body)["error"]


@torch.no_grad()
def plain_ranking(blip, photos, image, text, number):
    """One photo at a time: numbers, best first, without the query."""
    model, _ = query_side.load_query_model(ROOT / "pocket" / "isa.pt", blip)
    U = model(query_side.preprocess(model.encoder, image)[None])
    q = F.normalize(blip.encode_text(*isa.compose_query(blip, U, [text])), dim=-1)[0]
    scores = [float(blip.encode_image(blip.preprocess(Image.open(p))[None])[0][0] @ q)
              for p in photos]
    return sorted((i for i in range(len(photos)) if i != number), key=lambda i: -scores[i]), scores


def file_of(image, kind="PNG"):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def base64_of(data):
    return base64.b64encode(data).decode()


def test_the_page_and_its_pictures(opened):
    port, shown, _ = opened
    status, headers, body = ask(port, "GET", "/")
    assert status == 200 and body == page.HTML.read_bytes() and b"http" not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    gallery = json.loads(ask(port, "GET", "/gallery")[2])
    numbers = [row["photo"] for row in gallery["photos"]]
    assert gallery["count"] == 48 and len(set(numbers)) == 12 and gallery["rerank"] == 20
    status, headers, body = ask(port, "GET", f"/thumbnail/{numbers[0]}")
    picture = Image.open(io.BytesIO(body))
    assert (status, headers["Content-Type"], picture.size) == (200, "image/jpeg", (64, 64))
    assert shown.labels[numbers[0]] == gallery["photos"][0]["label"]


def test_a_search_is_that_of_single_features(opened, pocket_blip):
    port, shown, _ = opened
    text, number = "is at night", 3
    image = Image.open(shown.photos[number])
    status, answer = post(port, {"photo": number, "text": text, "compare": True})
    wanted, scores = plain_ranking(pocket_blip, shown.photos, image, text, number)
    rows = answer["columns"][0]["results"]
    assert status == 200 and [row["photo"] for row in rows] == wanted[:10]
    assert [r["score"] for r in rows] == pytest.approx([scores[i] for i in wanted[:10]], abs=1e-3)
    assert len(answer["words"]) == 6 and [len(maps) for maps in answer["maps"]] == [6, 6]
    assert answer["wire"] | {"jpeg": 0} == {"tokens": 6, "width": 128, "bytes": 2 * 6 * 128,
                                            "text": len(text), "jpeg": 0, "side": 64}
    with torch.no_grad():
        ids, mask = pocket_blip.tokenize([text])
        t = pocket_blip.encode_text(pocket_blip.embed_words(ids), mask)
        v = torch.cat([pocket_blip.encode_image(pocket_blip.preprocess(Image.open(path))[None])[0]
                       for path in shown.photos])
    for column, q in ((1, t[0]), (2, t[0] + v[number])):
        order = [i for i in (v @ q).argsort(descending=True).tolist() if i != number]
        assert [row["photo"] for row in answer["columns"][column]["results"]] == order[:10]
    # a file of one's own: the same picture finds itself, too
    _, own = post(port, {"image": base64_of(file_of(image)), "text": text})
    found = [row["photo"] for row in own["columns"][0]["results"]]
    assert [i for i in found if i != number] == wanted[: len(found) - (number in found)]
    assert own["suggestions"] == [] and own["columns"][0]["name"] == "ISA"


def test_reranking_by_the_switch(opened):
    port, _, _ = opened
    asked = {"photo": 5, "text": "is in the snow"}
    plain = post(port, asked)[1]["columns"][0]["results"]
    rows = post(port, asked | {"rerank": True})[1]["columns"][0]["results"]
    assert all(row["match"] is None for row in plain)
    assert all(0 <= row["match"] <= 1 for row in rows)
    assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)


def test_suggestions_find_what_they_say(opened):
    """By the specs of what was drawn: the first image shows each suggested change."""
    port, _, drawn = opened
    count = 0
    for number in range(0, 48, 8):
        for text in post(port, {"photo": number})[1]["suggestions"]:
            first = post(port, {"photo": number, "text": text})[1]["columns"][0]["results"][0]
            said, shown = text.split(), drawn[first["photo"]]
            for word in set(said) & set(specs.KINDS):
                gone = f"instead of the {word}" in text
                assert gone or word in {thing.kind for thing in shown.things}
            for name, words in specs.BACKGROUNDS.items():
                if words in text and f"instead of {words}" not in text:
                    assert shown.background == name
            count += 1
    assert count >= 6


def test_words_are_bounded_and_unknown_ones_named(port):
    assert post(port, {"photo": 1, "text": "has a helicopter"})[1]["unknown"] == ["helicopter"]
    for text, status, part in (("red " * 601, 413, "600 words"), ("x" * 6001, 413, "6000 letters"),
                               ("red " * 100, 400, "64 positions")):
        found, answer = post(port, {"photo": 1, "text": text})
        assert found == status and part in answer["error"]
    assert post(port, {"photo": 1, "text": "\ud800 \0 <b>"})[0] == 200


def bomb():
    """A PNG of 40,000 x 40,000 pixels in a few bytes."""

    def chunk(kind, data):
        both = kind + data
        return struct.pack(">I", len(data)) + both + struct.pack(">I", zlib.crc32(both))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9999))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) show\n%%EOF\n"


@pytest.mark.parametrize("body, status, part", [
    (b"", 400, "JSON"), (b"[1]", 400, "JSON"), (b"{" * 99_999, 400, "JSON"),
    (b"[" * 99_999, 400, "JSON"), (b"\xff\xfe", 400, "JSON"), ({}, 400, "either"),
    ({"photo": 1, "image": ""}, 400, "either"), ({"photo": 48}, 404, "0 to 47"),
    ({"photo": -1}, 404, "0 to 47"), ({"photo": "1"}, 404, "0 to 47"),
    ({"photo": True}, 404, "0 to 47"), ({"photo": 10**400}, 404, "0 to 47"),
    ({"photo": 1e999}, 404, "0 to 47"), ({"photo": None}, 404, "0 to 47"),
    ({"photo": 1, "text": 5}, 400, "string"), ({"photo": 1, "rerank": 1}, 400, "true or false"),
    ({"image": 5}, 400, "base64"), ({"image": "?"}, 400, "base64"), ({"image": ""}, 400, "empty"),
    ({"image": base64_of(b"no image")}, 400, "it is none"), ({"image": "é"}, 400, "base64"),
    ({"image": base64_of(EPS)}, 400, "it is none"), ({"image": base64_of(bomb())}, 400, "pixels"),
    ({"image": base64_of(file_of(Image.new("RGB", (64, 64)))[:-30])}, 400, "truncated"),
], ids=str)
def test_bad_searches_are_one_sentence(port, body, status, part):
    found, answer = post(port, body)
    assert (found, list(answer)) == (status, ["error"]) and part in answer["error"]
    assert "Traceback" not in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize("path", ("/../search.py", "/thumbnail/../../etc/passwd", "/thumbnail/-1",
                                  "/thumbnail/48", "/thumbnail/1.5", "/thumbnail/%31", "//etc",
                                  "/thumbnail/" + "9" * 4000, "/page.html", "/search"))
def test_nothing_else_is_served(port, path):
    status, headers, body = ask(port, "GET", path)
    assert status == 404 and headers["Content-Type"] == "application/json"
    assert list(json.loads(body)) == ["error"]


def test_strangers_are_refused(port):
    """Another name for this address (DNS rebinding), and another site's script."""
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1:1", "127.0.0.1", ""):
        assert ask(port, "GET", "/", Host=host)[0] == 403
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
        assert post(port, {"photo": 1}, Origin=origin)[0] == 403
    assert post(port, {"photo": 1}, Content_Type="text/plain")[0] == 415
    for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        assert post(port, {"photo": 1}, Origin=origin)[0] == 200
    two = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example\r\n\r\n".encode()
    assert error_of(raw(port, two))[0] == 403
    assert error_of(raw(port, b"GET / HTTP/1.1\r\n\r\n"))[0] == 403


def test_hostile_requests(port):
    own = f"Host: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    head = f"POST /search HTTP/1.1\r\n{own}".encode()
    for more, status in ((b"\r\n", 411), (b"Content-Length: -5\r\n\r\n", 411),
                         (b"Content-Length: x\r\n\r\n", 411),
                         (b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 411),
                         (b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
                         (b"Content-Length: 99999999\r\n\r\n", 413),
                         (b"Content-Length: 999999999999\r\n\r\n", 413),
                         (b"Content-Length: 50\r\n\r\n{}", 408)):
        assert error_of(raw(port, head + more))[0] == status
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "NONSENSE"):
        assert error_of(raw(port, f"{method} / HTTP/1.1\r\n{own}\r\n".encode()))[0] == 501
    for junk, status in ((b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
                         (b"GET / HTTP/9.9\r\n\r\n", 505), (b"a b c d e\r\n\r\n", 400),
                         (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431)):
        assert error_of(raw(port, junk))[0] == status
    raw(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # a browser that tries https
    assert raw(port, b"") == b"" and ask(port, "GET", "/")[0] == 200


def test_a_body_that_never_comes_is_given_up(port, monkeypatch):
    monkeypatch.setattr(page.Handler, "timeout", 0.3)
    head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(head.encode() + b"Content-Length: 50\r\n\r\n{")
        began = time.monotonic()
        reply = b"".join(iter(lambda: wire.recv(65536), b""))
        assert error_of(reply)[0] == 408 and time.monotonic() - began < 10


def test_two_at_once(opened):
    """A search that takes long holds up neither a thumbnail nor, for ever, another search."""
    port, shown, _ = opened
    plain, entered, leave, inside = shown.search, threading.Event(), threading.Event(), []

    def slow(*asked):
        inside.append(len(inside) + 1)
        entered.set()
        assert leave.wait(20) and len(inside) == 1  # alone
        inside.clear()
        return plain(*asked)

    shown.search, answers = slow, []
    threads = [threading.Thread(target=lambda: answers.append(post(port, {"photo": 2})))
               for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        assert entered.wait(20) and ask(port, "GET", "/thumbnail/4")[0] == 200 and not answers
        leave.set()
        for thread in threads:
            thread.join()
    finally:
        shown.search = plain
    assert [status for status, _ in answers] == [200, 200]


def test_an_error_of_ours_is_no_traceback(opened, monkeypatch, capfd):
    port, shown, _ = opened
    monkeypatch.setattr(shown, "search", lambda *_: 1 / 0)
    assert post(port, {"photo": 2}) == (500, {"error": "the search failed (ZeroDivisionError)"})
    assert capfd.readouterr().err == "search.py: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize("options, part", [
    (["--port", "8000"], "--serve"), ([], "--gallery and --image"), (["--image", "x"], "--gallery"),
    (["--serve", "--image", "x"], "--image"), (["--serve", "--text", "x"], "--text"),
    (["--serve", "--out", "x.png"], "--out"), (["--serve", "--json", "-"], "--json"),
    (["--serve", "--keep-query"], "--keep-query"), (["--serve", "--port", "70000"], "65535"),
    (["--serve", "--port", "-1"], "--port"), (["--serve", "--clip", "x.pt"], "--gallery"),
    (["--serve", "--blip", "x.pth"], "--gallery"), (["--serve", "--top", "0"], "--top"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_usage(call_script, options, part):
    done = call_script("search.py", *options)
    assert done.status == 2 and part in done.message


def test_a_port_that_is_taken(call_script, images):
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        done = call_script("search.py", "--serve", "--gallery", images, "--port", number, *FAST)
    assert done.status == 1 and f"--port {number}: cannot be used" in done.message
    one = images.parent / f"{images.name} one"
    one.mkdir()
    shutil.copy(next(images.iterdir()), one)
    done = call_script("search.py", "--serve", "--gallery", one, "--port", "0", *FAST)
    assert done.status == 1 and "too few for a page" in done.message


def test_ctrl_c(images, tmp_path):
    """As a user runs it: an address, an answer, and an end with status 130."""
    command = [sys.executable, ROOT / "search.py", "--serve", "--gallery", images, "--port", "0"]
    process = subprocess.Popen([*command, *FAST], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ})
    line = process.stdout.readline()
    assert line.startswith("24 photos; open http://127.0.0.1:")
    port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
    assert post(port, {"photo": 0})[0] == 200
    with socket.socket() as other:  # nobody listens on this machine's other addresses
        assert other.connect_ex(("127.0.0.2", port)) != 0
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1] == "search.py: the page is closed" and "Traceback" not in err


def test_in_a_browser(opened, browser, pocket_blip):
    """Pick, type, find what the library finds first, search on from there, and step back."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    port, shown, _ = opened

    def all_of(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def sources(selector):
        return [int(image.get_attribute("src").split("/thumbnail/")[1])
                for image in all_of(f"{selector} img")]

    def wait(condition):
        WebDriverWait(browser, 30, ignored_exceptions=(Exception,)).until(lambda _: condition())

    def first(number, text):
        image = Image.open(shown.photos[number])
        return plain_ranking(pocket_blip, shown.photos, image, text, number)[0][0]

    def settled():
        return all_of("#answer:not([hidden]):not([aria-busy])")

    browser.get(f"http://127.0.0.1:{port}/")
    wait(lambda: settled() and len(all_of("#choice img")) == 12)
    thumbnails = all_of("#choice button")
    number = sources("#choice")[4]
    thumbnails[4].send_keys(Keys.ENTER)  # by the keyboard alone
    wait(lambda: settled() and sources("#history") == [number])
    text = "is at night"
    all_of("#text")[0].send_keys(text, Keys.ENTER)
    wanted = first(number, text)
    wait(lambda: settled() and f"that {text}" in all_of("#phone + p, #tokens")[0].text)
    assert sources("#columns")[0] == wanted and len(sources("#columns")) == 10
    assert "1,536 bytes" in all_of("#wire")[0].text and len(all_of("#words img")) == 12

    all_of("#columns button")[0].click()
    wait(lambda: settled() and sources("#history") == [number, wanted])
    assert browser.switch_to.active_element.get_attribute("id") == "text"
    second = "is in the snow"
    all_of("#text")[0].send_keys(second, Keys.ENTER)
    wait(lambda: settled() and f"that {second}" in all_of("#tokens")[0].text)
    assert sources("#columns")[0] == first(wanted, second)

    all_of("#compare")[0].send_keys(Keys.SPACE)
    wait(lambda: settled() and len(all_of("#columns ol")) == 3)
    all_of("#history button")[0].click()  # back
    wait(lambda: sources("#columns")[0] == wanted)
    assert all_of("#text")[0].get_attribute("value") == text

    all_of("#file")[0].send_keys(shown.photos[7])  # a picture of one's own: a new search
    wait(lambda: settled() and len(all_of("#history img")) == 1)
    assert all_of("#query")[0].get_attribute("src").startswith("blob:")
    wait(lambda: settled() and 7 in sources("#columns"))  # its copy in the gallery is found

    for image in all_of("img"):
        assert image.get_attribute("alt") and int(image.get_attribute("naturalWidth")) > 0
    for control in all_of("input"):
        assert control.accessible_name
    assert all(button.accessible_name for button in all_of("button"))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True})
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    assert browser.get_log("browser") == []  # no blocked resource, no error
