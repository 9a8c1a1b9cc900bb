"""Make what a teacher hands out or puts on a page, from the notebooks as committed.

    python notebooks/make.py hand-out --out DIR    # no outputs, answers folded: for predicting
    python notebooks/make.py html --out DIR        # static pages, outputs included
    python notebooks/make.py address URL           # write the repository's address everywhere
    python notebooks/make.py ranges                # run them all again: ranges.json

`hand-out` folds the prose that follows a result behind "Answer". The code cells stay as they are.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ADDRESS = re.compile(r'^ADDRESS = "(.*)"', re.MULTILINE)
FOLDED = "<details><summary>Answer</summary>\n\n{}\n\n</details>"


def notebooks():
    """The six tutorials, in order: [(path, document)]."""
    paths = sorted(HERE.glob("0*.ipynb"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def write(path, document):
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def answers(text):
    """A markdown cell below a prediction -> the same with its answer folded.

    The answer ends where a heading or the next question begins: what follows introduces that.
    """
    blocks = text.split("\n\n")
    ends = [i for i, x in enumerate(blocks) if x.startswith(("#", "|")) or "**Predict" in x]
    end = min(ends, default=len(blocks))
    folded = [FOLDED.format("\n\n".join(blocks[:end]))] if end else []
    return "\n\n".join(folded + blocks[end:])


def hand_out(document):
    """Outputs go; the first prose after the code that follows a "**Predict" is folded."""
    asked = run = False
    for cell in document["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
            run = asked
            continue
        if run:
            text = answers(text)
            asked = run = False
        asked |= "**Predict" in text
        cell["source"] = text.splitlines(keepends=True)
    return document


def make_hand_out(args):
    for path, document in notebooks():
        write(args.out / path.name, hand_out(document))
    shutil.copy(HERE / "method.svg", args.out)
    print(f"wrote {len(notebooks())} notebooks without outputs to {args.out}; open them inside a "
          "clone, or let their first cell fetch one")


def make_html(args):
    try:
        import nbformat
        from nbconvert import HTMLExporter
    except ImportError:
        sys.exit("make.py: html needs nbconvert; pip install -r notebooks/requirements.txt")
    for path, document in notebooks():
        page, _ = HTMLExporter().from_notebook_node(nbformat.reads(json.dumps(document), 4))
        page = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', page)
        (args.out / f"{path.stem}.html").write_text(page, encoding="utf-8")
    shutil.copy(HERE / "method.svg", args.out)
    print(f"wrote {len(notebooks())} pages to {args.out}")


def set_address(args):
    for path, document in notebooks():
        for cell in document["cells"]:
            text = ADDRESS.sub(lambda _: f'ADDRESS = "{args.url}"', "".join(cell["source"]))
            cell["source"] = text.splitlines(keepends=True)
        write(path, document)
    print(f"the first cells clone from {args.url}")


def make_ranges(args):
    import ranges

    chosen = [x for x in notebooks() if int(x[0].name[:2]) in args.notebooks]
    try:
        ranges.write(chosen, args.seeds)
    except (ImportError, ValueError) as error:
        sys.exit(f"make.py: ranges: {error}; see notebooks/README.md, How to start")


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True)
    for name, run in {"hand-out": make_hand_out, "html": make_html, "address": set_address,
                      "ranges": make_ranges}.items():
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        if name == "address":
            command.add_argument("url", help="what `git clone` takes")
        elif name == "ranges":
            command.add_argument("--notebooks", type=int, nargs="+", default=range(1, 7),
                                 choices=range(1, 7), metavar="N", help="all six by default")
            command.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N",
                                 help="0: as committed; others are added to each, in thousands")
        else:
            command.add_argument("--out", type=Path, required=True, help="a folder")
    args = p.parse_args()
    if "out" in args:
        if args.out.resolve() == HERE:
            sys.exit("make.py: --out has to be another folder than notebooks/")
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"make.py: --out {args.out} cannot be made ({error.strerror}); name another")
    args.run(args)


if __name__ == "__main__":
    main()
