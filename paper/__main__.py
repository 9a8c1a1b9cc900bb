"""Every table and figure of the paper: train what is missing, print ours beside the paper's.

    python -m paper 5               # trains what Table 5 needs, three seeds a row, and prints it
    python -m paper commands 5      # prints what is missing, a line per run, to run side by side
    python -m paper all             # everything, into paper/RESULTS.md (--as-is: trains nothing)
    python -m paper 1 17 fig5       # costs at the paper's sizes; paper/figures/fig5.png
    python -m paper agreement       # how many pairs of rows stand in the paper's order
    python -m paper beyond          # what the paper does not ask, into paper/BEYOND.md

Our images, BLIP and query network are the pocket world's: compare the order of rows, not the two
numbers in a cell. Runs are kept in runs/tables/NAME-SEED; stopped ones resume. `all` also writes
every number to paper/results.json, from which --as-is prints the rows that were not run here.
"""

import argparse
import os
import signal
from collections import Counter
from pathlib import Path

import blip_lite
import train
from paper import agreement, beyond, costs, figures, lar, numbers, results, runs, stress, tables
from plumbing.command import run_command
from plumbing.files import check_output, replacing
from plumbing.options import add_shared_options, check_options

BEYOND = {"stronger": beyond.stronger_table, "rerank": beyond.rerank_table,
          "cost": beyond.rerank_cost, "growth": stress.growth_table,
          "robustness": stress.robustness_table}
ALL = (*map(str, range(1, 21)), "fig3", "lar", *figures.FIGURES, "agreement")


def needed(names, seeds):
    """Names of ALL -> {(run, seed): splits to evaluate it on}; seed None without training."""
    found = {}
    for name in names:
        entry = tables.TABLES.get(name)
        rows = numbers.ROWS.get(entry.rows if entry else name, {})
        wanted = [(row["ours"], seeds) for row in rows.values()]
        wanted += [(run, seeds[:1]) for run in figures.FIGURES.get(name, [()])[0]]
        wanted += [(beyond.RUN, seeds)] if name in BEYOND else []
        for ours, some in wanted:
            keys = [(runs.FOLDERS[ours], None)] if ours in runs.FOLDERS else []
            if ours in numbers.RUNS:
                keys = [(ours, seed) for seed in runs.seeds_of(ours, some)]
            for key in keys:
                splits = found.setdefault(key, [])
                if entry and entry.split not in splits:
                    splits.append(entry.split)
    return found


def section(name, args):
    """One table or figure -> lines of markdown, with its note and command."""
    title = tables.title_of(name)
    if name in ("1", "17"):
        lines = costs.cost_table() if name == "1" else costs.latency_table(args.threads)
    elif name == "agreement":
        lines = [*agreement.agreement_table(args.seeds), "", numbers.NOTES["agreement"]]
    elif name in BEYOND:
        lines = measured(name, args)
    elif name in figures.FIGURES:
        path = Path("paper/figures", f"{name}.png")
        lines = [numbers.NOTES[title], "",
                 f"![{title}]({os.path.relpath(path, Path(args.out or '').parent)})"]
        try:
            figures.draw_figure(name, path, args.seeds[0], args.threads)
        except ValueError as error:  # the tables are still worth printing
            if not (args.as_is and path.exists()):  # --as-is: as it was drawn elsewhere
                lines = [f"**{title}** is not drawn: {error}."]
    else:
        lines = lar.lar_table(args.seeds) if name == "lar" else tables.table(name, args.seeds)
        note = numbers.NOTES.get("lar" if name == "lar" else title)
        lines += ["", note] if note else []
    return [*lines, "", f"`python -m paper {name}`", ""]


def measured(name, args):
    """A table of BEYOND, kept in runs/tables/beyond: `beyond` and --as-is measure what is missing
    or older than a checkpoint, the table's own command always -> lines of markdown."""
    file = runs.HOME / "beyond" / f"{name}.md"
    models = [runs.folder(beyond.RUN, seed) / "isa.pt" for seed in args.seeds]
    times = [path.stat().st_mtime for path in models if path.exists()]
    kept = file.exists() and file.stat().st_mtime > max(times, default=0)
    if kept and (args.beyond or args.as_is):
        return file.read_text().splitlines()
    try:
        more = {"images": args.images} if name == "growth" else {}
        lines = BEYOND[name](args.seeds, args.threads, **more)
    except ValueError as error:
        return [f"**{name}** is not measured: {error}."]
    with replacing(file) as out:
        out.write("\n".join(lines).encode())
    return lines


def preamble(args, entries):
    """The head of RESULTS.md: the recipe of every row, seeds, machines and time, from the entries
    of results.json; or BEYOND.md's."""
    if not args.all:
        text = numbers.NOTES["BEYOND.md"].format(
            seeds=", ".join(map(str, args.seeds)), machine=costs.machine(args.threads))
        return ["# Beyond the paper", "", text, ""]
    recipe = vars(train.parse_args(runs.training("isa", 0)[1:]))
    machines = Counter(entry["machine"] for entry in entries.values())
    text = numbers.NOTES["RESULTS.md"].format(
        recipe=recipe, runs=len(entries), searle=numbers.RUNS["searle"][-1],
        seeds=", ".join(map(str, args.seeds)),
        machines="; ".join(f"{words} ({n} runs)" for words, n in machines.most_common()),
        hours=sum(entry["seconds"] for entry in entries.values()) / 3600,
    )
    return ["# Results: every table and figure of the paper, ours beside the paper's", "", text, ""]


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m paper", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = add_shared_options(p, "--threads")
    add("names", nargs="+", metavar="NAME",
        choices=(*ALL, "all", *BEYOND, "beyond", "commands"),
        help=f"{', '.join(ALL)} or all; {', '.join(BEYOND)} or beyond; "
        "with `commands`: print, do not run")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2],
        help="of every trained row; one is enough for a quick look")
    add("--as-is", action="store_true", help="run nothing: print what is there")
    add("--images", type=int, default=1_000_000, metavar="N", help="in the largest gallery of "
        "growth; each takes 0.7 ms of one core")
    add("--out", help="also write to this file (default of all: paper/RESULTS.md, of beyond: "
        "paper/BEYOND.md)")
    args = p.parse_args(argv)
    check_options(p, args, images=stress.SIZES[0])
    args.commands, args.all = "commands" in args.names, "all" in args.names
    args.beyond = "beyond" in args.names and not args.all
    if {"all", "beyond"} & {*args.names} and len({*args.names} - {"commands"}) > 1:
        p.error("all and beyond stand alone: each of them writes its own page")
    names = ALL if args.all else BEYOND if args.beyond else dict.fromkeys(args.names)
    args.names = [name for name in names if name != "commands"]
    if not args.names:
        p.error("commands of which tables? name some, or all")
    if not all(0 <= seed < 2**32 for seed in args.seeds) or len({*args.seeds}) < len(args.seeds):
        p.error("--seeds have to be different numbers, at least 0 and below 2**32")
    args.out = args.out or ("paper/RESULTS.md" if args.all else
                            "paper/BEYOND.md" if args.beyond else None)
    return args


def main(args):
    """Run and print what is asked for. Raises ValueError, at the end, if runs failed."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # the terminal was closed
    if args.out:
        check_output(args.out)
    wanted = needed(args.names, args.seeds)
    fingerprint = blip_lite.load("pocket").fingerprint if wanted else None
    if args.commands:
        for key, splits in wanted.items():
            if commands := runs.missing(*key, splits, fingerprint, args.threads):
                print(" && ".join(map(runs.shown, commands)))
        return
    failures = [] if args.as_is else runs.run_missing(wanted, args.threads, fingerprint)
    entries = {}
    if args.all:
        entries = results.collect(args.seeds, costs.machine(args.threads), fingerprint)
        for key, words in lar.look_at_runs(args.seeds).items():
            entries.get(runs.folder(*key).name, {})["words"] = words
        results.write(entries, Path(args.out).with_name(results.FILE.name))
    lines = preamble(args, entries) if args.all or args.beyond else []
    for name in args.names:
        made = section(name, args)
        print("\n".join(made), flush=True)
        lines += made
    if args.out:
        with replacing(args.out) as file:
            file.write("\n".join(lines).encode())
        print(f"wrote {args.out}")
    if failures:
        raise ValueError(f"failed runs: {len(failures)}; the first: {failures[0]}")


if __name__ == "__main__":
    run_command("paper", main, parse_args(), "interrupted; run the same command again to resume")
