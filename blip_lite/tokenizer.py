"""BERT's uncased WordPiece tokenizer (Devlin et al., 2019), with the two tokens that BLIP adds.

Text -> words (clean, lower-case, strip accents, split at punctuation) -> pieces: always the longest
entry of the vocabulary; inside a word, pieces begin with "##".
"Sleeveless, red" -> ["sleeve", "##less", ",", "red"].
"""

import re
import unicodedata

import torch

MAX_WORD = 100  # characters; BERT turns a longer word into one [UNK]
CACHE_SIZE = 100_000  # words; captions repeat theirs
REQUIRED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CJK = re.compile(  # ideographs, each a word of its own (BERT's Unicode blocks: no kana, no Hangul)
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


class Tokenizer:
    """B strings -> ids, mask [B, T] int64: [CLS] ... [SEP], then [PAD] up to the longest (mask 0).

    vocab_path: a vocab.txt with one token a line; a token's id is its line number, from 0. BLIP
    adds two: [DEC], which starts a caption, and [ENC], which replaces [CLS] in matching mode.

    Special tokens spelled out in a text become those tokens, as in the official code:
    transformers' BertTokenizer in Python, which differs from the Rust one on a final capital sigma.
    Nothing is truncated. Raises ValueError if the file is not a BERT vocabulary.
    """

    def __init__(self, vocab_path):
        self.vocab = _read_vocab(vocab_path)
        self.dec_id = self.vocab["[DEC]"] = len(self.vocab)
        self.enc_id = self.vocab["[ENC]"] = len(self.vocab)
        self.vocab_size = len(self.vocab)  # the file's lines and two
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (self.vocab[t] for t in REQUIRED)
        special = [t for t in (*REQUIRED, "[MASK]", "[DEC]", "[ENC]") if t in self.vocab]
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self._names = list(self.vocab)  # id -> token
        self._cache = {}  # word as written -> its pieces

    def __call__(self, texts):
        if isinstance(texts, str):
            raise TypeError("the tokenizer takes a list of strings, not one string")
        pieces = [["[CLS]", *self.tokenize(text), "[SEP]"] for text in texts]
        longest = max(map(len, pieces), default=0)
        padded = [row + ["[PAD]"] * (longest - len(row)) for row in pieces]
        ids = torch.tensor([[self.vocab[p] for p in row] for row in padded], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in pieces], dtype=torch.int64)
        mask = (torch.arange(longest) < lengths[:, None]).long()  # [B, T]
        return ids.view(mask.shape), mask

    def tokenize(self, text):
        """A string -> its pieces, without [CLS] and [SEP]."""
        pieces = []
        for i, part in enumerate(self._special.split(text)):
            if i % 2:  # split() puts the separators, here the special tokens, at odd places
                pieces.append(part)
                continue
            for word in re.split("[ \t\n\r]", part):
                found = self._cache.get(word)
                if found is None:
                    found = [p for simple in _basic_words(word) for p in self._word_pieces(simple)]
                    if len(self._cache) < CACHE_SIZE:
                        self._cache[word] = found
                pieces += found
        return pieces

    def unknown_words(self, text):
        """The words of a string that are [UNK], or only single letters, to the vocabulary.

        A model knows nothing of them. Longer pieces are usual: BERT reads "sleeve ##less".
        """
        def known(simple):
            pieces = [piece.removeprefix("##") for piece in self._word_pieces(simple)]
            return pieces != ["[UNK]"] and (len(pieces) == 1 or any(len(p) > 1 for p in pieces))

        return [word for word in text.split() if not all(map(known, _basic_words(word)))]

    def words(self):
        """{word of two letters or more: id}, without pieces and special tokens."""
        return {word: i for word, i in self.vocab.items() if word.isalpha() and len(word) > 1}

    def decode(self, ids):
        """Ids -> a string without [PAD], [CLS], [SEP]; case, accents and spacing are lost."""
        left_out = (self.pad_id, self.cls_id, self.sep_id)
        pieces = (self._names[i] for i in map(int, ids) if i not in left_out)
        return " ".join(pieces).replace(" ##", "")

    def _word_pieces(self, word):
        """Again and again the longest entry that begins what is left of the word; [UNK] if none."""
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
        current = ""
        for c in unicodedata.normalize("NFD", word.lower()):  # NFD separates letters and accents
            kind = unicodedata.category(c)
            if kind == "Mn":  # an accent
                continue
            if kind[0] == "P" or c in "$+<=>^`|~":  # BERT adds the rest of ASCII's symbols
                words += [current, c] if current else [c]
                current = ""
            else:
                current += c
        words += [current] if current else []
    return words


def _read_vocab(path):
    """vocab.txt -> dict token -> id, in the file's order."""
    remedy = "give the vocab.txt of bert-base-uncased, or the one that belongs to the checkpoint"
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            tokens = file.read().removesuffix("\n").split("\n")  # splitlines() splits at U+2028 too
    except OSError as error:
        raise ValueError(f"the vocabulary {path} cannot be read ({error.strerror}); "
                         f"{remedy}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the vocabulary {path} is not UTF-8 text; {remedy}") from None
    vocab = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in REQUIRED if token not in vocab]
    twice = [token for i, token in enumerate(tokens) if vocab[token] != i]
    added = [token for token in ("[DEC]", "[ENC]") if token in vocab]
    if missing:
        raise ValueError(f"the vocabulary {path} has no {', '.join(missing)}; {remedy}")
    if twice:
        raise ValueError(f"the vocabulary {path} lists {twice[0]!r} more than once; {remedy}")
    if added:
        raise ValueError(f"the vocabulary {path} lists {' and '.join(added)}, which BLIP adds "
                         "itself; remove the line")
    return vocab
