"""Prediction files, in the formats of the test servers of CIRR and CIRCO."""

import json
from pathlib import Path

from benchmarks.metrics import counted
from benchmarks.readers import coco_name, fields, plain_name, read_json, remedy, typed
from plumbing.files import replacing

SUBMITTED = {"recall": 50, "recall_subset": 3}  # names per query that the servers accept


def predictions(benchmark, rankings, metric="recall"):
    """Rankings -> the JSON document for the test server, as a dict; longer rankings are cut.

    CIRR: {"version": "rc2", "metric": metric, pairid: names}. CIRCO: {id: ids as ints}. FashionIQ,
    which has no server: {category: {id: names}}; join the categories with `|`. Others: {id: names}.
    Raises ValueError for a ranking that is too short, and as `score` does.
    """
    images, document = len(benchmark.gallery) - (benchmark.name == "cirr"), {}
    for query, names in zip(benchmark.queries, counted(benchmark, rankings, metric), strict=True):
        wanted = min(SUBMITTED[metric], len(query.subset) if metric == "recall_subset" else images)
        if len(names) < wanted:
            raise ValueError(f"the ranking of query {query.id} has {len(names)} names and {metric} "
                             f"needs {wanted}: rank with a larger k")
        document[query.id] = names[:SUBMITTED[metric]]
    if benchmark.name == "cirr":
        return {"version": "rc2", "metric": metric} | document
    if benchmark.name == "fashioniq":
        return {benchmark.category: document}
    if benchmark.name == "circo":
        return {key: [int(name) for name in names] for key, names in document.items()}
    return document


def write_predictions(path, document):
    with replacing(Path(path)) as file:
        file.write(json.dumps(document, separators=(",", ":")).encode())  # CIRR's limit is 5 MB


def read_predictions(path, benchmark, metric="recall"):
    """A file in the format of `predictions` -> rankings; nothing is dropped or cut.

    Raises FileNotFoundError, and ValueError for another metric, version, category or set of
    queries, and a list that is empty, repeats a name or holds one that is not to be ranked.
    """
    ids, gallery = {query.id for query in benchmark.queries}, set(benchmark.gallery)
    convert, rankings = coco_name if benchmark.name == "circo" else plain_name, {}
    with remedy(f"write it for {benchmark.name} {benchmark.split} and {metric}, each image once"):
        document = read_json(Path(path), dict)
        for key, wanted in {"version": "rc2", "metric": metric}.items():
            if benchmark.name == "cirr" and document.pop(key, None) != wanted:
                raise ValueError(f'{path}: "{key}" should be "{wanted}"')
        if benchmark.name == "fashioniq":
            document = fields(document, path, **{benchmark.category: dict})[benchmark.category]
        for keys, problem in ((ids - document.keys(), "missing"),
                              (document.keys() - ids, "not in this split")):
            if keys:
                first = ", ".join(sorted(keys)[:3])
                raise ValueError(f"{path}: {len(keys)} queries are {problem} (first: {first})")
        for query in benchmark.queries:
            where = f"{path}, query {query.id}"
            names = [convert(name, where) for name in typed(document[query.id], list, where)]
            allowed = query.subset if metric == "recall_subset" else gallery
            unknown = [name for name in names if allowed and name not in allowed]
            if unknown:
                raise ValueError(f"{where}: {unknown[0]!r:.80} is not among the images to rank")
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{where}: the list {'repeats a name' if names else 'is empty'}")
            rankings[query.id] = names
    return rankings
