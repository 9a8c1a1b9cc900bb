"""A leaderboard for the open project: a held-out pocket world, prediction files of several teams, a ranking that shows its ties.

    python -m pocket.world --out held_out --seed 7265193408816      # a long number of your own; whoever knows it has the targets
    python notebooks/assignments/leaderboard.py handout held_out for_students           # images and queries, no targets
    python notebooks/assignments/leaderboard.py baselines for_students baselines        # what the teams have to beat
    python notebooks/assignments/leaderboard.py score held_out teams --baselines baselines --markdown board.md --json board.json

teams/ holds a folder for each team, with cirr.json, fashioniq.json and circo.json as `python evaluate.py submit` writes them. The
score is the mean of CIRR's R@1, FashionIQ's R@10 (mean of its categories) and CIRCO's mAP@5 on the test queries. Intervals (95 %)
come from a bootstrap over queries; the same draws serve all teams, so that the difference of two teams has an interval of its own.
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
import evaluate  # noqa: E402
from benchmarks.metrics import HEADLINE  # noqa: E402
from plumbing.files import replacing  # noqa: E402
from plumbing.precision import open_blip  # noqa: E402

SPLIT = {"cirr": "test1", "fashioniq": "test", "circo": "test"}
CIRCO_LIST = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
KEPT = {  # the fields that the official test sets have; everything else may tell the target
    "cirr": ("pairid", "reference", "caption", "img_set"),
    "fashioniq": ("candidate", "captions"),
    "circo": ("reference_img_id", "relative_caption", "shared_concept", "id"),
}


def parts_of(name):
    """A benchmark's parts: one, or FashionIQ's categories."""
    return benchmarks.CATEGORIES if name == "fashioniq" else (None,)


# ---------------------------------------------------------------------------------------------- handout
def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path}: cannot be read; draw a world by `python -m pocket.world --out FOLDER --seed N`") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); draw the world again") from None


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def renamer(seed):
    """name -> a name that says nothing: in a drawn world neighbours' names follow each other, and so do references and targets."""
    return lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:12]


def hide(world):
    """A world on disk -> {"answers": {path: JSON}, "students": {path: JSON}, "images": {new path: old path}}; paths are relative.

    Images get names without meaning and lists a random order; `answers` still has the targets, `students` only official fields.
    """
    world = Path(world)
    seed = read_json(world / "world.json")["seed"]
    new, answers, images = renamer(seed), {}, {}
    entries = read_json(world / "cirr/captions/cap.rc2.test1.json")
    entries.sort(key=lambda entry: new(entry["pairid"]))  # a query's target is the reference of the group's next query
    for i, entry in enumerate(entries):
        entry |= {"pairid": i, "reference": new(entry["reference"]), "target_hard": new(entry["target_hard"]),
                  "target_soft": {}, "img_set": {"id": new(entry["img_set"]["id"]),
                                                 "members": sorted(map(new, entry["img_set"]["members"]))}}  # fmt: skip
    paths = read_json(world / "cirr/image_splits/split.rc2.test1.json")
    images |= {f"cirr/img_raw/test1/{new(name)}.png": f"cirr/img_raw/{path[2:]}" for name, path in paths.items()}
    answers["cirr/captions/cap.rc2.test1.json"] = entries
    answers["cirr/image_splits/split.rc2.test1.json"] = {name: f"./test1/{name}.png" for name in sorted(map(new, paths))}
    for category in benchmarks.CATEGORIES:
        captions, split = (f"fashioniq/{part}.{category}.test.json" for part in ("captions/cap", "image_splits/split"))
        names, entries = read_json(world / split), read_json(world / captions)
        for entry in entries:
            entry |= {"candidate": new(entry["candidate"]), "target": new(entry["target"])}
        answers[captions], answers[split] = entries, sorted(map(new, names))
        images |= {f"fashioniq/images/{new(name)}.png": f"fashioniq/images/{name}.png" for name in names}
    listed = read_json(world / "circo" / CIRCO_LIST)["images"]  # ids are random numbers, their order is not
    answers["circo/annotations/test.json"] = read_json(world / "circo/annotations/test.json")
    answers[f"circo/{CIRCO_LIST}"] = {"images": sorted(listed, key=lambda image: image["id"])}
    images |= {path: path for path in (f"circo/COCO2017_unlabeled/unlabeled2017/{image['file_name']}" for image in listed)}
    students = {}
    for path, value in answers.items():
        kept = KEPT[path.split("/")[0]]
        queries = "captions/" in path or path.endswith("test.json") and "annotations/" in path
        students[path] = [{k: v for k, v in entry.items() if k in kept} for entry in value] if queries else value
    return {"answers": answers, "students": students, "images": images}


def handout(args):
    """Write what students get to OUT, and the same with targets to WORLD/answers, by which `score` scores."""
    world, out = Path(args.world), Path(args.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; give a new folder, so that nothing else is handed out with it")
    if world.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: lies inside the world with the targets; give another folder")
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
    print(f"wrote {out}: {len(hidden['images'])} images and their queries, no targets; {world}/answers is yours")


# ---------------------------------------------------------------------------------------------- baselines
def baselines(args):
    """Prediction folders of the simple methods and of a trained ISA, for the handed-out world."""

    options = evaluate.parse_args(["table", "--precision", "fp32", "--cache-dir", args.cache_dir])
    blip, precision = open_blip(options)
    model, trained = evaluate.load_query_model(args.checkpoint, blip)
    documents = {}
    for name in HEADLINE:
        for category in parts_of(name):
            benchmark = benchmarks.load(name, Path(args.students) / name, SPLIT[name], category)
            setting = evaluate.Setting(blip, benchmark, options, precision)
            for method in (*evaluate.SIMPLE, "isa"):
                q = setting.query_features(method, model, trained["prompt"])
                documents.setdefault((method, name), {}).update(benchmarks.predictions(benchmark, setting.rank(q)[0]))
    for (method, name), document in documents.items():
        (Path(args.out) / method).mkdir(parents=True, exist_ok=True)
        benchmarks.write_predictions(Path(args.out) / method / f"{name}.json", document)
    print(f"wrote {args.out}: {', '.join(sorted({method for method, _ in documents}))}")


# ---------------------------------------------------------------------------------------------- score
def load_answers(world, names):
    """-> {name: [Benchmark for each part]} with targets, under the names that `handout` gave out."""
    answers = Path(world) / "answers"
    if not answers.is_dir():
        raise ValueError(f"{answers}: is missing; `leaderboard.py handout {world} OUT` writes it, for you alone")
    return {name: [benchmarks.load(name, answers / name, SPLIT[name], part) for part in parts_of(name)] for name in names}


def per_query(benchmark, rankings):
    """The headline metric of each query by itself, percent: [Q]; its mean is what benchmarks.score gives."""
    metric = HEADLINE[benchmark.name]
    return np.array([benchmarks.score(replace(benchmark, queries=[query]), rankings)[metric] for query in benchmark.queries])


def read_team(folder, opened):
    """A folder of prediction files -> [per-query values of each part]. Raises ValueError for what does not fit."""
    values = []
    for name, parts in opened.items():
        path = Path(folder) / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"{path}: is missing; hand in one file for each of {', '.join(opened)}")
        values += [per_query(part, benchmarks.read_predictions(path, part)) for part in parts]
    return values


def bootstrap(teams, weights, draws=2000, seed=0):
    """Scores of all teams in the same resampled sets of queries.

    teams: {team: [values of part 1 [Q1], values of part 2 [Q2], ...]}; weights: of the parts in the score -> {team: [draws]}.
    """
    rng, sums = np.random.default_rng(seed), {team: np.zeros(draws) for team in teams}
    for i, weight in enumerate(weights):
        count = len(next(iter(teams.values()))[i])
        often = rng.multinomial(count, np.full(count, 1 / count), size=draws)  # [draws, Q]: how often each query is drawn
        for team, values in teams.items():
            sums[team] += weight * (often @ values[i]) / count
    return sums


def leaderboard(opened, teams, draws=2000, seed=0):
    """{team: per-query values of each part} -> rows, best first: team, score, interval, metrics, behind (of the next better row).

    behind: the difference to the row above with its interval; a tie where the interval holds 0. None for the first.
    """
    names = [name for name, parts in opened.items() for _ in parts]
    weights = [1 / len(opened) / len(opened[name]) for name in names]
    sampled, rows = bootstrap(teams, weights, draws, seed), []
    interval = lambda x: [float(y) for y in np.percentile(x, (2.5, 97.5))]  # noqa: E731
    for team, values in teams.items():
        metrics = {name: float(np.mean([v.mean() for v, n in zip(values, names, strict=True) if n == name])) for name in opened}
        score = sum(w * v.mean() for w, v in zip(weights, values, strict=True))
        rows.append({"team": team, "score": float(score), "interval": interval(sampled[team]), "metrics": metrics, "behind": None})
    rows.sort(key=lambda row: (-row["score"], row["team"]))
    for better, row in zip(rows, rows[1:], strict=False):
        low, high = interval(sampled[better["team"]] - sampled[row["team"]])
        row["behind"] = {"by": better["score"] - row["score"], "interval": [low, high], "tie": low <= 0}
    return rows


def as_table(rows, opened):
    """Rows -> a Markdown table, which is readable as text too."""
    titles = ["", "team", "score", "95 %", *(f"{name} {HEADLINE[name]}" for name in opened), "behind the row above"]
    lines = [titles, ["---"] * len(titles)]
    for place, row in enumerate(rows, 1):
        behind = row["behind"]
        text = "" if behind is None else "{:.1f} ({:.1f} to {:.1f})".format(behind["by"], *behind["interval"])
        cells = [row["team"].replace("|", "/"), f"{row['score']:.2f}", "{:.1f} to {:.1f}".format(*row["interval"])]
        cells += [f"{row['metrics'][name]:.2f}" for name in opened]
        lines.append([str(place), *cells, text + ", a tie" * bool(behind and behind["tie"])])
    width = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join("| " + " | ".join(f"{cell:{w}s}" for cell, w in zip(line, width, strict=True)) + " |" for line in lines) + "\n"


def folders(root, suffix=""):
    """The folders in a folder -> {name: path}."""
    if not Path(root).is_dir():
        raise ValueError(f"{root}: is no folder; it should hold a folder for each team")
    return {path.name + suffix: path for path in sorted(Path(root).iterdir()) if path.is_dir() and path.name[0] != "."}


def score(args):
    opened = load_answers(args.world, args.benchmarks)
    found = folders(args.teams) | (folders(args.baselines, " (baseline)") if args.baselines else {})
    teams, refused = {}, {}
    for team, folder in found.items():
        try:
            teams[team] = read_team(folder, opened)
        except (ValueError, OSError) as error:
            refused[team] = str(error)
    if not teams:
        raise ValueError(f"nothing could be scored: {next(iter(refused.values()), f'{args.teams} holds no folder')}")
    rows = leaderboard(opened, teams, args.draws)
    table = as_table(rows, opened) + "".join(f"\nnot scored: {team}: {why}\n" for team, why in refused.items())
    print(table, end="")
    for path, text in ((args.markdown, table), (args.json, json.dumps({"rows": rows, "refused": refused}, indent=1) + "\n")):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(text.encode())
    if refused:
        raise ValueError(f"{len(refused)} of {len(found)} teams could not be scored; see above")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help):
        p = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        p.set_defaults(run=run)
        return p

    p = command("handout", handout, "copy a world's test images and queries without targets, under names that say nothing")
    p.add_argument("world", help="a world that pocket.world drew, with a seed that only you know")
    p.add_argument("out", help="new folder for the students")
    p = command("baselines", baselines, "prediction files of image, text, their sums, and ISA")
    p.add_argument("students", help="the folder that handout wrote")
    p.add_argument("out", help="folder for a folder of each baseline")
    p.add_argument("--checkpoint", default=str(ROOT / "pocket/isa.pt"), help="the ISA to beat")
    p.add_argument("--cache-dir", default="cache", help="folder for the gallery's features")
    p = command("score", score, "check and score the teams' prediction files")
    p.add_argument("world", help="the world with its answers, as handout left it")
    p.add_argument("teams", help="folder with a folder for each team")
    p.add_argument("--baselines", help="folder with a folder for each baseline")
    p.add_argument("--benchmarks", nargs="+", choices=HEADLINE, default=list(HEADLINE), help="what counts, in equal parts")
    p.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    p.add_argument("--json", help="write the rows")
    p.add_argument("--markdown", help="write the table")
    args = parser.parse_args(argv)
    if getattr(args, "draws", 100) < 100:
        parser.error(f"--draws has to be at least 100, not {args.draws}")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as stop:
        sys.exit(f"leaderboard.py: {stop}")
    except KeyboardInterrupt:
        sys.exit("leaderboard.py: interrupted")
