"""ISA beside two simple baselines, for one query: what the page of search.py shows."""

import os
from argparse import Namespace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

import benchmarks
import blip_lite
import isa
from plumbing.options import check_lengths
from plumbing.page import as_jpeg, overlays
from plumbing.pictures import nearest_words
from plumbing.precision import autocast
from pocket import suggestions

from .simple import image_plus_text, text_words


class Page:
    """A gallery's searches, for plumbing.page.serve.

    args, speak, listen and find are search.py's; photos are paths, v [N, E] their features; specs:
    {name of a pocket drawing: its spec}, empty for other photos.
    """

    def __init__(self, args, speak, listen, find, blip, model, trained, photos, v, specs):
        self.speak, self.ask, self.find = speak, listen, find
        self.blip, self.model, self.prompt = blip, model, trained["prompt"]
        self.photos, self.v, self.args = photos, v, args
        self.check = partial(check_lengths, blip, self.prompt, trained["tokens"])
        self.specs = [specs.get(Path(path).stem) for path in photos]
        self.labels = [suggestions.caption(spec) if spec else os.path.basename(path)
                       for path, spec in zip(photos, self.specs, strict=True)]
        most = args.rerank or min(20, len(photos) - 1)
        self.info = {"folder": args.gallery, "pocket": bool(specs), "tokens": trained["tokens"],
                     "rerank": most if hasattr(blip, "itm_head") else None}

    def search(self, image, number, text, compare=False, rerank=False):
        """A PIL image, its row in the gallery or None, a text -> dict (plumbing/README.md).

        compare: by both baselines, too. rerank: their sentences and ISA's are read by BLIP.
        """
        self.check([("the text", isa.continuation(text))])
        image = blip_lite.to_rgb(image)
        U, maps, spent = self.speak(self.model, image, self.args.precision)
        U = U.half()  # as it travels
        side, said = self.blip.image_size, len(text.encode(errors="replace"))
        jpeg, tokens = len(as_jpeg(image.resize((side, side)))), 2 * U.numel()

        def ranked(name, size, ask):
            began = perf_counter()
            sentence, q = ask()
            options = {"rerank": self.info["rerank"] if rerank else None, "workers": 0}
            found = self.find(self.blip, q, sentence, self.v, self.photos,
                              Namespace(**vars(self.args) | options),
                              -1 if number is None else number)
            rows = [{"photo": i, "score": round(score, 4), "match": chance, "label": self.labels[i]}
                    for i, score, chance in zip(*found, strict=True)]
            return {"name": name, "bytes": size + said, "results": rows,
                    "ms": round(1000 * (perf_counter() - began), 1)}

        columns = [ranked("ISA", tokens, lambda: self.listen(U, [text]))]
        if compare and text.strip():
            columns += [ranked("text only", 0, lambda: self.baseline(None, text)),
                        ranked("image + text", jpeg, lambda: self.baseline(image, text))]
        (words,), _ = nearest_words(self.blip, U)
        return {"columns": columns, "words": words, "maps": overlays(image, maps),
                "unknown": self.blip.tokenizer.unknown_words(text), "ms": round(spent, 1),
                "wire": {"tokens": U.shape[1], "width": U.shape[2], "bytes": tokens, "text": said,
                         "jpeg": jpeg, "side": side},
                "suggestions": [] if number is None else self.suggest(U, number)}

    def listen(self, U, texts):
        return self.ask(self.blip, U.float(), texts, self.prompt, self.args.precision)

    @torch.no_grad()
    def baseline(self, image, text):
        """-> sentence and q of the text alone, or None and q of its sum with the image's v."""
        device = self.blip.temp.device
        with autocast(device, self.args.precision):
            words = text_words(self.blip, [text])
            if image is None:
                return words, self.blip.encode_text(*words).float().cpu()
            v, _ = self.blip.encode_image(self.blip.preprocess(image)[None].to(device), True)
            return None, image_plus_text(self.blip, v, [text]).float().cpu()

    def suggest(self, U, number):
        def first(texts):
            best = benchmarks.top_k(self.listen(U, texts)[1], self.v, 1, [number] * len(texts))
            return [self.specs[i] for i in best[:, 0].tolist()]

        return suggestions.suggest(self.specs[number], first) if self.specs[number] else []
