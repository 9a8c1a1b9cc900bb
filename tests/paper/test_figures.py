"""Figures 4-8 and what LAR changes: attention, the choice of queries, sheets, words."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks
import evaluate
import isa
import query_side
import train
from paper import figures, lar, results
from paper.__main__ import parse_args, section
from paper.figures import FIGURES, draw_figure, first_of_each_kind, words_to_tokens
from paper.lar import lar_table, look_at_words
from paper.numbers import ROWS
from paper.runs import folder, training
from plumbing.pictures import GREEN, overlay, word_rows


@pytest.fixture
def here(tmp_path, monkeypatch, small_world):
    """A current folder with a small pocket world."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pocket").symlink_to(small_world)
    monkeypatch.setattr(results, "FILE", tmp_path / "results.json")  # none
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_words_to_tokens_takes_the_right_rows_and_columns(pocket_blip, monkeypatch):
    """Against an attention that says of each place which it is."""
    U = torch.randn(1, 6, pocket_blip.word_dim)
    words, _ = isa.compose_query(pocket_blip, U, ["has a red car"])
    T = words.shape[1]
    (first,) = [i for i in range(T) if torch.equal(words[0, i], U[0, 0])]
    places = torch.arange(T)[:, None] * 1000.0 + torch.arange(T)
    maps = places.expand(1, 2, 3, T, T)
    monkeypatch.setattr(type(pocket_blip.text_encoder), "attention_maps", lambda *_: maps)
    setting = SimpleNamespace(blip=pocket_blip, precision="fp32")
    pieces, attention = words_to_tokens(setting, U, "has a red car")
    assert pieces == ["has", "a", "red", "car"] and attention.shape == (4, 6)
    assert attention[0, 0] == (first + 6 + 1) * 1000 + first  # "that" stands between
    assert attention[-1, -1] == (T - 2) * 1000 + first + 5


@pytest.fixture
def untrained_runs(here, pocket_blip):
    """isa.pt of three lengths with random weights, as train.py writes them."""
    for run in ("tokens-2", "isa", "tokens-10"):
        settings = vars(train.parse_args(training(run, 0)[1:]))
        torch.manual_seed(0)
        model = query_side.build_query_model(settings, pocket_blip)
        folder(run, 0).mkdir(parents=True)
        state = {"query_model": model.state_dict(), "settings": settings}
        torch.save(state | {"blip": pocket_blip.fingerprint}, folder(run, 0) / "isa.pt")


@pytest.mark.parametrize("name, tokens", [("fig4", 2 + 6 + 10), ("fig6", 6 + 6)])
def test_figures_show_each_token_and_what_is_found(name, tokens, untrained_runs, monkeypatch):
    drawn, retrieved, pasted = [], [], figures.paste_retrieved
    monkeypatch.setattr(figures, "overlay", lambda *a: drawn.append(a) or overlay(*a))
    note = lambda *a: retrieved.append(a[2:4]) or pasted(*a)  # noqa: E731
    monkeypatch.setattr(figures, "paste_retrieved", note)
    path = Path(f"paper/figures/{name}.png")
    draw_figure(name, path, threads=1)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert path.stat().st_size < 300_000
    queries = len(retrieved) // len(FIGURES[name][0])
    assert 1 <= queries <= 4 and len({query.kind for query, _ in retrieved}) == queries
    assert len(drawn) == queries * tokens
    framed = (pixels == GREEN).all(axis=-1).any()
    assert framed == any({*names} & {*query.targets} for query, names in retrieved)
    assert name == "fig4" or not framed


def test_a_figure_is_linked_or_says_what_is_missing(here):
    why = "**Figure 5** is not drawn: runs/tables/isa-0/isa.pt"
    path = Path("paper/figures/fig5.png")
    assert section("fig5", parse_args(["fig5", "--as-is"]))[0].startswith(why)
    path.parent.mkdir(parents=True)
    path.touch()  # drawn elsewhere
    assert section("fig5", parse_args(["fig5"]))[0].startswith(why)
    for name, link in ("fig5", path), ("all", "figures/fig5.png"):
        lines = section("fig5", parse_args([name, "--as-is"]))
        assert lines[0].startswith("**Figure 5: ") and lines[2] == f"![Figure 5]({link})"


def test_queries_are_chosen_by_the_rule():
    kinds = ("multi", "one", "one", "describe", "multi")
    queries = [benchmarks.Query(str(i), "r", ["c"], [f"t{i}"], kind=k) for i, k in enumerate(kinds)]
    board = benchmarks.Benchmark("cirr", "test1", [], {}, queries)

    def rankings(ranks):  # of the target of each query, from 0
        return {str(i): [*["x"] * rank, f"t{i}"] for i, rank in enumerate(ranks)}

    def chosen(name, **runs):
        condition = FIGURES[name][1]
        return [q.id for q in first_of_each_kind(board, lambda q: condition(q, runs))]

    six, two = rankings([0, 1, 0, 0, 10]), rankings([0, 0, 1, 10, 10])
    assert chosen("fig4", isa=six) == ["1", "0", "3"]  # in the order one, multi, describe
    assert chosen("fig5", isa=six) == ["2", "0", "3"]
    assert chosen("fig6", isa=six) == ["4"]
    assert chosen("fig7", **{"isa": six, "tokens-2": two}) == ["2", "3"]
    assert chosen("fig8", **{"isa": six, "tokens-10": two}) == ["2", "3"]


def test_learnt_words_are_looked_at(small_world, trained, pocket_blip, monkeypatch):
    """A model that speaks two words of each caption, three times as long, and one made up."""
    benchmark = benchmarks.load("cirr", small_world / "cirr", "test1")
    names = benchmark.gallery[:12]
    captions = json.loads((small_world / "cirr" / "captions.json").read_text())
    vocabulary, rows = word_rows(pocket_blip)
    assert "red" in vocabulary and not {"a", "[PAD]", "##b", "7"} & {*vocabulary}
    spoken = [[*[w for w in captions[name].split() if len(w) > 1][:2], "zip"] for name in names]
    U = 3 * rows[torch.tensor([[vocabulary.index(w) for w in words] for words in spoken])]
    monkeypatch.setattr(evaluate, "through_query_model", lambda *_: (U, None))
    t = pocket_blip.encode_text(*isa.compose_query(pocket_blip, U))
    v = torch.cat([t[:9], -t[9:]])  # at most nine images are found by their sentences
    paths = [benchmark.paths[name] for name in names]
    norm, cosine, true, found, often = look_at_words(trained.isa, pocket_blip, paths, v)
    assert norm == pytest.approx(U.norm(dim=-1).mean().item(), abs=1e-4)
    assert cosine == 1 and 50 < found <= 75
    assert true == 66.6667 and often.split()[0] == "zip"


def test_lar_section_has_a_line_for_each_loss(here, trained, monkeypatch):
    """This folder's run is looked at; the others are those of results.json."""
    folder("isa", 0).mkdir(parents=True)
    shutil.copy(trained.isa, folder("isa", 0))
    monkeypatch.setattr(lar, "IMAGES", 8)
    monkeypatch.setattr(lar, "trained", lambda *key: "done" if key[:2] == ("isa", 0) else "begun")
    said = {"words": [5, 0.25, 60, 7.5, "sea"], "test": {"isa": {"cirr": {"one": {"R@1": 31}}}}}
    results.FILE.write_text(json.dumps({"gcd-1": said | {"options": "--loss gcd"}}))
    lines = lar_table([0, 1])
    (scores, words), (first, second) = ([[cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines if line.startswith(f"| {loss}  ")] for loss in ("GCD + LAR", "GCD"))
    assert scores == ["–"] * 9 and "–" not in words
    assert first == ["31.00"] + ["–"] * 8 and second == ["5.00", "0.25", "60.00", "7.50", "sea"]
    assert "\n".join(lines).count("\n| ") == 2 * (len(ROWS["lar"]) + 2)
