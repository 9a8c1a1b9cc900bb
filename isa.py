"""ISA: Image2Sentence based Asymmetric zero-shot composed image retrieval (Du et al., ICLR 2024).

The method, section 3. A light encoder turns the query image into a feature map; the adaptive token
learner turns the map into a short sentence U = [u1 .. uL] in the word space of a frozen BLIP; and
"[prompt] u1 .. uL that [modifier]" is then a text query against images that BLIP's large visual
encoder indexed beforehand. Training needs images alone: the sentence must say what its image shows.

    B images    C channels of the light feature map, H x W its size    L sentence tokens (6)
    d the learner's width (256)    d_w BLIP's word width    E BLIP's joint embedding
    F^v BLIP's image tokens [B, 1+N, D]    T tokens of a sentence

Where the paper is silent or ambiguous:
  width d     not printed. Projecting C -> 256 first and working at d = 256 gives the parameters of
              Table 1 for five of its six rows (EfficientNet-B2: 9.05 M, printed 8.5 M).
  Eq. 1       the printed denominator sums w^(l) over i; we read w^(i): a softmax over the L groups.
  Eq. 3, 4    printed as (ZK)(ZQ)^T, whose shapes do not match in Eq. 4. We read both as ordinary
              attention, one head, scaled by 1/sqrt(d): tokens ask, tokens or pixels answer.
  sigma       GELU. The equations have no normalisation layers, so there are none here.
  Eq. 5       tau is not printed: BLIP's own temperature, fixed.
  Eq. 7       negatives are not specified: BLIP's scheme (Li et al. 2022), one hard image and one
              hard sentence for each sample.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------- 3.1 light encoder and adaptive token learner


class AdaptiveTokenLearner(nn.Module):
    """A feature map [B, C, H, W] -> sentence tokens U [B, L, d_w] (Figure 1 right, Eq. 1-4).

    in_channels C, word_dim d_w, num_tokens L, width d; self_hidden and cross_hidden are the
    feed-forward widths of Eq. 3 and 4 (section 4.1). The ablations of Tables 18-20:
    self_attention=False omits Eq. 3, cross_attention=False omits Eq. 4 up to W_p; without both it
    is the paper's "simple tokenizer".
    """

    def __init__(self, in_channels, word_dim, num_tokens=6, width=256, self_hidden=256,
                 cross_hidden=512, self_attention=True, cross_attention=True):
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.project = nn.Conv2d(in_channels, width, kernel_size=1)
        self.W = nn.Conv2d(width, num_tokens, kernel_size=1, bias=False)  # Eq. 1's L convolutions
        if self_attention:
            self.Q_r, self.K_r, self.V_r = (nn.Linear(width, width, bias=False) for _ in range(3))
            self.W_r1, self.W_r2 = nn.Linear(width, self_hidden), nn.Linear(self_hidden, width)
        if cross_attention:
            self.Q_c, self.K_c, self.V_c = (nn.Linear(width, width, bias=False) for _ in range(3))
            self.W_c1, self.W_c2 = nn.Linear(width, cross_hidden), nn.Linear(cross_hidden, width)
        self.W_p = nn.Linear(width, word_dim)

    def forward(self, feature_map):
        """feature_map F^LE [B, C, H, W] -> U [B, L, d_w]."""
        pixels, grouping = self.group(feature_map)
        tokens, _ = self.speak(pixels, grouping)
        return tokens

    def attention_maps(self, feature_map):
        """feature_map [B, C, H, W] -> grouping and cross-attention, both [B, L, H, W].

        Grouping (Eq. 1) sums to 1 over tokens, cross-attention (Eq. 4, or None) over pixels.
        """
        size = feature_map.shape[-2:]
        pixels, grouping = self.group(feature_map)
        _, cross = self.speak(pixels, grouping)
        return grouping.unflatten(2, size), None if cross is None else cross.unflatten(2, size)

    def group(self, feature_map):
        """Eq. 1: share every pixel among L groups -> pixels [B, H*W, d], grouping A [B, L, H*W]."""
        F_LE = self.project(feature_map)  # [B, d, H, W]
        A = self.W(F_LE).flatten(2).softmax(dim=1)  # [B, L, H*W]; over groups, not over pixels
        return F_LE.flatten(2).transpose(1, 2), A

    def speak(self, pixels, A):
        """Eq. 2-4. pixels [B, H*W, d], A [B, L, H*W] -> U [B, L, d_w], cross [B, L, H*W]."""
        rho = A.sum(dim=2, keepdim=True).clamp_min(1e-6)  # [B, L, 1]; a group may own nothing
        Z = A @ pixels / rho  # Eq. 2: [B, L, d], each token the mean of the pixels it owns
        cross = None
        if self.self_attention:  # Eq. 3: the tokens look at each other
            attended, _ = attend(self.Q_r(Z), self.K_r(Z), self.V_r(Z))
            Z = Z + attended
            Z = Z + self.W_r2(F.gelu(self.W_r1(Z)))
        if self.cross_attention:  # Eq. 4: the tokens look back at the pixels
            attended, cross = attend(self.Q_c(Z), self.K_c(pixels), self.V_c(pixels))
            Z = Z + attended
            Z = Z + self.W_c2(F.gelu(self.W_c1(Z)))
        return self.W_p(Z), cross


def attend(q, k, v):
    """q [B, L, d], k and v [B, S, d] -> [B, L, d] and weights [B, L, S], summing to 1 over S."""
    weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [B, L, S]
    return weights @ v, weights


class QueryModel(nn.Module):
    """What the phone runs: pixels [B, 3, S, S] -> feature map [B, C, H, W] -> U [B, L, d_w]."""

    def __init__(self, encoder, mapper):
        super().__init__()
        self.encoder, self.mapper = encoder, mapper

    def forward(self, pixels):
        return self.mapper(self.encoder(pixels))


# ----------------------------------------- 3.2 learning with the frozen foundation model


def compose_query(blip, U, modifiers=None, prompt="a photo of"):
    """U [B, L, d_w] -> words [B, T, d_w], mask [B, T] (int64, 1 = a token), as BLIP reads them.

    Without modifiers the sentence is "[CLS] prompt u1 .. uL [SEP]" (training); with B strings it is
    "[CLS] prompt u1 .. uL that modifier [SEP]" (section 3.3). U replaces rows of the word
    embedding, so BLIP still adds positions and applies LayerNorm.
    """
    modifiers = [""] * len(U) if modifiers is None else modifiers
    if isinstance(modifiers, str):
        raise TypeError("modifiers should be a list of strings, one for each image, not a string")
    if len(modifiers) != len(U):
        raise ValueError(f"{len(U)} images but {len(modifiers)} modifiers; give one for each image")
    head, _ = blip.tokenize([prompt])  # [1, P+2]
    tail, tail_mask = blip.tokenize([continuation(m) for m in modifiers])  # [B, M+2]
    head = head[:, :-1].expand(len(U), -1)  # without [SEP]
    tail, tail_mask = tail[:, 1:], tail_mask[:, 1:]  # without [CLS]
    rows = blip.embed_words(torch.cat([head, tail], dim=1))  # [B, P+1 + M+1, d_w]
    before, after = rows[:, : head.shape[1]], rows[:, head.shape[1] :]
    words = torch.cat([before, U.to(rows.dtype), after], dim=1)  # [B, T, d_w]
    seen = tail_mask.new_ones(len(U), head.shape[1] + U.shape[1])
    return words, torch.cat([seen, tail_mask], dim=1)


def continuation(modifier):
    """What a modifier adds to the sentence: "that modifier", or "" if it is blank.

    A few modifiers of CIRR and FashionIQ begin with "that" already; it is not repeated.
    """
    modifier = re.sub(r"^\s*that\b", "", modifier, flags=re.IGNORECASE).strip()
    return f"that {modifier}" if modifier else ""


def global_contrastive_distillation(v, t, temperature):
    """GCD (Eq. 5, 6): each sentence finds its image in the batch, and each image its sentence.

    v [B, E] image features, t [B, E] sentence features, unit norm; temperature tau -> scalar.
    """
    with torch.autocast(v.device.type, enabled=False):  # bf16 rounds logits near 50 by up to 0.125
        logits = v.float() @ t.float().T / temperature  # [B images, B sentences]
    own = torch.arange(len(v), device=v.device)
    i2t, t2i = F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)  # one-hot y
    return (i2t + t2i) / 2


def local_alignment_regularization(blip, words, mask, F_v, v, t, return_logits=False):
    """LAR (Eq. 7): BLIP's matching head tells each sentence's own image from a wrong one.

    words [B, T, d_w] and mask [B, T] from compose_query, F_v [B, 1+N, D], v and t [B, E]. Each
    sample gives one matched and two wrong pairs: its sentence with a hard image, its image with a
    hard sentence. Returns the mean cross-entropy over the 3B pairs, a scalar; with return_logits
    also logits [3B, 2] and labels [3B] (1 = matched, the first B). Raises ValueError for B = 1.
    """
    if len(words) < 2:
        raise ValueError("local alignment regularization needs at least two images in a batch, "
                         "to find a wrong pair")
    hard_image, hard_sentence = sample_hard_negatives(v, t, blip.temperature)
    own = torch.arange(len(words), device=words.device)
    sentence = torch.cat([own, own, hard_sentence])  # [3B]: all pairs in one pass, over B images:
    image = torch.cat([own, hard_image, own])  # match projects each F^v to keys and values once
    # index_select: unlike that of words[sentence], its gradient is summed in a fixed order
    logits = blip.match(words.index_select(0, sentence), mask[sentence], F_v, image)
    labels = (sentence == image).long()  # a hard partner is never the own one
    loss = F.cross_entropy(logits, labels)
    return (loss, logits, labels) if return_logits else loss


@torch.no_grad()
def sample_hard_negatives(v, t, temperature):
    """For each sentence a wrong image, for each image a wrong sentence: int64 [B] and [B].

    BLIP's scheme: drawn with weight softmax(similarity / tau) + 1e-4, the own partner excluded.
    """
    with torch.autocast(v.device.type, enabled=False):
        similarity = t.float() @ v.float().T / temperature  # [B sentences, B images]
    image_weights = (similarity.softmax(dim=1) + 1e-4).fill_diagonal_(0)
    sentence_weights = (similarity.T.softmax(dim=1) + 1e-4).fill_diagonal_(0)
    return tuple(torch.multinomial(w, 1)[:, 0] for w in (image_weights, sentence_weights))
