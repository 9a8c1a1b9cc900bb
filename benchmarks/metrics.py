"""Recall@K and mAP@K as CIRR, FashionIQ and CIRCO define them.

For a query with n ground truths, let hit(i) = 1 if the i-th name of its ranking is one of them.

    precision@i = (hit(1) + ... + hit(i)) / i
    AP@K        = sum over i <= K of hit(i) * precision@i, divided by min(K, n)

mAP@K is the mean of AP@K over the queries. Recall@K is the share of queries whose first ground
truth is among the first K names that count: see `counted`.
"""

from dataclasses import replace

CUTOFFS = {"cirr": (1, 5, 10, 50), "fashioniq": (10, 50), "circo": (5, 10, 25, 50)}  # K
HEADLINE = {"cirr": "R@1", "fashioniq": "R@10", "circo": "mAP@5"}  # where there is room for one
SUBSET = ("Rs@1", "Rs@2", "Rs@3")  # CIRR's, among the five others of a group
LEFT_OUT = {"cirr": SUBSET, "circo": tuple(f"R@{k}" for k in CUTOFFS["circo"])}  # of tables


def average_precision(names, targets, k):
    """AP@K of one ranking, in 0..1, which a perfect list reaches for any K."""
    hits, total = 0, 0.0
    for i, name in enumerate(names[:k], 1):
        if name in targets:
            hits += 1
            total += hits / i
    return total / min(k, len(targets))


def recall(queries, lists, cutoffs, label="R"):
    found = [names.index(query.targets[0]) for query, names in zip(queries, lists, strict=True)
             if query.targets[0] in names]  # places, from 0
    return {f"{label}@{k}": 100 * sum(place < k for place in found) / len(lists) for k in cutoffs}


def score(benchmark, rankings, subset_rankings=None):
    """Rankings -> metrics in percent, as in the paper's Tables 2-4.

    Avg is the mean of CIRR's R@K or CIRCO's mAP@K. CIRR's Rs@K is R@K among the subset: from
    `subset_rankings`, or else from the members in `rankings`, a lower bound if lists are short.
    Raises ValueError for a split without targets, a missing ranking and a name ranked twice.
    """
    name, queries = benchmark.name, benchmark.queries
    if not all(query.targets for query in queries):
        raise ValueError(f"{name} split {benchmark.split} has no ground truth; write a submission "
                         "instead")
    lists = counted(benchmark, rankings)
    recalls = recall(queries, lists, CUTOFFS[name])
    if name == "fashioniq":
        return recalls
    if name == "cirr":
        subsets = rankings if subset_rankings is None else subset_rankings
        subsets = recall(queries, counted(benchmark, subsets, "recall_subset"), (1, 2, 3), "Rs")
        return recalls | {"Avg": sum(recalls.values()) / len(recalls)} | subsets
    maps = {f"mAP@{k}": 100 * sum(average_precision(names, query.targets, k) for query, names
                                  in zip(queries, lists, strict=True)) / len(queries)
            for k in CUTOFFS[name]}
    return maps | recalls | {"Avg": sum(maps.values()) / len(maps)}


def counted(benchmark, rankings, metric="recall"):
    """Rankings -> a list a query: CIRR's without the reference, "recall_subset" of the subset."""
    absent = [query.id for query in benchmark.queries if query.id not in rankings]
    if absent:
        raise ValueError(f"{len(absent)} queries have no ranking (first: {', '.join(absent[:3])}): "
                         "rank every query")
    lists = []
    for query in benchmark.queries:
        names = rankings[query.id]
        if len(set(names)) < len(names):
            raise ValueError(f"query {query.id}: a name is ranked twice: rank each image once")
        if metric == "recall_subset":
            names = [name for name in names if name in query.subset]
        elif benchmark.name == "cirr" and query.reference in names:
            names = [name for name in names if name != query.reference]
        lists.append(names)
    return lists


def score_by_kind(benchmark, rankings, subset_rankings=None):
    """`score` for each kind of modifier, {} where annotations name none."""
    parts = _split(benchmark, lambda query: {query.kind} - {""})
    return {kind: score(part, rankings, subset_rankings) for kind, part in parts.items()}


def aspect_scores(benchmark, rankings):
    """CIRCO's mAP@10 for each semantic aspect, as its server reports."""
    parts = _split(benchmark, lambda query: set(query.aspects))
    return {aspect: score(part, rankings)["mAP@10"] for aspect, part in parts.items()}


def _split(benchmark, labels):
    """{label: the benchmark with only the queries that have it}; a query may have several."""
    found = sorted(set().union(*map(labels, benchmark.queries)))
    return {label: replace(benchmark, queries=[q for q in benchmark.queries if label in labels(q)])
            for label in found}


def average(results):
    """Mean of each metric, for FashionIQ over dress, shirt and toptee."""
    return {metric: sum(r[metric] for r in results) / len(results) for metric in results[0]}
