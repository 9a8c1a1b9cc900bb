"""Annotation files -> gallery and queries, every entry checked."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

CATEGORIES = ("dress", "shirt", "toptee")  # FashionIQ is three benchmarks, each with its own gallery
TREES = {
    "cirr": """\
captions/cap.rc2.{train,val,test1}.json
image_splits/split.rc2.{train,val,test1}.json     name -> "./dev/NAME.png"
img_raw/{train,dev,test1}/                        NLVR2's images; train has numbered sub-folders
(or, as in SEARLE: cirr/captions/, cirr/image_splits/, and train/, dev/, test1/ beside cirr/)""",
    "fashioniq": """\
captions/cap.{dress,shirt,toptee}.{train,val,test}.json
image_splits/split.{dress,shirt,toptee}.{train,val,test}.json
images/                                           NAME.png or NAME.jpg""",
    "circo": """\
annotations/{val,test}.json
COCO2017_unlabeled/annotations/image_info_unlabeled2017.json
COCO2017_unlabeled/unlabeled2017/                 000000243611.jpg: COCO ids in 12 digits""",
}


@dataclass
class Query:
    """One composed query. `targets` is empty in a test split; its first entry is R@K's single target.

    captions: 1 text (CIRR, CIRCO) or 1-2 (FashionIQ, cleaned); subset: CIRR's group without the reference,
    five names; aspects: CIRCO's semantic aspects; kind: the pocket world's type of modifier, else "".
    """
    id: str
    reference: str
    captions: list[str]
    targets: list[str]
    subset: list[str] | None = None
    aspects: list[str] = field(default_factory=list)
    kind: str = ""


@dataclass
class Benchmark:
    """One split. Ties break in the order of `gallery`; `paths` covers gallery and references, unchecked."""
    name: str
    split: str
    gallery: list[str]
    paths: dict[str, Path]
    queries: list[Query]
    category: str | None = None


def load(name, root, split="val", category=None):
    """Read one split of "cirr", "fashioniq" (with a category of CATEGORIES) or "circo" below `root`.

    Only annotations are read. CIRCO's gallery is COCO's own list, or else the image folder; with neither
    it is empty, which is enough to score. Raises FileNotFoundError, and ValueError for an unknown name,
    damaged annotations and a name that leaves `root`.
    """
    root = Path(root)
    files = annotation_files(name, root, split, category)
    read = {"cirr": _read_cirr, "fashioniq": _read_fashioniq, "circo": _read_circo}[name]
    benchmark = Benchmark(name, split, *read(root, *files), category)
    _check_names(benchmark, files[0])
    return benchmark


def annotation_files(name, root, split, category=None):
    """The files that `load` requires: [captions, list of images], for CIRCO the first only."""
    if name not in TREES:
        raise ValueError(f"unknown benchmark {name!r}: choose one of {', '.join(TREES)}")
    if category not in (CATEGORIES if name == "fashioniq" else (None,)):
        raise ValueError(f"{name} has no category {category!r}: FashionIQ needs one of "
                         f"{', '.join(CATEGORIES)}, the others none")
    root, stem = Path(root), f"{category or 'rc2'}.{plain_name(split, 'split')}.json"
    if name == "circo":
        return [root / "annotations" / f"{split}.json"]
    if name == "cirr" and not (root / "captions").is_dir() and (root / "cirr").is_dir():
        root = root / "cirr"  # SEARLE's variant
    return [root / "captions" / f"cap.{stem}", root / "image_splits" / f"split.{stem}"]


def _read_cirr(root, captions, split):
    """-> gallery, paths, queries. Recall counts `target_hard` only, so `target_soft` is not read.

    Members are compared by name: `reference_rank` and `target_rank` are no indices into them.
    """
    images = root / "img_raw" if captions.parent.parent == root else root
    paths, queries = {}, []
    for name, relative in read_json(split, dict).items():
        where = f"{split}, image {name!r:.80}"
        parts = PurePosixPath(typed(relative, str, where)).parts or ("",)
        paths[plain_name(name, where)] = images.joinpath(*(plain_name(part, where) for part in parts))
    for where, entry in _entries(captions):
        reference = get(entry, "reference", str, where)
        members = _strings(get(entry, "img_set", dict, where), "members", where)
        queries.append(Query(
            str(get(entry, "pairid", int, where)), reference, [get(entry, "caption", str, where).strip()],
            targets=[get(entry, "target_hard", str, where)] if "target_hard" in entry else [],
            subset=[name for name in members if name != reference],
            kind=get(entry, "modifier_type", str, where, "")))
    return list(paths), paths, queries


def _read_fashioniq(root, captions, split):
    """-> gallery, paths, queries. The protocol strips blanks and ".?," from both captions.

    An empty caption is dropped; two empty ones leave "".
    """
    gallery, queries = read_json(split, list), []
    for i, (where, entry) in enumerate(_entries(captions)):
        texts = [text.strip(" \t\r\n.?,") for text in _strings(entry, "captions", where)]
        queries.append(Query(
            str(i), get(entry, "candidate", str, where), [text for text in texts if text] or [""],
            targets=[get(entry, "target", str, where)] if "target" in entry else [],
            kind=get(entry, "modifier_type", str, where, "")))
    paths, listed = {}, _list_images(root / "images")
    for name in gallery + [query.reference for query in queries]:
        plain_name(name, f"{split} or {captions.name}")
        paths[name] = root / "images" / listed.get(name, f"{name}.png")
    return gallery, paths, queries


def _read_circo(root, annotations):
    queries = []
    for where, entry in _entries(annotations):
        truths = [coco_name(truth, where) for truth in get(entry, "gt_img_ids", list, where, [])]
        target = str(entry.get("target_img_id", ""))
        queries.append(Query(
            str(get(entry, "id", int, where)),
            coco_name(get(entry, "reference_img_id", int, where), where),
            [get(entry, "relative_caption", str, where).strip()],
            targets=sorted(truths, key=lambda name, target=target: name != target),  # R@K's target first
            aspects=_strings(entry, "semantic_aspects", where, []),
            kind=get(entry, "modifier_type", str, where, "")))
    folder = root / "COCO2017_unlabeled" / "unlabeled2017"
    info = root / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json"
    listed = _list_images(folder)
    used = {name for query in queries for name in (query.reference, *query.targets)}
    gallery = []
    if info.is_file():
        images = get(read_json(info, dict), "images", list, f"{info}")
        gallery = [coco_name(get(image, "id", int, where), where)
                   for image, where in ((image, f"{info}, image {i}") for i, image in enumerate(images))]
    elif folder.is_dir():  # with all that is used: a half-unpacked folder then shows as missing images
        present = {str(int(stem)) for stem in listed if re.fullmatch("[0-9]{12}", stem)}
        gallery = sorted(used | present, key=int)
    paths = {}
    for name in gallery + sorted(used - set(gallery), key=int):
        stem = f"{int(name):012d}"
        paths[name] = folder / listed.get(stem, f"{stem}.jpg")
    return gallery, paths, queries


def _check_names(benchmark, file):
    """Ids and gallery names are unique, and every name that a query uses is known."""
    queries, gallery = benchmark.queries, set(benchmark.gallery)
    repeats = len({q.id for q in queries}) < len(queries) or len(gallery) < len(benchmark.gallery)
    if not queries or repeats:
        raise ValueError(f"{file} is empty, or it or its list of images repeats an entry: "
                         "download it again")
    for i, query in enumerate(queries):
        if len(set(query.targets)) < len(query.targets):
            raise ValueError(f"{file}, entry {i}: a ground truth is listed twice: "
                             "repair or download it again")
        if bool(query.targets) != bool(queries[0].targets):
            raise ValueError(f"{file}, entry {i}: some entries have a target and some have none: "
                             "download it again")
        unknown = [n for n in (query.reference, *(query.subset or ())) if n not in benchmark.paths]
        unknown += [n for n in query.targets if n not in gallery]
        if unknown and gallery:
            raise ValueError(f"{file}, entry {i}: {unknown[0]!r:.80} is not in the list of images of this "
                             "split: download captions and list again, from one release")


def _list_images(folder):
    """dict stem -> file name, .jpg before .png where both exist; {} if there is no folder."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found[path.stem] = min(path.name, found.get(path.stem, path.name))
    return found


# JSON from elsewhere: each helper returns the checked value, or raises ValueError that says `where`.
def read_json(path, kind):
    """The content of a JSON file whose outermost value is a `kind` and whose keys are unique."""
    if not path.is_file():
        first = path.name.split(".")[:-2][:1]  # "cap" of "cap.rc2.val.json"; nothing of "val.json"
        others = sorted(file.name for file in path.parent.glob("*.json")
                        if file.name.split(".")[:-2][:1] == first)[:6]
        there = f" (there is {', '.join(others)})" if others else ""
        raise FileNotFoundError(f"{path} is missing{there}: `python evaluate.py check` prints the files "
                                "that are expected")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not usable JSON ({error}): write or download it again") from None
    return typed(content, kind, f"{path}")


def _unique_keys(pairs):
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key!r:.80} appears twice")
        content[key] = value
    return content


def _entries(path):
    """The entries of a JSON list -> (where it is, entry) for each."""
    return [(f"{path}, entry {i}", entry) for i, entry in enumerate(read_json(path, list))]


def typed(value, kind, where):
    if type(value) is not kind:  # not isinstance: JSON's true would pass for an int
        raise ValueError(f"{where}: expected {kind.__name__}, found {value!r:.80}: "
                         "repair or download it again")
    return value


def get(entry, key, kind, where, default=None):
    """The value of a key; without a default the key must be there."""
    value = typed(entry, dict, where).get(key, default)
    if value is None:
        raise ValueError(f"{where}: {key!r} is missing: repair the file or download it again")
    return typed(value, kind, f"{where}, {key!r}")


def _strings(entry, key, where, default=None):
    return [typed(text, str, f"{where}, {key!r}") for text in get(entry, key, list, where, default)]


def plain_name(name, where):
    """A name that cannot reach another folder. (A symbolic link inside `root` is the user's choice.)"""
    if typed(name, str, where) in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{where}: {name!r:.80} is not a plain file name: "
                         "use annotations from the official source")
    return name


def coco_name(value, where):
    """A COCO id, an int or a decimal string -> its name, a decimal string without padding."""
    if type(value) not in (int, str) or not re.fullmatch("[0-9]{1,20}", str(value)):
        raise ValueError(f"{where}: {value!r:.80} is not a COCO image id: write ids as whole numbers")
    return str(int(value))
