"""python -m paper: the paper's numbers, which runs a table needs, what is run again, the cells."""

import itertools
import json
import os
import re
import shutil
import signal
import statistics
import threading
import time

import pytest
import torch
from conftest import ROOT, SHARED

import blip_lite
import clip_lite
import evaluate
import query_side
import train
from baselines import searle
from paper import __main__ as command
from paper import agreement, costs, lar, numbers, runs
from paper import results as measured
from paper.__main__ import ALL, main, needed, parse_args, section
from paper.numbers import METHODS, NUMBERS, ROWS, RUNS
from paper.runs import call, evaluation, missing, shown, training
from paper.tables import COLUMNS, TABLES, table, title_of
from pocket import classify

PAPER = SHARED / "paper" / "isa_paper.txt"
SECTIONS = [name for name in NUMBERS if name != "cost"]
MISPRINTS = {  # 60.01 for 60.21, 13.67 for 13.80, 32.90 for 32.83
    ("CIRR val", "GCD, EfficientViT-M2", "Avg"),
    ("FashionIQ val", "image-only", "R@50"), ("FashionIQ val", "text-only (CLIP)", "R@50"),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_averages_are_right_and_recalls_grow_with_k(name):
    wrong = set()
    for label, row in NUMBERS[name].items():
        x = [float(text) for text in row.values()]
        coarse = 0.0501 if "supervised" in label or "CLIP" in label else 0.0101  # one decimal
        if name == "FashionIQ val":  # dress, shirt, toptee, all
            assert all(small < large for small, large in zip(x[::2], x[1::2], strict=True)), label
            columns = {"R@10": x[::2], "R@50": x[1::2]}
        else:
            assert x[:-1] == sorted(x[:-1]) or label == "ATL w/o SA, EfficientNet-B2", label
            columns = {"Avg": x}
        wrong |= {(name, label, metric) for metric, (*values, mean) in columns.items()
                  if abs(statistics.mean(values) - mean) > coarse}
    assert wrong == {misprint for misprint in MISPRINTS if misprint[0] == name}


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not here")
def test_numbers_are_the_papers():
    """Every row stands in the text between the last caption and its table's own, in our order."""
    text = re.sub(r"\\checkmark|[<>u/_*\\]", " ", PAPER.read_text())
    text = re.sub(r"\s+", " ", text)
    ends = {str(n): text.index(f"Table {n}: ") for n in range(1, 21)}
    for name in TABLES.keys() - {"fig3"}:
        entry = TABLES[name]
        start = max((end for end in ends.values() if end < ends[name]), default=0)
        rows = list(ROWS[entry.rows].values())
        for column in rows[0].keys() - {"ours"}:
            found = [[x for heading in entry.headings
                      for x in NUMBERS[f"{heading} {entry.printed}"][row[column]].values()]
                     for row in rows if row[column]]
            places = [text.find(" ".join(values), start, ends[name]) for values in found]
            assert -1 not in places and places == sorted(places), (name, places)


def test_rows_fit_runs_and_numbers():
    methods = {method for some in METHODS.values() for method in some}
    ours = {row["ours"] for rows in ROWS.values() for row in rows.values()}
    of_clip = {f"clip {method}" for method in METHODS["clip"]}
    assert {x for x in ours - RUNS.keys() - methods if x[:6] != "needs "} == of_clip
    assert not RUNS.keys() & methods and methods <= {*evaluate.METHODS}
    wanted = {run for run, _ in needed(ALL, [0])}
    assert wanted == RUNS.keys() | METHODS.keys()
    used = {(f"{heading} {entry.printed}", name) for entry in TABLES.values()
            for heading in entry.headings for row in ROWS[entry.rows].values()
            for key, name in row.items() if key != "ours" and name}
    assert used == {(section, name) for section in SECTIONS for name in NUMBERS[section]}
    for name in SECTIONS:  # every column of ours is one of the paper's
        assert COLUMNS[name.split()[0]].keys() <= next(iter(NUMBERS[name].values())).keys()
    titles = {"RESULTS.md", "BEYOND.md", "lar", "agreement", *map(title_of, ALL), *command.BEYOND}
    assert {note.split(",")[0] for note in numbers.NOTES} <= titles


@pytest.mark.parametrize("run", RUNS)
def test_a_run_differs_from_the_default_by_its_options(run):
    words = training(run, 2, threads=3)
    script, options = (searle, words[2:]) if "searle" in run else (train, words[1:])
    args = vars(script.parse_args(options))
    usual = vars(script.parse_args([]))
    assert (args["seed"], args["threads"], args["name"]) == (2, 3, f"tables/{run}-2")
    assert (args["blip"], args["images"]) == ("pocket", "data/pocket/train")
    changed = {name for name in args if args[name] != usual[name]} - {"seed", "threads", "name"}
    assert changed == {x[2:].replace("-", "_") for x in RUNS[run] if x.startswith("--")}
    evaluated = evaluate.parse_args(evaluation(run, 2, "val")[0][1:])
    assert (evaluated.methods, evaluated.clip) == (["isa"], args["clip"])


def test_what_a_table_needs():
    assert needed(["5"], [0, 1]) == {(run, s): ["test"] for run in ("isa", "mlp") for s in (0, 1)}
    assert needed(["9", "2"], [4])["baselines", None] == ["val", "test"]
    assert ("searle-oti", None) not in needed(["9"], [4])
    assert needed(["fig7"], [3, 4]) == {("tokens-2", 3): [], ("isa", 3): []}
    some = needed(["lar"], [0, 1])
    assert ("lar-weight-3", 0) in some and ("lar-weight-3", 1) not in some
    found = {run for run, _ in needed(["6"], [0])} - {"isa-pocket-soft"}
    networks = {run.removesuffix("-pocket") for run in found}
    assert found == {name + start for name in networks for start in ("", "-pocket")}  # two starts
    assert "isa" in networks and networks - {"isa"} <= {*query_side.NAMES} and len(networks) == 6
    assert needed(["1", "17"], [0]) == {}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measured, "FILE", tmp_path / "paper/results.json")
    return tmp_path


def fabricate(run, seed, results=(), split="test", blip="f", left=0, **settings):
    """isa.pt and table.json as train.py and evaluate.py leave them."""
    words, out = evaluation(run, seed, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    if run in RUNS:
        script, start = (searle, 2) if "searle" in run else (train, 1)
        args = vars(script.parse_args(training(run, seed)[start:]))
        steps = 0 if "searle" in run else args["epochs"] * (24_000 // args["batch"]) - left
        args |= {"precision": "bf16", "threads": 7} | settings
        state = {"query_model": {}, "blip": blip, "settings": args, "images": 24_000, "step": steps}
        torch.save(state, out.parent / "isa.pt")
    asked = {k: v for k, v in vars(evaluate.parse_args(words[1:])).items() if not callable(v)}
    settings = asked | {"blip_fingerprint": blip}
    out.write_text(json.dumps({"settings": settings, "results": dict(results)}))


def test_what_is_finished_is_not_run_again(here):
    where = "runs/tables/gcd-1"
    start = "train.py --loss gcd --seed 1 --name tables/gcd-1 --resume".split()
    then = f"evaluate.py table --split test --methods isa --checkpoint {where}/isa.pt".split()
    then += ["--json", f"{where}/table.json", "--picture", ""]
    assert missing("gcd", 1, ["test"], "f") == [start, then]
    for run, seed in (("gcd", 1), ("searle", 1), ("baselines", None)):
        fabricate(run, seed)
        assert missing(run, seed, ["test"], "f") == []
        assert missing(run, seed, ["test"], "other")[-1][0] == "evaluate.py"
    (val,) = missing("gcd", 1, ["test", "val"], "f")
    assert f"{where}/table_val.json" in val
    old = time.time() - 1000
    os.utime(f"{where}/table.json", (old, old))  # of an earlier checkpoint
    assert missing("gcd", 1, ["test"], "f") == [then]


def test_runs_on_clip_are_of_pocket_clip(here, pocket_clip):
    for run, seed in (("pic2word-clip", 1), ("searle-clip", 1), ("clip", None)):
        fabricate(run, seed, blip=pocket_clip.fingerprint)
        assert missing(run, seed, ["test"], "f") == []
        fabricate(run, seed, blip="f")  # of pocket BLIP
        assert missing(run, seed, ["test"], "f")[-1][:2] == ["evaluate.py", "table"]
    fabricate("clip", None, {"cirr": {"image": {"all": {"R@1": [12.0, 0.0]}}}})
    assert cells(table("2", [0]), "CLIP: image-only")[0][0][1:3] == ["12.00", "7.40"]


def test_an_encoders_weights_are_made_once_and_first(here):
    first, then, _ = missing("mobilenet_v2-pocket", 2, ["test"], "f", threads=1)
    assert shown(first) == ("python -m pocket.classify --encoder mobilenet_v2 --query-size 96 "
                            "--out runs/tables/mobilenet_v2.pth --threads 1")
    options = classify.parse_args(first[2:])
    settings = vars(train.parse_args(then[1:]))
    assert settings["pretrained"] == options.out
    assert all(settings[name] == getattr(options, name) for name in ("encoder", "query_size"))
    (here / "runs/tables").mkdir(parents=True)
    (here / options.out).touch()
    assert missing("mobilenet_v2-pocket", 1, ["test"], "f", 1)[0][0] == "train.py"
    assert missing("isa-pocket", 1, ["test"], "f")[0][0] == "train.py"  # shipped


def test_what_is_half_done_or_differs_is_run_again(here, monkeypatch):
    def ends(run="gcd", **state):
        fabricate(run, 0, **state)
        return [words[-1] for words in missing(run, 0, ["test"], "f")]

    assert ends(left=1) == ["--resume", ""]
    for changed in ({"lr": 1e-3}, {"blip": "other"}, {"run": "searle", "count": 7}):
        assert ends(**changed) == ["--overwrite", ""], changed
    assert missing("searle", 1, [], "f") == [training("searle", 1)]  # it resumes by itself
    fabricate("gcd", 0)
    checkpoint = torch.load("runs/tables/gcd-0/isa.pt", weights_only=True)
    del checkpoint["settings"]["lar_weight"]  # older than this option
    torch.save(checkpoint, "runs/tables/gcd-0/isa.pt")
    assert runs.trained("gcd", 0, "f") == "done"
    monkeypatch.setitem(RUNS, "gcd", ["--loss", "gcd", "--epochs", "5"])
    assert missing("gcd", 0, ["test"], "f")[0][-1] == "--overwrite"


def test_commands_prints_and_runs_nothing(here, capsys, pocket_blip, monkeypatch):
    monkeypatch.setattr(runs, "call", None)  # fails if it is called
    fabricate("isa", 1, blip=pocket_blip.fingerprint)
    main(parse_args("commands 5 2 --seeds 0 1 --threads 1".split()))
    out = capsys.readouterr().out
    start = "python train.py --seed 0 --name tables/isa-0 --threads 1 --resume"
    assert out.startswith(f"{start} && python evaluate.py table") and "isa-1" not in out
    assert out.count("python train.py") == 1 + 2 * 5 and "'reference caption'" in out
    assert out.count("\npython -m pocket.classify --encoder efficientvit_m2") == 2
    assert out.count("\npython -m baselines.searle --count") == 2
    assert "\npython evaluate.py table --split test --methods image text image+text --clip" in out


@pytest.fixture
def scripts(here, monkeypatch):
    """Stand-ins for train.py and evaluate.py: they note how they were called, and do `what`."""
    monkeypatch.setattr(runs, "ROOT", here)
    head = "import signal, sys, time\nopen('calls', 'a').write(sys.argv[0] + '\\n')\n"

    def write(train, evaluate=""):
        (here / "train.py").write_text(head + train)
        (here / "evaluate.py").write_text(head + evaluate)

    return write


def test_failures_are_reported_and_stop_nothing_else(
    here, scripts, pocket_blip, monkeypatch, capsys
):
    scripts("""print('what was wrong')
sys.exit({'tables/mlp-0': 3, 'tables/st-0': 143}.get(sys.argv[-1]))""")
    both = lambda run, seed, *_: [training(run, seed), evaluation(run, seed, "test")[0]]  # noqa: E731
    monkeypatch.setattr(runs, "missing", both)
    failed, stopped = (shown(training(run, 0)) for run in ("mlp", "st"))
    log = "runs/tables/mlp-0/log.txt"
    with pytest.raises(ValueError, match="^failed runs: 2;") as error:
        main(parse_args(["18", "--seeds", "0"]))
    assert str(error.value).endswith(f"first: `{failed}` failed; see the end of {log}")
    out = capsys.readouterr().out
    assert f"`{stopped}` was interrupted; run it again to resume" in out and "**Table 18" in out
    assert re.fullmatch(r"\$ .*mlp-0\nwhat was wrong\npaper: \d+ s\n", (here / log).read_text())
    called = (here / "calls").read_text()
    assert called.count("/train.py") == 5 and called.count("/evaluate.py") == 3


def test_a_module_runs_from_any_folder(here):
    call(["-m", "baselines.searle", "--help"], here / "log.txt", threads=1)
    assert "usage: python -m baselines.searle" in (here / "log.txt").read_text()


def test_control_c_is_passed_on_once_and_waited_for(here, scripts):
    scripts("""
def stop(*_):
    signal.signal(signal.SIGINT, lambda *_: print('twice'))
    time.sleep(0.3)
    sys.exit('saved')
signal.signal(signal.SIGINT, stop)
open('ready', 'w')
time.sleep(20)
""")

    def interrupt():
        while not (here / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            call(["train.py"], here / "log.txt")
    finally:
        signal.signal(signal.SIGINT, before)
    log = (here / "log.txt").read_text()
    assert re.fullmatch(r"\$ python train.py\nsaved\npaper: \d+ s\n", log)


@pytest.mark.parametrize("argv, why", [
    ("commands", "name some"), ("5 --seeds 1 1", "different"), ("5 --seeds -1", "at least 0"),
    ("5 beyond", "stand alone"), ("all beyond", "stand alone"), ("beyond commands 5", "alone")])
def test_impossible_arguments(argv, why, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert why in capsys.readouterr().err


def test_all_as_is_writes_results_and_runs_nothing(here, monkeypatch):
    monkeypatch.setattr(runs, "call", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(command, "section", lambda name, args: [f"section {name}"])
    monkeypatch.setattr(lar, "look_at_runs", lambda _: {("isa", 1): [5, "sea"], ("gcd", 0): [6]})
    fingerprint = blip_lite.load("pocket").fingerprint
    for seed in (0, 1):
        fabricate("isa", seed, results(seed), blip=fingerprint)
        log = "$ x\nwrote runs/tables/isa-0/isa.pt after 5400 s; now: evaluate\n"
        (here / f"runs/tables/isa-{seed}/log.txt").write_text(log)
    fabricate("mlp", 0, results(0), blip="another")
    main(parse_args("all --as-is --threads 3".split()))
    text = (here / "paper/RESULTS.md").read_text()
    assert "{" not in text and "1500 images" in text
    assert re.search(r"data/pocket/train, 4 epochs, batch\s+128, [^-]* 0.002 ", text)
    for part in ("3 hours of training in 2 runs", torch.__version__, "3 threads"):
        assert part in text
    assert re.findall("section (.*)", text) == [*ALL]
    kept = json.loads((here / "paper/results.json").read_text())
    assert kept.keys() == {"isa-0", "isa-1"} and kept["isa-1"]["words"] == [5, "sea"]
    assert kept["isa-1"]["test"]["isa"]["cirr"]["all"]["R@1"] == 2


def test_rows_not_run_here_are_those_of_results_json(here, monkeypatch):
    """This folder's run goes first; a row of other options or another BLIP does not count."""
    for seed in (0, 1):
        fabricate("isa", seed, results(4))
    measured.write(measured.collect([0, 1], "a machine", "f"), measured.FILE)
    assert [row["cirr"]["all"]["R@1"] for row in measured.measured("isa", [0, 1], "test")] == [5, 5]
    shutil.rmtree(here / "runs")
    fabricate("isa", 1, results(7))
    assert [row["cirr"]["all"]["R@1"] for row in measured.measured("isa", [0, 1], "test")] == [5, 8]
    assert measured.measured("isa", [0, 1], "val") == []
    assert measured.collect([0], "this one", "g") == {}  # of another BLIP
    monkeypatch.setitem(RUNS, "isa", ["--lr", "1"])
    assert measured.measured("isa", [0, 1], "test") == []


def test_published_results_are_of_todays_blip_and_options():
    entries = json.loads((ROOT / "paper/results.json").read_text())
    blips = {"clip": clip_lite.load("pocket").fingerprint, "": blip_lite.load("pocket").fingerprint}
    for name, entry in entries.items():
        run = measured.run_of(name)
        assert entry["options"] == measured.options_of(run)
        assert entry["blip"] == blips["clip" if run.endswith("clip") else ""]


@pytest.mark.parametrize("ours, wanted", [
    (([9], [8]), "agree"), (([8], [9]), "against"), (([8.6], [9]), "level"),
    (([8, 10], [9, 12]), "level"),  # 1.5 apart, pooled deviation sqrt((2 + 4.5) / 2) = 1.8
    (([8, 10], [11, 13]), "against"), (([12, 14], [9, 10]), "agree"), (([], [9]), "not run"),
])
def test_verdicts(ours, wanted):
    assert agreement.verdict((60.0, 50.0), ours) == wanted
    assert agreement.verdict((50.0, 60.0), ours[::-1]) == wanted


def test_pairs_are_those_that_the_paper_separates(here):
    found = [(name, *labels) for name, heading, labels, *_ in agreement.separated_pairs([0])]
    # Table 5, CIRR Avg: 66.33 and 62.57, 65.41 and 62.90; CIRCO: each a point apart, too
    assert sum(pair[0] == "5" for pair in found) == 4
    # Table 18 prints the first pair again; its other rows: 64.31, 64.37, 65.08
    mine = {pair[1:] for pair in found if pair[0] == "18"}
    parts = {"MLP": 62.57, "ST": 64.31, "ATL w/o CA": 64.37, "ATL w/o SA": 65.08, "ATL": 66.33}
    want = {(a, b) for a, b in itertools.combinations(parts, 2)
            if abs(parts[a] - parts[b]) >= 1} - {("MLP", "ATL")}
    assert {tuple(label.split(":")[0] for label in pair) for pair in mine} == want
    assert not any("supervised" in label for pair in found for label in pair)


def test_agreement_counts_and_names_what_contradicts(here):
    fabricate("isa", 0, results(0))
    fabricate("mlp", 0, results(3))  # the paper: four points lower on CIRR
    lines = agreement.agreement_table([0])
    assert "contradict 4; " in lines[0]  # on CIRR and FashionIQ, B2 and M2; CIRCO is level
    row = next(line for line in lines if line.startswith("| Table 5, CIRR "))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["0", "0", "2", "0"]
    assert any("66.33 / 62.57" in line and "2.5 / 5.5" in line for line in lines)


def cells(lines, first):
    """Rows whose label begins with `first`, one for each table in `lines`, with heads."""
    found, head = [], None
    for line in lines:
        row = [c.strip() for c in line.split("|")[1:-1]] if line.startswith("|") else None
        head = None if row is None else row if head is None else head
        if row and row[0].startswith(first):
            found.append((row, head))
    return found


def results(shift, method="isa"):
    parts = {
        "cirr": {"all": {"R@1": 1 + shift, "R@5": 2, "R@10": 3 + 2 * shift, "Avg": 2.5 + shift}},
        "fashioniq": {"all": {"R@10": 10 + shift, "R@50": 20 + shift},
                      "dress": {"R@10": 30 + shift, "R@50": 31}},
        "circo": {"all": {"mAP@5": 5 + shift, "Avg": 6.5, "R@5": 99}},
    }
    return {b: {method: {part: {m: [x, 0.0] for m, x in row.items()} for part, row in rows.items()}}
            for b, rows in parts.items()}


def test_mean_and_spread_stand_in_their_cells(here):
    for seed, shift in enumerate((0, 1, 2)):
        fabricate("isa", seed, results(2 * shift))  # their standard deviation is 2
    fabricate("mlp", 1, results(0))
    fabricate("baselines", None, results(0, "text"))
    (cirr, head), (circo, _) = cells(table("5", [0, 1, 2]), "adaptive token learner")
    assert head[:5] == ["CIRR", "R@1", "paper, B2", "paper, M2", "Avg"]
    assert cirr[1:] == ["3.00 ± 2.00", "31.48", "31.26", "4.50 ± 2.00", "66.33", "65.41"]
    assert circo[1] == "7.00 ± 2.00"
    one, _ = cells(table("5", [0, 1, 2]), "MLP (single token) (1 seed)")[0]
    assert one[1:4] == ["1.00", "30.18", "30.32"]
    four = table("4", [0, 1, 2])
    (text, _), (garments, _) = cells(four, "text-only")[0], cells(four, "ISA (paper")[0]
    assert text[1:] == "10.00 22.54 20.00 39.73".split()
    assert garments[1] == "12.00 ± 2.00"
    ((six, head),) = cells(table("fig3", [0, 1, 2]), "L = 6")
    assert head[1:] == ["cirr Avg", "fashioniq mean", "circo Avg"]
    assert six[1:] == ["4.50 ± 2.00", "17.00 ± 2.00", "6.50 ± 0.00"]
    fabricate("isa", 0, results(7), split="val")
    assert cells(table("9", [0]), "ISA (paper")[0][0][1] == "8.00"


@pytest.mark.parametrize("name, label, start", [
    ("4", "Pic2Word", ["not run", "25.99", "", "46.00"]),
    ("4", "ISA, EfficientViT", ["not run", "29.35", ""]),
    ("15", "supervised: CLIP4Cir", ["needs triplets", "33.60"]),
])
def test_a_row_without_ours_says_why(here, name, label, start):
    assert cells(table(name, [0]), label)[0][0][1 : 1 + len(start)] == start


def test_note_and_command_stand_below(here, monkeypatch):
    monkeypatch.setattr(lar, "lar_table", lambda seeds: ["| words |"])
    for name, note in (("18", "Table 18"), ("lar", "lar")):
        monkeypatch.setitem(numbers.NOTES, note, "A row contradicts the paper.")
        row, *end = section(name, parse_args([name]))[-6:]
        assert row.startswith("| ")
        assert end == ["", "A row contradicts the paper.", "", f"`python -m paper {name}`", ""]


@pytest.fixture(scope="module")
def cost():
    return costs.costs()


def test_parameters_of_table_1(cost):
    """B2 is the one row that does not fit the paper's (isa.py's head)."""
    for name, (size, _, _) in cost.items():
        paper = float(NUMBERS["cost"][costs.LABELS[name]]["parameters, M"])
        assert abs(size / 1e6 - (9.05 if name == "efficientnet_b2" else paper)) < 0.06


def test_products_of_blip_by_hand(cost):
    _, macs, attention = cost["blip"]
    N, D, P, L, d = 197, 768, 196, 6, 256
    vit = P * 3 * 16 * 16 * D + 12 * (N * 12 * D * D + 2 * N * N * D)
    learner = P * D * d + P * d * L + L * P * d  # projection, grouping, Eq. 2
    learner += L * (3 * d * d + 2 * L * d + 2 * d * 256)  # Eq. 3
    learner += L * d * d + 2 * P * d * d + 2 * L * P * d + L * 2 * d * 512 + L * d * 768  # Eq. 4
    assert macs == vit + learner
    assert attention == 12 * 2 * N * N * D + L * P * d + 2 * L * L * d + 2 * L * P * d


def test_latency_table(monkeypatch):
    measured = dict.fromkeys(costs.LABELS, 10.0) | {"clip": (30.0, 4.0)}
    monkeypatch.setattr(costs, "latencies", lambda: (measured, 2.0, 0.5))
    lines = costs.latency_table(0)
    b2, clip = (cells(lines, label)[0][0][1:] for label in ("EfficientNet-B2", "CLIP"))
    assert b2 == ["10.00", "3.24", "2.50", "3.58", "12.50", "6.82"]
    assert clip == ["30.00", "24.44", "4.00", "3.60", "34.00", "15.38"]
    sent, scene, noise = (int(x.replace(",", "")) for x in re.findall(r"(\d+,\d+)\s+b", lines[-1]))
    assert sent == 6 * 768 * 2 and 1_000 < scene < noise < 224 * 224 * 3
