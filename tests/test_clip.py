"""CLIP through the scripts: what needs no matching head runs on it as on BLIP."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks
import evaluate
import query_side
from query_side import build_query_model, load_query_model

PLAIN = ["--precision", "fp32", "--threads", 1, "--clip", "pocket"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def hand_made_recall(clip, part, q):
    """R@1 of query features [Q, E], image by image; the reference is left out."""
    found = 0
    pixels = {name: clip.preprocess(Image.open(part.paths[name])) for name in part.gallery}
    gallery = {name: clip.encode_image(x[None])[0][0].numpy() for name, x in pixels.items()}
    for query, feature in zip(part.queries, q, strict=True):
        best = max((name for name in part.gallery if name != query.reference),
                   key=lambda name: float(np.dot(gallery[name], feature)))
        found += best in query.targets
    return 100 * found / len(part.queries)


def test_simple_baselines_are_the_default_table(call_script, small_world, tmp_path, pocket_clip):
    done = call_script("evaluate.py", "table", *PLAIN, "--benchmark", "cirr", "--data",
                       small_world / "cirr", "--split", "test1")
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "runs/table.json").read_text())
    assert results["settings"]["blip_fingerprint"] == pocket_clip.fingerprint
    rows = results["results"]["cirr"]
    assert list(rows) == [*evaluate.SIMPLE, "reference caption", "target caption"]
    part = benchmarks.load("cirr", small_world / "cirr", "test1")
    texts = [f"that {query.captions[0]}"[5:] for query in part.queries]
    with torch.no_grad():
        t = [pocket_clip.encode_text(pocket_clip.embed_words(ids), mask)[0].numpy()
             for ids, mask in (pocket_clip.tokenize([text]) for text in texts)]
        assert rows["text"]["all"]["R@1"][0] == pytest.approx(
            hand_made_recall(pocket_clip, part, t), abs=1e-6)
    assert rows["target caption"]["all"]["R@1"][0] > 20  # chance is about 2


def test_gcd_pic2word_and_searle(call_script, images, small_world, tmp_path, pocket_clip, cache):
    train = ["train.py", *PLAIN, "--images", images, "--cache-dir", cache, "--workers", 0,
             "--epochs", 1, "--batch", 12, "--loss", "gcd"]
    one = ["--encoder", "blip-v", "--mapper", "mlp", "--tokens", 1]
    for name, options in (("isa", []), ("sym", ["--encoder", "blip"]), ("pic2word", one),
                          ("pieces", ["--micro-batch", 5])):
        done = call_script(*train, *options, "--name", name)
        assert done.status == 0, done.err
    sentences = tmp_path / "small.json"
    sentences.write_text(json.dumps({"cat": ["a cat at night", "a photo of a cat that is red"]}))
    done = call_script("-m", "baselines.searle", *PLAIN, "--images", images, "--cache-dir", cache,
                       "--steps", 2, "--epochs", 1, "--count", 12, "--sentences", sentences)
    assert done.status == 0, done.err
    network = {name.removeprefix("mapper."): x for name, x in torch.load(
        tmp_path / "runs/searle/isa.pt", weights_only=True)["query_model"].items()}
    torch.save({"Phi": network}, tmp_path / "published.pt")
    runs = [tmp_path / f"runs/{name}/isa.pt" for name in ("isa", "sym")]
    done = call_script("evaluate.py", "table", *PLAIN, "--benchmark", "circo", "--data",
                       small_world / "circo", "--methods", "isa", "pic2word", "searle",
                       "--checkpoint", *runs, "--searle", tmp_path / "published.pt")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "runs/table.json").read_text())["results"]["circo"]
    assert list(rows) == ["isa", "pic2word", "searle"]


def test_query_images_are_cropped_as_the_gallery_is(pocket_clip):
    """A frozen encoder sees the middle of a photo; the light one sees it whole, squeezed."""
    photo = Image.new("RGB", (192, 64), "red")
    photo.paste("blue", (64, 0, 128, 64))
    own = pocket_clip.preprocess(photo)
    for name in ("blip", "blip-v", "blip-tuned"):
        encoder = query_side.build(name, blip=pocket_clip)
        assert torch.equal(query_side.preprocess(encoder, photo), own)
    light = query_side.preprocess(query_side.build("pocketnet"), photo)
    assert own.var((1, 2)).max() < 1e-6 < light.var((1, 2)).max()


def test_a_query_model_of_another_clip_is_refused(pocket_clip, pocket_blip, tmp_path):
    settings = {**query_side.query_model.PUBLISHED, "mapper": "mlp"}
    model = build_query_model(settings, pocket_clip)
    torch.save({"query_model": model.state_dict(), "settings": settings,
                "blip": pocket_clip.fingerprint}, tmp_path / "isa.pt")
    load_query_model(tmp_path / "isa.pt", pocket_clip)
    with pytest.raises(ValueError, match="was trained against BLIP .*same --blip .or --clip."):
        load_query_model(tmp_path / "isa.pt", pocket_blip)
