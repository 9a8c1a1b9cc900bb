"""The server of `search.py --serve`: one page, thumbnails by number, and two JSON endpoints.

It is for one person at this machine: it listens on 127.0.0.1 alone and refuses what another site's
script in the same browser could send (plumbing/README.md).
"""

import base64
import hashlib
import io
import json
import random
import re
import socketserver
import sys
import threading
import time
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import blip_lite
from plumbing.images import open_image
from plumbing.pictures import overlay, scaled

HTML = Path(__file__).with_name("page.html")
HOST = "127.0.0.1"
IMAGE_BYTES, TEXT_WORDS, TEXT_LETTERS = 20_000_000, 600, 6_000  # the most that is taken
BODY_BYTES = IMAGE_BYTES * 4 // 3 + 100_000  # base64, and JSON around it
SECONDS = 20  # for a request to arrive
SIDE, SHOWN = 320, 12  # pixels of a thumbnail; photos to choose from


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 64
    page = lock = thumbnail = html = None  # serve() fills them

    def handle_error(self, request, client_address):
        """A client that went away is no error; anything else is one line, without a traceback."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"search.py: {type(error).__name__}: {error}", file=sys.stderr)


def open_server(port):
    """Take the port before anything slow. Raises ValueError if that is not possible."""
    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise ValueError(f"--port {port}: cannot be used ({error.strerror}); give another one, or "
                         "--port 0 for any that is free") from None


def serve(server, page):
    """Serve until KeyboardInterrupt; a search that runs is finished first.

    page: photos (paths), labels (alternative texts), info (a dict for the page) and search(image,
    number, text, compare, rerank) -> dict, all for JSON.
    """
    server.page, server.lock = page, threading.Lock()
    server.html = HTML.read_text("utf-8").encode()  # with \n alone, as browsers hash it (policy)
    server.thumbnail = lru_cache(1000)(
        lambda number: as_jpeg(small(blip_lite.to_rgb(open_image(page.photos[number])), SIDE)))
    try:
        print(f"{len(page.photos)} photos; open http://{HOST}:{server.server_address[1]}/ in a "
              "browser; Ctrl-C ends", flush=True)
        server.serve_forever()
    finally:
        server.lock.acquire(timeout=SECONDS)
        server.server_close()


class Refused(Exception):
    """A request that gets an HTTP status and one sentence."""


class Handler(BaseHTTPRequestHandler):
    timeout = SECONDS  # of each read and write
    server_version, sys_version = "ISA", ""

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def answer(self, make):
        """Send what make() returns, bytes and their type, or an error as JSON."""
        try:
            self.check_sender()
            status, (body, kind) = 200, make()
        except Refused as error:
            return self.send_error(*error.args)
        except ValueError as error:  # of an image or a text
            return self.send_error(400, str(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            print(f"search.py: {type(error).__name__}: {error}", file=sys.stderr)
            return self.send_error(500, f"the search failed ({type(error).__name__})")
        self.send_body(status, body, kind)

    def check_sender(self):
        """Only this page, under its own name: no other site's script, and no DNS rebinding."""
        port = self.server.server_address[1]
        hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        hosts |= {HOST, "localhost"} if port == 80 else set()
        origins = self.headers.get_all("Origin", [])
        named = self.headers.get_all("Host", [])
        if len(named) != 1 or named[0] not in hosts:
            raise Refused(403, f"this server answers to http://{HOST}:{port}/ alone")
        if not {origin.removeprefix("http://") for origin in origins} <= hosts:
            raise Refused(403, "this server answers its own page alone")

    def get(self):
        path = self.path.partition("?")[0]
        page = self.server.page
        if path == "/":
            return self.server.html, "text/html; charset=utf-8"
        if path == "/gallery":
            numbers = random.sample(range(len(page.photos)), min(SHOWN, len(page.photos)))
            photos = [{"photo": i, "label": page.labels[i]} for i in numbers]
            return as_json({**page.info, "count": len(page.photos), "photos": photos})
        if number := re.fullmatch(r"/thumbnail/([0-9]{1,12})", path):
            return self.server.thumbnail(self.number(int(number[1]))), "image/jpeg"
        raise Refused(404, "there is no such page")

    def number(self, number):
        count = len(self.server.page.photos)
        if type(number) is not int or not 0 <= number < count:  # True is an int, too
            raise Refused(404, f"there is no such photo; they have numbers from 0 to {count - 1}")
        return number

    def post(self):
        if self.path != "/search":
            raise Refused(404, "there is no such page")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a search is sent as application/json")
        asked = read_json(self.read_body())
        text, page = asked.get("text", ""), self.server.page
        switches = [asked.get(name, False) for name in ("compare", "rerank")]
        if not isinstance(text, str) or not all(isinstance(on, bool) for on in switches):
            raise Refused(400, "text has to be a string, compare and rerank true or false")
        if len(text) > TEXT_LETTERS or len(text.split()) > TEXT_WORDS:
            raise Refused(413, f"the text is longer than {TEXT_WORDS} words or "
                               f"{TEXT_LETTERS} letters; shorten it")
        if switches[1] and not page.info["rerank"]:
            raise Refused(400, "this model has no matching head to re-rank with")
        if ("photo" in asked) == ("image" in asked):
            raise Refused(400, "a search needs either photo, a number, or image, a file in base64")
        number = self.number(asked["photo"]) if "photo" in asked else None
        data = read_base64(asked["image"]) if number is None else None
        with self.server.lock:  # one search at a time: one image decoded, one model at work
            image = (open_image(page.photos[number]) if data is None else
                     open_image("your picture", io.BytesIO(data)))
            return as_json(page.search(image, number, text, *switches))

    def read_body(self):
        """As many bytes as Content-Length says, if they come in time."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,12}", lengths[0].strip()):
            raise Refused(411, "a search needs one Content-Length, a number of bytes")
        left, until, parts = int(lengths[0]), time.monotonic() + SECONDS, []
        if left > BODY_BYTES:
            raise Refused(413, f"a picture has at most {IMAGE_BYTES // 10**6} MB")
        while left:
            try:
                part = self.rfile.read1(min(left, 1 << 16))
            except TimeoutError:
                part = b""
            if not part or time.monotonic() > until:
                raise Refused(408, f"{left} bytes of the request did not come")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def send_error(self, code, message=None, explain=None):
        """JSON, also for what http.server refuses by itself: a method, a line that is too long."""
        body, kind = as_json({"error": message or self.responses.get(code, ("refused",))[0]})
        self.send_body(code, body, kind)

    def send_body(self, status, body, kind):
        self.close_connection = True  # a body that was not read is not the next request
        self.request_version = self.protocol_version  # HTTP/0.9 would get no headers
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", len(body)),
                            ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
                            ("Cross-Origin-Resource-Policy", "same-origin"),
                            ("Referrer-Policy", "no-referrer"), ("Connection", "close"),
                            ("Content-Security-Policy", policy(self.server.html))):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@lru_cache(1)
def policy(html):
    """The page may run the one script and style that stand in it and fetch from here alone."""
    inside = {}
    for kind, text in re.findall(rb"<(style|script)>(.*?)</\1>", html, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        inside[kind.decode()] = f"'sha256-{digest}'"
    return (f"default-src 'none'; style-src {inside['style']}; script-src {inside['script']}; "
            "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


def read_json(body):
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise Refused(400, "the request is not a JSON object")
    return asked


def read_base64(text):
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise Refused(400, "image has to be a file in base64") from None
    if len(data) > IMAGE_BYTES:
        raise Refused(413, f"a picture has at most {IMAGE_BYTES // 10**6} MB")
    return data


def as_json(value):
    return json.dumps(value).encode(), "application/json"


def as_jpeg(image, quality=90):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def small(image, side):
    return image if max(image.size) <= side else scaled(image, side)


def overlays(image, maps, side=128):
    """An RGB image, maps [L, H, W] or None -> for each of them L data URLs, for None None."""
    image = scaled(image, side)

    def url(weights):
        data = base64.b64encode(as_jpeg(overlay(image, weights))).decode()
        return f"data:image/jpeg;base64,{data}"

    return [None if m is None else [url(weights) for weights in m] for m in maps]
