"""Recall@K and mAP@K as CIRR, FashionIQ and CIRCO define them."""

from dataclasses import replace

HEADLINE = {"cirr": "R@1", "fashioniq": "R@10", "circo": "mAP@5"}  # the one metric, where there is room for one


def score(benchmark, rankings, subset_rankings=None):
    """Rankings -> metrics in percent, as in the paper's Tables 2-4.

    CIRR: R@1/5/10/50 and their mean Avg, without the reference; Rs@1/2/3 from `subset_rankings`, or else from the
    members that occur in `rankings`: a target that is absent there ranks last, so top-50 lists give a lower bound.
    FashionIQ: R@10/50. CIRCO: mAP@5/10/25/50 and their mean Avg over all ground truths; R@5/10/25/50 of the target.
    Raises ValueError for a split without targets, a query without ranking and a name that occurs twice in one.
    """
    queries = benchmark.queries
    if not all(query.targets for query in queries):
        raise ValueError(f"{benchmark.name} split {benchmark.split} has no ground truth; write a submission instead")
    lists = _lists(benchmark, rankings)
    if benchmark.name == "fashioniq":
        return {f"R@{k}": _recall(queries, lists, k) for k in (10, 50)}
    if benchmark.name == "cirr":
        result = {f"R@{k}": _recall(queries, lists, k) for k in (1, 5, 10, 50)}
        result["Avg"] = sum(result.values()) / 4
        subsets = _lists(benchmark, rankings if subset_rankings is None else subset_rankings, "recall_subset")
        return result | {f"Rs@{k}": _recall(queries, subsets, k) for k in (1, 2, 3)}
    pairs = list(zip(lists, queries, strict=True))
    result = {f"mAP@{k}": _percent(average_precision(names, query.targets, k) for names, query in pairs)
              for k in (5, 10, 25, 50)}
    average_map = sum(result.values()) / 4
    return result | {f"R@{k}": _recall(queries, lists, k) for k in (5, 10, 25, 50)} | {"Avg": average_map}


def aspect_scores(benchmark, rankings):
    """CIRCO: mAP@10 over the queries of each semantic aspect, as the server reports it; a query may have several."""
    by_aspect = {aspect: [query for query in benchmark.queries if aspect in query.aspects]
                 for aspect in sorted({aspect for query in benchmark.queries for aspect in query.aspects})}
    return {aspect: score(replace(benchmark, queries=queries), rankings)["mAP@10"]
            for aspect, queries in by_aspect.items()}


def score_by_kind(benchmark, rankings, subset_rankings=None):
    """`score` on the queries of each type of modifier -> dict kind -> metrics; {} where the annotations name none."""
    kinds = sorted({query.kind for query in benchmark.queries} - {""})
    return {kind: score(replace(benchmark, queries=[query for query in benchmark.queries if query.kind == kind]),
                        rankings, subset_rankings) for kind in kinds}


def average(results):
    """Mean of each metric over several results: FashionIQ's average row over dress, shirt and toptee."""
    if not results or any(result.keys() != results[0].keys() for result in results):
        raise ValueError("average needs at least one result, and the same metrics in all")
    return {metric: sum(result[metric] for result in results) / len(results) for metric in results[0]}


def average_precision(names, targets, k):
    """AP@K = sum over ranks i <= K that hold a ground truth of precision@i, divided by min(K, ground truths), in 0..1.

    The divisor is CIRCO's: with more truths than K a perfect list still reaches 1.
    """
    hits, total = 0, 0.0
    for i, name in enumerate(names[:k], 1):
        if name in targets:
            hits += 1
            total += hits / i
    return total / min(k, len(targets))


def _recall(queries, lists, k):
    return _percent(query.targets[0] in names[:k] for query, names in zip(queries, lists, strict=True))


def _percent(values):
    values = list(values)
    return 100 * sum(values) / len(values)


def _lists(benchmark, rankings, metric="recall"):
    """The names that count, in query order: CIRR's without the reference, or only the members of the subset."""
    absent = [query.id for query in benchmark.queries if query.id not in rankings]
    if absent:
        raise ValueError(f"{len(absent)} queries have no ranking (first: {', '.join(absent[:3])}): rank every query")
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
