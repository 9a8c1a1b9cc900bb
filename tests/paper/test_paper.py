"""tables.py: the paper's numbers, which runs a table needs, what is run again and what is not, the cells, costs and figures."""

import json
import os
import re
import shutil
import signal
import statistics
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from test_blip_lite import filled, inputs

import benchmarks
import evaluate
import isa
import query_side
import train
from baselines.searle import parse_args
from paper.__main__ import ALL, main, parse_args, preamble, section
from paper.costs import costs, drawn, jpeg_bytes, latency_table, texture
from paper.figures import CHOICE, draw_figure, first_of_each_kind, paste_retrieved, words_to_tokens
from paper.numbers import NO_CLIP, NO_TRIPLETS, NO_WEIGHTS, NOTES, PAPER_COSTS, TABLES
from paper.runs import (
    BUDGET,
    FIGURE_RUNS,
    LAR_RUNS,
    RUNS,
    UNTRAINED,
    WEIGHTS,
    call,
    evaluation,
    folder,
    missing,
    needed,
    run_missing,
    shown,
    trained,
    training,
)
from paper.tables import features_of, lar_table, look_at_words, table
from plumbing.pictures import overlay, word_rows

PAPER = SHARED / "paper" / "isa_paper.txt"
OFF = {("4", "image-only", "R@50"), ("8", "GCD", "Avg")}  # averages that the paper misprints: 13.67 for 13.80, 60.01 for 60.21


def parts(entry, paper):
    """The paper's values of one row -> for each part of the table {metric: value}."""
    numbers, found = [float(x) for x in paper.split()], []
    for _, columns in entry.parts:
        found.append({metric: numbers.pop(0) for _, metric in columns})
    assert not numbers
    return found


PRINTED = [
    (name, label, paper, values)
    for name, entry in TABLES.items()
    for label, _, *papers in entry.rows
    for paper in papers
    if paper
    for values in parts(entry, paper)
]


# ------------------------------------------------------------------------------------------------ the paper's numbers
@pytest.mark.parametrize("name", TABLES)
def test_the_papers_averages_are_those_of_its_columns(name):
    seen = set()
    for table, label, _, values in PRINTED:
        if table != name:
            continue
        if "Avg" in values:
            *columns, average = values.values()
            wrong = ["Avg"] if abs(statistics.mean(columns) - average) > 0.0101 else []
        else:  # other papers' rows in Table 16 have one decimal
            means = {m: statistics.mean(values[f"{c} {m}"] for c in ("dress", "shirt", "toptee")) for m in ("R@10", "R@50")}
            coarse = 0.0501 if name == "16" else 0.0101
            wrong = [m for m, mean in means.items() if abs(mean - values[m]) > coarse]
        seen |= {(table, label, metric) for metric in wrong}
    assert seen == {entry for entry in OFF if entry[0] == name}


def test_rows_that_several_tables_print_are_the_same_in_all():
    """ISA's row of Tables 5-8, 9, 18 and of 11-14, 16, 20; recalls grow with K in every row."""
    same = {}
    for name, label, _, values in PRINTED:
        if label in ("adaptive token learner", "light / BLIP VE", "GCD + LAR", "ATL") and name != "fig3":
            same.setdefault(tuple(values), set()).add(tuple(values.values()))
        for small, large in (("R@1", "R@5"), ("R@5", "R@10"), ("R@10", "R@50"), ("mAP@5", "mAP@10"), ("dress R@10", "dress R@50")):
            assert small not in values or large not in values or values[small] <= values[large], (name, label)
    assert [len(rows) for rows in same.values()] == [2, 2, 2]  # EfficientNet-B2's and EfficientViT-M2's; three benchmarks


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not here")
def test_numbers_are_the_papers():
    """Every row stands in the text just before its table's caption, and in our order."""
    text = re.sub(r"\\checkmark|[<>u/_*\\]", " ", PAPER.read_text())
    text = re.sub(r"\s+", " ", text)
    ends = {n: text.index(f"Table {n}: ") for n in TABLES if n.isdigit()}
    for name, end in ends.items():
        start = max([e for e in (*ends.values(), text.index("Table 1: "), text.index("Table 17: ")) if e < end], default=0)
        for k in range(len(TABLES[name].papers)):
            places = [text.find(row[2 + k], start, end) for row in TABLES[name].rows if row[2 + k]]
            assert -1 not in places and places == sorted(places), (name, places)


# ------------------------------------------------------------------------------------------------ runs
def test_every_row_names_a_run_a_method_or_a_reason():
    reasons = {NO_WEIGHTS, NO_TRIPLETS, NO_CLIP}
    methods = {method for some in UNTRAINED.values() for method in some}
    for name, entry in TABLES.items():
        for label, ours, *papers in entry.rows:
            assert ours in RUNS or ours in methods | reasons, (name, label)
            assert len(papers) == len(entry.papers), (name, label)
    assert {run for runs in FIGURE_RUNS.values() for run in runs} <= RUNS.keys()
    assert not RUNS.keys() & methods
    assert methods <= set(evaluate.METHODS)


@pytest.mark.parametrize("run", RUNS)
def test_options_of_a_run_are_accepted_and_only_they_differ_from_the_default(run):
    command = training(run, 2, threads=3)
    parse = {"train.py": train.parse_args, "baselines.py": parse_args}[command[0]]
    args, usual = vars(parse(command[1:])), vars(parse(["searle"] if run == "searle" else BUDGET))
    assert (args["seed"], args["threads"], args["name"]) == (2, 3, f"tables/{run}-2")
    assert (args["blip"], args["images"]) == ("pocket", "data/pocket/train")
    changed = {name for name in args if args[name] != usual[name]} - {"seed", "threads", "name"}
    assert changed == {o[2:].replace("-", "_") for o in RUNS[run] if o.startswith("--")}
    assert vars(evaluate.parse_args(evaluation(run, 2, "val")[0][1:]))["methods"] == ["isa"]


def test_what_a_table_needs():
    assert needed(["5"], [0, 1]) == {(run, seed): ["test"] for run in ("isa", "mlp") for seed in (0, 1)}
    assert needed(["2", "9"], [4])["isa", 4] == ["test", "val"]
    assert needed(["9", "2"], [4])["baselines", None] == ["val", "test"]
    assert needed(["fig7"], [3, 4]) == {("tokens-2", 3): [], ("isa", 3): []}
    eight = needed(["8"], [0, 1])
    assert ("lar-weight-3", 0) in eight and ("lar-weight-3", 1) not in eight
    assert not {run for run, _ in needed(["6"], [0])} & WEIGHTS
    assert WEIGHTS < {run for run, _ in needed(["6"], [0], imagenet=True)}
    assert needed(["1", "17"], [0]) == {}
    everything = {run for run, _ in needed(ALL, [0], imagenet=True)}
    assert everything == {*RUNS, *UNTRAINED}  # no run that no table asks for


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fabricate(run, seed, results, split="test", blip="f", left=0, **settings):
    """isa.pt and table.json as train.py and evaluate.py leave them. results {benchmark: {method: {part: {metric: value}}}}."""
    command, (evaluation, out) = training(run, seed), evaluation(run, seed, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    if command:
        args = vars(train.parse_args(command[1:])) | {"precision": "bf16", "threads": 7} | settings
        steps = args["epochs"] * (24_000 // args["batch"])
        state = {"query_model": {}, "settings": args, "blip": blip, "images": 24_000, "step": steps - left}
        torch.save(state, out.parent / "isa.pt")
    spread = {b: {m: {part: {k: [v, 0.0] for k, v in ks.items()} for part, ks in ps.items()} for m, ps in methods.items()}
              for b, methods in results.items()}  # fmt: skip
    asked = {k: v for k, v in vars(evaluate.parse_args(evaluation[1:])).items() if not callable(v)}
    out.write_text(json.dumps({"settings": asked | {"blip_fingerprint": blip}, "results": spread}))


def test_what_is_finished_is_not_run_again(here):
    assert missing("gcd", 1, ["test"], "f") == [
        ["train.py", *BUDGET, "--loss", "gcd", "--seed", "1", "--name", "tables/gcd-1", "--resume"],
        ["evaluate.py", "table", "--split", "test", "--methods", "isa", "--checkpoint", "runs/tables/gcd-1/isa.pt",
         "--json", "runs/tables/gcd-1/table.json", "--picture", ""],
    ]  # fmt: skip
    fabricate("gcd", 1, {})
    assert missing("gcd", 1, ["test"], "f") == []
    (val,) = missing("gcd", 1, ["test", "val"], "f")
    assert val[0] == "evaluate.py" and "runs/tables/gcd-1/table_val.json" in val
    old = time.time() - 1000
    os.utime("runs/tables/gcd-1/table.json", (old, old))  # older than the checkpoint: of an earlier one
    assert [c[0] for c in missing("gcd", 1, ["test"], "f")] == ["evaluate.py"]
    fabricate("baselines", None, {})
    assert missing("baselines", None, ["test"], "f") == []
    assert [c[0] for c in missing("baselines", None, ["test"], "other")] == ["evaluate.py"]


def test_what_is_half_done_or_differs_is_run_again(here, monkeypatch):
    fabricate("gcd", 0, {}, left=1)
    assert [(c[0], c[-1]) for c in missing("gcd", 0, ["test"], "f")] == [("train.py", "--resume"), ("evaluate.py", "")]
    fabricate("gcd", 0, {}, lr=1e-3)
    assert missing("gcd", 0, ["test"], "f")[0][-1] == "--overwrite"
    fabricate("gcd", 0, {})
    assert missing("gcd", 0, ["test"], "another BLIP")[0][-1] == "--overwrite"
    monkeypatch.setitem(RUNS, "gcd", ["--loss", "gcd", "--epochs", "5"])
    assert missing("gcd", 0, ["test"], "f")[0][-1] == "--overwrite"


def test_a_checkpoint_may_be_older_than_an_option(here):
    fabricate("isa", 0, {})
    checkpoint = torch.load("runs/tables/isa-0/isa.pt", weights_only=True)
    del checkpoint["settings"]["lar_weight"]
    torch.save(checkpoint, "runs/tables/isa-0/isa.pt")
    assert trained("isa", 0, "f") == "done"


def test_commands_prints_and_runs_nothing(here, capsys, pocket_blip, monkeypatch):
    monkeypatch.setattr(tables, "call", None)  # would fail if it were called
    fabricate("isa", 1, {}, blip=pocket_blip.fingerprint)
    assert main(parse_args(["commands", "5", "2", "--seeds", "0", "1", "--threads", "1"])) == []
    lines = capsys.readouterr().out.splitlines()
    start = shown(["train.py", *BUDGET, *"--seed 0 --name tables/isa-0 --threads 1 --resume".split()])
    assert lines[0].startswith(f"{start} && python evaluate.py table")
    assert lines[0].endswith("--json runs/tables/isa-0/table.json --picture ''")
    assert [line for line in lines if "isa-1" in line] == []
    assert sum("train.py" in line for line in lines) == 1 + 2 * 3 and sum("baselines.py searle " in line for line in lines) == 2
    assert "'reference caption'" in "".join(lines)


@pytest.fixture
def scripts(here, monkeypatch):
    """Stand-ins for train.py and evaluate.py, which take no time: they note how they were called, and do `what`."""
    monkeypatch.setattr(tables, "ROOT", here)

    def write(what="", **others):
        for name in ("train", "evaluate"):
            head = "import signal, sys, time\nopen('calls', 'a').write(sys.argv[0] + '\\n')\n"
            (here / f"{name}.py").write_text(head + others.get(name, what))

    return write


def test_a_run_that_fails_gives_one_line_and_the_others_go_on(here, scripts, monkeypatch):
    scripts(train="print('what was wrong')\nif 'tables/mlp-0' in sys.argv: sys.exit(3)\n")
    monkeypatch.setattr(tables, "trained", lambda run, *_: "done" if (here / "calls").exists() else "begun")
    both = lambda run, seed, *_: [training(run, seed), evaluation(run, seed, "test")[0]]  # noqa: E731
    monkeypatch.setattr(tables, "missing", both)
    args = parse_args(["5", "--seeds", "0"])
    (failure,) = run_missing(["5"], args, "f")
    command = shown(training("mlp", 0))
    assert failure == f"`{command}` failed; its last words are in runs/tables/mlp-0/log.txt"
    log = (here / "runs/tables/mlp-0/log.txt").read_text().splitlines()
    assert log[:2] == [f"$ {command}", "what was wrong"]
    assert re.fullmatch(r"tables\.py: \d+ s", log[2])
    called = [line.split("/")[-1] for line in (here / "calls").read_text().splitlines()]
    assert sorted(called) == ["evaluate.py", "train.py", "train.py"]  # a row that was not trained is not evaluated


def test_a_training_that_was_stopped_is_not_evaluated(here, scripts):
    scripts("sys.exit(128 + signal.SIGTERM)\n")
    (failure,) = run_missing(["fig5"], parse_args(["fig5", "--seeds", "0"]), "f")
    assert failure == f"`{shown(training('isa', 0))} --resume` was stopped from outside; the same command goes on"
    assert [line.split("/")[-1] for line in (here / "calls").read_text().splitlines()] == ["train.py"]


def test_control_c_is_passed_on_once_and_waited_for(here, scripts):
    scripts("""
def stop(*_):
    signal.signal(signal.SIGINT, lambda *_: open('twice', 'w'))
    time.sleep(0.3)
    print('saved')
    sys.exit()
signal.signal(signal.SIGINT, stop)
open('ready', 'w')
time.sleep(20)
""")

    def interrupt():
        while not (here / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    waiter = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it would be ignored
    try:
        waiter.start()
        with pytest.raises(KeyboardInterrupt):
            call(["train.py"], here / "log.txt")
    finally:
        signal.signal(signal.SIGINT, before)
    waiter.join()
    assert re.fullmatch(r"\$ python train.py\nsaved\ntables.py: \d+ s\n", (here / "log.txt").read_text())
    assert not (here / "twice").exists()


@pytest.mark.parametrize("argv", [["21"], ["commands"], ["5", "--seeds", "1", "1"], ["5", "--seeds", "-1"], ["5", "--threads=-1"]])
def test_impossible_arguments(argv, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert "there is no table" in (said := capsys.readouterr().err) or "at least 0" in said


def test_as_is_runs_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(tables, "call", lambda *_: pytest.fail("a run was started"))
    main(parse_args(["5", "--as-is"]))
    assert "not run" in capsys.readouterr().out


def test_all_writes_results(here, monkeypatch, capsys):
    monkeypatch.setattr(tables, "run_missing", lambda *_: ["one failed"])
    monkeypatch.setattr(tables, "section", lambda name, args: [f"section {name}"])
    assert main(parse_args(["all"])) == ["one failed"]
    written = (here / "RESULTS.md").read_text()
    assert [line for line in written.splitlines() if "section" in line] == [f"section {name}" for name in ALL]
    assert written.startswith("# Results")


# ------------------------------------------------------------------------------------------------ cells
def cells(lines, first):
    """The cells of the row whose label begins with `first`, for each markdown table in `lines`: [{heading: cell}]."""
    found, head = [], None
    for line in lines:
        row = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else None
        head = None if row is None else row if head is None else head
        if row and row[0].startswith(first):
            found.append((row, head))
    return found


def results(shift, method="isa"):
    cirr = {"R@1": 1 + shift, "R@5": 2, "R@10": 3 + 2 * shift, "R@50": 4, "Avg": 2.5 + shift}
    circo = {"mAP@5": 5 + shift, "mAP@10": 6, "mAP@25": 7, "mAP@50": 8, "Avg": 6.5, "R@5": 99}
    return {
        "cirr": {method: {"all": cirr, "one": {"R@1": 77}}},
        "fashioniq": {method: {"all": {"R@10": 10 + shift, "R@50": 20 + shift}, "dress": {"R@10": 30 + shift, "R@50": 31}}},
        "circo": {method: {"all": circo}},
    }


def test_mean_and_spread_stand_in_their_cells(here):
    for seed, shift in enumerate((0, 1, 5)):
        fabricate("isa", seed, results(shift))
    fabricate("mlp", 1, results(0))
    fabricate("baselines", None, results(0, "text"))
    lines = table("5", [0, 1, 2])
    (cirr, head), (circo, _) = cells(lines, "adaptive token learner")
    assert head[:5] == ["CIRR", "R@1", "paper, B2", "paper, M2", "R@5"]
    spread = f"{statistics.stdev((0, 1, 5)):.2f}"
    assert cirr[1:7] == [f"3.00 ± {spread}", "31.48", "31.26", "2.00 ± 0.00", "63.42", "62.31"]
    assert cirr[7] == f"7.00 ± {2 * statistics.stdev((0, 1, 5)):.2f}" and cirr[13:] == [f"4.50 ± {spread}", "66.33", "65.41"]
    assert circo[1:4] == [f"7.00 ± {spread}", "13.19", "12.24"] and circo[13:] == ["6.50 ± 0.00", "14.52", "13.27"]
    (cirr, _), _ = cells(lines, "MLP (single token) (1 seed)")
    assert cirr[1:4] == ["1.00", "30.18", "30.32"]
    assert cells(table("5", [0]), "adaptive token learner (1 seed)")[0][0][1] == "1.00"

    labels = "text-only", "Pic2Word", "ISA, EfficientViT", "ISA (paper"
    rows = {label: cells(table("4", [0, 1, 2]), label)[0] for label in labels}
    assert rows["text-only"][0][1:] == ["30.00", "18.10", "31.00", "35.05", "–", "23.45", "–", "39.21", "–", "26.06", "–", "44.93",
                                        "10.00", "22.54", "20.00", "39.73"]  # fmt: skip
    assert rows["Pic2Word"][0][1:5] == ["not run", "21.35", "", "42.68"]
    assert rows["ISA, EfficientViT"][0][1:3] == ["needs ImageNet weights", "25.48"]
    assert rows["ISA (paper"][0][1] == f"32.00 ± {spread}" and rows["ISA (paper"][0][13] == f"12.00 ± {spread}"
    assert cells(table("6", [0]), "EfficientNet-B0")[0][0][1] == "needs ImageNet weights"
    assert cells(table("6", [0]), "EfficientNet-B0*")[0][0][1] == "not run"
    assert cells(table("2", [0]), "SEARLE-OTI")[0][0][1] == "not run"
    assert cells(table("15", [0]), "supervised: CLIP4Cir")[0][0][1:3] == ["needs triplets", "33.60"]

    ((six, head),) = cells(table("fig3", [0, 1, 2]), "L = 6")
    assert head[1:] == ["cirr Avg", "fashioniq mean", "circo Avg"]
    assert six[1:] == [f"4.50 ± {spread}", f"17.00 ± {spread}", "6.50 ± 0.00"]


def test_validation_is_another_file(here):
    fabricate("isa", 0, results(0))
    fabricate("isa", 0, results(3), split="val")
    assert cells(table("9", [0]), "ISA (paper")[0][0][1] == "4.00"
    assert cells(table("2", [0]), "ISA (paper")[0][0][1] == "1.00"


def test_notes_and_command_stand_below(here, monkeypatch):
    monkeypatch.setitem(NOTES, "18", "A row contradicts the paper.")
    lines = section("18", parse_args(["18"]))
    assert lines[-4:] == ["A row contradicts the paper.", "", "`python tables.py 18`", ""]


def test_preamble_tells_budget_machine_and_time(here):
    for seed in (0, 1):
        fabricate("isa", seed, {})
        (here / f"runs/tables/isa-{seed}/log.txt").write_text("$ x\ntables.py: 1800 s\n$ y\ntables.py: 5400 s\n")
    text = "\n".join(preamble(parse_args(["all", "--threads", "3"])))
    epochs, batch = BUDGET[BUDGET.index("--epochs") + 1], train.PRESETS["pocket"]["batch"]
    assert re.search(rf"24000 images of data/pocket/train, {epochs} epochs?,\n  batch {batch}, .* learning rate of 0.002 ", text)
    assert "4.0 hours recorded, for 2 runs" in text and f"{os.cpu_count()} cores" in text and torch.__version__ in text
    assert "3 threads" in text and "python tables.py all" in text


# ------------------------------------------------------------------------------------------------ cost
@pytest.fixture(scope="module")
def costs():
    return costs()


def test_parameters_of_table_1(costs):
    """Printed: 87.0, 5.3, 8.5, 5.0, 3.5, 5.5; B2 is the one row that does not fit (isa.py's head)."""
    sizes = {name: round(size / 1e6, 2) for name, (size, _, _) in costs.items()}
    assert sizes == {"blip": 86.98, "efficientnet_b0": 5.32, "efficientnet_b2": 9.05, "efficientvit_m2": 5.01, "mobilenet_v2": 3.54,
                     "mobilevitv2_100": 5.51}  # fmt: skip
    for name, size in sizes.items():
        assert name == "efficientnet_b2" or abs(size - float(PAPER_COSTS[name][1])) < 0.06


def test_products_of_blip_by_hand(costs):
    _, macs, attention = costs["blip"]
    N, D, P, L, d = 197, 768, 196, 6, 256
    vit = P * 3 * 16 * 16 * D + 12 * (N * 12 * D * D + 2 * N * N * D)
    learner = P * D * d + P * d * L + L * P * d  # projection, grouping, Eq. 2
    learner += L * (3 * d * d + 2 * L * d + 2 * d * 256)  # Eq. 3
    learner += L * d * d + 2 * P * d * d + 2 * L * P * d + L * 2 * d * 512 + L * d * 768  # Eq. 4
    assert macs == vit + learner
    assert attention == 12 * 2 * N * N * D + L * P * d + 2 * L * L * d + 2 * L * P * d


def test_latency_table(monkeypatch):
    names = dict.fromkeys(PAPER_COSTS, 10.0)
    monkeypatch.setattr(tables, "latencies", lambda: (names, 2.0, 0.5))
    lines = latency_table(0)
    ((row, _),) = cells(lines, "EfficientNet-B2")
    assert row[1:] == ["10.00", "3.24", "2.50", "3.58", "12.50", "6.82"]
    assert cells(lines, "BLIP VE")[0][0][-1] == "10.11" and cells(lines, "MobileViTV2")[0][0][-1] == "6.98"  # as printed
    assert "9,216 bytes" in "\n".join(lines)
    assert 1_000 < jpeg_bytes(drawn()) < jpeg_bytes(texture()) < 224 * 224 * 3
    assert np.asarray(texture()).std() > 40


# ------------------------------------------------------------------------------------------------ figures
def test_attention_maps_equal_transformers():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512,
                        attn_implementation="eager", type_vocab_size=1)  # fmt: skip
    with torch.device("meta"):
        theirs = BertModel(config).eval()
    theirs = filled(theirs)
    torch.nn.init.zeros_(theirs.embeddings.token_type_embeddings.weight)
    theirs.embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.int64)
    ours = tables.blip_lite.blip.TextEncoder(50, 512, 128, 3, 64)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all("crossattention" in name for name in missing)
    assert all(name.startswith("pooler") or "token_type" in name for name in unexpected)
    words = torch.randn(3, 9, 128)
    mask = (torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]).long()
    with torch.no_grad():
        maps = ours.attention_maps(words, mask)
        want = theirs(inputs_embeds=words, attention_mask=mask, output_attentions=True).attentions
    assert maps.shape == (3, 3, 2, 9, 9)
    torch.testing.assert_close(maps, torch.stack(want, dim=1), atol=2e-6, rtol=0)
    assert maps[1, ..., 5:].abs().max() == 0  # padding is not looked at
    assert maps.std(dim=-1).mean() > 0.05  # and they are not flat


def test_attention_maps_leave_forward_alone(pocket_blip):
    _, ids, mask = inputs(pocket_blip)
    words = pocket_blip.embed_words(ids)
    before = pocket_blip.encode_text(words, mask)
    pocket_blip.text_encoder.attention_maps(words, mask)
    assert torch.equal(before, pocket_blip.encode_text(words, mask))


@pytest.fixture
def untrained_runs(here, pocket_blip):
    """isa.pt of three lengths with random weights, as train.py writes them."""
    for run in ("tokens-2", "isa", "tokens-10"):
        settings = vars(train.parse_args(training(run, 0)[1:]))
        torch.manual_seed(0)
        model = query_side.build_query_model(settings, pocket_blip)
        folder(run, 0).mkdir(parents=True)
        state = {"query_model": model.state_dict(), "settings": settings, "blip": pocket_blip.fingerprint}
        torch.save(state, folder(run, 0) / "isa.pt")


@pytest.mark.parametrize("name, tokens", [("fig4", 2 + 6 + 10), ("fig6", 6)])
def test_figures_are_readable(name, tokens, untrained_runs, small_world, here, monkeypatch):
    drawn, retrieved, plain = [], [], overlay
    monkeypatch.setattr(tables, "overlay", lambda image, weights: drawn.append(weights) or plain(image, weights))
    pasted = paste_retrieved
    monkeypatch.setattr(tables, "paste_retrieved", lambda *a: retrieved.append(a[2:4]) or pasted(*a))
    path, told = draw_figure(name, parse_args([name]), data=small_world / "cirr")
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert path.stat().st_size < 300_000 and pixels.shape[0] > 150 and pixels.shape[1] > 500
    per_query = len(FIGURE_RUNS[name])
    queries = len(retrieved) // per_query
    assert 1 <= queries <= 4 and len({query.kind for query, _ in retrieved}) == queries and "first query of each type" in told
    assert len(drawn) == queries * tokens * (2 if name == "fig6" else 1)
    framed = (pixels == tables.GREEN).all(axis=-1).any()
    assert framed == any(set(names) & set(query.targets) for query, names in retrieved)
    if name == "fig6":
        assert not framed


def test_a_figure_without_its_run_says_so(here, small_world, monkeypatch):
    draw = draw_figure
    monkeypatch.setattr(tables, "draw_figure", lambda name, args: draw(name, args, data=small_world / "cirr"))
    assert "Figure 5** is not drawn: runs/tables/isa-0/isa.pt" in section("fig5", parse_args(["fig5"]))[0]


def test_queries_are_chosen_by_the_rule():
    kinds = ("multi", "one", "one", "describe", "multi")
    queries = [tables.benchmarks.Query(str(i), "r", ["c"], [f"t{i}"], kind=kind) for i, kind in enumerate(kinds)]
    board = tables.benchmarks.Benchmark("cirr", "test1", [], {}, queries)
    good, other, far = (lambda i: [f"t{i}", "x"]), (lambda i: ["x", f"t{i}"]), (lambda i: [*"abcdefghij", f"t{i}"])
    six = dict(zip("01234", (good(0), other(1), good(2), good(3), far(4)), strict=True))
    two = dict(zip("01234", (good(0), good(1), other(2), far(3), far(4)), strict=True))

    def chosen(name, **rankings):
        return [q.id for q in first_of_each_kind(board, lambda q: CHOICE[name][1](q, rankings))]

    assert chosen("fig4", isa=six) == ["1", "0", "3"]  # in the order one, multi, describe
    assert chosen("fig5", isa=six) == ["2", "0", "3"]
    assert chosen("fig6", isa=six) == ["4"]
    assert chosen("fig7", **{"isa": six, "tokens-2": two}) == ["2", "3"]
    assert chosen("fig8", **{"isa": six, "tokens-10": two}) == ["2", "3"]


def test_words_to_tokens_takes_the_right_rows_and_columns(pocket_blip, monkeypatch):
    """Against an attention that says of each place which it is."""
    U = torch.randn(1, 6, pocket_blip.word_dim)
    modifier = "has a red car"
    words, _ = isa.compose_query(pocket_blip, U, [modifier])
    (first,) = [i for i in range(words.shape[1]) if torch.equal(words[0, i], U[0, 0])]
    T = words.shape[1]
    places = torch.arange(T)[:, None] * 1000.0 + torch.arange(T)
    monkeypatch.setattr(type(pocket_blip.text_encoder), "attention_maps", lambda *_: places.expand(1, 2, 3, T, T))
    setting = type("Setting", (), {"blip": pocket_blip, "precision": "fp32"})
    pieces, attention = words_to_tokens(setting, U, modifier)
    assert pieces == ["has", "a", "red", "car"]
    assert attention.shape == (4, 6) and attention[0, 0] == (first + 6 + 1) * 1000 + first  # "that" stands between
    assert attention[-1, -1] == (T - 2) * 1000 + first + 5


def test_overlay_is_red_where_the_token_looks():
    weights = torch.zeros(8, 8)
    weights[1, 6] = 0.3
    sheet = np.asarray(overlay(Image.new("RGB", (64, 64), "white"), weights), int)
    redness = sheet[..., 0] - sheet[..., 1]
    assert np.unravel_index(redness.argmax(), redness.shape)[0] in range(8, 16) and redness.argmax() % 64 in range(48, 56)
    assert redness[40:].max() == 0
    with warnings.catch_warnings(action="error"):  # a token that looks nowhere is not divided by 0
        assert np.asarray(overlay(Image.new("RGB", (64, 64)), torch.zeros(8, 8))).std() == 0


# ---------------------------------------------------------------------------------------------------- what LAR changes
def test_learnt_words_are_looked_at(small_world, trained, pocket_blip, monkeypatch):
    """A model that speaks two words of each image's caption, three times as long, and a last one that it makes up."""
    benchmark = benchmarks.load("cirr", small_world / "cirr", "test1")
    names = benchmark.gallery[:12]
    captions = json.loads((small_world / "cirr" / "captions.json").read_text())
    rows = pocket_blip.text_encoder.embeddings.word_embeddings.weight
    vocabulary, kept = word_rows(pocket_blip)
    assert "red" in vocabulary and not {"a", "[PAD]", "##b", "7"} & set(vocabulary) and len(kept) == len(vocabulary)
    spoken = [[*[word for word in captions[name].split() if len(word) > 1][:2], "zip"] for name in names]
    U = torch.stack([torch.stack([3 * rows[pocket_blip.tokenizer.vocab[word]] for word in words]) for words in spoken])
    monkeypatch.setattr(tables.evaluate, "through_query_model", lambda *_: (U, None))
    paths = [benchmark.paths[name] for name in names]
    v = features_of(pocket_blip, paths)
    norm, cosine, true, found, often = look_at_words(trained.isa, pocket_blip, paths, v)
    assert norm == pytest.approx(U.norm(dim=-1).mean().item()) and cosine == pytest.approx(1, abs=1e-5)
    assert true == pytest.approx(200 / 3) and often.split()[0] == "zip" and 0 <= found <= 100


def test_lar_section_has_a_line_for_each_loss(here, small_world, trained, monkeypatch):
    monkeypatch.setattr(tables.evaluate, "POCKET_DATA", str(small_world))
    run = here / "runs" / "tables" / "isa-0"
    run.mkdir(parents=True)
    shutil.copy(trained.isa, run)
    text = "\n".join(lar_table([0, 1], images=8))
    line = [line for line in text.splitlines() if line.startswith("| GCD + LAR  ")]
    assert len(line) == 2 and line[0].count("–") == 9 and "–" not in line[1]
    assert text.count("\n| ") == 2 * (len(LAR_RUNS) + 2)
