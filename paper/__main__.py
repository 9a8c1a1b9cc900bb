"""Every table and figure of the paper as a list of runs: what is missing is trained, then ours is printed beside the paper's.

    python tables.py 5                    # trains and evaluates what Table 5 needs (three seeds a row), prints it
    python tables.py 2 8 fig3             # several; rows that tables share are trained once
    python tables.py commands 5           # only prints what is missing, one line a run, to be started side by side on idle cores
    python tables.py all                  # everything; writes RESULTS.md (--as-is: from what is there, without running anything)
    python tables.py 1                    # cost at the real sizes (also 17); needs no training
    python tables.py fig5                 # pocket/figures/fig5.png (also fig4, fig6, fig7, fig8)
    python tables.py lar                  # what LAR changes: results by type of modifier, and the learnt words themselves

Ours is measured in the pocket world, on its test sets (Tables 9 and 10: validation). Its images, its BLIP and its query network are
not the paper's, so numbers are not to be compared across a row: compare which row stands above which, and by how many spreads.

A run is `train.py` with the options of RUNS in runs/tables/NAME-SEED, then `evaluate.py table`. What is finished is not run again,
and what was stopped goes on where it was. Ctrl-C stops after the step in hand. For the paper's own data, take what `commands`
prints and add --preset paper and the paths of README's "The real thing".
"""

import argparse
from pathlib import Path

import blip_lite
import query_side
import train
from paper.costs import cost_table, latency_table, machine
from paper.figures import draw_figure
from paper.numbers import NOTES
from paper.runs import ALL, COSTS, FIGURES, RUNS, missing, needed, run_missing, shown, training
from paper.tables import lar_table, table
from plumbing.command import run_command
from plumbing.files import check_output, replacing


def section(name, args):
    """Everything about one table or figure -> lines of markdown: numbers or picture, notes, command."""
    if name in COSTS:
        lines = [*(cost_table() if name == "1" else latency_table(args.threads)), ""]
    elif name in FIGURES:
        try:
            path, told = draw_figure(name, args)
            lines = [f"**Figure {name[3:]}: {told}**", "", f"![Figure {name[3:]}]({path})", ""]
        except ValueError as error:  # the tables are still worth printing
            lines = [f"**Figure {name[3:]}** is not drawn: {error}.", ""]
    elif name == "lar":
        lines = [*lar_table(args.seeds), ""]
    else:
        lines = table(name, args.seeds)
    return [*lines, *([NOTES[name], ""] if name in NOTES else []), f"`python tables.py {name}`", ""]


def preamble(args):
    """What RESULTS.md is, the budget of a row, the machine, seeds and time."""
    recipe = vars(train.parse_args(training("isa", 0)[1:]))
    images = {int(query_side.read_checkpoint(path)["images"]) for path in sorted(Path("runs/tables").glob("isa-*/isa.pt"))}
    logs = [path.read_text() for path in sorted(Path("runs/tables").glob("*/log.txt"))]
    seconds = sum(float(line.split()[1]) for text in logs for line in text.splitlines() if line.startswith("tables.py: "))
    epochs = "1 epoch" if recipe["epochs"] == 1 else f"{recipe['epochs']} epochs"
    text = f"""\
# Results: every table and figure of the paper, ours beside the paper's

Written by `python tables.py all`; below each table stands the command that makes it alone. Ours is measured in the pocket world
(see README), whose images, BLIP and light network are not the paper's: compare the order of rows, not the two numbers of a cell.
The paper's ablations are on validation sets; ours are on test sets unless it says otherwise, since choices were made on validation.

- **Training of every row**: {" or ".join(map(str, images)) or "all"} images of {recipe["images"]}, {epochs},
  batch {recipe["batch"]}, AdamW with a peak learning rate of {recipe["lr"]} and weight decay {recipe["weight_decay"]}, no
  augmentation; {recipe["encoder"]} where no other encoder is named. That is a quarter of `python train.py`, so that
  all can be run; README has ISA's results at full length. Rows that say more epochs or steps have them, SEARLE has a recipe
  of its own (baselines.py), with {RUNS["searle"][-1]} images to invert.
- **Seeds**: {", ".join(map(str, args.seeds))}. Numbers without ± have one seed, or no training.
- **Machine**: {machine(args.threads)}.
- **Time**: {seconds / 3600:.1f} hours recorded, for {len(logs)} runs with their evaluation.
"""
    return [*text.splitlines(), ""]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(ALL)} or all; `commands` before them: print, do not run")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of every trained row; one for a quick look")
    p.add_argument("--threads", type=int, default=0, help="CPU threads of a run (0 = all)")
    p.add_argument("--as-is", action="store_true", help="run nothing: print what is there")
    p.add_argument("--imagenet", action="store_true", help="also the rows that start from ImageNet weights (downloads, weights/)")
    p.add_argument("--out", help="also write what is printed to this file (all: RESULTS.md)")
    args = p.parse_args(argv)
    args.commands = args.names[0] == "commands"
    args.names = args.names[args.commands :]
    args.all = "all" in args.names
    unknown = [name for name in args.names if name not in (*ALL, "all")]
    if unknown or not args.names:
        p.error(f"there is no table or figure {' '.join(unknown)}; choose from {' '.join(ALL)} all")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds) or args.threads < 0:
        p.error("--seeds and --threads have to be at least 0, and no seed twice")
    args.names = list(ALL) if args.all else list(dict.fromkeys(args.names))
    args.out = args.out or ("RESULTS.md" if args.all else None)
    return args


def main(args):
    if args.out:
        check_output(args.out)
    runs = needed(args.names, args.seeds, args.imagenet)
    fingerprint = blip_lite.load("pocket").fingerprint if runs else None
    if args.commands:
        for (run, seed), splits in runs.items():
            commands = missing(run, seed, splits, fingerprint, args.threads)
            if commands:
                print(" && ".join(map(shown, commands)))
        return []
    failures = run_missing(args.names, args, fingerprint) if runs and not args.as_is else []
    lines = preamble(args) if args.all else []
    for name in args.names:
        made = section(name, args)
        print("\n".join(made), flush=True)
        lines += made
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out) as file:
            file.write("\n".join(lines).encode())
        print(f"wrote {args.out}")
    return failures


if __name__ == "__main__":
    run_command("paper", main, parse_args(), "interrupted; the same command continues from here")
