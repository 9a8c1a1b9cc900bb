"""Do our rows stand in the paper's order? Pairs of rows that the paper separates by a point."""

import statistics
from itertools import combinations

from paper.numbers import NOTES, NUMBERS, ROWS
from paper.results import measured
from paper.tables import COLUMNS, TABLES, markdown, title_of, value

SUMMARY = {"CIRR": "Avg", "CIRCO": "Avg", "FashionIQ": "R@10"}  # heading of a table -> metric
VERDICTS = ("agree", "level", "against", "not run")


def verdict(paper, ours):
    """Two rows' numbers in the paper, and of each the list of ours over seeds -> of VERDICTS.

    level: the means differ by no more than the pooled standard deviation, or half a point.
    """
    if not all(ours):
        return "not run"
    first, second = map(statistics.mean, ours)
    variances = [statistics.variance(x) if len(x) > 1 else 0 for x in ours]
    if abs(first - second) <= max(0.5, statistics.mean(variances) ** 0.5):
        return "level"
    return "agree" if (first > second) == (paper[0] > paper[1]) else "against"


def separated_pairs(seeds):
    """Yields (table, heading, the two rows' labels, the paper's two numbers, ours over seeds, the
    verdict), each pair of the paper's numbers once for each split, though two tables print it."""
    seen = set()
    for name, entry in TABLES.items():
        for heading in entry.headings if entry.rows != "token lengths" else ():
            printed, metric = NUMBERS[f"{heading} {entry.printed}"], SUMMARY[heading]
            where, rows = COLUMNS[heading][metric], ROWS[entry.rows]
            found = {label: [value(result, *where)
                             for result in measured(row["ours"], seeds, entry.split)]
                     for label, row in rows.items()}
            for column in next(iter(rows.values())).keys() - {"ours"}:
                there = [label for label, row in rows.items()
                         if row[column] and "triplets" not in row["ours"]]
                for two in combinations(there, 2):
                    papers = [rows[label][column] for label in two]
                    key = (heading, entry.printed, entry.split, *sorted(papers))
                    numbers = [float(printed[paper][metric]) for paper in papers]
                    if key not in seen and abs(numbers[0] - numbers[1]) >= 1:
                        ours = [found[label] for label in two]
                        yield name, heading, two, numbers, ours, verdict(numbers, ours)
                    seen.add(key)


def agreement_table(seeds):
    """Two tables -> lines of markdown: the count for each table, and each pair against."""
    all_pairs, count, against = list(separated_pairs(seeds)), {}, []
    for name, heading, labels, numbers, ours, found in all_pairs:
        count.setdefault((name, heading), dict.fromkeys(VERDICTS, 0))[found] += 1
        if found == "against":
            means = [f"{statistics.mean(x):.1f}" for x in ours]
            where = f"{title_of(name)}, {heading} {SUMMARY[heading]}"
            against.append([where, *labels, " / ".join(map(str, numbers)), " / ".join(means)])
    rows = [[f"{title_of(name)}, {heading}", *map(str, found.values())]
            for (name, heading), found in count.items()]
    total = {v: sum(found[v] for found in count.values()) for v in VERDICTS}
    rows.append(["all", *map(str, total.values())])
    said = NOTES["agreement, count"].format(**total, pairs=len(all_pairs))
    return [said, "", *markdown(["table", *VERDICTS], rows), "", "Those that contradict:", "",
            *markdown(["where", "one row", "another", "paper", "ours"], against)]
