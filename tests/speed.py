"""How fast this code runs, as ratios that one run measures: against a reference, and against what the machine could do.

    python tests/speed.py                    # all parts, about 15 minutes on two cores
    python tests/speed.py blip step          # some of them

Everything that is compared runs in turn, forwards and backwards, several times over; medians are printed. The *floor* of a
computation is its matrix products and convolutions (torch.utils.flop_counter) at the speed of the best large matrix product
that was measured on this machine at the start, or its bytes at the speed of reading them. Nothing else about time is
asserted anywhere in the tests: these figures are to be read.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import blip_lite  # noqa: E402
import isa  # noqa: E402
import light_encoders  # noqa: E402
from blip_lite.checkpoint import POCKET, _our_name, infer_sizes  # noqa: E402

bf16 = partial(torch.autocast, "cpu", torch.bfloat16)


# ----------------------------------------------------------------------------------------------- measuring
def measure(functions, repeats=5):
    """{name: function} -> {name: median seconds}; they take turns, in alternating order, after a round that is not counted."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak(dtype):
    """The best of several large matrix products (those of a ViT-B on 16 images, and square ones), in operations a second."""
    best = 0
    for m, k, n in ((3152, 768, 3072), (3152, 3072, 768), (2048, 2048, 2048), (4096, 4096, 4096)):
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        seconds = measure({"product": lambda a=a, b=b: F.linear(a, b)}, repeats=9)["product"]
        best = max(best, 2 * m * k * n / seconds)
    return best


def operations(function):
    """Operations of the matrix products and convolutions in function(): two for each product and sum."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def show(what, seconds, floor=None, against=None, wanted=None):
    line = f"  {what:58s} {1000 * seconds:9.1f} ms"
    line += f"   {floor / seconds:4.0%} of the floor's speed" if floor else ""
    line += f"   {against / seconds:5.2f} x" if against else ""
    print(line + (f"  (wanted: {wanted})" if wanted else ""), flush=True)


# ----------------------------------------------------------------------------------------------- 1. frozen BLIP at full size
def blip_base():
    """(ours, transformers'): BLIP ViT-B of 224 px with the same random weights, frozen."""
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipTextConfig, BlipVisionConfig

    torch.manual_seed(0)
    text = BlipTextConfig(vocab_size=30524, num_attention_heads=12, num_hidden_layers=12, layer_norm_eps=1e-12, hidden_act="gelu")
    vision = BlipVisionConfig(image_size=224, patch_size=16, num_hidden_layers=12, layer_norm_eps=1e-6, hidden_act="gelu")
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=256)
    theirs = BlipForImageTextRetrieval(config).eval().requires_grad_(False)
    state = {_our_name(name): x for name, x in theirs.state_dict().items() if not name.endswith("position_ids")}
    state["temp"] = torch.tensor(0.07)
    ours = blip_lite.Blip(infer_sizes(state, 224), blip_lite.Tokenizer(POCKET / "vocab.txt"))
    ours.load_state_dict(state, assign=True)
    return ours.eval().requires_grad_(False), theirs


@torch.no_grad()
def part_blip():
    """The frozen encoders, batch 16: images, texts of 16 tokens, and matching: a text and two wrong ones for each image."""
    speed = {torch.float32: peak(torch.float32), torch.bfloat16: peak(torch.bfloat16)}
    print("  measured peak: " + ", ".join(f"{str(d)[6:]} {x / 1e9:.0f} Gop/s" for d, x in speed.items()))
    ours, theirs = blip_base()
    pixels, ids = torch.randn(16, 3, 224, 224), torch.randint(5, 400, (48, 16))
    mask, rows = torch.ones_like(ids), torch.arange(48) % 16
    words, F_v = ours.embed_words(ids), ours.encode_image(pixels)[1]
    pairs = {
        "images -> v": (
            lambda: ours.encode_image(pixels, cls_only=True),
            lambda: F.normalize(theirs.vision_proj(theirs.vision_model(pixels).last_hidden_state[:, 0]), dim=-1),
        ),
        "images -> v and F^v": (
            lambda: ours.encode_image(pixels),
            lambda: F.normalize(theirs.vision_proj(theirs.vision_model(pixels).last_hidden_state[:, 0]), dim=-1),
        ),
        "48 texts -> t": (
            lambda: ours.encode_text(words, mask),
            lambda: F.normalize(theirs.text_proj(theirs.text_encoder(ids, mask).last_hidden_state[:, 0]), dim=-1),
        ),
        "48 texts, 3 an image -> matching logits": (
            lambda: ours.match(words, mask, F_v, rows),
            lambda: theirs.itm_head(theirs.text_encoder(ids, mask, encoder_hidden_states=F_v[rows]).last_hidden_state[:, 0]),
        ),
    }  # fmt: skip
    for what, (our, their) in pairs.items():
        floor = {dtype: operations(our) / rate for dtype, rate in speed.items()}

        def in_bf16(function):
            with bf16():
                function()

        t = measure({"ours": our, "theirs": their, "ours16": partial(in_bf16, our), "theirs16": partial(in_bf16, their)})
        show(f"{what}, fp32, transformers", t["theirs"])
        show(f"{what}, fp32", t["ours"], floor[torch.float32], t["theirs"], "1.1 x")
        show(f"{what}, bf16, transformers", t["theirs16"])
        show(f"{what}, bf16", t["ours16"], floor[torch.bfloat16], t["theirs16"], "60 % of the floor's speed")
        show(f"{what}, bf16 against transformers in fp32", t["ours16"], None, t["theirs"], "3 x for images")


# ----------------------------------------------------------------------------------------------- 2. a training step at full size
def part_step():
    """EfficientNet-B2, BLIP-base, 32 images of 224 px, stored v and F^v, bf16: ours, and a plain step on transformers' modules."""
    rate = peak(torch.bfloat16)
    ours, theirs = blip_base()
    torch.manual_seed(0)
    encoder = light_encoders.build("efficientnet_b2")
    model = isa.QueryModel(encoder, isa.AdaptiveTokenLearner(encoder.out_channels, 768)).train()
    plain_encoder = models.efficientnet_b2().features.train()  # as torchvision builds it, with the same weights
    plain_encoder.load_state_dict(encoder.state_dict())
    plain_model = isa.QueryModel(plain_encoder, model.mapper).train()
    pixels = torch.randn(32, 3, 224, 224)
    v, F_v = F.normalize(torch.randn(32, 256), dim=-1), torch.randn(32, 197, 768)

    def our_step(losses="gcd+lar"):
        torch.manual_seed(1)
        with bf16():
            words, mask = isa.compose_query(ours, model(pixels))
            t = ours.encode_text(words, mask)
        loss = isa.global_contrastive_distillation(v, t, ours.temperature)
        if losses == "gcd+lar":
            with bf16():
                loss = loss + isa.local_alignment_regularization(ours, words, mask, F_v, v, t)
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss

    def encode(words, mask, image=None):
        """transformers' text encoder, from word vectors on."""
        hidden = theirs.text_encoder.embeddings(inputs_embeds=words)
        return theirs.text_encoder(
            encoder_embeds=hidden, attention_mask=mask, encoder_hidden_states=image, is_decoder=False
        ).last_hidden_state[:, 0]

    def plain_step():
        """As BLIP's own pre-training spells it: a pass for the pairs, one for both kinds of wrong pairs."""
        torch.manual_seed(1)
        with bf16():
            words, mask = isa.compose_query(ours, plain_model(pixels))
            t = F.normalize(theirs.text_proj(encode(words, mask)).float(), dim=-1)
        gcd = isa.global_contrastive_distillation(v, t, ours.temperature)
        image, sentence = isa.sample_hard_negatives(v, t, ours.temperature)
        with bf16():
            enc = ours.embed_words(torch.tensor(ours.tokenizer.enc_id)).expand(32, 1, -1)
            words = torch.cat([enc, words[:, 1:]], dim=1)
            right = encode(words, mask, F_v)
            wrong = encode(torch.cat([words, words[sentence]]), torch.cat([mask, mask]), torch.cat([F_v[image], F_v]))
            logits = theirs.itm_head(torch.cat([right, wrong])).float()
        loss = gcd + F.cross_entropy(logits, torch.cat([torch.ones(32), torch.zeros(64)]).long())
        plain_model.zero_grad(set_to_none=True)
        loss.backward()
        return loss

    def light(encoder):
        with bf16():
            features = encoder(pixels)
        features.float().sum().backward()

    def frozen_part():
        """Our step from the tokens on, for counting: torch's counter takes grouped convolutions' backward for full ones."""
        with bf16():
            words, mask = isa.compose_query(ours, torch.zeros(32, 6, 768, requires_grad=True))
            t = ours.encode_text(words, mask)
            (isa.local_alignment_regularization(ours, words, mask, F_v, v, t) + t.sum()).backward()

    difference = (our_step() - plain_step()).abs().item()
    print(f"  both losses agree to {difference:.1e}")
    frozen = operations(frozen_part)
    with torch.no_grad():
        floor = (3 * operations(partial(encoder, pixels)) + frozen) / rate  # backward is twice forward
    parts = measure({"ours": our_step, "plain": plain_step, "gcd": partial(our_step, "gcd"), "light": partial(light, encoder),
                     "plain light": partial(light, plain_encoder)})  # fmt: skip
    show("a plain step on transformers' modules", parts["plain"])
    show("  of that, torchvision's EfficientNet-B2", parts["plain light"])
    show("our step, GCD + LAR", parts["ours"], floor, parts["plain"], "1.5 x")
    show("  of that, our EfficientNet-B2", parts["light"], None, parts["plain light"])
    show("our step, GCD alone", parts["gcd"])


PARTS = {"blip": part_blip, "step": part_step}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=f"which parts, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads")
    for name in args.parts or PARTS:
        print(f"\n{name}: {PARTS[name].__doc__.splitlines()[0]}")
        PARTS[name]()


if __name__ == "__main__":
    main()
