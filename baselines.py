"""What the paper compares ISA with (section 4): the three simple baselines, Pic2Word and SEARLE; and "LLM TR", a loss of Table 8.

    python train.py --encoder blip-v --mapper mlp --tokens 1 --loss gcd --name pic2word         # Pic2Word
    python baselines.py searle                                                                  # SEARLE, about 10 minutes
    python evaluate.py table --pic2word runs/pic2word/isa.pt --searle runs/searle/isa.pt

All of them query with the frozen BLIP's own image feature v, so they are symmetric: nothing runs on a phone. As the paper does, we
put Pic2Word (Saito et al., CVPR 2023) and SEARLE (Baldrati et al., ICCV 2023), which were made for CLIP, on BLIP. Figures that
are said to be SEARLE's or Pic2Word's are the defaults of the code that their authors published (miccunifi/SEARLE,
google-research/composed_image_retrieval).

    B, M images    E BLIP's joint embedding    d_w BLIP's word width    L tokens    C concepts    k of them for an image
"""

import argparse
import copy
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import blip_lite
import isa
import light_encoders
from blip_lite.checks import check_folder, check_options
from blip_lite.features import autocast, image_features, keep_freed_memory, pick_precision, round_frozen_weights
from blip_lite.files import replacing
from blip_lite.images import find_images
from blip_lite.signals import end_workers, exit_interrupted, interrupt_on_signals
from pocket import world

PROMPT = "a photo of"
POCKET_IMAGES = "data/pocket/train"
CHUNK = 250  # images that are inverted together and then stored

# ------------------------------------------------------------------- simple baselines: query features q [B, E] of unit norm


def image_only(blip, v, modifiers):
    """v [B, E] as it is; the modifiers are not read."""
    return v


def text_only(blip, v, modifiers):
    """B modifiers -> BLIP's text features [B, E]; the images are not looked at."""
    ids, mask = blip.tokenize(list(modifiers))
    return blip.encode_text(blip.embed_words(ids), mask)


def image_plus_text(blip, v, modifiers, image_weight=1.0):
    """normalize(w v + t) [B, E]: the paper's sum for w = 1; less weight on the image (0.5) makes a stronger baseline."""
    return F.normalize(image_weight * v + text_only(blip, v, modifiers), dim=-1)


# ------------------------------------------------------------------- mapping networks that speak one word


class MLP(nn.Module):
    """A feature map [B, C, H, W] -> its mean over H x W -> three linear layers -> one word [B, 1, d_w].

    Pic2Word's mapping network (its section 3): 512 hidden units, ReLU, dropout 0.1. On a light encoder it is "MLP (single token)"
    of Tables 5, 11 and 18-20, on v as a map of one pixel (the encoder "blip-v") Pic2Word itself.
    """

    def __init__(self, in_channels, word_dim, hidden=512, dropout=0.1, activation=nn.ReLU):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_channels, hidden), activation(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), activation(), nn.Dropout(dropout),
            nn.Linear(hidden, word_dim),
        )  # fmt: skip

    def forward(self, feature_map):
        """feature_map [B, C, H, W] -> U [B, 1, d_w]."""
        return self.layers(feature_map.mean(dim=(2, 3)))[:, None]


class Phi(MLP):
    """SEARLE's textual inversion network (its section 3): the same with GELU, 4 C hidden units and dropout 0.5."""

    def __init__(self, in_channels, word_dim, dropout=0.5):
        super().__init__(in_channels, word_dim, 4 * in_channels, dropout, nn.GELU)


# ------------------------------------------------------------------- both sides trained (Tables 7, 13)


class TwoSidedModel(isa.QueryModel):
    """Both sides trained (Tables 7, 13): one encoder gives the query's feature map and the gallery's features.

    encoder: a light encoder, whose map gets linear layers of its own in place of BLIP's v and F^v, or a TunedBlipEncoder, which
    has them. The text side stays the frozen BLIP's. forward: pixels [B, 3, S, S] -> U [B, L, d_w], v [B, E] of unit norm, F^v
    [B, 1+N, D], the latter for matching (the light encoder's first row is the mean of its pixels).
    """

    def __init__(self, encoder, mapper, blip):
        super().__init__(encoder, mapper)
        self.to_tokens = nn.Linear(encoder.out_channels, blip.vision_proj.in_features)  # C -> D
        self.vision_proj = copy.deepcopy(blip.vision_proj).float().requires_grad_(True)  # D -> E
        if isinstance(encoder, light_encoders.TunedBlipEncoder):
            self.to_tokens = nn.Identity()

    def forward(self, pixels):
        if isinstance(self.encoder, light_encoders.TunedBlipEncoder):
            F_v = self.encoder.visual_encoder(pixels)  # [B, 1+N, D]
            feature_map = light_encoders.as_map(F_v)
        else:
            feature_map = self.encoder(pixels)  # [B, C, H, W]
            tokens = self.to_tokens(feature_map.flatten(2).transpose(1, 2))  # [B, N, D]
            F_v = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        v = F.normalize(self.vision_proj(F_v[:, 0]).float(), dim=-1)
        return self.mapper(feature_map), v, F_v


# ------------------------------------------------------------------- text regularization with sentences made by an LLM


def read_sentences(path):
    """JSON {concept: list of sentences, each of which contains the concept} -> that dict.

    Raises ValueError, one sentence that names the file and the concept, for anything else.
    """
    try:
        made = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of {{concept: [sentences]}} in JSON") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); write {{concept: [sentences]}}") from None
    if not isinstance(made, dict) or not made:
        raise ValueError(f"{path}: holds no concepts; write {{concept: [sentences]}}")
    for concept, sentences in made.items():
        if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) for s in sentences):
            raise ValueError(f'{path}: the concept "{concept}" needs a list of at least one sentence')
        for sentence in sentences:
            if not concept.strip() or find_concept(concept, sentence) is None:
                raise ValueError(f'{path}: the concept "{concept}" is not in its sentence "{sentence}"; mend or remove it')
    return made


def find_concept(concept, sentence):
    """The words before and after the concept's first place in the sentence, or None. Whole words, in any case."""
    parts = re.split(rf"(?<!\w){re.escape(concept.strip())}(?!\w)", sentence, maxsplit=1, flags=re.IGNORECASE)
    return parts if len(parts) == 2 else None


@torch.no_grad()
def encode_texts(blip, texts, precision="fp32", batch_size=256):
    """Strings -> BLIP's text features [N, E], unit norm."""
    with autocast(blip.temp.device, precision):
        return torch.cat([text_only(blip, None, texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)])


def assign_concepts(v, concepts, k):
    """Zero-shot classification: v [B, E] and concept features [C, E], unit norm -> the k nearest concepts, int64 [B, k]."""
    with torch.autocast(v.device.type, enabled=False):  # bfloat16 would make near concepts equal
        return (v.float() @ concepts.T).topk(k).indices


class TextRegularization:
    """The "LLM TR" of Table 8, SEARLE's L_gpt: spoken of by U, a sentence about one of its concepts has to mean the same.

        regularize = TextRegularization(blip, read_sentences("pocket/sentences.json"))
        loss = regularize(U, v)                # "a [u1 .. uL] next to a tree" against "a red cat next to a tree"

    BLIP gives each image its k nearest concepts, by "a photo of a {concept}"; at each call one of the k and one of its sentences
    are drawn. SEARLE: k = 15 in inversion and 150 in distillation, of the 20,000 concepts of Open Images, 256 sentences each; the
    pocket world has 120 concepts, eight sentences each. All of them are tokenized and encoded here, once, in `precision`; calls run
    under the caller's autocast.
    """

    def __init__(self, blip, made, k=3, precision="fp32"):
        self.blip, self.names, self.k = blip, list(made), min(k, len(made))
        self.concepts = encode_texts(blip, [f"a photo of {with_article(name)}" for name in made], precision)  # [C, E]
        self.count = torch.tensor([len(sentences) for sentences in made.values()], device=blip.temp.device)  # [C]
        self.first = self.count.cumsum(0) - self.count  # [C]; the sentences of concept c are rows first[c] .. first[c] + count[c]-1
        self.sentences = [sentence for sentences in made.values() for sentence in sentences]
        self.t = encode_texts(blip, self.sentences, precision)  # [S, E]

        parts = [find_concept(name, sentence) for name, sentences in made.items() for sentence in sentences]
        (head, head_mask), (tail, tail_mask) = (blip.tokenize(list(texts)) for texts in zip(*parts, strict=True))
        self.place = head_mask.sum(1) - 1  # [S]; where U goes: after [CLS] and the words before the concept, without their [SEP]
        rest = [torch.cat([h[:n], t[1:m]]) for h, n, t, m in zip(head, self.place, tail, tail_mask.sum(1), strict=True)]
        self.ids = nn.utils.rnn.pad_sequence(rest, batch_first=True, padding_value=blip.tokenizer.pad_id)  # [S, T]
        self.length = torch.tensor([len(ids) for ids in rest], device=self.ids.device)  # [S]

    def __call__(self, U, v, random=None):
        """U [B, L, d_w] of the images with features v [B, E] -> the mean of 1 - cosine, a scalar.

        random, float [B, 2] in [0, 1), chooses concept and sentence; by default it comes from torch's global generator.
        """
        random = (torch.rand(len(U), 2) if random is None else random).to(v.device)
        rows = self.draw(v, random)
        t = self.blip.encode_text(*self.speak(rows, U))  # [B, E]
        return (1 - (t * self.t[rows]).sum(dim=1)).mean()

    def draw(self, v, random):
        """v [B, E], random [B, 2] -> rows of sentences, int64 [B]: for each image one of its k concepts, one sentence of that."""
        near = assign_concepts(v, self.concepts, self.k)  # [B, k]
        concept = near.gather(1, (random[:, :1] * self.k).long())[:, 0]  # [B]
        return self.first[concept] + (random[:, 1] * self.count[concept]).long()

    def speak(self, rows, U):
        """The sentences `rows` [B] with U [B, L, d_w] in the place of their concept -> words [B, T+L, d_w], mask [B, T+L]."""
        L, length = U.shape[1], self.length[rows]
        place = torch.arange(int(length.max()) + L, device=U.device).expand(len(U), -1)  # [B, T+L]
        begin = self.place[rows, None]  # [B, 1]
        inside = (place >= begin) & (place < begin + L)
        source = torch.where(place < begin, place, (place - L).clamp_min(0))  # what stands there in the sentence without U
        words = self.blip.embed_words(self.ids[rows].gather(1, source))
        words = words.masked_scatter(inside[..., None], U.to(words.dtype))  # row by row, u1 .. uL in their order
        return words, (place < length[:, None] + L).long()


def with_article(concept):
    return f"an {concept}" if concept.strip()[:1].lower() in tuple("aeiou") else f"a {concept}"


# ------------------------------------------------------------------- SEARLE: inversion, then distillation


def invert(blip, v, regularize, steps=150, lr=2e-2, weight=0.5, weight_decay=0.01, precision="fp32", numbers=None, seed=0):
    """Optimization-based textual inversion, OTI (SEARLE, section 3): for each image the word that says it best.

    v [M, E], unit norm -> words [M, 1, d_w]. Each image has a free word, at first drawn from N(0, 0.02^2), that AdamW moves so
    that (1 - cosine(text feature of "a photo of [word]", v)) + weight * regularize becomes small; what comes back is the
    exponential moving average of the word over the steps. SEARLE: 350 steps, lr 2e-2, weight 0.5, weight decay 0.01, decay 0.99
    of the average, and one of 24 templates at each step; here ISA's prompt alone, since pocket BLIP has seen no other. With fewer
    steps the average spans the same share of them: its decay is 1 - 3.5 / steps. In the pocket world (128 images, sought among 512)
    50, 100, 150, 200 and 350 steps give a cosine of 0.88, 0.91, 0.925, 0.93 and 0.94; from 150 on every word finds its own image.

    Images do not touch each other: image i draws from a generator of its own, seeded by (seed, numbers[i]); numbers defaults to
    0 .. M-1. So how they are batched changes no more than rounding.
    """
    start, random = draw_for_images(range(len(v)) if numbers is None else numbers, steps, blip.word_dim, seed)
    words = start.to(v.device).requires_grad_()  # [M, 1, d_w]
    average, random = words.detach().clone(), random.to(v.device)
    optimizer = torch.optim.AdamW([words], lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        with autocast(v.device, precision):
            t = blip.encode_text(*isa.compose_query(blip, words, prompt=PROMPT))  # [M, E]
            other = regularize(words, v, random[:, step])
        loss = (1 - (t * v).sum(dim=1)).sum() + weight * len(v) * other  # a sum: an image's gradient does not depend on M
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.lerp_(words.detach(), min(1.0, 3.5 / steps))
    return average


def draw_for_images(numbers, steps, word_dim, seed):
    """For each image its first word and its choices of concept and sentence -> [M, 1, d_w], [M, steps, 2]."""
    words, random = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(hash((seed, int(number))))
        words.append(0.02 * torch.randn(1, word_dim, generator=generator))
        random.append(torch.rand(steps, 2, generator=generator))
    return torch.stack(words), torch.stack(random)


def distillation_loss(words, predicted, temperature=0.25):
    """SEARLE's L_distil (section 3): symmetric, and the negatives come from both sides.

    words and predicted [B, d_w] -> scalar. Of the 2B normalized vectors each has to find its partner among the 2B - 1 others.
    """
    both = F.normalize(torch.cat([words, predicted]).float(), dim=1)  # [2B, d_w]
    logits = (both @ both.T / temperature).fill_diagonal_(-math.inf)  # [2B, 2B]
    partner = torch.arange(len(both), device=both.device).roll(len(words))
    return F.cross_entropy(logits, partner)


def distill(blip, phi, v, words, regularize, epochs=100, batch=256, lr=1e-4, weight=0.75, weight_decay=0.01, temperature=0.25,
            precision="fp32"):  # fmt: skip
    """Train phi in place to say of v [M, E] what inversion found, words [M, 1, d_w]: L_distil + weight * regularize.

    SEARLE: AdamW at a constant lr of 1e-4, 100 epochs of batches of 256, weight 0.75, weight decay 0.01, temperature 0.25. With
    3,000 images of the pocket world lr 1e-3 is better (R@1 on its CIRR's validation set 47 against 36; 45 after 30 epochs).
    Order, dropout and sentences come from torch's global generator. Returns the mean loss of each epoch; leaves phi in eval
    mode. Raises ValueError for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(phi.parameters(), lr=lr, weight_decay=weight_decay)
    phi.train()
    losses = []
    bar = tqdm(range(epochs), desc="distilling", unit="epoch", disable=None)
    for _ in bar:
        order, total = torch.randperm(len(v)).to(v.device), 0.0
        parts = order.split(batch)
        parts = parts[:-1] if len(parts) > 1 and len(parts[-1]) < batch else parts  # few images have few negatives
        for rows in parts:
            with autocast(v.device, precision):
                U = phi(v[rows, :, None, None])  # [B, 1, d_w]
                other = regularize(U, v[rows])
            loss = distillation_loss(words[rows, 0], U[:, 0], temperature) + weight * other
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(parts)
        if not math.isfinite(total):
            raise ValueError(f"the loss is {total}; lower --lr")
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    phi.eval()
    return losses


# ------------------------------------------------------------------- command line


def invert_in_chunks(blip, v, numbers, regularize, folder, **options):
    """invert, CHUNK images at a time, each kept in `folder`: what is there already is read. -> words [M, 1, d_w]."""
    folder.mkdir(parents=True, exist_ok=True)
    words = []
    for start in tqdm(range(0, len(v), CHUNK), desc="inverting", unit=f"x{CHUNK} img", disable=None):
        path, part = folder / f"{start:08d}.pt", slice(start, start + CHUNK)
        if not path.exists():
            found = invert(blip, v[part], regularize, numbers=numbers[part], **options).cpu()
            with replacing(path) as file:
                torch.save(found, file)
        try:
            words.append(torch.load(path, weights_only=True))
        except Exception:  # torch.load reports damaged files in many ways
            raise ValueError(f"{path}: is damaged; delete it, it is then computed again") from None
    return torch.cat(words).to(v.device)


def choose_images(args, blip, precision):
    """--count images of --images: their numbers [M] and v [M, E], from the features that `train.py --loss gcd` stores too."""
    if args.images == POCKET_IMAGES:
        world.ensure(Path(args.images).parent)
    images = find_images(args.images, args.cache_dir)
    features = image_features(blip, images, args.cache_dir, skip_bad=True, precision=precision, what="training images")
    for why in list(features.bad.values())[:10]:
        print(f"left out: {why}", file=sys.stderr)
    if len(features.bad) > 0.01 * len(images):
        raise ValueError(f"{len(features.bad)} of {len(images)} images in {args.images} are damaged; mend or remove them")
    sound = np.setdiff1d(np.arange(len(images)), list(features.bad))
    numbers = np.sort(np.random.default_rng(args.seed).permutation(sound)[: args.count])
    return numbers, torch.from_numpy(features.v[numbers]).float().to(args.device)


def searle(args):
    """Invert --count images, train phi on their words, write runs/NAME/isa.pt."""
    run = Path("runs") / args.name
    if (run / "isa.pt").exists() and not args.overwrite:
        raise ValueError(f"{run} already holds a training; replace it with --overwrite or give another --name")
    check_folder(run)
    made = read_sentences(args.sentences)  # now: an error should not wait for the features
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    blip = blip_lite.load(args.blip, vocab=args.vocab, image_size=args.image_size, device=args.device)
    precision = pick_precision(args.device) if args.precision == "auto" else args.precision
    round_frozen_weights(blip, precision)
    settings = {**vars(args), "precision": precision, "encoder": "blip-v", "mapper": "phi", "tokens": 1, "prompt": PROMPT,
                "gallery": "blip", "query_size": None}  # fmt: skip
    print(" ".join(f"{k}={v}" for k, v in settings.items()))

    numbers, v = choose_images(args, blip, precision)
    regularize = TextRegularization(blip, made, args.concepts, precision)
    what = json.dumps([blip.fingerprint, precision, args.seed, args.steps, args.concepts, made, numbers.tolist()])
    key = hashlib.sha256(what.encode() + v.cpu().numpy().tobytes()).hexdigest()  # of all that a word depends on
    folder = Path(args.cache_dir) / f"words-{key[:16]}"
    words = invert_in_chunks(blip, v, numbers, regularize, folder, steps=args.steps, precision=precision, seed=args.seed)

    torch.manual_seed(args.seed)
    encoder = light_encoders.build("blip-v", None, blip)
    phi = Phi(encoder.out_channels, blip.word_dim).to(args.device)
    losses = distill(blip, phi, v, words, regularize, args.epochs, lr=args.lr, precision=precision)
    print(f"loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
    run.mkdir(parents=True, exist_ok=True)
    state = isa.QueryModel(encoder, phi).state_dict()
    with replacing(run / "isa.pt") as file:
        torch.save({"query_model": state, "settings": settings, "blip": blip.fingerprint, "images": len(v)}, file)
    print(f"wrote {run}/isa.pt; now: python evaluate.py table --searle {run}/isa.pt")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("searle", help="train SEARLE's network phi; a command that was stopped goes on where it was",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)  # fmt: skip
    p.add_argument("--blip", default="pocket", help='"pocket", a Salesforce .pth, or a Hugging Face folder or file')
    p.add_argument("--vocab", help="BERT's vocab.txt, where it does not lie beside the checkpoint")
    p.add_argument("--image-size", type=int, help="side in pixels that BLIP sees (None: the checkpoint's)")
    p.add_argument("--images", default=POCKET_IMAGES, help="folder of images and of .tar shards; only pixels are read")
    p.add_argument("--count", type=int, default=3000, help="images to invert, drawn by --seed; SEARLE: 100,000 (ImageNet test)")
    p.add_argument("--sentences", default="pocket/sentences.json", help="JSON, concept -> list of sentences made by an LLM")
    p.add_argument("--concepts", type=int, default=3, help="concepts that an image is given; more where the list is longer")
    p.add_argument("--steps", type=int, default=150, help="of inversion; SEARLE: 350, for 2 %% more cosine here")
    p.add_argument("--epochs", type=int, default=100, help="of distillation; SEARLE: 100")
    p.add_argument("--lr", type=float, default=1e-3, help="of distillation; SEARLE: 1e-4, too low for few images")
    p.add_argument("--seed", type=int, default=0, help="images, words, sentences, weights, order")
    p.add_argument("--name", default="searle", help="the run's folder is runs/NAME")
    p.add_argument("--overwrite", action="store_true", help="start anew although runs/NAME holds a training")
    p.add_argument("--cache-dir", default="cache", help="folder for features and inverted words")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is faster here")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0 = all); 1 where several trainings share a machine")
    args = parser.parse_args(argv)
    check_options(p, args, count=2, concepts=1, steps=1, epochs=1, seed=0, threads=0)
    if args.lr <= 0:
        p.error(f"--lr has to be positive, not {args.lr}")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    interrupt_on_signals()
    try:
        searle(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"baselines.py: {error}")
    except KeyboardInterrupt as interrupt:
        what = "the same command goes on with the images that are not inverted yet, and distils from the start"
        exit_interrupted(interrupt, f"baselines.py: interrupted; {what}")
    finally:
        end_workers()
