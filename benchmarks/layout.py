"""What should be on disk, and what is."""

from itertools import islice, product
from pathlib import Path

from benchmarks.readers import CATEGORIES, annotation_files, load
from plumbing.images import decode_sample, list_images, walk

EVALUATED = {"cirr": ("val", "test1"), "circo": ("val", "test")}  # splits; of others "val" alone


def check_benchmark(name, root, splits=None, decode=200, workers=0):
    """Print the expected tree of a benchmark and what was found of each split (and category).

    splits: by default those of EVALUATED that have annotations, or else "val". decode: how many
    images of each to decode. Raises ValueError where anything is missing or damaged.
    """
    tree = (Path(__file__).parent / "trees" / f"{name}.txt").read_text()
    print(f"expected below {root}:\n\n{tree}")
    parts, complete = CATEGORIES if name == "fashioniq" else (None,), True
    decoded = set()  # CIRCO's splits share a gallery
    if splits is None:
        splits = [split for split in EVALUATED.get(name, ("val",)) if any(
            file.is_file() for part in parts for file in annotation_files(name, root, split, part))]
    for split, part in product(splits or ["val"], parts):
        files, paths = annotation_files(name, root, split, part), {}
        missing = [file for file in files if not file.is_file()]
        try:
            benchmark = load(name, root, split, part)
            paths = benchmark.paths
            missing = [paths[image] for image in missing_images(benchmark)]
            found = (f"{len(benchmark.queries)} queries, gallery of {len(benchmark.gallery)}, "
                     f"{len(paths) - len(missing)} of {len(paths)} images found")
        except (FileNotFoundError, ValueError) as error:
            found, complete = "annotations are missing" if missing else error, False
        print(f"{name} {part or ''} {split}: {found}")
        for path in missing[:5]:
            print(f"  {'empty' if path.is_file() else 'missing'}: {path}")
        if paths and 2 * len(missing) > len(paths):
            _search(root, missing)
        there = sorted({*paths.values()}.difference(missing, decoded))
        decoded.update(there)
        if there:
            complete &= not decode_sample(list_images(there), decode, workers)[1]
        complete &= not missing
    if not complete:
        raise ValueError(f"{root} is not complete; see the list above")


def _search(root, missing):
    """Print a folder below `root` that holds one of the first missing images, if there is one."""
    wanted = {path.stem: path for path in missing[:50]}
    for path in map(Path, islice(walk(root), 500_000)):
        place = wanted.get(path.stem, path)
        if path.parent != place.parent:
            print(f"  images seem to be in {path.parent}; link or move them to {place.parent}")
            break


def missing_images(benchmark):
    """Names, gallery first, whose image file does not exist or is empty."""
    return [name for name, path in benchmark.paths.items()
            if not (path.is_file() and path.stat().st_size)]


def require_images(benchmark):
    """ValueError where images are missing."""
    missing = missing_images(benchmark)
    if missing:
        raise ValueError(f"{len(missing)} of {len(benchmark.paths)} images of {benchmark.name} are "
                         f"missing or empty, the first is {benchmark.paths[missing[0]]}; "
                         "`python evaluate.py check` shows the expected tree")
