"""A leaderboard for the open project, on a held-out pocket world, with intervals and ties.

    python -m pocket.world --out held_out --seed 7265193408816   # a long number of your own
    python notebooks/assignments/leaderboard.py handout held_out for_students   # without targets
    python notebooks/assignments/leaderboard.py baselines for_students reference
    python notebooks/assignments/leaderboard.py score held_out teams --baselines reference \
        --markdown board.md --json board.json

Keep the seed secret: it gives the targets away. teams/ holds a folder for each team, with
cirr.json, fashioniq.json and circo.json as `python evaluate.py submit` writes them. The score is
the mean of CIRR's R@1, FashionIQ's R@10 (mean of its categories) and CIRCO's mAP@5 on the test
queries. Intervals (95 %) come from a bootstrap over queries. All teams share the same draws, so the
difference between two teams has an interval of its own.
"""

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import benchmarks  # noqa: E402
import blip_lite  # noqa: E402
import evaluate  # noqa: E402
import query_side  # noqa: E402
from benchmarks import HEADLINE  # noqa: E402
from plumbing.command import run_command  # noqa: E402
from plumbing.files import replacing, write_json  # noqa: E402

SPLIT = {"cirr": "test1", "fashioniq": "test", "circo": "test"}
CIRCO_LIST = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
KEPT = {  # the fields of the official test sets; any other may give the target away
    "cirr": ("pairid", "reference", "caption", "img_set"),
    "fashioniq": ("candidate", "captions"),
    "circo": ("reference_img_id", "relative_caption", "shared_concept", "id"),
}


def parts_of(name):
    """The parts of a benchmark: FashionIQ's categories, or the whole (None)."""
    return benchmarks.CATEGORIES if name == "fashioniq" else (None,)


# ------------------------------------------------------------------------------------------ handout
def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        remedy = "draw a world by `python -m pocket.world --out FOLDER --seed N`"
        raise ValueError(f"{path}: cannot be read; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); draw the world again") from None


def renamer(seed):
    """name -> a name without meaning; as drawn, a target's name follows its reference's."""
    return lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:12]


def hide(world):
    """A world on disk -> {"answers": {path: JSON}, "students": {path: JSON}, "images": {new: old}}.

    Paths are relative. Images get names without meaning, and lists a random order. `answers` keeps
    the targets, `students` only the official fields.
    """
    world = Path(world)
    new, answers, images = renamer(read_json(world / "world.json")["seed"]), {}, {}
    captions = "cirr/captions/cap.rc2.test1.json"
    entries = read_json(world / captions)
    entries.sort(key=lambda entry: new(entry["pairid"]))  # as drawn, targets are next references
    for i, entry in enumerate(entries):
        group = entry["img_set"]
        members = sorted(map(new, group["members"]))
        entry |= {"pairid": i, "reference": new(entry["reference"]), "target_soft": {},
                  "target_hard": new(entry["target_hard"]),
                  "img_set": {"id": new(group["id"]), "members": members}}
    split = "cirr/image_splits/split.rc2.test1.json"
    paths = read_json(world / split)
    images |= {f"cirr/img_raw/test1/{new(name)}.png": f"cirr/img_raw/{path[2:]}"
               for name, path in paths.items()}
    answers[captions] = entries
    answers[split] = {name: f"./test1/{name}.png" for name in sorted(map(new, paths))}

    for category in benchmarks.CATEGORIES:
        captions = f"fashioniq/captions/cap.{category}.test.json"
        split = f"fashioniq/image_splits/split.{category}.test.json"
        names, entries = read_json(world / split), read_json(world / captions)
        for entry in entries:
            entry |= {"candidate": new(entry["candidate"]), "target": new(entry["target"])}
        answers[captions], answers[split] = entries, sorted(map(new, names))
        images |= {f"fashioniq/images/{new(name)}.png": f"fashioniq/images/{name}.png"
                   for name in names}

    listed = read_json(world / "circo" / CIRCO_LIST)["images"]  # ids are random, their order is not
    answers["circo/annotations/test.json"] = read_json(world / "circo/annotations/test.json")
    answers[f"circo/{CIRCO_LIST}"] = {"images": sorted(listed, key=lambda image: image["id"])}
    files = [f"circo/COCO2017_unlabeled/unlabeled2017/{image['file_name']}" for image in listed]
    images |= dict(zip(files, files, strict=True))

    students = {}
    for path, value in answers.items():
        kept = KEPT[path.split("/")[0]]
        queries = "captions/" in path or path == "circo/annotations/test.json"
        students[path] = [{key: entry[key] for key in kept if key in entry}
                          for entry in value] if queries else value
    return {"answers": answers, "students": students, "images": images}


def handout(args):
    """Write what students get to OUT, and the same with targets, for `score`, to WORLD/answers."""
    world, out = Path(args.world), Path(args.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        remedy = "give a new folder, so that nothing else is handed out with it"
        raise ValueError(f"{out}: is not empty; {remedy}")
    if world.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: is inside the world with the targets; give another folder")
    hidden = hide(world)
    draft = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    for path, value in hidden["students"].items():
        write_json(draft / path, value)
    for path, old in hidden["images"].items():
        (draft / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(world / old, draft / path)  # without the times of the original
    for path, value in hidden["answers"].items():
        write_json(world / "answers" / path, value)
    if out.exists():
        out.rmdir()
    draft.rename(out)
    print(f"wrote {out}: {len(hidden['images'])} images and their queries, no targets")
    print(f"wrote {world}/answers: the targets, for you alone")


# ---------------------------------------------------------------------------------------- baselines
def baselines(args):
    """Write prediction files of the simple methods and of a trained ISA, for the handout."""
    blip = blip_lite.load("pocket")
    model, trained = query_side.load_query_model(args.checkpoint, blip)
    documents = {}
    for name in HEADLINE:
        for category in parts_of(name):
            benchmark = benchmarks.load(name, Path(args.students) / name, SPLIT[name], category)
            setting = evaluate.Setting(blip, benchmark, cache_dir=args.cache_dir)
            for method in (*evaluate.SIMPLE, "isa"):
                q = setting.query_features(method, model, trained["prompt"])
                predicted = benchmarks.predictions(benchmark, setting.rank(q)[0])
                documents.setdefault((method, name), {}).update(predicted)
    for (method, name), document in documents.items():
        benchmarks.write_predictions(Path(args.out) / method / f"{name}.json", document)
    print(f"wrote {args.out}: {', '.join(sorted({method for method, _ in documents}))}")


# -------------------------------------------------------------------------------------------- score
def load_answers(world, names):
    """-> {name: [Benchmark for each part]} with targets, under the names that `handout` chose."""
    answers = Path(world) / "answers"
    if not answers.is_dir():
        raise ValueError(f"{answers}: is missing; `leaderboard.py handout {world} OUT` writes it")
    return {name: [benchmarks.load(name, answers / name, SPLIT[name], part)
                   for part in parts_of(name)] for name in names}


def per_query(benchmark, rankings):
    """The headline metric of each query alone, in percent: [Q]; its mean is benchmarks.score's."""
    alone = [replace(benchmark, queries=[query]) for query in benchmark.queries]
    return np.array([benchmarks.score(one, rankings)[HEADLINE[benchmark.name]] for one in alone])


def read_team(folder, opened):
    """A folder of prediction files -> [per-query values of each part]. Raises ValueError."""
    values = []
    for name, parts in opened.items():
        path = Path(folder) / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"{path}: is missing; submit one file for each of {', '.join(opened)}")
        values += [per_query(part, benchmarks.read_predictions(path, part)) for part in parts]
    return values


def bootstrap(teams, weights, draws=2000, seed=0):
    """Scores of all teams on the same resampled sets of queries -> {team: [draws]}.

    teams: {team: [values of part 1 [Q1], values of part 2 [Q2], ...]}; weights: of the parts.
    """
    rng, sums = np.random.default_rng(seed), {team: np.zeros(draws) for team in teams}
    for i, weight in enumerate(weights):
        count = len(next(iter(teams.values()))[i])
        often = rng.multinomial(count, np.full(count, 1 / count), size=draws)  # [draws, Q]
        for team, values in teams.items():
            sums[team] += weight * (often @ values[i]) / count
    return sums


def interval(draws):
    """95 % of the draws lie between these two."""
    return [float(bound) for bound in np.percentile(draws, (2.5, 97.5))]


def leaderboard(opened, teams, draws=2000, seed=0):
    """{team: per-query values of each part} -> rows, best first.

    A row is {team, score, interval, metrics, behind}. behind, the difference from the row above,
    has an interval of its own; it is a tie where that contains 0. The first row's is None.
    """
    names = [name for name, parts in opened.items() for _ in parts]
    weights = [1 / len(opened) / len(opened[name]) for name in names]
    sampled, rows = bootstrap(teams, weights, draws, seed), []
    for team, values in teams.items():
        means = [float(v.mean()) for v in values]
        metrics = {name: float(np.mean([m for m, n in zip(means, names, strict=True) if n == name]))
                   for name in opened}
        score = sum(w * m for w, m in zip(weights, means, strict=True))
        rows.append({"team": team, "score": score, "interval": interval(sampled[team]),
                     "metrics": metrics, "behind": None})
    rows.sort(key=lambda row: (-row["score"], row["team"]))
    for better, row in zip(rows, rows[1:], strict=False):
        low, high = interval(sampled[better["team"]] - sampled[row["team"]])
        by = better["score"] - row["score"]
        row["behind"] = {"by": by, "interval": [low, high], "tie": low <= 0}
    return rows


def as_table(rows, opened):
    """Rows -> a Markdown table that is readable as text too."""
    titles = ["", "team", "score", "95 %", *(f"{name} {HEADLINE[name]}" for name in opened),
              "behind the row above"]
    lines = [titles, ["---"] * len(titles)]
    for place, row in enumerate(rows, 1):
        behind, text = row["behind"], ""
        if behind:
            text = "{:.1f} ({:.1f} to {:.1f})".format(behind["by"], *behind["interval"])
            text += ", a tie" * behind["tie"]
        metrics = [f"{row['metrics'][name]:.2f}" for name in opened]
        bounds = "{:.1f} to {:.1f}".format(*row["interval"])
        team = row["team"].replace("|", "/")
        lines.append([str(place), team, f"{row['score']:.2f}", bounds, *metrics, text])
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[f"{cell:{w}s}" for cell, w in zip(line, width, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def folders(root, suffix=""):
    """The folders in a folder -> {name: path}."""
    if not Path(root).is_dir():
        raise ValueError(f"{root}: is not a folder; it should contain a folder for each team")
    found = sorted(path for path in Path(root).iterdir() if path.is_dir())
    return {path.name + suffix: path for path in found if not path.name.startswith(".")}


def score(args):
    opened = load_answers(args.world, args.benchmarks)
    found, teams, refused = folders(args.teams), {}, {}
    if args.baselines:
        found |= folders(args.baselines, " (baseline)")
    for team, folder in found.items():
        try:
            teams[team] = read_team(folder, opened)
        except (ValueError, OSError) as error:
            refused[team] = str(error)
    if not teams:
        reason = next(iter(refused.values()), f"{args.teams} contains no folder")
        raise ValueError(f"nothing could be scored: {reason}")
    rows = leaderboard(opened, teams, args.draws)
    table = as_table(rows, opened)
    table += "".join(f"\nnot scored: {team}: {why}\n" for team, why in refused.items())
    print(table, end="")
    if args.markdown:
        with replacing(args.markdown) as file:
            file.write(table.encode())
    if args.json:
        write_json(args.json, {"rows": rows, "refused": refused})
    if refused:
        raise ValueError(f"{len(refused)} of {len(found)} teams could not be scored; see above")


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help):
        p = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        p.set_defaults(run=run)
        return p

    p = command("handout", handout, "copy a world's test images and queries without the targets")
    p.add_argument("world", help="a world that pocket.world drew, with a seed that only you know")
    p.add_argument("out", help="new folder for the students")
    p = command("baselines", baselines, "write prediction files of image, text, their sums and ISA")
    p.add_argument("students", help="the folder that handout wrote")
    p.add_argument("out", help="folder for a folder of each baseline")
    p.add_argument("--checkpoint", default=str(ROOT / "pocket/isa.pt"), help="the ISA to beat")
    p.add_argument("--cache-dir", default="cache", help="folder for the gallery's features")
    p = command("score", score, "check and score the teams' prediction files")
    p.add_argument("world", help="the world, with the answers that handout wrote")
    p.add_argument("teams", help="folder with a folder for each team")
    p.add_argument("--baselines", help="folder with a folder for each baseline")
    p.add_argument("--benchmarks", nargs="+", choices=HEADLINE, default=list(HEADLINE),
                   help="those that count, equally (default: all)")
    p.add_argument("--draws", type=int, default=2000, help="bootstrap draws (default: %(default)s)")
    p.add_argument("--json", help="write the rows")
    p.add_argument("--markdown", help="write the table")
    args = parser.parse_args(argv)
    if getattr(args, "draws", 100) < 100:
        parser.error(f"--draws has to be at least 100, not {args.draws}")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    run_command("leaderboard.py", arguments.run, arguments)
