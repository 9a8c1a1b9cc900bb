"""What should lie on disk, and what does."""

import os
from contextlib import nullcontext
from pathlib import Path

import benchmarks
from benchmarks.readers import CATEGORIES, TREES, annotation_files, load

CHECKED = {"cirr": ("val", "test1"), "fashioniq": ("val",), "circo": ("val", "test")}  # the splits that evaluation asks for


def expected_tree(name):
    """The official tree of a benchmark, relative to its root, as text."""
    return TREES[name]


def missing_images(benchmark):
    """Names (gallery first, in its order) whose image file does not exist or is empty: one listing a folder."""
    listed = {}
    for folder in {path.parent for path in benchmark.paths.values()}:
        with os.scandir(folder) if folder.is_dir() else nullcontext(()) as entries:
            listed[folder] = {entry.name for entry in entries if not _is_empty(entry)}
    return [name for name, path in benchmark.paths.items() if path.name not in listed[path.parent]]


def _is_empty(entry):
    try:
        return entry.stat().st_size == 0
    except OSError:  # a link that leads nowhere
        return True


def _annotated(name, root, split):
    """Is any annotation file of this split there?"""
    return any(file.is_file() for category in (CATEGORIES if name == "fashioniq" else (None,))
               for file in annotation_files(name, root, split, category))


def find_root(name, root):
    """Where a user may have meant: the folder with the annotations of a benchmark, and if possible its images, among `root`, its
    parent and what lies up to two levels below; None where there is none.
    """
    below = [folder for pattern in ("*/", "*/*/") for folder in sorted(Path(root).glob(pattern))[:1000]]
    annotated = [(folder, split) for folder in (Path(root), Path(root).absolute().parent, *below) for split in CHECKED[name]
                 if _annotated(name, folder, split)]
    for folder, split in annotated:
        try:
            paths = load(name, folder, split, CATEGORIES[0] if name == "fashioniq" else None).paths
        except (FileNotFoundError, ValueError):
            continue
        if next(iter(paths.values())).is_file():
            return folder
    return annotated[0][0] if annotated else None


def check_layout(name, root, splits=None, first=5):
    """Compare a folder with the expected tree -> one dict a split (FashionIQ: a split and category).

    Keys: split, category, found and missing (annotation files), problem (a sentence, or None); when the annotations
    can be read also queries, gallery, images (expected), images_missing (counts) and first_missing (their paths).
    splits: by default those that evaluation asks for (CHECKED) and whose annotations are there, or else "val".
    """
    if splits is None:
        splits = [split for split in CHECKED[name] if _annotated(name, root, split)] or ["val"]
    rows = []
    for split in splits:
        for category in CATEGORIES if name == "fashioniq" else (None,):
            files = annotation_files(name, root, split, category)
            row = {"split": split, "category": category, "problem": None,
                   "found": [str(file) for file in files if file.is_file()],
                   "missing": [str(file) for file in files if not file.is_file()]}
            try:
                benchmark = load(name, root, split, category)
                absent = missing_images(benchmark)
                row |= {"queries": len(benchmark.queries), "gallery": len(benchmark.gallery),
                        "images": len(benchmark.paths), "images_missing": len(absent),
                        "first_missing": [str(benchmark.paths[image]) for image in absent[:first]]}
            except (FileNotFoundError, ValueError) as error:
                row["problem"] = str(error)
            rows.append(row)
    return rows


def require_images(benchmark):
    """ValueError where image files are missing, before any model is loaded: a gallery is never silently smaller."""
    missing = benchmarks.missing_images(benchmark)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(benchmark.paths)} images of {benchmark.name} are missing or empty, the first is "
            f"{benchmark.paths[missing[0]]}; `python evaluate.py check` shows the expected tree"
        )


def check_benchmark(name, root, splits=None):
    """Temporary, until its owner's version is merged."""
    print(f"expected below {root}:\n\n{expected_tree(name)}\n")
    complete = True
    for row in check_layout(name, root, splits):
        print(f"{name} {row['category'] or ''} {row['split']}: ", end="")
        if row["problem"]:
            complete = False
            print(row["problem"] if not row["missing"] else "annotations are missing")
            for file in row["missing"]:
                print(f"  missing: {file}")
            continue
        found = row["images"] - row["images_missing"]
        print(f"{row['queries']} queries, gallery of {row['gallery']}, {found} of {row['images']} images found")
        for file in row["first_missing"]:
            print(f"  missing: {file}")
        complete &= not row["images_missing"]
    if not complete:
        meant = find_root(name, root)
        hint = "" if meant in (None, Path(root)) else f", and --data {meant} has its annotations"
        raise ValueError(f"{root} is not complete; see the list above{hint}")
