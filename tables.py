"""Every table and figure of the paper as a list of runs: what is missing is trained, then ours is printed beside the paper's.

    python tables.py 5                    # trains and evaluates what Table 5 needs (three seeds a row), prints it
    python tables.py 2 8 fig3             # several; rows that tables share are trained once
    python tables.py commands 5           # only prints what is missing, one line a run, to be started side by side on idle cores
    python tables.py all                  # everything; writes RESULTS.md (--as-is: from what is there, without running anything)
    python tables.py 1                    # cost at the real sizes (also 17); needs no training
    python tables.py fig5                 # pocket/figures/fig5.png (also fig4, fig6, fig7, fig8)
    python tables.py lar                  # what LAR changes: results by type of modifier, and the learnt words themselves

Ours is measured in the pocket world, on its test sets (Tables 9 and 10: validation). Its images, its BLIP and its query network are
not the paper's, so numbers are not to be compared across a row: compare which row stands above which, and by how many spreads.

A run is `train.py` with the options of RUNS in runs/tables/NAME-SEED, then `evaluate.py table`. What is finished is not run again,
and what was stopped goes on where it was. Ctrl-C stops after the step in hand. For the paper's own data, take what `commands`
prints and add --preset paper and the paths of README's "The real thing".
"""

import argparse
import io
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from json import loads
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import baselines
import benchmarks
import blip_lite
import evaluate
import isa
import light_encoders
import train
from blip_lite.checks import check_output
from blip_lite.features import autocast
from blip_lite.files import replacing
from blip_lite.signals import end_workers, exit_interrupted, interrupt_on_signals
from evaluate import GREEN, nearest_words, overlay, word_rows
from pocket import drawing, specs

ROOT = Path(__file__).resolve().parent
ENCODERS = ("efficientnet_b0", "efficientnet_b2", "efficientvit_m2", "mobilenet_v2", "mobilevitv2_100")
IMAGENET = {  # torchvision fetches its own; the others' files (see light_encoders.py) have to be put there
    "efficientnet_b0": "imagenet", "efficientnet_b2": "imagenet", "mobilenet_v2": "imagenet",
    "efficientvit_m2": "weights/efficientvit_m2.pth", "mobilevitv2_100": "weights/mobilevitv2_100.pth",
}  # fmt: skip

# ---------------------------------------------------------------------------------------------- runs
# name -> options of train.py; whatever they do not say is train.py's default, so all rows have the same images and steps.
RUNS = {
    "isa": [],
    "mlp": ["--mapper", "mlp", "--tokens", "1"],  # one word, as Pic2Word's, with LAR
    "st": ["--mapper", "st"],
    "atl-no-ca": ["--mapper", "atl-no-ca"],
    "atl-no-sa": ["--mapper", "atl-no-sa"],
    "tokens-2": ["--tokens", "2"],
    "tokens-10": ["--tokens", "10"],
    "gcd": ["--loss", "gcd"],
    "lar": ["--loss", "lar"],
    "gcd+llm": ["--loss", "gcd+llm"],
    "gcd-twice": ["--loss", "gcd", "--epochs", "2"],  # a step of GCD + LAR takes 1.5 times that of GCD (README)
    "isa-full": ["--epochs", "4"],  # as long as `python train.py`: does LAR pay later?
    "gcd-full": ["--loss", "gcd", "--epochs", "4"],
    "gcd-six": ["--loss", "gcd", "--epochs", "6"],  # as long by the clock
    "lar-weight-0.3": ["--lar-weight", "0.3"],
    "lar-weight-3": ["--lar-weight", "3"],
    "sym": ["--encoder", "blip"],  # BLIP's encoder, frozen, under the learner
    "blip-dagger": ["--encoder", "blip-tuned"],  # a copy of it is trained on the query side, the gallery's stays as it is
    "light-light": ["--gallery", "query"],  # both sides trained: "multi-task"
    "blip-blip": ["--encoder", "blip-tuned", "--gallery", "query"],
    "pic2word": ["--encoder", "blip-v", "--mapper", "mlp", "--tokens", "1", "--loss", "gcd"],
    "searle": ["--count", "1500"],  # the second stage of SEARLE, by baselines.py: see training
    **{name: ["--encoder", name, "--query-size", "96"] for name in ENCODERS},
    **{f"{name}-imagenet": ["--encoder", name, "--query-size", "96", "--pretrained", IMAGENET[name]] for name in ENCODERS},
}
BUDGET = ["--epochs", "1"]  # of every training here, a quarter of `python train.py`: eighty runs have to be affordable
ONE_SEED = {"lar-weight-0.3", "lar-weight-3"}  # trends, not rows of the paper
WEIGHTS = {f"{name}-imagenet" for name in ENCODERS}  # run with --imagenet only
UNTRAINED = {  # folder below runs/tables -> methods of evaluate.py
    "baselines": ["image", "text", "image+text", "0.5image+text", "reference caption", "target caption"],
    "searle-oti": ["searle-oti"],
}


# ---------------------------------------------------------------------------------------------- the paper's numbers
@dataclass
class Table:
    """title; parts [(heading, [(benchmark, metric)])], each printed as one table; papers: headings of the paper's columns beside
    ours; rows (label, ours, the paper's values over all parts as printed, one string for each of papers).

    ours is a run of RUNS, a method of UNTRAINED, or the reason why there is none.
    """

    title: str
    parts: list
    papers: tuple
    rows: list
    split: str = "test"


CIRR = ("CIRR", [("cirr", m) for m in ("R@1", "R@5", "R@10", "R@50", "Avg")])
CIRCO = ("CIRCO", [("circo", m) for m in ("mAP@5", "mAP@10", "mAP@25", "mAP@50", "Avg")])
FASHIONIQ = ("FashionIQ", [("fashioniq", f"{c} {m}".strip()) for c in (*benchmarks.CATEGORIES, "") for m in ("R@10", "R@50")])
LENGTHS = ("averages over the metrics", [("cirr", "Avg"), ("fashioniq", "mean"), ("circo", "Avg")])
B2_M2 = ("paper, B2", "paper, M2")
ISA_B2 = "ISA (paper: EfficientNet-B2; ours: PocketNet)"
NO_WEIGHTS = "needs ImageNet weights"  # for the rows that start from them
M2 = ("ISA, EfficientViT-M2", NO_WEIGHTS)
NO_TRIPLETS = "needs triplets"
NO_CLIP = "needs CLIP"
BEYOND = [  # not in the paper
    ("0.5 image + text", "0.5image+text", ""),
    ("SEARLE-OTI (optimised for each query)", "searle-oti", ""),
]
CEILINGS = [  # nor these: how far the pocket world's BLIP gets with true captions
    ("*ceiling: reference's true caption + modifier*", "reference caption", ""),
    ("*ceiling: target's true caption*", "target caption", ""),
]

TABLES = {
    "2": Table("CIRR, test", [CIRR], ("paper",), [
        ("image-only", "image", "7.52 21.83 31.21 52.94 28.37"),
        ("text-only", "text", "26.48 50.46 61.22 82.26 55.10"),
        ("image + text", "image+text", "8.19 24.19 34.41 57.81 31.15"),
        ("Pic2Word", "pic2word", "26.70 53.16 64.10 84.36 57.08"),
        ("SEARLE", "searle", "29.27 54.86 66.57 86.16 59.21"),
        ("ISA, symmetric", "sym", "29.68 58.72 70.79 90.33 62.38"),
        (ISA_B2, "isa", "30.84 61.06 73.57 92.43 64.48"),
        (*M2, "29.63 58.99 71.37 91.47 62.87"),
        *BEYOND, *CEILINGS,
    ]),
    "3": Table("CIRCO, test", [CIRCO], ("paper",), [
        ("image-only", "image", "1.28 1.48 1.88 2.13 1.69"),
        ("text-only", "text", "4.01 4.37 4.79 5.13 4.58"),
        ("image + text", "image+text", "1.39 1.72 2.22 2.51 1.96"),
        ("Pic2Word", "pic2word", "8.69 9.36 10.40 10.99 9.86"),
        ("SEARLE", "searle", "10.65 11.34 12.40 13.02 11.85"),
        ("ISA, symmetric", "sym", "9.67 10.32 11.26 11.61 10.72"),
        (ISA_B2, "isa", "11.33 12.25 13.42 13.97 12.74"),
        (*M2, "9.82 10.50 11.61 12.09 11.01"),
        *BEYOND, *CEILINGS,
    ]),
    "4": Table("FashionIQ (paper: validation; it has no test annotations)", [FASHIONIQ], ("paper",), [
        ("image-only", "image", "4.07 11.35 7.07 16.39 6.88 13.67 6.01 13.67"),
        ("text-only", "text", "18.10 35.05 23.45 39.21 26.06 44.93 22.54 39.73"),
        ("image + text", "image+text", "5.16 13.58 8.15 18.89 7.80 16.62 7.03 16.36"),
        ("Pic2Word", "pic2word", "21.35 42.68 27.51 46.01 29.12 49.33 25.99 46.00"),
        ("SEARLE", "searle", "22.11 41.79 29.72 48.53 31.03 52.37 27.62 47.56"),
        ("ISA, symmetric", "sym", "24.69 43.88 30.79 50.05 33.91 53.65 29.79 49.19"),
        (ISA_B2, "isa", "25.33 46.26 30.03 48.58 33.45 53.80 29.60 49.54"),
        (*M2, "25.48 45.51 29.64 48.68 32.94 54.31 29.35 49.50"),
        *BEYOND, *CEILINGS,
    ]),
    "5": Table("mapping networks (paper: validation)", [CIRR, CIRCO], B2_M2, [
        ("adaptive token learner", "isa", "31.48 63.42 77.27 93.16 66.33 13.19 13.83 15.20 15.85 14.52",
         "31.26 62.31 75.70 92.38 65.41 12.24 12.75 13.80 14.27 13.27"),
        ("MLP (single token)", "mlp", "30.18 59.46 71.30 89.33 62.57 8.28 8.67 9.62 10.00 9.14",
         "30.32 60.25 71.49 89.57 62.90 7.19 7.73 8.47 9.09 8.12"),
    ]),
    "6": Table("query models (paper: validation); * from random weights", [CIRR, CIRCO], ("paper",), [
        ("EfficientNet-B0", "efficientnet_b0-imagenet", "32.02 64.57 76.12 92.29 66.25 11.11 12.04 13.14 13.67 12.49"),
        ("EfficientNet-B0*", "efficientnet_b0", "27.82 58.38 71.16 90.07 61.86 9.5 9.96 10.6 11.02 10.27"),
        ("EfficientNet-B2", "efficientnet_b2-imagenet", "31.48 63.42 77.27 93.16 66.33 13.19 13.83 15.20 15.85 14.52"),
        ("EfficientNet-B2*", "efficientnet_b2", "29.47 60.13 74.05 91.27 63.73 11.16 11.57 12.56 13.13 12.11"),
        ("EfficientViT-M2", "efficientvit_m2-imagenet", "31.26 62.31 75.70 92.38 65.41 12.24 12.75 13.80 14.27 13.27"),
        ("EfficientViT-M2*", "efficientvit_m2", "28.56 59.46 71.11 89.38 62.13 10.19 10.79 11.48 11.94 11.10"),
        ("MobileNetV2", "mobilenet_v2-imagenet", "30.50 63.51 74.27 91.18 64.87 10.50 10.82 12.09 12.44 11.46"),
        ("MobileNetV2*", "mobilenet_v2", "29.47 60.14 72.10 90.07 62.95 8.55 9.16 10.04 10.39 9.54"),
        ("MobileViTV2", "mobilevitv2_100-imagenet", "27.63 58.66 70.85 88.68 61.46 9.44 9.68 10.49 10.96 10.14"),
        ("MobileViTV2*", "mobilevitv2_100", "27.02 57.92 69.33 88.96 60.81 8.41 8.77 9.54 9.97 9.17"),
        ("PocketNet*", "isa", ""),
    ]),
    "7": Table("symmetric and asymmetric retrieval (paper: validation); query model / gallery model", [CIRR, CIRCO], B2_M2, [
        ("light / BLIP VE", "isa", "31.48 63.42 77.27 93.16 66.33 13.19 13.83 15.20 15.85 14.52",
         "31.26 62.31 75.70 92.38 65.41 12.24 12.75 13.80 14.27 13.27"),
        ("light / light, both trained", "light-light", "0.61 0.74 1.02 3.97 1.59 0.00 0.02 0.08 0.14 0.06",
         "0.29 0.37 0.79 2.68 1.03 0.00 0.01 0.04 0.11 0.04"),
        ("BLIP VE† / BLIP VE, query's trained", "blip-dagger", "30.93 62.09 74.67 92.90 65.15 12.60 13.20 14.56 15.07 13.86", ""),
        ("BLIP VE / BLIP VE, both trained", "blip-blip", "0.49 0.60 0.83 2.96 1.22 0.02 0.03 0.08 0.15 0.07", ""),
        ("BLIP VE / BLIP VE, both frozen (Sym)", "sym", "", ""),
    ]),
    "8": Table("losses (paper: validation)", [CIRR, CIRCO], B2_M2, [
        ("GCD + LAR", "isa", "31.48 63.42 77.27 93.16 66.33 13.19 13.83 15.20 15.85 14.52",
         "31.26 62.31 75.70 92.38 65.41 12.24 12.75 13.80 14.27 13.27"),
        ("GCD", "gcd", "29.86 60.18 73.90 91.13 63.77 10.46 10.98 11.88 12.41 11.43",
         "26.87 55.58 69.00 89.38 60.01 9.48 9.84 10.95 11.38 10.41"),
        ("LAR", "lar", "27.02 56.67 68.91 88.18 60.20 7.56 7.68 8.45 8.94 8.16",
         "24.35 50.49 63.26 84.00 55.53 5.75 6.00 6.98 7.26 6.50"),
        ("GCD + LLM TR", "gcd+llm", "29.43 60.18 73.21 91.32 63.54 11.07 11.35 12.59 13.17 12.05",
         "27.61 56.49 70.03 89.76 60.97 10.18 10.69 11.48 12.04 11.10"),
        ("GCD, twice the steps (1.3 times the time of GCD + LAR)", "gcd-twice", "", ""),
        ("GCD + LAR, four epochs", "isa-full", "", ""),
        ("GCD, four epochs", "gcd-full", "", ""),
        ("GCD, six epochs (the time of GCD + LAR, four)", "gcd-six", "", ""),
        ("GCD + 0.3 LAR", "lar-weight-0.3", "", ""),
        ("GCD + 3 LAR", "lar-weight-3", "", ""),
    ]),
    "9": Table("CIRR, validation", [CIRR], ("paper",), [
        ("image-only", "image", "6.72 23.13 32.82 55.66 29.58"),
        ("text-only", "text", "25.38 51.02 61.76 81.68 54.96"),
        ("image + text", "image+text", "7.58 25.90 36.28 61.13 32.72"),
        ("Pic2Word", "pic2word", "27.89 58.15 69.42 87.53 60.75"),
        ("SEARLE", "searle", "28.03 60.74 71.41 88.82 62.25"),
        ("ISA, symmetric", "sym", "30.21 61.52 74.09 90.81 64.16"),
        (ISA_B2, "isa", "31.48 63.42 77.27 93.16 66.33"),
        (*M2, "31.26 62.31 75.70 92.38 65.41"),
        BEYOND[0], *CEILINGS,
    ], split="val"),
    "10": Table("CIRCO, validation", [CIRCO], ("paper",), [
        ("image-only", "image", "1.86 2.18 2.71 2.97 2.43"),
        ("text-only", "text", "5.32 5.76 6.04 6.29 5.85"),
        ("image + text", "image+text", "2.04 2.63 3.18 3.49 2.84"),
        ("Pic2Word", "pic2word", "7.91 8.27 9.05 9.56 8.70"),
        ("SEARLE", "searle", "11.52 11.74 12.91 13.56 12.43"),
        ("ISA, symmetric", "sym", "11.03 12.01 13.17 13.81 12.51"),
        (ISA_B2, "isa", "13.19 13.83 15.20 15.85 14.52"),
        (*M2, "12.24 12.75 13.80 14.27 13.27"),
        BEYOND[0], *CEILINGS,
    ], split="val"),
    "11": Table("mapping networks (paper: validation; its \"transformer\" is the adaptive token learner)", [FASHIONIQ], B2_M2, [
        ("adaptive token learner", "isa", "25.33 46.26 30.03 48.58 33.45 53.80 29.60 49.54",
         "25.48 45.51 29.64 48.68 32.94 54.31 29.35 49.50"),
        ("MLP (single token)", "mlp", "23.65 43.83 28.46 47.74 31.16 51.96 27.76 47.84",
         "24.39 44.27 29.05 47.45 30.75 53.19 28.06 48.30"),
    ]),
    "12": Table("query models (paper: validation); * from random weights", [FASHIONIQ], ("paper",), [
        ("EfficientNet-B0", "efficientnet_b0-imagenet", "25.19 45.56 28.95 48.04 32.53 52.78 28.89 48.79"),
        ("EfficientNet-B0*", "efficientnet_b0", "23.05 44.17 27.43 45.14 29.98 51.76 26.82 47.02"),
        ("EfficientNet-B2", "efficientnet_b2-imagenet", "25.33 46.26 30.03 48.58 33.45 53.80 29.60 49.54"),
        ("EfficientNet-B2*", "efficientnet_b2", "25.04 44.22 28.31 46.76 31.26 53.24 28.20 48.07"),
        ("EfficientViT-M2", "efficientvit_m2-imagenet", "25.48 45.51 29.64 48.68 32.94 54.31 29.35 49.50"),
        ("EfficientViT-M2*", "efficientvit_m2", "24.14 43.63 27.63 45.58 31.72 53.24 27.83 47.48"),
        ("MobileNetV2", "mobilenet_v2-imagenet", "24.34 45.51 28.95 47.35 32.02 54.11 28.44 48.99"),
        ("MobileNetV2*", "mobilenet_v2", "24.59 44.47 27.48 45.78 31.51 53.19 27.86 47.81"),
        ("MobileViTV2", "mobilevitv2_100-imagenet", "22.16 40.46 26.35 43.23 27.84 49.01 25.45 44.23"),
        ("MobileViTV2*", "mobilevitv2_100", "21.52 39.41 25.66 42.89 27.54 48.70 24.91 43.67"),
        ("PocketNet*", "isa", ""),
    ]),
    "13": Table("symmetric and asymmetric retrieval (paper: validation); query model / gallery model", [FASHIONIQ], B2_M2, [
        ("light / BLIP VE", "isa", "25.33 46.26 30.03 48.58 33.45 53.80 29.60 49.54",
         "25.48 45.51 29.64 48.68 32.94 54.31 29.35 49.50"),
        ("light / light, both trained", "light-light", "0.5 2.08 0.64 2.01 0.87 1.63 0.67 1.91",
         "0.69 1.59 1.08 2.16 1.22 2.04 1.00 1.93"),
        ("BLIP VE† / BLIP VE, query's trained", "blip-dagger", "24.89 45.36 30.18 49.07 35.65 55.12 30.24 49.85", ""),
        ("BLIP VE / BLIP VE, both trained", "blip-blip", "2.13 5.7 1.86 4.47 2.4 6.12 2.13 5.43", ""),
        ("BLIP VE / BLIP VE, both frozen (Sym)", "sym", "", ""),
    ]),
    "14": Table("losses (paper: validation)", [FASHIONIQ], B2_M2, [
        ("GCD + LAR", "isa", "25.33 46.26 30.03 48.58 33.45 53.80 29.60 49.54",
         "25.48 45.51 29.64 48.68 32.94 54.31 29.35 49.50"),
        ("GCD", "gcd", "23.90 45.66 27.33 45.14 31.31 52.12 27.51 47.64", "23.35 44.03 26.79 44.80 30.65 50.99 26.93 46.61"),
        ("LAR", "lar", "22.76 42.69 26.15 44.16 29.68 50.59 26.20 45.81", "13.73 28.46 21.49 38.13 24.68 43.50 19.97 36.70"),
        ("GCD + LLM TR", "gcd+llm", "24.19 45.17 27.92 44.90 31.06 51.56 27.72 47.21",
         "23.80 44.03 26.94 45.00 30.49 50.94 27.08 46.66"),
        ("GCD, twice the steps (1.3 times the time of GCD + LAR)", "gcd-twice", "", ""),
        ("GCD + LAR, four epochs", "isa-full", "", ""),
        ("GCD, four epochs", "gcd-full", "", ""),
        ("GCD, six epochs (the time of GCD + LAR, four)", "gcd-six", "", ""),
        ("GCD + 0.3 LAR", "lar-weight-0.3", "", ""),
        ("GCD + 3 LAR", "lar-weight-3", "", ""),
    ]),
    # "ALTEMIS" in print is ARTEMIS. The supervised rows and CLIP's are other papers' figures: nothing to run here
    "15": Table("CIRR, test: beside supervised methods", [CIRR], ("paper",), [
        ("supervised: CIRPLANT", NO_TRIPLETS, "19.60 52.60 68.40 92.40 58.25"),
        ("supervised: ARTEMIS", NO_TRIPLETS, "16.96 46.10 61.31 87.73 53.03"),
        ("supervised: CLIP4Cir", NO_TRIPLETS, "33.60 65.40 77.40 95.20 67.90"),
        ("Pic2Word (CLIP)", NO_CLIP, "23.90 51.70 65.30 87.80 57.17"),
        ("SEARLE (CLIP)", NO_CLIP, "24.22 52.41 66.29 88.63 57.88"),
        ("Pic2Word (BLIP)", "pic2word", "26.70 53.16 64.10 84.36 57.08"),
        ("SEARLE (BLIP)", "searle", "29.27 54.86 66.57 86.16 59.21"),
        (ISA_B2, "isa", "30.84 61.06 73.57 92.43 64.48"),
        (*M2, "29.63 58.99 71.37 91.47 62.87"),
    ]),
    "16": Table("FashionIQ (paper: validation): beside supervised methods", [FASHIONIQ], ("paper",), [
        ("supervised: CIRPLANT", NO_TRIPLETS, "17.45 40.41 17.53 38.81 21.64 45.38 18.87 41.53"),
        ("supervised: ARTEMIS", NO_TRIPLETS, "27.20 52.40 21.80 43.60 29.20 54.80 26.10 50.30"),
        ("supervised: CLIP4Cir", NO_TRIPLETS, "30.30 54.50 37.20 55.80 39.20 61.30 35.60 57.20"),
        ("Pic2Word (CLIP)", NO_CLIP, "20.00 40.20 26.20 43.60 27.90 47.40 24.70 43.70"),
        ("SEARLE (CLIP)", NO_CLIP, "20.32 43.18 27.43 45.68 29.32 50.17 25.69 46.34"),
        ("Pic2Word (BLIP)", "pic2word", "21.35 42.68 27.51 46.01 29.12 49.33 25.99 46.00"),
        ("SEARLE (BLIP)", "searle", "22.11 41.79 29.72 48.53 31.03 52.37 27.62 47.56"),
        (ISA_B2, "isa", "25.33 46.26 30.03 48.58 33.45 53.80 29.60 49.54"),
        (*M2, "25.48 45.51 29.64 48.68 32.94 54.31 29.35 49.50"),
    ]),
    "18": Table("parts of the mapping network (paper: validation, EfficientNet-B2)", [CIRR], ("paper",), [
        ("MLP", "mlp", "30.18 59.46 71.30 89.33 62.57"),
        ("ST: simple tokenizer, Eq. 1-2", "st", "29.94 61.68 73.71 91.92 64.31"),
        ("ATL w/o CA: Eq. 1-3", "atl-no-ca", "29.85 61.61 74.48 91.53 64.37"),
        ("ATL w/o SA: Eq. 1, 2, 4", "atl-no-sa", "30.35 62.13 75.95 91.89 65.08"),
        ("ATL", "isa", "31.48 63.42 77.27 93.16 66.33"),
    ]),
    # Its header prints mAP@1, 5, 10, 50; but the MLP and ATL rows are those of Table 5, where they stand under mAP@5, 10, 25, 50.
    # "ATL w/o SA" has mAP@25 above mAP@50, which CIRCO's few ground truths hardly allow; its mean is right as printed
    "19": Table("parts of the mapping network (paper: validation, EfficientNet-B2)", [CIRCO], ("paper",), [
        ("MLP", "mlp", "8.28 8.67 9.62 10.00 9.14"),
        ("ST: simple tokenizer, Eq. 1-2", "st", "9.89 10.33 11.38 11.79 10.85"),
        ("ATL w/o CA: Eq. 1-3", "atl-no-ca", "10.46 10.94 12.03 12.52 11.49"),
        ("ATL w/o SA: Eq. 1, 2, 4", "atl-no-sa", "11.52 12.15 13.83 13.58 12.77"),
        ("ATL", "isa", "13.19 13.83 15.20 15.85 14.52"),
    ]),
    "20": Table("parts of the mapping network (paper: validation, EfficientNet-B2)", [FASHIONIQ], ("paper",), [
        ("MLP", "mlp", "23.65 43.83 28.46 47.74 31.16 51.96 27.76 47.84"),
        ("ST: simple tokenizer, Eq. 1-2", "st", "23.45 43.58 28.80 45.78 31.57 52.32 27.94 47.23"),
        ("ATL w/o CA: Eq. 1-3", "atl-no-ca", "24.00 45.86 27.33 45.29 31.62 52.27 27.65 47.80"),
        ("ATL w/o SA: Eq. 1, 2, 4", "atl-no-sa", "24.15 46.71 28.16 46.22 32.46 52.37 28.26 48.43"),
        ("ATL", "isa", "25.33 46.26 30.03 48.58 33.45 53.80 29.60 49.54"),
    ]),
    # A plot in the paper, whose points are not printed as numbers
    "fig3": Table("token lengths", [LENGTHS], (), [
        ("L = 2", "tokens-2"), ("L = 6", "isa"), ("L = 10", "tokens-10"),
    ]),
}  # fmt: skip
COSTS, FIGURES = ("1", "17"), ("fig4", "fig5", "fig6", "fig7", "fig8")
ALL = ("1", *map(str, range(2, 17)), "17", "18", "19", "20", "fig3", "lar", *FIGURES)
LAR_RUNS = {"gcd": "GCD", "isa": "GCD + LAR", "lar": "LAR", "gcd-twice": "GCD, twice the steps", "lar-weight-0.3": "GCD + 0.3 LAR",
            "lar-weight-3": "GCD + 3 LAR", "gcd-full": "GCD, four epochs", "isa-full": "GCD + LAR, four epochs",
            "gcd-six": "GCD, six epochs"}  # fmt: skip
FIGURE_RUNS = {"fig4": ("tokens-2", "isa", "tokens-10"), "fig5": ("isa",), "fig6": ("isa",), "fig7": ("tokens-2", "isa"),
               "fig8": ("isa", "tokens-10"), "lar": tuple(LAR_RUNS)}  # fmt: skip
NOTES = {  # name of a table or figure -> sentences that stand below it in RESULTS.md, written by hand from the results
    "2": (
        "The order of the paper: ISA above SEARLE and Pic2Word, those above text-only and image + text. Against it: the "
        "symmetric variant stands below all of them. It says more of its image (GCD 0.04 at the end, ISA 0.73 after this "
        "one epoch) and is the better one where a single thing changes, but a description of the target does not override "
        "it (R@1 27-39 there, ISA 63). The half-weighted sum, which the paper does not have, is above everything here."
    ),
    "3": (
        "Against the paper: ISA does not stand above Pic2Word and SEARLE, all three are within two points. One word seems "
        "to be enough where several images are right. One epoch is short for ISA, whose encoder starts from random "
        "weights while theirs is BLIP: after four (README) it reaches 42.6 in mAP@5."
    ),
    "4": (
        "Against the paper: what starts from BLIP's own features (Sym 59, Pic2Word 47, SEARLE 43 in R@10) stands above "
        "ISA (39), since sleeves, necklines and details are a few pixels that PocketNet has seen once. After four epochs "
        "(README) ISA reaches 53."
    ),
    "5": (
        "Against the paper: one word by an MLP is as good as six by the learner on both. What is different here: an image "
        "of at most three things has less to say than a photograph, and BLIP's word space has 128 dimensions for some 80 "
        "words."
    ),
    "11": (
        "With the paper: on garments, which have eight attributes each, one word is too short (35.6 against 39.2 in "
        "R@10)."
    ),
    "6": (
        "At 96 px, from random weights, one epoch: the paper's starred rows. EfficientViT-M2, level with PocketNet, and "
        "MobileViTV2 are far ahead of the convolutional three; in the paper the starred rows are within three points, and "
        "MobileViTV2 is last. What differs: the phone networks were made for long trainings at 224 px, and end here in maps "
        "of 3 x 3 or 2 x 2."
    ),
    "7": (
        "With the paper: where both sides are trained, retrieval breaks down, to chance with the light network, although "
        "the training loss is the lowest of all: the two sides agree on a language of their own. BLIP on both sides keeps "
        "a little of what it knew after so short a training. A trained copy of BLIP for the query (†) is as good as the "
        "frozen one and below the light network on both, as the paper says; the reason given there, smaller batches, does "
        "not hold here."
    ),
    "12": (
        "As in Table 6: the two with attention ahead."
    ),
    "13": (
        "Against the paper, which finds them level: BLIP's encoder on the query side is far better on garments, trained "
        "or frozen."
    ),
    "8": (
        "With the paper: LAR alone is far worse than GCD alone (here it learns next to nothing: composed queries are as good "
        "as text-only), and at equal steps GCD + LAR is above GCD, but only in a long training: after four epochs CIRR 61.1 "
        "± 0.6 against 59.8 ± 0.4, CIRCO level. Against it: after one epoch LAR adds nothing, whatever its weight. At equal "
        "time LAR adds nothing either: GCD makes six epochs in the time of four with LAR and has 61.7 ± 0.7; after a short "
        "time, GCD for twice the steps of GCD + LAR, 1.3 times its time, is far better. LLM text regularization changes "
        "nothing beyond the spread. LAR needs a good matching head: against the second edition of pocket BLIP, which differs "
        "in its head alone, four epochs with LAR ended at 58.4 ± 0.8 (pocket/LOG.md)."
    ),
    "14": (
        "After four epochs GCD + LAR has 53.3 ± 2.0 in R@10, GCD 49.7 ± 2.9, and 52.7 ± 1.0 in the same time: as in Table 8, "
        "but within the spread; after one epoch LAR gains nothing. GCD + LLM TR: level."
    ),
    "18": (
        "Against the paper: at this length the five are within two spreads of each other; cross-attention adds nothing, "
        "leaving it out is best."
    ),
    "19": (
        "As in Table 18: no difference beyond the spread."
    ),
    "20": (
        "With the paper: one word is the least. The learner's parts differ by no more than two spreads."
    ),
    "fig3": (
        "With the paper: more tokens are not always better. Scenes are best with two; garments rather need more, within the "
        "spread."
    ),
    "lar": (
        "After one epoch LAR changes nothing beyond the spread: the learnt words are already true words of their image "
        "without it (nine in ten). After four it raises what succeeds where one thing changes (CIRR 30.8 to 38.8), and costs "
        "nothing where the target is described; the words themselves, their length and their truth, stay as they are. The "
        "matching head that LAR asks is right on 96 % of pairs with full captions and 85 % with partial ones (`python -m "
        "pocket.pretrain --validate pocket`, half of the pairs wrong as LAR draws them). With the former head, right on 82 % "
        "of the partial ones, LAR raised single changes as much, but cost four points where the target is described "
        "(pocket/LOG.md). Harder negatives change nothing (there too). Alone, LAR makes longer tokens that no longer tell one "
        "image from another: matching is asked about a few pairs a step, GCD about all of the batch."
    ),
}


# ---------------------------------------------------------------------------------------------- running what is missing
def folder(run, seed=None):
    return Path("runs/tables") / (run if seed is None else f"{run}-{seed}")


def folder_of(method):
    """The entry of UNTRAINED that a method belongs to, else None."""
    return next((run for run, methods in UNTRAINED.items() if method in methods), None)


def training(run, seed, threads=0):
    """The command that trains one run, without the interpreter; None for what needs no training."""
    if run in UNTRAINED:
        return None
    script = ["baselines.py", "searle", *RUNS[run]] if run == "searle" else ["train.py", *BUDGET, *RUNS[run]]
    some = ["--threads", str(threads)] if threads else []
    return [*script, "--seed", str(seed), "--name", f"tables/{run}-{seed}", *some]


def evaluation(run, seed, split):
    """The command that evaluates one run on the three benchmarks of the pocket world, and the file that it writes."""
    where = folder(run, seed)
    out = where / ("table.json" if split == "test" else f"table_{split}.json")
    what = ["--methods", *UNTRAINED[run]] if run in UNTRAINED else ["--methods", "isa", "--checkpoint", str(where / "isa.pt")]
    return ["evaluate.py", "table", "--split", split, *what, "--json", str(out), "--picture", ""], out


def needed(names, seeds, imagenet=False):
    """Names of tables and figures -> {(run, seed): splits to be evaluated}; seed None = untrained."""
    found = {}
    for name in names:
        rows = [row[1] for row in TABLES[name].rows] if name in TABLES else FIGURE_RUNS.get(name, ())
        for ours in rows:
            if ours in RUNS and (imagenet or ours not in WEIGHTS):
                some = [(ours, seed) for seed in (seeds[:1] if ours in ONE_SEED or name in FIGURES else seeds)]
            else:
                some = [(folder_of(ours), None)] if folder_of(ours) else []
            for run in some:
                splits = found.setdefault(run, [])
                if name in TABLES and TABLES[name].split not in splits:
                    splits.append(TABLES[name].split)
    return found


def trained(run, seed, fingerprint):
    """How far the training of a run is: "done", "begun" (or not begun), or "other": by other options or against another BLIP."""
    path = folder(run, seed) / "isa.pt"
    if not path.exists():
        return "begun"
    checkpoint, command = train.read_checkpoint(path), training(run, seed)
    parse_args, usual = (baselines.parse_args, ["searle"]) if run == "searle" else (train.parse_args, [])
    wanted, usual = vars(parse_args(command[1:])), vars(parse_args(usual))
    fixed = wanted.keys() - train.MAY_CHANGE - {"precision", "command", "run"}
    settings = {**usual, **checkpoint["settings"]}  # a checkpoint may be older than an option
    if checkpoint["blip"] != fingerprint or any(settings[name] != wanted[name] for name in fixed):
        return "other"
    if run == "searle":
        return "done"  # written once, at its end
    steps = wanted["epochs"] * (checkpoint["images"] // min(wanted["batch"], checkpoint["images"]))
    return "done" if checkpoint["step"] >= steps else "begun"


def read_results(path):
    """What `evaluate.py table` wrote -> dict."""
    try:
        content = loads(path.read_text())
        return {"settings": {**content["settings"]}, "results": {**content["results"]}}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is damaged; delete it, it is then made again") from None


def evaluated(run, seed, split, fingerprint):
    """Whether the run's table is there, of the same methods, and not older than its checkpoint."""
    command, out = evaluation(run, seed, split)
    if not out.exists():
        return False
    settings, wanted = read_results(out)["settings"], vars(evaluate.parse_args(command[1:]))
    checkpoint = folder(run, seed) / "isa.pt"
    same = all(settings.get(name) == wanted[name] for name in ("methods", "split", "checkpoint"))
    newer = run in UNTRAINED or out.stat().st_mtime >= checkpoint.stat().st_mtime
    return same and newer and settings["blip_fingerprint"] == fingerprint


def missing(run, seed, splits, fingerprint, threads=0):
    """The commands that are still to be run for one run: training and evaluations, or none."""
    command = training(run, seed, threads)
    state = trained(run, seed, fingerprint) if command else "done"
    splits = [split for split in splits if state != "done" or not evaluated(run, seed, split, fingerprint)]
    commands = [evaluation(run, seed, split)[0] for split in splits]
    if state == "other":
        return [[*command, "--overwrite"], *commands]
    if state == "begun":
        return [[*command, *(["--resume"] if command[0] == "train.py" else [])], *commands]
    return commands


def shown(command):
    return f"python {shlex.join(command)}"


def call(command, log, threads=0):
    """One script in a process of its own; what it prints goes to the end of `log`, and after it the seconds that it took.

    Raises ValueError where it fails. Ctrl-C is passed on once, and waited for: train.py then saves and ends after the step in hand.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    began = time.time()
    with log.open("a") as out:
        print("$", shown(command), file=out, flush=True)
        child = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=out, stderr=subprocess.STDOUT,
                                 env=environment, start_new_session=True)  # fmt: skip
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            if child.poll() is None:  # Ctrl-C for the second time
                child.kill()
            print(f"tables.py: {time.time() - began:.0f} s", file=out)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise ValueError(f"`{shown(command)}` was stopped from outside; the same command goes on")
    if status:
        raise ValueError(f"`{shown(command)}` failed; its last words are in {log}")


def run_missing(names, args, fingerprint):
    """Run what the tables need and what is not there yet, one process at a time. -> one line for each run that failed."""
    runs = needed(names, args.seeds, args.imagenet).items()
    waiting = [(run, seed, splits) for (run, seed), splits in runs if missing(run, seed, splits, fingerprint)]
    failures = []
    for run, seed, splits in tqdm(waiting, desc="runs", disable=None):
        try:
            for command in missing(run, seed, splits, fingerprint, args.threads):
                tqdm.write(f"$ {shown(command)}")
                call(command, folder(run, seed) / "log.txt", args.threads)
        except ValueError as error:  # the others go on: a night should not be lost to one row
            failures.append(str(error))
            tqdm.write(f"tables.py: {error}")
    return failures


# ---------------------------------------------------------------------------------------------- printing
def measured(ours, seeds, split):
    """A run's or a method's results -> [{benchmark: {"all" and parts: {metric: value}}}], one for each seed that is there."""
    untrained = folder_of(ours)
    if ours not in RUNS and untrained is None:
        return []
    found = []
    for seed in [None] if untrained else seeds:
        _, path = evaluation(untrained or ours, seed, split)
        if path.exists():
            results = read_results(path)["results"]
            rows = {benchmark: methods.get(ours if untrained else "isa", {}) for benchmark, methods in results.items()}
            means = {b: {part: {m: mean for m, (mean, _) in ms.items()} for part, ms in row.items()} for b, row in rows.items()}
            found.append({benchmark: row for benchmark, row in means.items() if row})
    return [result for result in found if result]


def value(result, benchmark, metric):
    """One number: a metric, FashionIQ's "dress R@10" where the file has it, or its "mean" over the two averages; else None."""
    row = result.get(benchmark, {})
    if metric == "mean":
        return statistics.mean((row["all"]["R@10"], row["all"]["R@50"])) if row else None
    *category, metric = metric.split()
    return row.get(category[0] if category else "all", {}).get(metric)


def cell(values):
    """Values over seeds -> "57.55 ± 1.00", "57.55" for one, "–" where there is none."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(name, seeds):
    """One table of the paper as markdown: a column for each metric of ours, and beside it the paper's."""
    entry, lines, start = TABLES[name], [], 0
    title = f"Table {name}" if name.isdigit() else f"Figure {name[3:]}"
    ours = [f"pocket {'validation' if entry.split == 'val' else 'test'} sets", "mean ± standard deviation over seeds"]
    lines += [f"**{title}: {entry.title}.** Ours: {', '.join(ours)}.", ""]
    for heading, columns in entry.parts:
        rows = []
        for label, run, *papers in entry.rows:
            results = measured(run, seeds[:1] if run in ONE_SEED else seeds, entry.split)
            why = NO_WEIGHTS if run in WEIGHTS else "not run" if run in RUNS or folder_of(run) else run
            cells = [label + (" (1 seed)" if run in RUNS and len(results) == 1 else "")]
            printed = [paper.split()[start : start + len(columns)] or [""] * len(columns) for paper in papers]
            for i, (benchmark, metric) in enumerate(columns):
                cells += [cell([value(r, benchmark, metric) for r in results]) if results else why if i == 0 else ""]
                cells += [numbers[i] for numbers in printed]
            rows.append(cells)
        head = [heading]
        for benchmark, metric in columns:
            head += [f"{benchmark} {metric}" if len({b for b, _ in columns}) > 1 else metric, *entry.papers]
        lines += [*markdown(head, rows), ""]
        start += len(columns)
    return lines


def markdown(head, rows):
    """A head and rows of strings -> lines of a markdown table, padded so that it can be read as text as well."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return [line(head), line(["-" * w for w in widths]), *map(line, rows)]


def section(name, args):
    """Everything about one table or figure -> lines of markdown: numbers or picture, notes, command."""
    if name in COSTS:
        lines = [*(cost_table() if name == "1" else latency_table(args.threads)), ""]
    elif name in FIGURES:
        try:
            path, told = draw_figure(name, args)
            lines = [f"**Figure {name[3:]}: {told}**", "", f"![Figure {name[3:]}]({path})", ""]
        except ValueError as error:  # the tables are still worth printing
            lines = [f"**Figure {name[3:]}** is not drawn: {error}.", ""]
    elif name == "lar":
        lines = [*lar_table(args.seeds), ""]
    else:
        lines = table(name, args.seeds)
    return [*lines, *([NOTES[name], ""] if name in NOTES else []), f"`python tables.py {name}`", ""]


def preamble(args):
    """What RESULTS.md is, the budget of a row, the machine, seeds and time."""
    recipe = vars(train.parse_args(training("isa", 0)[1:]))
    images = {int(train.read_checkpoint(path)["images"]) for path in sorted(Path("runs/tables").glob("isa-*/isa.pt"))}
    logs = [path.read_text() for path in sorted(Path("runs/tables").glob("*/log.txt"))]
    seconds = sum(float(line.split()[1]) for text in logs for line in text.splitlines() if line.startswith("tables.py: "))
    epochs = "1 epoch" if recipe["epochs"] == 1 else f"{recipe['epochs']} epochs"
    text = f"""\
# Results: every table and figure of the paper, ours beside the paper's

Written by `python tables.py all`; below each table stands the command that makes it alone. Ours is measured in the pocket world
(see README), whose images, BLIP and light network are not the paper's: compare the order of rows, not the two numbers of a cell.
The paper's ablations are on validation sets; ours are on test sets unless it says otherwise, since choices were made on validation.

- **Training of every row**: {" or ".join(map(str, images)) or "all"} images of {recipe["images"]}, {epochs},
  batch {recipe["batch"]}, AdamW with a peak learning rate of {recipe["lr"]} and weight decay {recipe["weight_decay"]}, no
  augmentation; {recipe["encoder"]} where no other encoder is named. That is a quarter of `python train.py`, so that
  all can be run; README has ISA's results at full length. Rows that say more epochs or steps have them, SEARLE has a recipe
  of its own (baselines.py), with {RUNS["searle"][-1]} images to invert.
- **Seeds**: {", ".join(map(str, args.seeds))}. Numbers without ± have one seed, or no training.
- **Machine**: {machine(args.threads)}.
- **Time**: {seconds / 3600:.1f} hours recorded, for {len(logs)} runs with their evaluation.
"""
    return [*text.splitlines(), ""]


def machine(threads):
    """The machine in words: cores, what its CPU can do, versions."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    able = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    able = able or [torch.backends.cpu.get_cpu_capability()]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    count = threads or torch.get_num_threads()
    used = "1 thread a process" if count == 1 else f"{count} threads a process"
    return f"{os.cpu_count()} cores ({platform.machine()}, {', '.join(able)}){gpu}, {used}, PyTorch {torch.__version__}"


# ---------------------------------------------------------------------------------------------- cost (Tables 1 and 17)
# encoder -> FLOPs in G, parameters in M (Table 1), query latency in ms (Table 17)
PAPER_COSTS = {
    "blip": ("16.86", "87.0", "6.53"), "efficientnet_b0": ("0.43", "5.3", "3.07"), "efficientnet_b2": ("0.72", "8.5", "3.24"),
    "efficientvit_m2": ("0.21", "5.0", "3.27"), "mobilenet_v2": ("0.35", "3.5", "3.03"), "mobilevitv2_100": ("1.42", "5.5", "3.40"),
}  # fmt: skip
LABELS = {"blip": "BLIP VE (ViT-B/16)", "efficientnet_b0": "EfficientNet-B0", "efficientnet_b2": "EfficientNet-B2",
          "efficientvit_m2": "EfficientViT-M2", "mobilenet_v2": "MobileNetV2", "mobilevitv2_100": "MobileViTV2"}  # fmt: skip
BLIP_BASE = dict(image_size=224, patch_size=16, image_width=768, image_depth=12, vocab_size=30524, max_positions=512, word_dim=768,
                 text_depth=12, embed_dim=256)  # fmt: skip


def blip_base():
    """The paper's BLIP, ViT-B/16 at 224 px, with random weights and the pocket world's short vocabulary."""
    return blip_lite.Blip(BLIP_BASE, blip_lite.Tokenizer(ROOT / "pocket/vocab.txt")).eval().requires_grad_(False)


def full_size(name, blip):
    """The query side at the paper's sizes, with random weights: all see 224 px, as BLIP does; six words of 768."""
    encoder = light_encoders.build(name, blip=blip if name == "blip" else None, image_size=224)
    return isa.QueryModel(encoder, isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)).eval()


def parameters(model, name, blip):
    """Encoder and learner; BLIP's encoder is hidden from PyTorch (light_encoders.BlipEncoder), so it is added."""
    hidden = blip.visual_encoder.parameters() if name == "blip" else ()
    return sum(p.numel() for p in (*model.parameters(), *hidden))


@torch.no_grad()
def products(model):
    """MACs of one image: convolutions and matrix products, FlopCounterMode's FLOPs halved; and how many of them are products of two
    activations, as in attention.

    On the meta device, where nothing is computed and attention is written out in products: on a CPU the counter passes the fused
    kernel over (PyTorch 2.x).
    """
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, model.encoder.image_size, model.encoder.image_size, device="meta"))
    return counter.get_total_flops() / 2, counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0) / 2


def costs():
    """{encoder: (parameters, MACs, attention's part of them)} at the real sizes; nothing is computed, so it takes seconds."""
    with torch.device("meta"):
        blip = blip_base()
        models = {name: full_size(name, blip) for name in PAPER_COSTS}
    return {name: (parameters(model, name, blip), *products(model)) for name, model in models.items()}


def cost_table():
    rows, found = [], costs()
    whole_size, whole_macs, attention = found["blip"]
    for name, (size, macs, _) in found.items():
        rows.append([LABELS[name], f"{macs / 1e9:.2f}", PAPER_COSTS[name][0], f"{100 * macs / whole_macs:.1f}",
                     f"{size / 1e6:.2f}", PAPER_COSTS[name][1], f"{100 * size / whole_size:.1f}"])  # fmt: skip
    return [
        "**Table 1: cost of encoder and adaptive token learner (L = 6, d_w = 768), without classifier, at 224 px.** What the paper",
        "calls FLOPs are multiply-adds (MACs); ours are those of convolutions and matrix products, attention's included. Without",
        f"attention BLIP's would be {(whole_macs - attention) / 1e9:.2f} G: the paper's tool seems to have passed it over.",
        "",
        *markdown(["query model", "MACs, G", "paper", "% of BLIP", "parameters, M", "paper", "% of BLIP"], rows),
    ]


def median_ms(function, seconds=2.0, least=7):
    """Median time of function() in milliseconds, over `seconds` and at least `least` calls, after three that do not count."""
    for _ in range(3):
        function()
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


@torch.inference_mode()
def latencies(gallery=123_403):
    """-> {encoder: ms for one query image}, ms of the text encoder for one composed query, ms of ranking the gallery [N, 256]."""
    torch.manual_seed(0)
    blip, query = blip_base(), {}
    for name in PAPER_COSTS:
        model, pixels = full_size(name, blip), torch.randn(1, 3, 224, 224)
        query[name] = median_ms(lambda model=model, pixels=pixels: model(pixels))
    U = torch.randn(1, 6, blip.word_dim)

    def encode():
        return blip.encode_text(*isa.compose_query(blip, U, ["shows a red car in the snow instead"]))

    features, q = torch.nn.functional.normalize(torch.randn(gallery, blip.embed_dim), dim=1), encode()
    return query, median_ms(encode), median_ms(lambda: benchmarks.top_k(q, features, 50))


def jpeg_bytes(image, side=224):
    """Size of an image at side x side as JPEG of quality 75."""
    out = io.BytesIO()
    image.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=75)
    return len(out.getvalue())


def texture(side=224, seed=0):
    """Noise with the spectrum of photographs (amplitude falls as 1/frequency), grey mean and spread as theirs. -> PIL image."""
    noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((3, side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    image = np.fft.ifft2(noise / np.maximum(frequency, 1 / side)).real  # [3, S, S]
    image = 118 + 60 * (image - image.mean()) / image.std()
    return Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def drawn(seed=0):
    """A scene of the pocket world."""
    return drawing.draw(specs.random_scene(random.Random(seed), count=3))


def latency_table(threads):
    if threads:
        torch.set_num_threads(threads)
    query, text, ranking = latencies()
    rows = []
    for name, ms in query.items():
        numbers = f"{ms:.2f}", PAPER_COSTS[name][2], f"{text + ranking:.2f}", "3.58", f"{ms + text + ranking:.2f}"
        rows.append([LABELS[name], *numbers, f"{float(PAPER_COSTS[name][2]) + 3.58:.2f}"])
    rows.append(["CLIP ViT-L/14", NO_CLIP, "24.44", "", "3.60", "", "15.38"])  # printed so; 24.44 + 3.60 is 28.04
    sent = 6 * 768 * 2
    return [
        "**Table 17: latency of one query in ms.** Ours: batch 1, 224 px, float32, random weights; medians after a warm-up on",
        f"{machine(threads)}. Retrieval: BLIP's text encoder on the composed query ({text:.2f} ms) and the exact 50 best of",
        f"123,403 x 256 features, CIRCO's gallery ({ranking:.2f} ms). The paper does not name this table's machine.",
        "",
        *markdown(["query model", "query", "paper", "retrieval", "paper", "total", "paper"], rows),
        "",
        f"Sent for a query image: 6 words of 768 numbers in float16, {sent:,} bytes. The image itself, as a JPEG of 224 x 224",
        f"pixels and quality 75: {jpeg_bytes(drawn()):,} bytes for a drawn scene of the pocket world, enlarged;",
        f"{jpeg_bytes(texture()):,} bytes for coloured noise with the spectrum of photographs (1/f).",
    ]


# ---------------------------------------------------------------------------------------------- what LAR changes
def lar_table(seeds, images=500):
    """Losses compared beyond Table 8: headline metrics by type of modifier, and what the learnt sentences look like."""
    blip = blip_lite.load("pocket")
    benchmark = benchmarks.load("cirr", Path(evaluate.POCKET_DATA) / "cirr", "test1")
    paths = [benchmark.paths[name] for name in benchmark.gallery[:images]]
    v = features_of(blip, paths)
    kinds = [kind for kind in specs.EDIT_KINDS if kind != "replace"]  # that one is in pre-training alone
    columns = [(b, metric, kind) for b, metric in benchmarks.HEADLINE.items() for kind in kinds]
    scores, words = [], []
    for run, label in LAR_RUNS.items():
        there = [seed for seed in (seeds[:1] if run in ONE_SEED else seeds) if (folder(run, seed) / "isa.pt").exists()]
        results = measured(run, there, "test")
        scores.append([label, *(cell([value(r, b, f"{kind} {metric}") for r in results]) for b, metric, kind in columns)])
        looks = [look_at_words(folder(run, seed) / "isa.pt", blip, paths, v) for seed in there]
        words.append([label, *(cell([x[i] for x in looks]) for i in range(4)), looks[0][4] if looks else "–"])
    return [
        "**What LAR changes: results by type of modifier.** One change, two or three, a description of the target.",
        "",
        *markdown(["loss", *(f"{b} {metric}, {kind}" for b, metric, kind in columns)], scores),
        "",
        f"**What LAR changes: the learnt words** of {images} images of CIRR's test gallery. Rows of the word embedding have a mean",
        f"norm of {word_rows(blip)[1].norm(dim=1).mean():.2f}. True: the nearest word stands in its full caption. Own image:",
        "R@1 of the sentence alone, among these images.",
        "",
        *markdown(
            ["loss", "norm of a token", "cosine to the nearest word", "true, %", "own image, R@1", "nearest words, most often"],
            words,
        ),
    ]


@torch.no_grad()
def features_of(blip, paths):
    """BLIP's v [M, E] of some images: the same for every run, so computed once."""
    return torch.cat([blip.encode_image(blip.preprocess(Image.open(path))[None], cls_only=True)[0] for path in paths])


@torch.no_grad()
def look_at_words(checkpoint, blip, paths, v):
    """The tokens U [M, L, d_w] of some images with features v [M, E] -> their mean norm, mean cosine to the nearest word, percent
    of nearest words that the image's full caption holds, R@1 of the sentence among the images, the words nearest most often."""
    model, settings = train.load_query_model(checkpoint, blip)
    U, _ = evaluate.through_query_model(model, paths, "fp32", "cpu", 1)
    said, cosine = nearest_words(blip, U)  # [M, L] each
    captions = loads((paths[0].absolute().parents[2] / "captions.json").read_text())
    true = [word in captions[path.stem].split() for path, words in zip(paths, said, strict=True) for word in words]
    t = blip.encode_text(*isa.compose_query(blip, U, prompt=settings["prompt"]))
    found = (t @ v.T).argmax(dim=1) == torch.arange(len(paths))
    often = Counter(word for words in said for word in words).most_common(6)
    numbers = U.norm(dim=-1).mean().item(), cosine.mean().item(), 100 * statistics.mean(true), 100 * found.float().mean().item()
    return *numbers, " ".join(word for word, _ in often)


# ---------------------------------------------------------------------------------------------- figures 4-8
TILE, GAP = 64, 6


def open_retrieval(checkpoints, data=None):
    """{run: path of isa.pt} -> the pocket CIRR test set ready to be queried, {run: query model}, {run: rankings}."""
    for path in checkpoints.values():
        train.read_checkpoint(path)  # now: the world may have to be drawn
    args = evaluate.parse_args(["table", "--benchmark", "cirr", *(["--data", str(data)] if data else [])])
    (benchmark,) = evaluate.open_benchmarks(args)
    blip, precision = evaluate.open_blip(args)
    setting = evaluate.Setting(blip, benchmark, args, precision)
    models = {run: train.load_query_model(path, blip) for run, path in checkpoints.items()}
    rankings = {run: setting.rank(setting.query_features("isa", m, trained["prompt"]))[0] for run, (m, trained) in models.items()}
    return setting, {run: model for run, (model, _) in models.items()}, rankings


def first_of_each_kind(benchmark, condition):
    """The first query of each type of modifier for which condition(query) holds: a rule instead of a hand that picks."""
    kinds = sorted({query.kind for query in benchmark.queries}, key=[*specs.EDIT_KINDS, ""].index)
    found = [next((q for q in benchmark.queries if q.kind == kind and condition(q)), None) for kind in kinds]
    return [query for query in found if query]


def is_first(query, ranking):
    return ranking[query.id][0] in query.targets


CHOICE = {  # figure -> what it shows, and which queries: condition(query, {run: rankings})
    "fig4": ("cross-attention of the sentence tokens (Eq. 4) for 2, 6 and 10 tokens, and what they retrieve. The first query of "
             "each type of modifier", lambda q, r: True),
    "fig5": ("good retrievals. The first query of each type of modifier whose target is ranked first",
             lambda q, r: is_first(q, r["isa"])),
    "fig6": ("failures. The first query of each type of modifier whose target is not among the first ten",
             lambda q, r: not set(q.targets) & set(r["isa"][q.id][:10])),
    "fig7": ("2 and 6 tokens. The first query of each type of modifier whose target is ranked first with 6 and not with 2",
             lambda q, r: is_first(q, r["isa"]) and not is_first(q, r["tokens-2"])),
    "fig8": ("6 and 10 tokens. The first query of each type of modifier whose target is ranked first with 6 and not with 10",
             lambda q, r: is_first(q, r["isa"]) and not is_first(q, r["tokens-10"])),
}  # fmt: skip


def draw_figure(name, args, data=None, out="pocket/figures"):
    """pocket/figures/NAME.png from the runs of seed args.seeds[0] -> its path, and in words what it shows."""
    runs = FIGURE_RUNS[name]
    checkpoints = {run: folder(run, args.seeds[0]) / "isa.pt" for run in runs}
    setting, models, rankings = open_retrieval(checkpoints, data)
    told, condition = CHOICE[name]
    chosen = first_of_each_kind(setting.benchmark, lambda query: condition(query, rankings))
    if not chosen:
        raise ValueError(f"{name}: no query of {setting.benchmark.name} {setting.benchmark.split} fits its rule")
    draw = draw_attention if name in ("fig5", "fig6") else draw_lengths
    blocks = [draw(setting, models, rankings, query) for query in chosen]
    sheet = Image.new("RGB", (max(b.width for b in blocks) + GAP, sum(b.height + 3 * GAP for b in blocks)), "white")
    y = 0
    for block in blocks:
        sheet.paste(block, (GAP, y + 2 * GAP))
        y += block.height + 3 * GAP
    path = Path(out) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        sheet.save(file, optimize=True)
    return path, f"{told} in the pocket CIRR test set. Framed green: the target."


def picture(setting, name):
    return blip_lite.to_rgb(Image.open(setting.benchmark.paths[name])).resize((TILE, TILE))


def paste_query(sheet, setting, query):
    """Reference image and modifier in the left 2.5 tiles of a sheet."""
    sheet.paste(picture(setting, query.reference), (GAP, 16))
    text = textwrap.fill(f"that {query.captions[0]}", 24)
    ImageDraw.Draw(sheet).multiline_text((GAP, TILE + 22), text, fill="black", font_size=12)


def paste_retrieved(sheet, setting, query, names, x, y):
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        at = x + i * (TILE + GAP)
        if name in query.targets:
            pen.rectangle((at - 4, y - 4, at + TILE + 3, y + TILE + 3), fill=GREEN)
        sheet.paste(picture(setting, name), (at, y))


@torch.no_grad()
def look(setting, model, query):
    """-> grouping and cross-attention maps [L, H, W] and U [1, L, d_w] of a query's reference image."""
    image, device = Image.open(setting.benchmark.paths[query.reference]), setting.blip.temp.device
    with autocast(device, setting.precision):
        feature_map = model.encoder(light_encoders.preprocess(model.encoder, image)[None].to(device))
        grouping, cross = model.mapper.attention_maps(feature_map)
        return grouping[0].float().cpu(), cross[0].float().cpu(), model.mapper(feature_map)


def draw_lengths(setting, models, rankings, query, top=5):
    """One query under several token lengths, a line each: the cross-attention maps, then the best images. -> PIL image."""
    left, step, most = 2.5 * TILE, TILE + GAP, max(len(look(setting, m, query)[1]) for m in models.values())
    sheet = Image.new("RGB", (int(left + (most + top) * step + 3 * GAP), len(models) * (step + 16)), "white")
    pen = ImageDraw.Draw(sheet)
    paste_query(sheet, setting, query)
    image = picture(setting, query.reference)
    for line, (run, model) in enumerate(models.items()):
        y, (_, cross, _) = line * (step + 16) + 16, look(setting, model, query)
        pen.text((left, y - 15), f"{len(cross)} tokens", fill="black", font_size=11)
        for i, weights in enumerate(cross):
            sheet.paste(overlay(image, weights), (int(left + i * step), y))
        paste_retrieved(sheet, setting, query, rankings[run][query.id][:top], int(left + most * step + 2 * GAP), y)
    return sheet


@torch.no_grad()
def words_to_tokens(setting, U, modifier):
    """How much each word of the modifier attends to each sentence token in BLIP's text encoder: words, float [words, L].

    The mean over heads and layers, text mode, the composed query of inference.
    """
    blip = setting.blip
    words, mask = isa.compose_query(blip, U, [modifier])
    with autocast(words.device, setting.precision):
        attention = blip.text_encoder.attention_maps(words, mask)[0].float().mean(dim=(0, 1))  # [T, T]
    pieces = blip.tokenizer.tokenize(isa.continuation(modifier))
    first = words.shape[1] - 1 - len(pieces) - U.shape[1]  # u1; after it the tokens, the pieces and [SEP]
    after = first + U.shape[1]
    return pieces[1:], attention[after + 1 : after + len(pieces), first:after].cpu()


def draw_attention(setting, models, rankings, query, top=5):
    """One query of figures 5 and 6: maps of every token (grouping, then cross-attention), words to tokens, best images."""
    (run, model), *_ = models.items()
    grouping, cross, U = look(setting, model, query)
    pieces, attention = words_to_tokens(setting, U, query.captions[0])
    left, step, row = int(2.5 * TILE), TILE + GAP, 13
    right = left + len(cross) * step + 2 * GAP
    table_width = 84 + 22 * len(cross)
    height = max(2 * (step + 16) + 4, row * len(pieces) + 20)
    sheet = Image.new("RGB", (right + table_width + 3 * GAP + top * step, height), "white")
    pen = ImageDraw.Draw(sheet)
    paste_query(sheet, setting, query)
    image = picture(setting, query.reference)
    for line, (label, maps) in enumerate((("grouping (Eq. 1)", grouping), ("cross-attention (Eq. 4)", cross))):
        y = line * (step + 16) + 16
        pen.text((left, y - 15), f"{label} of u1 .. u{len(maps)}", fill="black", font_size=11)
        for i, weights in enumerate(maps):
            sheet.paste(overlay(image, weights), (left + i * step, y))
    for i in range(len(cross)):
        pen.text((right + 84 + 22 * i, 1), f"u{i + 1}", fill="black", font_size=11)
    for i, (piece, weights) in enumerate(zip(pieces, attention, strict=True)):
        y = 16 + row * i
        pen.text((right, y - 1), piece[:13], fill="black", font_size=11)
        for j, weight in enumerate(weights.tolist()):
            shade = int(255 * (1 - weight / float(attention.max())))
            pen.rectangle((right + 84 + 22 * j, y, right + 84 + 22 * j + 20, y + row - 2), fill=(shade, shade, 255))
    paste_retrieved(sheet, setting, query, rankings[run][query.id][:top], right + table_width + 3 * GAP, 16)
    return sheet


# ---------------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(ALL)} or all; `commands` before them: print, do not run")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every trained row; one for a quick look")
    p.add_argument("--threads", type=int, default=0, help="CPU threads of a run (0 = all)")
    p.add_argument("--as-is", action="store_true", help="run nothing: print what is there")
    p.add_argument("--imagenet", action="store_true", help="also the rows that start from ImageNet weights (downloads, weights/)")
    p.add_argument("--out", help="also write what is printed to this file (all: RESULTS.md)")
    args = p.parse_args(argv)
    args.commands = args.names[0] == "commands"
    args.names = args.names[args.commands :]
    args.all = "all" in args.names
    unknown = [name for name in args.names if name not in (*ALL, "all")]
    if unknown or not args.names:
        p.error(f"there is no table or figure {' '.join(unknown)}; choose from {' '.join(ALL)} all")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds) or args.threads < 0:
        p.error("--seeds and --threads have to be at least 0, and no seed twice")
    args.names = list(ALL) if args.all else list(dict.fromkeys(args.names))
    args.out = args.out or ("RESULTS.md" if args.all else None)
    return args


def main(args):
    if args.out:
        check_output(args.out)
    runs = needed(args.names, args.seeds, args.imagenet)
    fingerprint = blip_lite.load("pocket").fingerprint if runs else None
    if args.commands:
        for (run, seed), splits in runs.items():
            commands = missing(run, seed, splits, fingerprint, args.threads)
            if commands:
                print(" && ".join(map(shown, commands)))
        return []
    failures = run_missing(args.names, args, fingerprint) if runs and not args.as_is else []
    lines = preamble(args) if args.all else []
    for name in args.names:
        made = section(name, args)
        print("\n".join(made), flush=True)
        lines += made
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out) as file:
            file.write("\n".join(lines).encode())
        print(f"wrote {args.out}")
    return failures


if __name__ == "__main__":
    interrupt_on_signals()
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal, without nohup
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    try:
        failures = main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"tables.py: {error}")
    except KeyboardInterrupt as interrupt:
        exit_interrupted(interrupt, "tables.py: interrupted; the same command goes on from here")
    finally:
        end_workers()
    if failures:
        sys.exit(f"tables.py: {len(failures)} failed, the first: {failures[0]}")
