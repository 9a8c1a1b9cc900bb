"""Annotation files -> gallery and queries, with every entry checked."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

CATEGORIES = ("dress", "shirt", "toptee")  # FashionIQ is three benchmarks, each with its gallery
PAPERS = ("cirr", "fashioniq", "circo")  # the pocket world has these
OPTIONAL = {"target_hard": str, "target": str, "gt_img_ids": list, "semantic_aspects": list[str],
            "modifier_type": str}  # fields of some captions only: test splits have no targets
ID = (int, str)  # some tools write numbers as strings


@dataclass
class Query:
    id: str
    reference: str
    captions: list[str]  # one, or FashionIQ's one or two, cleaned
    targets: list[str]  # ground truths, R@K's first; empty in a test split
    subset: list[str] | None = None  # the five others of CIRR's group
    aspects: list[str] = field(default_factory=list)  # CIRCO's semantic aspects
    kind: str = ""  # the pocket world's type of modifier


@dataclass
class Benchmark:
    name: str
    split: str
    gallery: list[str]  # ties in a ranking keep this order
    paths: dict[str, Path]  # of gallery and references, unchecked
    queries: list[Query]
    category: str | None = None


def load(name, root, split="val", category=None):
    """Read one split of "cirr", "circo" or "fashioniq" (with one of CATEGORIES) below `root`.

    Only annotations are read. CIRCO's gallery is COCO's own list, or else the image folder; with
    neither it is empty, which is enough to score. Raises FileNotFoundError, and ValueError for an
    unknown name, damaged annotations and a name that leaves `root`.
    """
    files = annotation_files(name, root, split, category)
    with remedy("repair it, or download it again from the official source"):
        benchmark = Benchmark(name, split, *READERS[name](Path(root), *files), category)
        _check_names(benchmark, files[0])
    return benchmark


def annotation_files(name, root, split, category=None):
    """What `load` requires: [captions, list of images]; annotations/SPLIT.json of any other."""
    if name not in NAMES or category not in (CATEGORIES if name == "fashioniq" else (None,)):
        raise ValueError(f"no benchmark {name!r} with category {category!r}: choose "
                         f"{', '.join(NAMES)}; fashioniq with one of {', '.join(CATEGORIES)}")
    root, stem = Path(root), f"{category or 'rc2'}.{plain_name(split, 'split')}.json"
    if name not in ("cirr", "fashioniq"):
        return [root / "annotations" / f"{split}.json"]
    if name == "cirr" and not (root / "captions").is_dir() and (root / "cirr").is_dir():
        root = root / "cirr"  # SEARLE's variant
    return [root / "captions" / f"cap.{stem}", root / "image_splits" / f"split.{stem}"]


def _read_cirr(root, captions, split):
    """Only `target_hard` counts as a target; the ranks in `img_set` are no indices into it."""
    places = [root / "img_raw", root / "images", root / "NLVR2" / "images"]
    places.insert(3 if captions.parent.parent == root else 0, root)
    paths, queries = {}, []
    for name, relative in read_json(split, dict).items():
        where = f"{split}, image {name!r:.80}"
        parts = PurePosixPath(typed(relative, str, where)).parts or ("",)
        paths[plain_name(name, where)] = Path(*(plain_name(p, where) for p in parts))
    images = _first_with(next(iter(paths.values()), Path()).parent, places)
    paths = {name: images / path for name, path in paths.items()}
    for where, entry in _entries(captions, pairid=ID, reference=str, caption=str, img_set=dict):
        members = fields(entry["img_set"], where, members=list[str])["members"]
        queries.append(Query(
            str(entry["pairid"]), entry["reference"], [entry["caption"].strip()],
            targets=[entry["target_hard"]] if "target_hard" in entry else [],
            subset=[name for name in members if name != entry["reference"]],
            kind=entry.get("modifier_type", "")))
    return list(paths), paths, queries


def _read_fashioniq(root, captions, split):
    """The protocol strips blanks and ".?,"; of two empty captions "" is left."""
    gallery, queries = read_json(split, list), []
    for _, entry in _entries(captions, candidate=str, captions=list[str]):
        texts = [text.strip(" \t\r\n.?,") for text in entry["captions"]]
        queries.append(Query(
            str(len(queries)), entry["candidate"], [text for text in texts if text] or [""],
            targets=[entry["target"]] if "target" in entry else [],
            kind=entry.get("modifier_type", "")))
    names = [plain_name(name, f"{split} or {captions.name}")
             for name in gallery + [query.reference for query in queries]]
    category, images = captions.name.split(".")[1], root / "images"
    places = (images, images / category, root / category)
    folder, files = max(((place, _list_images(place)) for place in places),
                        key=lambda found: len(found[1].keys() & names))
    return gallery, {name: folder / files.get(name, f"{name}.png") for name in names}, queries


def _read_circo(root, annotations):
    gallery, paths, queries = [], {}, []
    for where, entry in _entries(annotations, id=ID, reference_img_id=ID, relative_caption=str):
        truths = [coco_name(truth, where) for truth in entry.get("gt_img_ids", [])]
        queries.append(Query(
            str(entry["id"]), coco_name(entry["reference_img_id"], where),
            [entry["relative_caption"].strip()],
            targets=sorted(truths, key=coco_name(entry.get("target_img_id", 0), where).__ne__),
            aspects=entry.get("semantic_aspects", []), kind=entry.get("modifier_type", "")))
    info, folder = (_first_with(path, [root / "COCO2017_unlabeled", root]) / path
                    for path in ("annotations/image_info_unlabeled2017.json", "unlabeled2017"))
    files = _list_images(folder)
    used = {name for query in queries for name in (query.reference, *query.targets)}
    if info.is_file():
        for i, image in enumerate(fields(read_json(info, dict), info, images=list)["images"]):
            where = f"{info}, image {i}"
            gallery.append(coco_name(fields(image, where, id=ID)["id"], where))
    elif folder.is_dir():  # and all that is used: a half-unpacked folder shows as missing images
        present = {str(int(stem)) for stem in files if re.fullmatch("[0-9]{12}", stem)}
        gallery = sorted(used | present, key=int)
    for name in gallery + sorted(used - set(gallery), key=int):
        stem = f"{int(name):012d}"
        paths[name] = folder / files.get(stem, f"{stem}.jpg")
    return gallery, paths, queries


READERS = {"cirr": _read_cirr, "fashioniq": _read_fashioniq, "circo": _read_circo}
NAMES = tuple(READERS)


def _first_with(path, folders):
    """The first of `folders` that holds `path`, or else the first."""
    return next((folder for folder in folders if (folder / path).exists()), folders[0])


def _list_images(folder):
    """dict stem -> file name, .jpg before .png where both exist; {} if there is no folder."""
    paths = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ()
    return {p.stem: p.name for p in paths if p.suffix.lower() in (".jpg", ".jpeg", ".png")}


def _check_names(benchmark, file):
    """Ids and gallery names are unique, and every name that a query uses is known."""
    queries, gallery = benchmark.queries, set(benchmark.gallery)
    ids = {query.id for query in queries}
    if not ids or len(ids) < len(queries) or len(gallery) < len(benchmark.gallery):
        raise ValueError(f"{file} is empty, or it or its list of images repeats an entry")
    for i, query in enumerate(queries):
        where, shown = f"{file}, entry {i}", (query.reference, *(query.subset or ()))
        unknown = [name for name in shown if name not in benchmark.paths]
        unknown += [name for name in query.targets if name not in gallery]
        if len(set(query.targets)) < len(query.targets):
            raise ValueError(f"{where}: a ground truth is listed twice")
        if bool(query.targets) != bool(queries[0].targets):
            raise ValueError(f"{where}: some entries have a target and some have none")
        if unknown and gallery:
            raise ValueError(f"{where}: {unknown[0]!r:.80} is not in the list of images")


# Checks of JSON: each returns the value, or raises ValueError that says where it is.
@contextmanager
def remedy(advice):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}: {advice}") from None


def read_json(path, kind):
    if not path.is_file():
        pattern = f"{path.name.split('.')[0]}.*.json" if len(path.suffixes) > 1 else "*.json"
        others = ", ".join(sorted(file.name for file in path.parent.glob(pattern))[:6])
        raise FileNotFoundError(f"{path} is missing{f' (there is {others})' if others else ''}: "
                                "`python evaluate.py check` prints what is expected")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not usable JSON ({error})") from None
    return typed(content, kind, path)


def _unique_keys(pairs):
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key!r:.80} appears twice")
        content[key] = value
    return content


def _entries(path, **kinds):
    for i, entry in enumerate(read_json(path, list)):
        yield f"{path}, entry {i}", fields(entry, f"{path}, entry {i}", **kinds)


def fields(entry, where, **kinds):
    """A dict with all of `kinds` and any of OPTIONAL, without those that are null."""
    entry = {k: x for k, x in typed(entry, dict, where).items() if x is not None or k in kinds}
    for key, kind in (OPTIONAL | kinds).items():
        if key in entry:
            typed(entry[key], kind, f"{where}, {key!r}")
        elif key in kinds:
            raise ValueError(f"{where}: {key!r} is missing")
    return entry


def typed(value, kind, where):
    if kind == list[str]:
        return [typed(text, str, where) for text in typed(value, list, where)]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:  # not isinstance: JSON's true would pass for an int
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: expected {expected}, found {value!r:.80}")
    return value


def plain_name(name, where):
    """A name that cannot reach another folder. (A symbolic link in `root` is the user's choice.)"""
    if typed(name, str, where) in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{where}: {name!r:.80} is not a plain file name")
    return name


def coco_name(value, where):
    """A COCO id, an int or a decimal string -> its name, without padding."""
    if type(value) not in (int, str) or not re.fullmatch("[0-9]{1,20}", str(value)):
        raise ValueError(f"{where}: {value!r:.80} is not a COCO image id; these are whole numbers")
    return str(int(value))
