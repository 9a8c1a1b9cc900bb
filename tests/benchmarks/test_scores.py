"""Metrics worked by hand, prediction files, and the printed table."""

import json
import os
import random

import pytest
from trees import bench, circo_tree, cirr_tree, refused, write

import benchmarks
from benchmarks import Query
from benchmarks.report import print_table, summarize


def test_cirr_by_hand():
    gallery = ["r", *(f"g{i}" for i in range(1, 61))]
    subset = ["g3", "g7", "g12", "g30", "g55"]
    benchmark = bench("cirr", [
        Query(str(i), "r", [""], [target], subset, kind="" if i < 3 else "one")
        for i, target in enumerate(["g3", "g7", "g12", "g55"])], gallery)

    def score(names, subsets=None):
        return benchmarks.score(benchmark, dict.fromkeys("0123", names),
                                subsets and dict.fromkeys("0123", subsets))

    # Without r: g60 is 1st, g55 6th, g12 49th, g7 54th, g3 58th.
    order = ["r", *(f"g{i}" for i in range(60, 0, -1))]
    result = score(order)
    assert list(result.items()) == [("R@1", 0), ("R@5", 0), ("R@10", 25), ("R@50", 50),
                                    ("Avg", 18.75), ("Rs@1", 25), ("Rs@2", 25), ("Rs@3", 50)]
    assert all(type(value) is float for value in result.values())
    kinds = benchmarks.score_by_kind(benchmark, dict.fromkeys("0123", order))
    assert list(kinds) == ["one"] and kinds["one"]["R@10"] == 100 and kinds["one"]["R@5"] == 0
    # The reference at rank 5 does not push the 6th name out of R@5; without it all is the same.
    early = ["g60", "g59", "g58", "g57", "r", "g55", *(f"g{i}" for i in range(54, 0, -1))]
    for ranking in (early, [name for name in early if name != "r"]):
        assert score(ranking)["R@5"] == 25
    # Members that a short list lacks come last: of the four targets only g12 is found, after g30.
    assert [score(["g1", "g30", "g12"])[f"Rs@{k}"] for k in (1, 2, 3)] == [0, 25, 25]
    # A subset ranking counts instead, restricted to the members.
    apart = score(order, ["r", "g9", "g7", "g3", "g12"])
    assert [apart[f"Rs@{k}"] for k in (1, 2, 3)] == [25, 50, 75] and apart["R@10"] == 25


def test_fashioniq_by_hand():
    gallery = ["r", *(f"g{i}" for i in range(1, 61))]
    queries = [Query(str(i), "r", [""], [f"g{n}"]) for i, n in enumerate((9, 10, 49, 50))]
    # The reference keeps rank 1.
    rankings = {str(i): gallery for i in range(4)}
    result = benchmarks.score(bench("fashioniq", queries, gallery, "dress"), rankings)
    assert result == {"R@10": 25, "R@50": 75}
    others = [{"R@10": 50, "R@50": 75}, {"R@10": 0, "R@50": 0}]
    assert benchmarks.average([result, *others]) == {"R@10": 25, "R@50": 50}


def test_circo_by_hand():
    # Two truths at ranks 1 and 4: (1/1 + 2/4) / min(K, 2) = 3/4. R@K's is targets[0], at rank 4.
    # Seven truths, hits at 2 and 6: AP@5 = (1/2) / 5, AP@10 = (1/2 + 2/6) / 7.
    queries = [Query("0", "1", [""], ["40", "10"], aspects=["negation", "addition"]),
               Query("1", "2", [""], [str(i) for i in range(21, 28)], aspects=["addition"])]
    rankings = {"0": ["10", "1", "30", "40", "50"],
                "1": ["2", "22", "3", "4", "5", "21", "6", "7"]}
    result = benchmarks.score(bench("circo", queries), rankings)
    maps = {f"mAP@{k}": 50 * (3 / 4 + (1 / 10 if k == 5 else 5 / 42)) for k in (5, 10, 25, 50)}
    recalls = {"R@5": 50, "R@10": 100, "R@25": 100, "R@50": 100}
    wanted = maps | recalls | {"Avg": sum(maps.values()) / 4}
    assert result == pytest.approx(wanted) and list(result) == list(wanted)
    aspects = benchmarks.aspect_scores(bench("circo", queries), rankings)
    assert list(aspects) == ["addition", "negation"]
    assert aspects == pytest.approx({"addition": result["mAP@10"], "negation": 75})
    # The divisor: six truths, the first five right, is perfect at 5 and 5/6 at 10.
    assert benchmarks.average_precision("abcde", "abcdef", 5) == 1
    assert benchmarks.average_precision("abcde", "abcdef", 10) == pytest.approx(5 / 6)


def test_score_refuses(tmp_path):
    benchmark = benchmarks.load("circo", circo_tree(tmp_path), "test")
    with refused(ValueError, "circo", "test", "no ground truth; write a submission instead"):
        benchmarks.score(benchmark, {"0": ["1"]})
    benchmark = benchmarks.load("circo", tmp_path)
    for second, words in [({}, ["1 queries have no ranking", "first: 1"]),
                          ({"1": ["30", "2", "30"]}, ["query 1", "twice"])]:
        with refused(ValueError, *words):
            benchmarks.score(benchmark, {"0": ["30"]} | second)
    rankings = {"0": ["30"], "1": ["1"], "other": []}
    assert benchmarks.score(benchmark, rankings)["mAP@5"] == 25
    assert benchmarks.score_by_kind(benchmark, rankings) == {}
    benchmark.queries[1].targets.clear()
    with refused(ValueError, "no ground truth"):
        benchmarks.score(benchmark, rankings)
    cirr = benchmarks.load("cirr", cirr_tree(tmp_path / "c"))
    with refused(ValueError, "1 queries have no ranking", "first: 40"):
        benchmarks.score(cirr, {"12": [], "40": []}, {"12": []})


def big(name, queries=3, gallery=80):
    names = [f"img{i}" if name != "circo" else str(i) for i in range(gallery)]
    asked = [Query(str(10 + i), names[i], [""], [names[i + 1]],
                   names[1 + i:6 + i] if name == "cirr" else None) for i in range(queries)]
    benchmark = bench(name, asked, names, "shirt" if name == "fashioniq" else None)
    return benchmark, {q.id: random.Random(int(q.id)).sample(names, gallery) for q in asked}


@pytest.mark.parametrize("name, metric", [
    ("cirr", "recall"), ("cirr", "recall_subset"), ("fashioniq", "recall"), ("circo", "recall")])
def test_round_trip(tmp_path, name, metric):
    benchmark, rankings = big(name)
    path, wanted = tmp_path / "p.json", {}
    benchmarks.write_predictions(path, benchmarks.predictions(benchmark, rankings, metric))
    for q in benchmark.queries:
        names = [n for n in rankings[q.id] if name != "cirr" or n != q.reference]
        subset = [n for n in names if n in (q.subset or ())]
        wanted[q.id] = names[:50] if metric == "recall" else subset[:3]
    assert benchmarks.read_predictions(path, benchmark, metric) == wanted
    if name == "circo":
        wanted = {key: [int(n) for n in names] for key, names in wanted.items()}
    head = {"version": "rc2", "metric": metric} if name == "cirr" else {}
    wanted = {"shirt": wanted} if name == "fashioniq" else head | wanted
    assert json.loads(path.read_text()) == wanted and b" " not in path.read_bytes()  # 5 MB at most
    # Rankings that are too short are refused, unless a small gallery has no more to give.
    names = rankings["11"][:49] if metric == "recall" else benchmark.queries[1].subset[:2]
    with refused(ValueError, "query 11", "names", "rank with a larger k"):
        benchmarks.predictions(benchmark, rankings | {"11": names}, metric)
    small = benchmarks.predictions(*big(name, gallery=12))
    counts = {len(names) for names in small.get("shirt", small).values() if type(names) is list}
    assert counts == {11 if name == "cirr" else 12}


GOOD = {"10": ["img3"], "11": ["img4"], "12": ["img5"]}
HEAD = {"version": "rc2", "metric": "recall"}


SUBSET = HEAD | {"metric": "recall_subset"}


@pytest.mark.parametrize("metric, content, words", [
    ("recall", HEAD | GOOD | {"11": ["img4", "img5", "img4"]}, ["query 11", "repeats"]),
    ("recall", HEAD | GOOD | {"11": []}, ["query 11", "empty"]),
    ("recall", HEAD | GOOD | {"11": ["img4", "img99"]}, ["query 11", "img99"]),
    ("recall", HEAD | GOOD | {"11": "img4"}, ["query 11", "list"]),
    ("recall", HEAD | GOOD | {"11": [4]}, ["query 11", "expected str"]),
    ("recall", HEAD | GOOD | {"99": [""], "98": [""]}, ["2 queries are not in this", "98, 99"]),
    ("recall", HEAD | {"12": ["img4"]}, ["2 queries are missing", "10, 11"]),
    ("recall", SUBSET | GOOD, ["metric"]), ("recall", {"version": "rc2"} | GOOD, ["metric"]),
    ("recall", HEAD | GOOD | {"version": "rc1"}, ["version"]), ("recall", [GOOD], ["expected"]),
    ("recall", '{"10": ["img3"], "11": ["img4"], "10": ["img4"]}', ["10", "twice"]),
    ("recall_subset", HEAD | GOOD, ["metric"]),
    ("recall_subset", SUBSET | GOOD | {"10": ["img0"]}, ["query 10", "img0"]),
    ("recall_subset", SUBSET | GOOD | {"10": ["img9"]}, ["query 10", "img9"])])
def test_cirr_predictions(tmp_path, metric, content, words):
    benchmark, _ = big("cirr")  # the group of img0, query 10: img1 ... img5
    path = write(tmp_path / "p.json", HEAD | {"metric": metric} | GOOD)
    assert benchmarks.read_predictions(path, benchmark, metric) == GOOD
    with refused(ValueError, "p.json", *words, f"write it for cirr val and {metric}"):
        benchmarks.read_predictions(write(path, content), benchmark, metric)


def test_the_reference_is_read_but_not_scored(tmp_path):
    benchmark, _ = big("cirr")
    names = {"10": ["img0", "img1"]}
    read = benchmarks.read_predictions(write(tmp_path / "p.json", HEAD | GOOD | names), benchmark)
    assert read == GOOD | names and benchmarks.score(benchmark, read)["R@1"] == 100 / 3


def test_circo_ids(tmp_path):
    benchmark, _ = big("circo", queries=1)
    path = write(tmp_path / "p.json", {"10": [5, "7", "000000000009"]})
    assert benchmarks.read_predictions(path, benchmark) == {"10": ["5", "7", "9"]}
    for bad in (True, 1.0, -3, "-3", "3 ", "٣", None, [3], "9" * 5000, "", "cat"):
        with refused(ValueError, "query 10", "COCO image id"):
            benchmarks.read_predictions(write(path, {"10": [5, bad]}), benchmark)
    for content, word in (([5, 5], "repeats"), ([5, "05"], "repeats"), ([80], "80")):
        with refused(ValueError, word):
            benchmarks.read_predictions(write(path, {"10": content}), benchmark)
    benchmark.gallery.clear()  # annotations only: any id passes
    assert benchmarks.read_predictions(write(path, {"10": [123]}), benchmark) == {"10": ["123"]}


def test_fashioniq_predictions_by_category(tmp_path):
    benchmark, rankings = big("fashioniq")
    both = {"dress": {"0": ["x"]}} | benchmarks.predictions(benchmark, rankings)
    path = write(tmp_path / "p.json", both)
    assert benchmarks.read_predictions(path, benchmark)["11"] == rankings["11"][:50]
    for content in ({"dress": {}}, GOOD, {"shirt": []}):
        with refused(ValueError, "p.json", "shirt"):
            benchmarks.read_predictions(write(path, content), benchmark)


def test_writing_is_atomic(tmp_path):
    path = write(tmp_path / "p.json", "old")
    with pytest.raises(TypeError):
        benchmarks.write_predictions(path, {"10": [object()]})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["p.json"]
    with refused(ValueError, "p.json/x: cannot be written"):
        benchmarks.write_predictions(path / "x", {})
    with refused(FileNotFoundError, "no.json is missing"):
        benchmarks.read_predictions(tmp_path / "no.json", big("circo")[0])


def test_only_metrics_named_as_left_out_are_left_out_of_tables(capsys):
    """A metric of any other name has its column, "Rsum" and that of a new benchmark too."""
    metrics = {"R@1": 1.0, "Rs@1": 2.0, "Rsum": 3.0, "R@5": 4.0}
    heads = []
    for name in ("cirr", "circo"):
        print_table(name, {"text": {"all": summarize([metrics])}}, "val", [])
        heads.append(capsys.readouterr().out.splitlines()[2].split()[1:])
    assert heads == [["R@1", "Rsum", "R@5"], ["R@1", "Rs@1", "Rsum"]]


def test_print_table(capsys):
    assert summarize([{"R@1": 1.0}]) == {"R@1": [1, 0]}
    two = {"all": summarize([{"mAP@5": 40.0, "R@5": 1.0}, {"mAP@5": 42.0, "R@5": 2.0}]),
           "one": {"mAP@5": [7.0, 0.5]}, "dress": {"mAP@5": [1.0, 0.0]}}
    text = {"all": {"mAP@5": [3.25, 0.0], "R@5": [1.0, 0.0]}, "one": {"mAP@5": [100.0, 0.0]}}
    print_table("circo", {"text": text}, "val", ["isa"])
    print_table("circo", {"text": text, "isa": two}, "val", ["isa"])
    assert capsys.readouterr().out == """
circo (val), percent
method               mAP@5  mAP@5 one
text                  3.25     100.00

circo (val), percent, mean ± standard deviation over seeds where there are several
method                     mAP@5        mAP@5 one
text                        3.25           100.00
isa                 41.00 ± 1.41      7.00 ± 0.50
"""
