"""Recall@K and mAP@K as CIRR, FashionIQ and CIRCO define them.

For one query with n ground truths, and hit(i) = 1 if the i-th name of its ranking is one of them, else 0:

    precision@i = (hit(1) + ... + hit(i)) / i
    AP@K        = sum over i <= K of hit(i) * precision@i, divided by min(K, n)

mAP@K is the mean of AP@K over the queries. Recall@K is the share of queries whose one target is among the
first K names. All that else differs between the benchmarks is which names count (`counted`) and which K.
"""

from dataclasses import replace

HEADLINE = {"cirr": "R@1", "fashioniq": "R@10", "circo": "mAP@5"}  # where there is room for one


def recall(queries, lists, cutoffs, label="R"):
    """Lists of names in query order -> {"R@K": percent} for each K of `cutoffs`."""
    ranked = list(zip(queries, lists, strict=True))
    return {f"{label}@{k}": _percent([query.targets[0] in names[:k] for query, names in ranked])
            for k in cutoffs}


def average_precision(names, targets, k):
    """AP@K of one ranking, in 0..1. The divisor is CIRCO's: a perfect list reaches 1 for any K."""
    hits, total = 0, 0.0
    for i, name in enumerate(names[:k], 1):
        if name in targets:
            hits += 1
            total += hits / i
    return total / min(k, len(targets))


def score(benchmark, rankings, subset_rankings=None):
    """Rankings -> metrics in percent, as in the paper's Tables 2-4.

    CIRR: R@1/5/10/50, their mean Avg, and Rs@1/2/3 among the subset, from `subset_rankings` or else from
    the members in `rankings`; top-50 lists then give a lower bound, as a target they lack ranks last.
    FashionIQ: R@10/50. CIRCO: mAP@5/10/25/50, their mean Avg, and R@5/10/25/50 of the single target.
    Raises ValueError for a split without targets, a query without ranking and a name that is ranked twice.
    """
    queries = benchmark.queries
    if not all(query.targets for query in queries):
        raise ValueError(f"{benchmark.name} split {benchmark.split} has no ground truth; "
                         "write a submission instead")
    lists = counted(benchmark, rankings)
    if benchmark.name == "fashioniq":
        return recall(queries, lists, (10, 50))
    if benchmark.name == "cirr":
        result = recall(queries, lists, (1, 5, 10, 50))
        result["Avg"] = sum(result.values()) / 4
        subset_rankings = rankings if subset_rankings is None else subset_rankings
        subsets = counted(benchmark, subset_rankings, "recall_subset")
        return result | recall(queries, subsets, (1, 2, 3), "Rs")
    result = {f"mAP@{k}": _percent([average_precision(names, query.targets, k)
                                    for query, names in zip(queries, lists, strict=True)])
              for k in (5, 10, 25, 50)}
    mean = sum(result.values()) / 4
    return result | recall(queries, lists, (5, 10, 25, 50)) | {"Avg": mean}


def counted(benchmark, rankings, metric="recall"):
    """Rankings -> lists of the names that count, in query order; raises ValueError as `score` does.

    CIRR's leave out the reference image or, for "recall_subset", all but the members of the subset.
    """
    absent = [query.id for query in benchmark.queries if query.id not in rankings]
    if absent:
        raise ValueError(f"{len(absent)} queries have no ranking (first: {', '.join(absent[:3])}): "
                         "rank every query")
    lists = []
    for query in benchmark.queries:
        names = rankings[query.id]
        if len(set(names)) < len(names):
            raise ValueError(f"the ranking of query {query.id} holds a name twice: rank each image once")
        if metric == "recall_subset":
            names = [name for name in names if name in query.subset]
        elif benchmark.name == "cirr":
            names = [name for name in names if name != query.reference]
        lists.append(names)
    return lists


def score_by_kind(benchmark, rankings, subset_rankings=None):
    """`score` for each kind of modifier: dict kind -> metrics, empty where annotations name no kinds."""
    kinds = sorted({query.kind for query in benchmark.queries} - {""})
    return {kind: score(replace(benchmark, queries=[q for q in benchmark.queries if q.kind == kind]),
                        rankings, subset_rankings) for kind in kinds}


def aspect_scores(benchmark, rankings):
    """CIRCO's mAP@10 for each semantic aspect, as its server reports it; a query may have several."""
    aspects = sorted({aspect for query in benchmark.queries for aspect in query.aspects})
    return {aspect: score(replace(benchmark, queries=[q for q in benchmark.queries if aspect in q.aspects]),
                          rankings)["mAP@10"] for aspect in aspects}


def average(results):
    """Mean of each metric over several results: FashionIQ's over dress, shirt and toptee."""
    if not results or any(result.keys() != results[0].keys() for result in results):
        raise ValueError("average needs at least one result, and the same metrics in all")
    return {metric: sum(result[metric] for result in results) / len(results) for metric in results[0]}


def _percent(values):
    return 100 * sum(values) / len(values)
