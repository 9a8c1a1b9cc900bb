"""Prediction files, in the formats of the test servers of CIRR and CIRCO."""

import json
from pathlib import Path

from benchmarks.metrics import counted
from benchmarks.readers import coco_name, get, plain_name, read_json, typed
from plumbing.files import replacing

SUBMITTED = {"recall": 50, "recall_subset": 3}  # names per query that the servers accept


def predictions(benchmark, rankings, metric="recall"):
    """Rankings -> the JSON document for the test server, as a dict; longer rankings are cut.

    CIRR: {"version": "rc2", "metric": metric, pairid: names}: for "recall" 50 without the reference, for
    "recall_subset" 3 of the group. CIRCO: {id: 50 ids as ints}. FashionIQ, which has no server:
    {category: {id: 50 names}}; join the categories with `|`.
    Raises ValueError for a ranking that is too short, and as `score` does.
    """
    _check_metric(benchmark, metric)
    room, document = len(benchmark.gallery) - (benchmark.name == "cirr"), {}
    for query, names in zip(benchmark.queries, counted(benchmark, rankings, metric), strict=True):
        wanted = min(SUBMITTED[metric], len(query.subset) if metric == "recall_subset" else room)
        if len(names) < wanted:
            raise ValueError(f"the ranking of query {query.id} has {len(names)} names and {metric} needs "
                             f"{wanted}: rank with a larger k")
        document[query.id] = names[:SUBMITTED[metric]]
    if benchmark.name == "cirr":
        return {"version": "rc2", "metric": metric} | document
    if benchmark.name == "fashioniq":
        return {benchmark.category: document}
    return {key: [int(name) for name in names] for key, names in document.items()}


def write_predictions(path, document):
    """Write a document of `predictions`; a reader sees the old file or the new one, never a part."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist: create it, or choose another file name")
    with replacing(path) as file:
        file.write(json.dumps(document, separators=(",", ":")).encode())  # CIRR's limit is 5 MB


def read_predictions(path, benchmark, metric="recall"):
    """A file in the format of `predictions` -> rankings; nothing is dropped or cut.

    Raises FileNotFoundError, and ValueError for another metric, version or category, for a missing or
    unexpected query, and for a list that is empty, repeats a name or holds one that is not in the gallery
    (recall_subset: the group; CIRCO without gallery: the COCO ids).
    """
    _check_metric(benchmark, metric)
    path = Path(path)
    document = read_json(path, dict)
    if benchmark.name == "cirr":
        for key, wanted in (("version", "rc2"), ("metric", metric)):
            if document.pop(key, None) != wanted:
                raise ValueError(f'{path}: "{key}" should be "{wanted}": '
                                 "pass the file made for this metric and split")
    if benchmark.name == "fashioniq":
        document = get(document, benchmark.category, dict, f"{path}")
    ids = {query.id for query in benchmark.queries}
    for problem, keys in (("missing", ids - document.keys()), ("not in this split", document.keys() - ids)):
        if keys:
            raise ValueError(f"{path}: {len(keys)} queries are {problem} (first: "
                             f"{', '.join(sorted(keys)[:3])}): predict all of {benchmark.name} "
                             f"{benchmark.split}")
    convert = coco_name if benchmark.name == "circo" else plain_name
    gallery, rankings = set(benchmark.gallery), {}
    for query in benchmark.queries:
        where = f"{path}, query {query.id}"
        names = [convert(name, where) for name in typed(document[query.id], list, where)]
        allowed = set(query.subset) if metric == "recall_subset" else gallery
        unknown = [name for name in names if allowed and name not in allowed]
        if unknown:
            raise ValueError(f"{where}: {unknown[0]!r:.80} is not among the images to rank: "
                             "predict names of this split")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{where}: the list {'repeats a name' if names else 'is empty'}: "
                             "rank each image once")
        rankings[query.id] = names
    return rankings


def _check_metric(benchmark, metric):
    if metric not in SUBMITTED or (metric == "recall_subset" and benchmark.name != "cirr"):
        raise ValueError(f"unknown metric {metric!r}: use recall, or for CIRR also recall_subset")
