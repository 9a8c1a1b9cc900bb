"""CLIP's tokenizer against transformers' on made-up merges, and open_clip's on the real ones."""

import gzip
import html
import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import pytest
from conftest import DATA

from clip_lite import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = [
    "a photo of a cat", "A RED car, parked near a Café", "It's the dog's; they're, we've, he'd",
    "I'm I'll", "isn't can't DON'T 'S 'quoted' ''s", "42 in 2023: 3.14, 1,000", "²³ ½ Ⅷ ٣٤ 一二三",
    "more sleeves/less-buttons (v-neck)!!!", "emoji \U0001f600\U0001f600 and ☃", "e\u0301 n\u0303",
    "a\tb\n c\u00a0d \u3000 e", "", "   ", "...", "こんにちは 世界", "тест ΑΒΓ",
    "snake_case a_b __", "100% $5 a@b.c #tag", "x" * 200, "antidisestablishmentarianism", "a'b'c'd",
    "'", "'s", "s'", "'re're", "x\u0300\u0301y", "İstanbul straße", "<b>bold</b>", "a & b && c",
]
ENTITIES = ["salt &amp; pepper", "&lt;b&gt; &amp;amp; &quot;x&quot;", "caf&eacute; &#39;s &#x27;s",
            "AT&T; &copy 2020"]
QUOTES = ["don’t ‘do’ “that”", "the dog’s"]


def captions():
    texts = set()
    for path in DATA.glob("*/**/*.json"):
        if path.parent.name in ("captions", "captions_ext", "annotations"):
            found = [json.loads(path.read_text())]
            while found:
                x = found.pop()
                if isinstance(x, str):
                    texts.add(x)
                elif isinstance(x, dict | list):
                    found += list(x.values()) if isinstance(x, dict) else x
    return random.Random(0).sample(sorted(texts), min(len(texts), 500))


def noise(count=300):
    rng = random.Random(0)
    for _ in range(count):
        limit = rng.choice([0x7F, 0x250, 0x3000, 0x1F700])
        points = (rng.randrange(32, limit) for _ in range(12))
        text = "".join(rng.choice((chr(p), *"ao1 '")) for p in points if not 0xD800 <= p < 0xE000)
        if all(unicodedata.category(c)[0] != "C" and c != "Σ" for c in text):
            yield text


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """The files of Hugging Face with some 900 merges, learnt by another implementation."""
    tokenizers = pytest.importorskip("tokenizers")
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    split = tokenizers.pre_tokenizers
    learner.pre_tokenizer = split.Sequence([split.Split(" ", "removed"), split.ByteLevel(False)])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1500, end_of_word_suffix="</w>",
                                             show_progress=False, min_frequency=2)
    corpus = [t.lower() for t in TEXTS * 3 + captions()]
    learner.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    assert len(merges) > 40
    folder = tmp_path_factory.mktemp("bpe")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "merges.txt", merges


def test_equals_transformers(made_up):
    transformers = pytest.importorskip("transformers")
    path, merges = made_up
    ours = Tokenizer(path, 514 + len(merges))
    theirs = transformers.CLIPTokenizer(vocab=ours.vocab, merges=merges)
    for text in [*TEXTS, *captions(), *noise(), *ENTITIES]:
        found, mask = ours([text])
        assert mask.all() and mask.shape == found.shape
        assert found[0].tolist() == theirs(html.unescape(html.unescape(text)))["input_ids"], text


@pytest.fixture(scope="module")
def real():
    """open_clip's tokenizer.py, which is OpenAI's, without the rest of the package."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip_torch, which has the real vocabulary, is not installed")
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, folder / "bpe_simple_vocab_16e6.txt.gz"


def test_equals_openais_on_the_real_vocabulary(real, tmp_path):
    module, path = real
    theirs = module.SimpleTokenizer()
    plain = [x for x in noise() if module.ftfy.fix_text(x) == unicodedata.normalize("NFC", x)]
    assert len(plain) > 100
    ours = Tokenizer(path, 49408)
    assert ours.vocab_size == 49408
    assert (ours.vocab[START], ours.vocab[END], ours.vocab["$</w>"]) == (49406, 49407, 259)
    assert ours(["a photo of a cat"])[0].tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    for text in [*TEXTS, *captions(), *plain, *ENTITIES, *QUOTES]:
        assert [ours.vocab[piece] for piece in ours.tokenize(text)] == theirs.encode(text), text
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1:48895]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(ours.vocab))
    assert Tokenizer(tmp_path / "merges.txt", 49408).vocab == ours.vocab
    assert ours.unknown_words("a cat qzx9") == [] and "photo" in ours.words()


def test_vocabulary_of_hugging_face_has_the_ids(made_up, tmp_path):
    path, merges = made_up
    names = list(Tokenizer(path, 514 + len(merges)).vocab)
    shuffled = {name: i for i, name in enumerate(random.Random(0).sample(names, len(names)))}
    (tmp_path / "merges.txt").write_bytes(path.read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(shuffled))
    tokenizer = Tokenizer(tmp_path / "merges.txt", len(names))
    assert tokenizer(["a"])[0].tolist() == [[shuffled[START], shuffled["a</w>"], shuffled[END]]]


def test_batches_and_specials(tmp_path):
    (tmp_path / "merges.txt").write_text("c a\nca t</w>\nr e\nre d</w>\n")
    tokenizer = Tokenizer(tmp_path / "merges.txt", 518)
    ids, mask = tokenizer(["Cat red", "", "ca"])
    cat, red, c = (tokenizer.vocab[name] for name in ("cat</w>", "red</w>", "c"))
    assert (cat, red, c) == (513, 515, 66)
    assert ids.tolist() == [[516, 513, 515, 517], [516, 517, 0, 0], [516, 66, 320, 517]]
    assert mask.tolist() == [[1] * 4, [1, 1, 0, 0], [1] * 4]
    assert str(ids.dtype) == str(mask.dtype) == "torch.int64"
    assert all(x.shape == (0, 0) for x in tokenizer([]))
    assert END not in tokenizer.tokenize(f"a {END}{START}")  # a text cannot end its sentence
    assert tokenizer.tokenize("\ud800") == ["?</w>"]
    assert tokenizer.unknown_words("a red, cat dog!") == ["dog!"]
    assert tokenizer.words() == {"cat": 513, "red": 515}
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer("a cat")


@pytest.mark.parametrize("content, message", [
    (None, r"cannot be read as CLIP's vocabulary \(No such file"),
    (b"[PAD]\n[UNK]\na\n", "not a list of pairs of pieces"),  # BERT's
    (b'{"a": 1}', "not a list of pairs"), (b"two words\n", "not a list of pairs"),
    (b"\xff\xfe", "not a list of pairs"), (b"\x1f\x8b\x08\x00", "not a list of pairs"),
    (gzip.compress(b"r e\n" * 1000, mtime=0)[:-9], "not a list of pairs"),
    (b"", "makes 514 tokens, but the weights know 516"),
    (b"r e\n", "makes 515 tokens, but the weights know 516; give OpenAI's bpe_simple"),
])
def test_a_wrong_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path, 516)
    assert "words.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 0}', '{"!": "x"}'])
def test_a_vocabulary_that_does_not_belong_to_the_merges(tmp_path, content):
    (tmp_path / "merges.txt").write_text("r e\nre d</w>\n")
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match="vocab.json does not belong to .*merges.txt; give"):
        Tokenizer(tmp_path / "merges.txt", 516)
