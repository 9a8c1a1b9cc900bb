"""CLIP's tokenizer: byte-pair encoding (Sennrich et al., 2016) of lower-cased text.

Text -> words -> the bytes of each, as printable characters, the last with "</w>" -> the pair that
was learnt first becomes one piece, again and again.
"""

import gzip
import html
import itertools
import json
import re
import unicodedata
import zlib
from functools import lru_cache
from pathlib import Path

import torch

START, END = "<|startoftext|>", "<|endoftext|>"
FILES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt")
REMEDY = f"give OpenAI's {FILES[0]}, or Hugging Face's {FILES[1]} with vocab.json beside it"
PLAIN = [*range(ord("!"), 127), *range(ord("¡"), 173), *range(ord("®"), 256)]  # bytes
OTHER = [byte for byte in range(256) if byte not in PLAIN]  # blank or invisible as Latin-1
BYTES = dict(zip(PLAIN + OTHER, map(chr, (*PLAIN, *range(256, 256 + len(OTHER)))), strict=True))
QUOTES = str.maketrans("‘’‚‛“”„‟", "''''" '""""')
SHORT = re.compile("'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
RUN = re.compile(" +|L+|N|[^ LN]+")  # of kinds of characters: letters, one digit, or others


class Tokenizer:
    """B strings -> ids, mask [B, T] int64: start ... end, then 0 up to the longest (mask 0).

    path: OpenAI's bpe_simple_vocab_16e6.txt.gz, or Hugging Face's merges.txt, whose ids come from
    the vocab.json beside it, if any. size: how many tokens the model knows; OpenAI's file has more.
    Nothing is truncated, and no text can spell the start or the end token. Quotes are straightened
    and HTML's entities resolved as OpenAI does; other repairs of its ftfy are left out.
    Raises ValueError for a file that is not such a vocabulary or is of another size.
    """

    pad_id = 0

    def __init__(self, path, size):
        merges = _read_merges(path)[: max(0, size - 514)]  # beside 2 x 256 bytes, start and end
        self._rank = {pair: i for i, pair in enumerate(merges)}
        letters, ids = list(BYTES.values()), Path(path).with_name("vocab.json")
        names = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), START, END]
        self.vocab = {name: i for i, name in enumerate(names)}
        if Path(path).name == FILES[1] and ids.exists():
            try:
                self.vocab = json.loads(ids.read_bytes())
                if {*names} - {*self.vocab} or {*self.vocab.values()} != {*range(len(self.vocab))}:
                    raise ValueError
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise ValueError(f"{ids} does not belong to {path}; {REMEDY}") from None
        self.vocab_size = len(self.vocab)
        if self.vocab_size != size:
            raise ValueError(f"{path} makes {self.vocab_size} tokens, but the weights know {size}; "
                             f"{REMEDY}")
        self._pieces = lru_cache(100_000)(self._pieces)  # captions repeat their words

    def __call__(self, texts):
        if isinstance(texts, str):
            raise TypeError("the tokenizer takes a list of strings, not one string")
        pieces = [[START, *self.tokenize(text), END] for text in texts]
        mask = torch.zeros(len(pieces), max(map(len, pieces), default=0), dtype=torch.int64)
        ids = mask.clone()
        for i, row in enumerate(pieces):
            mask[i, : len(row)] = 1
            ids[i, : len(row)] = torch.tensor([self.vocab[piece] for piece in row])
        return ids, mask

    def tokenize(self, text):
        """A string -> its pieces, without start and end."""
        return [piece for word in _words(text) for piece in self._pieces(word)]

    def unknown_words(self, text):
        """The words of a string that fall into single letters, of which a model knows little."""
        def known(word):
            lengths = [len(piece.removesuffix("</w>")) for piece in self._pieces(word)]
            return len(lengths) == 1 or max(lengths) > 1

        return [word for word in text.split() if not all(map(known, _words(word)))]

    def words(self):
        """{word of two letters or more: id}"""
        whole = {name[:-4]: i for name, i in self.vocab.items() if name.endswith("</w>")}
        return {word: i for word, i in whole.items() if word.isalpha() and len(word) > 1}

    def _pieces(self, word):
        *pieces, last = (BYTES[byte] for byte in word.encode("utf-8", "replace"))
        pieces.append(f"{last}</w>")
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in self._rank]:
            best, joined = min(pairs, key=self._rank.get), []
            for piece in pieces:
                if joined and (joined[-1], piece) == best:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            pieces = joined
        return pieces


def _words(text):
    """"It's a Dog &amp; 2 cats" -> ["it", "'s", "a", "dog", "&", "2", "cats"]."""
    text = html.unescape(html.unescape(text)).translate(QUOTES)
    text = " ".join(unicodedata.normalize("NFC", text).lower().split())
    kinds = "".join(" " if c == " " else unicodedata.category(c)[0] for c in text)
    words, end = [], 0
    while end < len(text):
        begin, end = end, (SHORT.match(text, end) or RUN.match(kinds, end)).end()
        words += [text[begin:end]] if text[begin] != " " else []
    return words


def _read_merges(path):
    """A file of merges -> pairs of pieces, the first learnt first."""
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        lines = [line for line in text.splitlines() if line and "#version" not in line]
        merges, known = [tuple(line.split(" ")) for line in lines], set(BYTES.values())
        known |= {letter + "</w>" for letter in known}
        for first, second in merges:
            if not {first, second} <= known:
                raise ValueError
            known.add(first + second)
    except (OSError, ValueError, EOFError, zlib.error) as error:  # damaged gzip: three of them
        why = getattr(error, "strerror", None) or "not a list of pairs of pieces"
        raise ValueError(f"{path} cannot be read as CLIP's vocabulary ({why}); {REMEDY}") from None
    return merges
