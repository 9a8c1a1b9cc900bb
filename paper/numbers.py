"""The data beside this file: the paper's numbers, the rows of its tables, our runs, the notes."""

from pathlib import Path


def read_sections(name):
    """A markdown file -> {heading of second level: the text below it}."""
    text = (Path(__file__).parent / name).read_text()
    parts = (part.partition("\n") for part in text.split("\n## ")[1:])
    return {heading: body.strip() for heading, _, body in parts}


def read_tables(name):
    """A markdown file with a table in each section -> {heading: {first cell: {column: cell}}}."""
    found = {}
    for heading, text in read_sections(name).items():
        lines = [line for line in text.splitlines() if line.startswith("|")]
        head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        found[heading] = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    return found


NUMBERS, ROWS = read_tables("numbers.md"), read_tables("rows.md")
CONTENTS = ROWS.pop("tables")  # title, headings and rows of each table
NOTES, TRAINED, UNTRAINED = read_sections("notes.md"), *read_tables("runs.md").values()
RUNS = {name: row["options"].split() for name, row in TRAINED.items()}  # options of train.py
METHODS = {name: row["methods"].split(", ") for name, row in UNTRAINED.items()}  # of evaluate.py
