"""blip_lite.tokenizer against transformers' BertTokenizer with [DEC] and [ENC], as BLIP has it."""

import json
import random

import pytest
from conftest import DATA

from blip_lite import Tokenizer

VOCAB = DATA / "bert" / "vocab.txt"
needs_vocab = pytest.mark.skipif(not VOCAB.is_file(), reason=f"no {VOCAB}; set ISA_SHARED")

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
    try:  # the tokenizer in Python, which the official code used, by its name in transformers 5
        from transformers.models.bert import tokenization_bert_legacy

        tokenizer = tokenization_bert_legacy.BertTokenizerLegacy(str(VOCAB))
    except ImportError:
        tokenizer = pytest.importorskip("transformers").BertTokenizer(str(VOCAB))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def strings(value, wanted):
    """Every string below the keys that are wanted, in JSON of any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(inner, wanted or "caption" in key or key == "shared_concept")
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, wanted)
    elif isinstance(value, str) and wanted:
        yield value


@needs_vocab
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_unicode(reference, text):
    assert Tokenizer(VOCAB).tokenize(text) == reference.tokenize(text)


@needs_vocab
def test_random_unicode(reference):
    rng, ours = random.Random(0), Tokenizer(VOCAB)
    for _ in range(2000):
        limit = rng.choice([0x80, 0x250, 0x3000, 0xD800, 0x30000])
        points = (rng.randrange(limit) for _ in range(12))
        text = "".join(rng.choice((chr(p), *"ao [.")) for p in points if not 0xD800 <= p < 0xE000)
        assert ours.tokenize(text) == reference.tokenize(text), ascii(text)


@needs_vocab
def test_all_real_captions(reference):
    texts = set()
    for path in DATA.glob("*/**/*.json"):
        if path.parent.name in ("captions", "captions_ext", "annotations"):
            texts.update(strings(json.loads(path.read_text()), False))
    if not texts:
        pytest.skip(f"no annotations in {DATA}")
    assert len(texts) > 35_000
    texts = sorted(texts)
    ids, mask = Tokenizer(VOCAB)(texts)
    for row, length, text in zip(ids.tolist(), mask.sum(1).tolist(), texts, strict=True):
        expected = reference.convert_tokens_to_ids(reference.tokenize(text))
        assert row[:length] == [101, *expected, 102] and not any(row[length:]), text


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
    windows = b"\xef\xbb\xbf" + "\r\n".join(SMALL).encode()  # byte order mark, CRLF, no last one
    (tmp_path / "dos.txt").write_bytes(windows)
    assert Tokenizer(tmp_path / "dos.txt").vocab == tokenizer.vocab


def test_words_of_mere_letters_are_unknown(tmp_path):
    letters = ["h", "c", "x", "o", "##o", "##c", "##h"]
    tokenizer = Tokenizer(write(tmp_path / "vocab.txt", [*SMALL, *letters, ","]))
    assert tokenizer.unknown_words("a dog doggy, x dogs") == []
    text = "Hoch, dogs ooh-dog \U0001f600 doggyx"
    assert tokenizer.unknown_words(text) == ["Hoch,", "ooh-dog", "\U0001f600", "doggyx"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "words.txt cannot be read"),
        (b"", r"no \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("\n".join(SMALL[:3]).encode(), r"no \[SEP\]"),
        ("\n".join([*SMALL, "dog"]).encode(), "'dog' more than once"),
        ("\n".join([*SMALL, "", "", ""]).encode(), "'' more than once"),
        ("\n".join([*SMALL, "[ENC]"]).encode(), r"\[ENC\], which BLIP adds"),
    ],
)
def test_bad_vocabulary_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert "words.txt" in str(error.value) and "\n" not in str(error.value)
