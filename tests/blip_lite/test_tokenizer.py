"""blip_lite.tokenizer against transformers' BertTokenizer, to which BLIP's official code adds [DEC] and [ENC]."""

import json
import os
import random
from pathlib import Path

import pytest

from blip_lite import Tokenizer

SHARED = Path(os.environ.get("ISA_SHARED") or Path(__file__).resolve().parents[2] / "shared")
DATA = SHARED / "data" if (SHARED / "data").is_dir() else SHARED
VOCAB = DATA / "bert" / "vocab.txt"
needs_vocab = pytest.mark.skipif(not VOCAB.is_file(), reason=f"no BERT vocabulary at {VOCAB}; set ISA_SHARED")

NASTY = [
    "",
    " \t\n ",
    "a [SEP] b [sep] [MASK]x[CLS]",
    "[ENC][PAD]x[DEC]y [[UNK]] [unused5]",
    "##ing ## a##b",
    "zero\u200bwidth soft\u00adhyphen nul\x00 \ufffd",
    "next\x85line e\u2028f\u2029g tab\x0bform\x0cfeed no\xa0break\u3000wide",
    "ABC中文x 豈更 〇 ひらカナ 한국어 \U00020000\U0002f800",
    "Crème BRÛLÉE e\u0301 \u0301 İstanbul ΣΑΣ ı I ǅ K Å ß ﬁ ａｂｃ",
    "don't—stop… ¿qué? «x» a$b+c`d^e~f|g<h>i=j 1/2 ½ ² № €",
    "😀👨‍👩‍👧🏽 ♥ \ue000 ไทย हिन्दी عربى",
    "x" * 100,
    "x" * 101,
    "é" * 100 + " " + "e\u0301" * 100,
    "supercalifragilisticexpialidocious antidisestablishmentarianism qwrtzpsdfg",
]


@pytest.fixture(scope="module")
def reference():
    try:  # transformers 5 keeps the tokenizer in Python, which the official code used, under another name
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy as BertTokenizer
    except ImportError:
        from transformers import BertTokenizer
    tokenizer = BertTokenizer(str(VOCAB))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def captions():
    """Every caption in the real annotations."""
    texts = []
    for path in sorted(DATA.glob("*/**/*.json")):
        if path.parent.name in ("captions", "captions_ext", "annotations"):
            for entry in json.loads(path.read_text()):
                for key in ("caption", "captions", "caption_extend", "relative_caption", "shared_concept"):
                    value = entry.get(key, [])
                    texts += [value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value
    return texts


@needs_vocab
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_unicode(reference, text):
    assert Tokenizer(VOCAB).tokenize(text) == reference.tokenize(text)


@needs_vocab
def test_random_unicode(reference):
    rng, ours = random.Random(0), Tokenizer(VOCAB)
    for _ in range(2000):
        limit = rng.choice([0x80, 0x250, 0x3000, 0xD800, 0x30000])
        points = [rng.randrange(limit) if rng.random() < 0.7 else ord(rng.choice("aeo [].")) for _ in range(12)]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert ours.tokenize(text) == reference.tokenize(text), ascii(text)


@needs_vocab
def test_all_real_captions(reference):
    texts = sorted(set(captions()))
    if not texts:
        pytest.skip(f"no annotations in {DATA}")
    assert len(texts) > 35_000
    ids, mask = Tokenizer(VOCAB)(texts)
    for row, length, text in zip(ids.tolist(), mask.sum(1).tolist(), texts, strict=True):
        assert row[:length] == [101, *reference.convert_tokens_to_ids(reference.tokenize(text)), 102], text
        assert not any(row[length:])


@needs_vocab
def test_ids_mask_and_decode():
    tokenizer = Tokenizer(VOCAB)
    assert (tokenizer.dec_id, tokenizer.enc_id, tokenizer.vocab_size) == (30522, 30523, 30524)
    ids, mask = tokenizer(["A sleeveless dog.", ""])
    assert ids.tolist() == [[101, 1037, 10353, 3238, 3899, 1012, 102], [101, 102, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1] * 7, [1, 1, 0, 0, 0, 0, 0]]
    assert str(ids.dtype) == str(mask.dtype) == "torch.int64"
    assert tokenizer.decode(ids[0]) == "a sleeveless dog ."
    assert tokenizer(["[ENC] [DEC]"])[0].tolist() == [[101, 30523, 30522, 102]]


@needs_vocab
def test_lone_surrogates_are_dropped():
    tokenizer = Tokenizer(VOCAB)
    assert tokenizer.tokenize("\ud800a\udfff dog") == ["a", "dog"]
    for point in range(0xD7F0, 0xE010):
        tokenizer.tokenize("x" + chr(point))


def write(path, tokens):
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


SMALL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "##s", "##gy"]


def test_small_vocabulary(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "vocab.txt", SMALL))
    pieces = ["a", "dog", "[UNK]", "dog", "##s", "dog", "##gy", "[UNK]", "[UNK]", "[UNK]"]
    assert tokenizer.tokenize("A dog, dogs doggy [MASK]") == pieces
    ids, mask = tokenizer([])
    assert ids.shape == mask.shape == (0, 0)
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer("a dog")
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(SMALL).encode())  # Windows: BOM, CRLF, no last one
    assert Tokenizer(tmp_path / "dos.txt").vocab == tokenizer.vocab


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"no \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("\n".join(SMALL[:3]).encode(), r"no \[SEP\]"),
        ("\n".join([*SMALL, "dog"]).encode(), "'dog' more than once"),
        ("\n".join([*SMALL, "", ""]).encode(), "once|''"),
        ("\n".join([*SMALL, "[ENC]"]).encode(), r"\[ENC\], which BLIP adds"),
    ],
)
def test_bad_vocabulary_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    if content.endswith(b"\n\n"):
        path.write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert "words.txt" in str(error.value) and "\n" not in str(error.value)


def test_missing_vocabulary_is_one_sentence(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
            Tokenizer(path)
