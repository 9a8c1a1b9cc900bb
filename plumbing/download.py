"""Fetch an official BLIP checkpoint and BERT's vocabulary: python -m blip_lite.download model_base.pth --to weights

A download that was cut off goes on where it stopped when the same command is run again. The files come from Salesforce
(github.com/salesforce/BLIP, BSD-3 licence) and Hugging Face (bert-base-uncased, Apache 2.0).
"""

import argparse
import base64
import hashlib
import http.client
import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

from plumbing.files import check_folder

SALESFORCE = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"


VOCAB_URL = "https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt"


VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


CHECKPOINTS = {
    "model_base.pth": "the paper's: ViT-B/16, 129M image-text pairs, 224 px",
    "model_base_14M.pth": "ViT-B/16, 14M pairs, 224 px",
    "model_base_capfilt_large.pth": "ViT-B/16, 129M pairs with captions cleaned by ViT-L, 224 px",
    "model_large.pth": "ViT-L/16, 129M pairs, 224 px",
    "model_base_retrieval_coco.pth": "ViT-B/16 fine-tuned for retrieval on COCO, 384 px",
    "model_base_retrieval_flickr.pth": "ViT-B/16 fine-tuned for retrieval on Flickr30k, 384 px",
    "model_large_retrieval_coco.pth": "ViT-L/16 fine-tuned for retrieval on COCO, 384 px",
    "model_large_retrieval_flickr.pth": "ViT-L/16 fine-tuned for retrieval on Flickr30k, 384 px",
}


CHUNK = 1 << 20


TIMEOUT = 60  # seconds without a byte


def download(url, path, sha256=None):
    """Fetch `url` to `path`, through `path`.part, from which an earlier attempt is resumed.

    The size must be the one that the server states; the content must have `sha256` (hex) where given, and the MD5 that
    Google's storage states in its x-goog-hash header. `path` exists only when all of that holds.
    Raises ValueError, one sentence that says what to do, for whatever the server or the network does wrong.
    """
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    start = max(have - 1, 0)  # the last byte is asked for again: the range is never empty, even if nothing else is left
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # "range not satisfiable": the .part is longer than the file
            part.unlink()
            return download(url, path, sha256)
        raise ValueError(f"{url} answers {error.code} {error.reason}; try later or another --base-url") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{url} cannot be reached ({getattr(error, 'reason', error)}); check the network") from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError(f"{url} answers with a web page, not the file; check the network, or the --base-url")
        total = response.headers.get("Content-Length", "")
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not found or int(found[1]) != start:
                raise ValueError(f"{url} answers with another range than asked for; delete {part} and run again")
            total = found[2]
        else:
            start = 0  # the server sends all of it, whether it was asked for a range or not
        if not total.isdecimal():
            raise ValueError(f"{url} does not state the file's size; use another --base-url")
        total = int(total)
        if total - start > shutil.disk_usage(path.parent).free:
            raise ValueError(f"{path.name} needs {(total - start) / 1e9:.1f} GB more than {path.parent} has room for")
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=path.name, disable=None)
        with bar, open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            while True:
                try:
                    chunk = response.read(CHUNK)
                except (OSError, http.client.HTTPException):  # reset, timed out, cut off inside a chunk
                    break
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
        md5 = re.search(r"md5=([\w+/=]+)", " ".join(response.headers.get_all("x-goog-hash", [])))
    size = part.stat().st_size
    if size < total:
        raise ValueError(f"the connection ended after {size} of {total} bytes of {path.name}; run again to go on there")
    wanted = {"sha256": sha256, "md5": md5 and base64.b64decode(md5[1]).hex()}
    for algorithm, digest in wanted.items():
        if digest and _digest(part, algorithm) != digest:
            part.unlink()
            raise ValueError(f"{url} is not the file it should be ({algorithm} differs); run again or use a mirror")
    os.replace(part, path)


def _digest(path, algorithm):
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m blip_lite.download",
        description="Fetch an official BLIP checkpoint and BERT's vocabulary. Run again to resume.",
        epilog="names:\n" + "\n".join(f"  {name:34}{what}" for name, what in CHECKPOINTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [*CHECKPOINTS, "vocab.txt"]
    parser.add_argument("name", choices=names, metavar="NAME", help="a checkpoint below, or vocab.txt alone")
    parser.add_argument("--to", type=Path, default=Path("."), metavar="DIR", help="folder to write to (default: this)")
    parser.add_argument("--base-url", metavar="URL", help="a mirror: take URL/NAME and URL/vocab.txt instead")
    args = parser.parse_args(argv)

    urls = {name: SALESFORCE + name for name in CHECKPOINTS} | {"vocab.txt": VOCAB_URL}
    if args.base_url:
        urls = {name: f"{args.base_url.rstrip('/')}/{name}" for name in urls}
    try:
        check_folder(args.to)
        args.to.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(("vocab.txt", args.name)):
            if (args.to / name).exists():
                print(f"{args.to / name} is there already; delete it to fetch it again")
                continue
            download(urls[name], args.to / name, VOCAB_SHA256 if name == "vocab.txt" else None)
    except (ValueError, OSError) as error:
        sys.exit(f"blip_lite.download: {error}")


if __name__ == "__main__":
    main()
