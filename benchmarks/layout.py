"""What should be on disk, and what is."""

from itertools import product

from benchmarks.readers import CATEGORIES, TREES, annotation_files, load

CHECKED = {"cirr": ("val", "test1"), "fashioniq": ("val",), "circo": ("val", "test")}  # evaluated splits


def expected_tree(name):
    """The official tree of a benchmark, relative to its root, as text."""
    return TREES[name]


def check_benchmark(name, root, splits=None):
    """Print the expected tree of a benchmark, and what was found of each split (and category).

    splits: by default those of CHECKED whose annotations are there, or else "val".
    Raises ValueError where annotations are missing or damaged, or images are missing or empty.
    """
    print(f"expected below {root}:\n\n{expected_tree(name)}\n")
    categories = CATEGORIES if name == "fashioniq" else (None,)
    if splits is None:
        splits = [split for split in CHECKED[name] if any(
            file.is_file() for c in categories for file in annotation_files(name, root, split, c))]
    complete = True
    for split, category in product(splits or ["val"], categories):
        files = annotation_files(name, root, split, category)
        missing = [file for file in files if not file.is_file()]
        try:
            benchmark = load(name, root, split, category)
            missing = [benchmark.paths[image] for image in missing_images(benchmark)]
            found = f"{len(benchmark.paths) - len(missing)} of {len(benchmark.paths)} images found"
            found = f"{len(benchmark.queries)} queries, gallery of {len(benchmark.gallery)}, {found}"
            complete &= not missing
        except (FileNotFoundError, ValueError) as error:
            found = "annotations are missing" if missing else error
            complete = False
        print(f"{name} {category or ''} {split}: {found}")
        for path in missing[:5]:
            print(f"  missing: {path}")
    if not complete:
        raise ValueError(f"{root} is not complete; see the list above")


def missing_images(benchmark):
    """Names (gallery first, in its order) whose image file does not exist or is empty."""
    return [name for name, path in benchmark.paths.items() if not _has_content(path)]


def _has_content(path):
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def require_images(benchmark):
    """ValueError where images are missing, before a model is loaded: no gallery is silently smaller."""
    missing = missing_images(benchmark)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(benchmark.paths)} images of {benchmark.name} are missing or empty, the "
            f"first is {benchmark.paths[missing[0]]}; `python evaluate.py check` shows the expected tree")
