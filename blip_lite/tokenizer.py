"""BERT's uncased WordPiece tokenizer (Devlin et al., 2019), written out, with the two tokens that BLIP adds.

Text -> words (clean, lower-case, strip accents, split at punctuation) -> pieces: the longest entry of the vocabulary
first, and pieces inside a word begin with "##". "Sleeveless, red" -> ["sleeve", "##less", ",", "red"].
"""

import re
import unicodedata

import torch

MAX_WORD = 100  # BERT's rule: a longer word becomes [UNK] as a whole
CACHE_SIZE = 100_000  # words; captions repeat theirs, so nearly all of tokenization is a dictionary look-up
REQUIRED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CJK = re.compile(  # the ideographs, each a word of its own (BERT's list of Unicode blocks: no kana, no Hangul)
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f\U0002b820-\U0002ceaf"
    "\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


class Tokenizer:
    """A list of B strings -> ids [B, T] and mask [B, T], int64: [CLS] ... [SEP], then [PAD] up to the longest (mask 0).

    vocab_path: a vocab.txt with one token per line; a token's id is its line number, counted from 0. BLIP appends two
    tokens that the file does not list: [DEC], which starts a caption, and [ENC], which replaces [CLS] in matching mode.

    The names of special tokens written out in a text ("[SEP]", "[ENC]", ...; this spelling only) become those tokens,
    as in the official code, which adds both tokens to transformers' BertTokenizer (the one in Python: where that one
    and the Rust one differ, as on a final capital sigma, this follows the former). Any Unicode is accepted; a lone
    surrogate is dropped like a control character. Nothing is truncated: the text encoder refuses too long a text.

    Raises ValueError where the file is not a BERT vocabulary.
    """

    def __init__(self, vocab_path):
        self.vocab = _read_vocab(vocab_path)
        self.dec_id = self.vocab["[DEC]"] = len(self.vocab)
        self.enc_id = self.vocab["[ENC]"] = len(self.vocab)
        self.vocab_size = len(self.vocab)  # rows of the word embedding: the file's lines and two
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (self.vocab[token] for token in REQUIRED)
        special = [token for token in (*REQUIRED, "[MASK]", "[DEC]", "[ENC]") if token in self.vocab]
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self._names = list(self.vocab)  # id -> token
        self._cache = {}  # word as written -> its pieces

    def __call__(self, texts):
        if isinstance(texts, str):
            raise TypeError("the tokenizer takes a list of strings, not one string")
        rows = [[self.cls_id, *(self.vocab[p] for p in self.tokenize(text)), self.sep_id] for text in texts]
        longest = max(map(len, rows), default=0)
        ids = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
        return ids.view(len(rows), longest), mask.view(len(rows), longest)

    def tokenize(self, text):
        """A string -> its pieces, without [CLS] and [SEP]."""
        pieces = []
        for i, part in enumerate(self._special.split(text)):
            if i % 2:  # split() puts the separators, here special tokens, at odd places
                pieces.append(part)
                continue
            for word in re.split("[ \t\n\r]", part):
                found = self._cache.get(word)
                if found is None:
                    found = [piece for simple in _basic_words(word) for piece in self._word_pieces(simple)]
                    if len(self._cache) < CACHE_SIZE:
                        self._cache[word] = found
                pieces += found
        return pieces

    def decode(self, ids):
        """A sequence of ids -> a readable string without [PAD], [CLS], [SEP]; case, accents and spacing are lost."""
        skip = (self.pad_id, self.cls_id, self.sep_id)
        return " ".join(self._names[i] for i in map(int, ids) if i not in skip).replace(" ##", "")

    def _word_pieces(self, word):
        """The longest vocabulary entry that begins the word, then the same for the rest; [UNK] where there is none."""
        if len(word) > MAX_WORD:
            return ["[UNK]"]
        pieces, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.vocab:
                    break
            else:
                return ["[UNK]"]
            pieces.append(piece)
            start = end
        return pieces


def _basic_words(text):
    """BERT's "basic tokenization": "Crème-BRÛLÉE" -> ["creme", "-", "brulee"]."""
    if not text.isascii() or not text.isprintable():
        # category C*: control, format, surrogate, private, unassigned; Zs: spaces other than " "
        kinds = ((c, unicodedata.category(c)) for c in text if c != "\ufffd")
        text = "".join(" " if kind == "Zs" else c for c, kind in kinds if kind[0] != "C")
        text = CJK.sub(r" \1 ", text)
    words = []
    for word in text.split():
        word = unicodedata.normalize("NFD", word.lower())  # NFD: a letter and its accents become separate characters
        current = ""
        for c in word:
            kind = unicodedata.category(c)
            if kind == "Mn":  # an accent
                continue
            if kind[0] == "P" or c in "$+<=>^`|~":  # BERT counts every printable ASCII non-alphanumeric as punctuation
                words += [current, c] if current else [c]
                current = ""
            else:
                current += c
        if current:
            words.append(current)
    return words


def _read_vocab(path):
    """vocab.txt -> dict token -> id, in the order of the file; ValueError where it is none."""
    remedy = "give the vocab.txt of bert-base-uncased, or the one that belongs to the checkpoint"
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            tokens = file.read().split("\n")  # not splitlines(): it splits at U+2028 and others, which may be tokens
    except OSError as error:
        raise ValueError(f"the vocabulary {path} cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the vocabulary {path} is not UTF-8 text; {remedy}") from None
    if tokens[-1] == "":  # the file's last line end
        tokens.pop()
    vocab = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in REQUIRED if token not in vocab]
    if missing:
        raise ValueError(f"the vocabulary {path} has no {', '.join(missing)}; {remedy}")
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"the vocabulary {path} lists {twice!r} more than once; {remedy}")
    added = [token for token in ("[DEC]", "[ENC]") if token in vocab]
    if added:
        raise ValueError(f"the vocabulary {path} lists {' and '.join(added)}, which BLIP adds itself; remove the line")
    return vocab
