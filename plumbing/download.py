"""Fetch an official checkpoint of BLIP or CLIP, and its vocabulary beside it."""

import argparse
import os
import socket
import sys
from http.client import HTTPException
from pathlib import Path
from shutil import disk_usage
from urllib.error import HTTPError
from urllib.request import urlopen

from torch.hub import download_url_to_file

from plumbing.command import run_command
from plumbing.files import check_folder

SALESFORCE = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"  # BSD-3
VOCAB = "https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt"  # Apache 2.0
VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
CLIP_VOCAB = "bpe_simple_vocab_16e6.txt.gz"
OPENAI = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
CLIP = {  # MIT: name -> address, SHA-256
    CLIP_VOCAB: ("https://github.com/openai/CLIP/raw/main/clip/" + CLIP_VOCAB,
                 "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    "ViT-L-14.pt": (f"https://openaipublic.azureedge.net/clip/models/{OPENAI}/ViT-L-14.pt", OPENAI),
}
LISTED = Path(__file__).with_name("checkpoints.txt").read_text()
CHECKPOINTS = dict(line.split(maxsplit=1) for line in LISTED.splitlines())  # name -> what it is


def download(url, path, sha256=None):
    """Fetch `url` to `path`; ValueError unless all of it comes."""
    part = path.with_name(f".{path.name}")
    try:
        with urlopen(url) as response:  # PyTorch checks none of this
            size = int(response.headers.get("Content-Length", 0))
            if response.headers.get_content_type() == "text/html":
                raise OSError("a web page came instead")
        if size > disk_usage(path.parent).free:
            raise OSError(f"{size / 1e9:.1f} GB are more than the disk has room for")
        download_url_to_file(url, str(part), sha256, progress=sys.stderr.isatty())
        if part.stat().st_size < size:
            raise OSError("the connection was cut")
        os.replace(part, path)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise ValueError(f"{url} cannot be fetched ({reason}); check the network, the disk and "
                         "--base-url, then run again") from None
    finally:
        part.unlink(missing_ok=True)


def main(args):
    socket.setdefaulttimeout(60)  # seconds without a byte
    check_folder(args.to)
    args.to.mkdir(parents=True, exist_ok=True)
    clip = args.name in CLIP
    sources = {CLIP_VOCAB: CLIP[CLIP_VOCAB]} if clip else {"vocab.txt": (VOCAB, VOCAB_SHA256)}
    sources.setdefault(args.name, CLIP[args.name] if clip else (SALESFORCE + args.name, None))
    for name, (url, sha256) in sources.items():
        path = args.to / name
        if path.exists():
            print(f"{path} is there already; delete it to fetch it again")
        else:
            mirror = args.base_url and f"{args.base_url.rstrip('/')}/{name}"
            download(mirror or url, path, sha256)


if __name__ == "__main__":
    p = argparse.ArgumentParser("python -m plumbing.download", description=__doc__,
                                epilog=f"names:\n{LISTED}", allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=[*CHECKPOINTS, "vocab.txt"], metavar="NAME",
                   help="a checkpoint below, or vocab.txt alone")
    p.add_argument("--to", type=Path, default=".", metavar="DIR", help="folder (default: this one)")
    p.add_argument("--base-url", metavar="URL", help="a mirror that has URL/NAME, URL/vocab.txt")
    run_command("plumbing.download", main, p.parse_args())
