"""LLM text regularization, the "LLM TR" of Table 8 (SEARLE's L_gpt)."""

import json
import re
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing.precision import autocast

from .simple import text_only

FORMAT = "{concept: [sentences]}"


def read_sentences(path):
    """JSON {concept: [sentences with it]} -> dict. Raises ValueError."""
    try:
        by_concept = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of JSON "
                         f"{FORMAT}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); write {FORMAT}") from None
    if not isinstance(by_concept, dict) or not by_concept:
        raise ValueError(f"{path}: holds no concepts; write {FORMAT}")
    for concept, texts in by_concept.items():
        where = f'{path}: the concept "{concept}"'
        if not isinstance(texts, list) or not texts or not all(isinstance(s, str) for s in texts):
            raise ValueError(f"{where} needs a list of at least one sentence")
        for text in texts:
            if not concept.strip() or find_concept(concept, text) is None:
                raise ValueError(f'{where} is not in its sentence "{text}"; fix or remove it')
    return by_concept


def find_concept(concept, sentence):
    """The text before and after a concept's first place in a sentence (whole words), or None."""
    pattern = rf"(?<!\w){re.escape(concept.strip())}(?!\w)"
    parts = re.split(pattern, sentence, maxsplit=1, flags=re.IGNORECASE)
    return parts if len(parts) == 2 else None


def nearest_concepts(v, concepts, k):
    """v [B, E], the concepts' t [C, E] -> the k nearest, int64 [B, k]."""
    with torch.autocast(v.device.type, enabled=False):  # bfloat16 would make near concepts equal
        return (v.float() @ concepts.T).topk(k).indices


@torch.no_grad()
def encode_texts(blip, texts, precision, batch=256):
    """Strings -> BLIP's text features [N, E], unit norm."""
    with autocast(blip.temp.device, precision):
        return torch.cat([text_only(blip, None, texts[i : i + batch])
                          for i in range(0, len(texts), batch)])


class TextRegularization:
    """A sentence about an image's concept must mean the same when U stands for it.

    "a [u1 .. uL] next to a tree", say, against "a red cat next to a tree". BLIP gives each image
    its k nearest concepts, by "a photo of a {concept}"; each call draws one of them and one of its
    sentences. All are encoded once, in `precision`; calls run under the caller's autocast.
    C concepts, S sentences, of at most T tokens without their concept.
    """

    def __init__(self, blip, by_concept, k=3, precision="fp32"):
        self.blip, self.k = blip, min(k, len(by_concept))
        prompts = [f"a photo of {'an' if name.strip()[0] in 'aeiouAEIOU' else 'a'} {name}"
                   for name in by_concept]
        self.concepts = encode_texts(blip, prompts, precision)  # [C, E]
        counts = [len(texts) for texts in by_concept.values()]
        self.count = torch.tensor(counts, device=blip.temp.device)  # [C]
        self.first = self.count.cumsum(0) - self.count  # [C]; each concept's first sentence
        pairs = [(name, text) for name, texts in by_concept.items() for text in texts]
        self.sentences = [text for _, text in pairs]
        self.t = encode_texts(blip, self.sentences, precision)  # [S, E]

        parts = zip(*(find_concept(*pair) for pair in pairs), strict=True)
        (head, head_mask), (tail, tail_mask) = (blip.tokenize(list(texts)) for texts in parts)
        self.place = head_mask.sum(1) - 1  # [S]; where U goes: after [CLS] and the head's words
        rest = [torch.cat([h[:n], t[1:m]])  # [CLS] head tail [SEP]
                for h, n, t, m in zip(head, self.place, tail, tail_mask.sum(1), strict=True)]
        self.ids = pad_sequence(rest, True, blip.tokenizer.pad_id)  # [S, T]
        self.length = torch.tensor([len(ids) for ids in rest], device=self.ids.device)  # [S]

    def __call__(self, U, v, random=None):
        """U [B, L, d_w] of the images with features v [B, E] -> mean of 1 - cosine, a scalar.

        random [B, 2] in [0, 1) chooses concept and sentence (default: torch's global generator).
        """
        random = torch.rand(len(U), 2) if random is None else random
        rows = self.draw(v, random.to(v.device))
        t = self.blip.encode_text(*self.speak(rows, U))  # [B, E]
        return (1 - (t * self.t[rows]).sum(dim=1)).mean()

    def draw(self, v, random):
        """One sentence of one of each image's k concepts: v [B, E], random [B, 2] -> int64 [B]."""
        near = nearest_concepts(v, self.concepts, self.k)  # [B, k]
        concept = near.gather(1, (random[:, :1] * self.k).long())[:, 0]  # [B]
        return self.first[concept] + (random[:, 1] * self.count[concept]).long()

    def speak(self, rows, U):
        """Sentences `rows` [B], U [B, L, d_w] for their concept -> words [B, T+L, d_w], mask."""
        L, length = U.shape[1], self.length[rows]
        place = torch.arange(int(length.max()) + L, device=U.device).expand(len(U), -1)  # [B, T+L]
        begin = self.place[rows, None]  # [B, 1]
        inside = (place >= begin) & (place < begin + L)
        source = torch.where(place < begin, place, (place - L).clamp_min(0))  # place without U
        words = self.blip.embed_words(self.ids[rows].gather(1, source))
        words = words.masked_scatter(inside[..., None], U.to(words.dtype))  # row by row, u1 .. uL
        return words, (place < length[:, None] + L).long()
