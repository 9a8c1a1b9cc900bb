"""paper/results.json: what was measured, of every run, seed and metric; RESULTS.md shows a part.

    {"isa-0": {"options": "", "blip": "3f9c...", "machine": "2 cores ...", "seconds": 93,
               "test": {"cirr": {"all": {"R@1": 60.61, ...}, "one": {...}}, "fashioniq": ...},
               "val": ...}, ...}

Percent; parts are "all", FashionIQ's categories and the types of modifier. "words": see lar.py.
"""

import json
import re
from pathlib import Path

from paper.numbers import METHODS, RUNS
from paper.runs import FOLDERS, clip_fingerprint, evaluation, folder, on_clip, read_results, trained
from plumbing.files import replacing

FILE = Path(__file__).with_name("results.json")


def run_of(name):
    return name if name in METHODS else name.rpartition("-")[0]


def options_of(run):
    return " ".join(RUNS.get(run) or METHODS.get(run, ()))


def local(run, seed, split):
    """What this folder's run has -> (its BLIP, {method: {benchmark: {part: {metric: %}}}}), or
    None; a run with other options than those of runs.md does not count."""
    path = evaluation(run, seed, split)[1]
    if not path.exists():
        return None
    content, found = read_results(path), {}
    blip = content["settings"].get("blip_fingerprint")
    if run in RUNS and trained(run, seed, blip) == "other":
        return None
    for benchmark, methods in content["results"].items():
        for method, parts in methods.items():
            rounded = {part: {metric: round(pair[0], 2) for metric, pair in row.items()}
                       for part, row in parts.items()}
            found.setdefault(method, {})[benchmark] = rounded
    return blip, found


def published():
    """The entries of results.json whose options are still those of runs.md."""
    entries = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {name: entry for name, entry in entries.items()
            if entry["options"] == options_of(run_of(name))}


def collect(seeds, machine, fingerprint):
    """The entries of results.json, made anew where this folder has a run; those of another BLIP
    than the one with this fingerprint (or of another pocket CLIP) are dropped."""
    entries = published()
    for run in (*RUNS, *METHODS):
        for seed in seeds if run in RUNS else [None]:
            splits = {split: local(run, seed, split) for split in ("test", "val")}
            splits = {split: found for split, found in splits.items() if found}
            if splits:
                log = folder(run, seed) / "log.txt"
                times = re.findall(r"after (\d+) s", log.read_text()) if log.exists() else []
                (blip, _), *_ = splits.values()
                entries[folder(run, seed).name] = {
                    "options": options_of(run), "blip": blip, "machine": machine,
                    "seconds": sum(map(int, times)),
                    **{split: methods for split, (_, methods) in splits.items()}}
    return {name: entry for name, entry in entries.items()
            if entry["blip"] == (clip_fingerprint() if on_clip(run_of(name)) else fingerprint)}


def write(entries, path):
    """Write a results.json, a line for each run and split."""
    lines = []
    for name in sorted(entries):
        parts = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries[name].items())
        lines.append(f"{json.dumps(name)}: {{" + ",\n ".join(parts) + "}")
    with replacing(path) as file:
        file.write(("{" + ",\n".join(lines) + "}\n").encode())


def measured(ours, seeds, split):
    """Results of a run or a method, for each seed that has some: of this folder's runs, else of
    results.json.

    -> a list of {benchmark: {part: {metric: %}}}.
    """
    run, kept, found = FOLDERS.get(ours, ours), published(), []
    method = ours.removeprefix("clip ") if ours in FOLDERS else "isa"
    for seed in [None] if ours in FOLDERS else seeds if ours in RUNS else []:
        here = local(run, seed, split)
        methods = here[1] if here else kept.get(folder(run, seed).name, {}).get(split, {})
        found.append(methods.get(method))
    return [result for result in found if result]
