"""LLM text regularization, the "LLM TR" of Table 8 (SEARLE's L_gpt)."""

import json
import re
from pathlib import Path

import torch
from torch import nn

from baselines.simple import text_only
from plumbing.precision import autocast


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
