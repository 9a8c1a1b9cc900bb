"""CIRR, FashionIQ and CIRCO: annotations -> gallery and queries, exact ranking, metrics, prediction files.

A query is a reference image and a caption that changes it; the answer is a ranking of the gallery's names. Images are
compared by name, never by path, so a ranking can be scored with the annotations alone. Conventions of this file:

- Names: CIRR and FashionIQ as in their files; CIRCO the COCO id as a decimal string without padding ("243611").
- Rankings: dict query id -> list of names, best first. It may hold fewer names than the gallery, but every query.
- Reference image: removed from the ranking in CIRR, kept in FashionIQ and CIRCO, as in the papers that introduced them.
- Metrics are percentages. Errors are one sentence (ValueError, FileNotFoundError) that say where and what to do.

CIRR: Liu et al., ICCV 2021. FashionIQ: Wu et al., CVPR 2021. CIRCO: Baldrati et al., ICCV 2023.
"""
import json
import math
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from blip_lite.files import replacing

CATEGORIES = ("dress", "shirt", "toptee")  # FashionIQ is three benchmarks, each with its own gallery
SUBMITTED = {"recall": 50, "recall_subset": 3}  # names per query that the test servers of CIRR and CIRCO accept
HEADLINE = {"cirr": "R@1", "fashioniq": "R@10", "circo": "mAP@5"}  # the one metric, where there is room for one
CHECKED = {"cirr": ("val", "test1"), "fashioniq": ("val",), "circo": ("val", "test")}  # the splits that evaluation asks for
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
    """One composed query. `targets` is empty in a test split; its first entry is the single target of R@K.

    captions: 1 text (CIRR, CIRCO) or 1-2 (FashionIQ, cleaned); subset: CIRR's group without the reference, five names;
    aspects: CIRCO's semantic aspects; kind: type of modifier, where the annotations say (the pocket world's do).
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
    """One split: `gallery` is the order in which ties break; `paths` covers gallery and references, unchecked."""
    name: str
    split: str
    gallery: list[str]
    paths: dict[str, Path]
    queries: list[Query]
    category: str | None = None


# ------------------------------------------------------------------------------------------------------- reading
def load(name, root, split="val", category=None):
    """Read one split of "cirr", "fashioniq" (with a category: dress, shirt or toptee) or "circo" below `root`.

    Only annotations are read; `missing_images` says which images are absent. CIRCO's gallery is COCO's own list, or
    else the image folder; with neither it is empty, which is enough to score.
    Raises ValueError (unknown name, damaged annotations, a name that leaves `root`) and FileNotFoundError.
    """
    root = Path(root)
    files = annotation_files(name, root, split, category)
    read = {"cirr": _read_cirr, "fashioniq": _read_fashioniq, "circo": _read_circo}[name]
    gallery, paths, queries = read(root, *files)
    benchmark = Benchmark(name, split, gallery, paths, queries, category)
    _check_names(benchmark, files[0])
    return benchmark


def annotation_files(name, root, split, category=None):
    """The annotation files that `load` will read: [captions, gallery list], for CIRCO the first only."""
    if name not in TREES:
        raise ValueError(f"unknown benchmark {name!r}: choose one of {', '.join(TREES)}")
    if category not in (CATEGORIES if name == "fashioniq" else (None,)):
        raise ValueError(f"{name} has no category {category!r}: FashionIQ needs one of {', '.join(CATEGORIES)}, "
                         "the others none")
    root, stem = Path(root), f"{category or 'rc2'}.{_plain_name(split, 'split')}.json"
    if name == "circo":
        return [root / "annotations" / f"{split}.json"]
    if name == "cirr" and not (root / "captions").is_dir() and (root / "cirr").is_dir():
        root = root / "cirr"  # SEARLE's variant
    return [root / "captions" / f"cap.{stem}", root / "image_splits" / f"split.{stem}"]


def _read_cirr(root, captions, split):
    """`target_soft`, `reference_rank` and `target_rank` are not used: recall counts `target_hard` only, and the
    ranks are no indices into the members."""
    images = root / "img_raw" if captions.parent.parent == root else root
    paths, queries = {}, []
    for name, relative in _read_json(split, dict).items():
        where = f"{split}, image {name!r:.80}"
        parts = PurePosixPath(_typed(relative, str, where)).parts or ("",)
        paths[_plain_name(name, where)] = images.joinpath(*(_plain_name(part, where) for part in parts))
    for i, entry in enumerate(_read_json(captions, list)):
        where = f"{captions}, entry {i}"
        pair, reference = _get(entry, "pairid", int, where), _get(entry, "reference", str, where)
        members = _strings(_get(entry, "img_set", dict, where), "members", where)
        queries.append(Query(
            str(pair), reference, [_get(entry, "caption", str, where).strip()],
            targets=[_get(entry, "target_hard", str, where)] if "target_hard" in entry else [],
            subset=[name for name in members if name != reference], kind=_get(entry, "modifier_type", str, where, "")))
    return list(paths), paths, queries


def _read_fashioniq(root, captions, split):
    """The protocol strips blanks and ".?," from both captions; an empty one is dropped, two empty ones leave ""."""
    gallery, queries = _read_json(split, list), []
    for i, entry in enumerate(_read_json(captions, list)):
        where = f"{captions}, entry {i}"
        texts = [text.strip(" \t\r\n.?,") for text in _strings(entry, "captions", where)]
        queries.append(Query(
            str(i), _get(entry, "candidate", str, where), [text for text in texts if text] or [""],
            targets=[_get(entry, "target", str, where)] if "target" in entry else [],
            kind=_get(entry, "modifier_type", str, where, "")))
    paths, listed = {}, _list_images(root / "images")
    for name in gallery + [query.reference for query in queries]:
        _plain_name(name, f"{split} or {captions.name}")
        paths[name] = root / "images" / listed.get(name, f"{name}.png")
    return gallery, paths, queries


def _read_circo(root, annotations):
    queries = []
    for i, entry in enumerate(_read_json(annotations, list)):
        where = f"{annotations}, entry {i}"
        truths = [_coco_name(truth, where) for truth in _get(entry, "gt_img_ids", list, where, [])]
        target = str(entry.get("target_img_id", ""))
        queries.append(Query(
            str(_get(entry, "id", int, where)), _coco_name(_get(entry, "reference_img_id", int, where), where),
            [_get(entry, "relative_caption", str, where).strip()],
            targets=sorted(truths, key=lambda name, target=target: name != target),  # the single target of R@K first
            aspects=_strings(entry, "semantic_aspects", where, []),
            kind=_get(entry, "modifier_type", str, where, "")))
    folder = root / "COCO2017_unlabeled" / "unlabeled2017"
    info = root / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json"
    listed = _list_images(folder)
    used = {name for query in queries for name in (query.reference, *query.targets)}
    gallery = []
    if info.is_file():
        gallery = [_coco_name(_get(image, "id", int, f"{info}, image {i}"), f"{info}, image {i}")
                   for i, image in enumerate(_get(_read_json(info, dict), "images", list, f"{info}"))]
    elif folder.is_dir():  # and what the annotations use: a half-unpacked folder then shows as missing images
        gallery = sorted(used | {str(int(stem)) for stem in listed if re.fullmatch("[0-9]{12}", stem)}, key=int)
    paths = {}
    for name in gallery + sorted(used - set(gallery), key=int):
        stem = f"{int(name):012d}"
        paths[name] = folder / listed.get(stem, f"{stem}.jpg")
    return gallery, paths, queries


def _check_names(benchmark, file):
    """Ids and gallery names are unique, and every name that a query uses is one that can be found."""
    queries, gallery = benchmark.queries, set(benchmark.gallery)
    if not queries or len({query.id for query in queries}) < len(queries) or len(gallery) < len(benchmark.gallery):
        raise ValueError(f"{file} is empty, or it or its list of images repeats an entry: download it again")
    for i, query in enumerate(queries):
        if len(set(query.targets)) < len(query.targets):
            raise ValueError(f"{file}, entry {i}: a ground truth is listed twice: repair or download it again")
        if bool(query.targets) != bool(queries[0].targets):
            raise ValueError(f"{file}, entry {i}: some entries have a target and some have none: download it again")
        unknown = [name for name in (query.reference, *(query.subset or ())) if name not in benchmark.paths]
        unknown += [name for name in query.targets if name not in gallery]
        if unknown and gallery:
            raise ValueError(f"{file}, entry {i}: {unknown[0]!r:.80} is not in the list of images of this split: "
                             "download captions and list again, from one release")


def _unique_keys(pairs):
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key!r:.80} appears twice")
        content[key] = value
    return content


def _read_json(path, kind):
    """The content of a JSON file whose outermost value is a `kind`; a key that appears twice is an error."""
    if not path.is_file():
        first = path.name.split(".")[:-2][:1]  # "cap" of "cap.rc2.val.json"; of "val.json" nothing
        others = sorted(file.name for file in path.parent.glob("*.json") if file.name.split(".")[:-2][:1] == first)[:6]
        there = f" (there is {', '.join(others)})" if others else ""  # of another split, or another benchmark
        raise FileNotFoundError(f"{path} is missing{there}: `python evaluate.py check` prints the files that are expected")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not usable JSON ({error}): write or download it again") from None
    return _typed(content, kind, f"{path}")


def _typed(value, kind, where):
    if type(value) is not kind:  # not isinstance: JSON's true would pass for an int
        raise ValueError(f"{where}: expected {kind.__name__}, found {value!r:.80}: repair or download it again")
    return value


def _get(entry, key, kind, where, default=None):
    """The value of a key; without a default (of the kind) the key must be there."""
    value = _typed(entry, dict, where).get(key, default)
    if value is None:
        raise ValueError(f"{where}: {key!r} is missing: repair the file or download it again")
    return _typed(value, kind, f"{where}, {key!r}")


def _strings(entry, key, where, default=None):
    return [_typed(value, str, f"{where}, {key!r}") for value in _get(entry, key, list, where, default)]


def _plain_name(name, where):
    """Refuse what could reach another folder; a symbolic link that the user made inside `root` is the user's choice."""
    if _typed(name, str, where) in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{where}: {name!r:.80} is not a plain file name: use annotations from the official source")
    return name


def _coco_name(value, where):
    """COCO id, as an int or a decimal string -> its name, a decimal string without padding."""
    if type(value) not in (int, str) or not re.fullmatch("[0-9]{1,20}", str(value)):
        raise ValueError(f"{where}: {value!r:.80} is not a COCO image id: write ids as whole numbers")
    return str(int(value))


# --------------------------------------------------------------------------------------------------------- layout
def expected_tree(name):
    """The official tree of a benchmark, relative to its root, as text."""
    return TREES[name]


def _list_images(folder):
    """One listing of a folder -> dict of stem -> file name (.jpg before .png where both exist); {} without folder."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found[path.stem] = min(path.name, found.get(path.stem, path.name))
    return found


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


# -------------------------------------------------------------------------------------------------------- ranking
@torch.no_grad()
def top_k(query_features, gallery_features, k, exclude=None, chunk=4096):
    """The k most similar gallery items: query [Q, E], gallery [N, E] -> indices [Q, k] int64, best first, on the CPU.

    Similarity is the inner product, summed in float64 and rounded to float32; equal values keep gallery order. Float32
    matmuls round by position, so equal images would not tie: here one only discards what cannot be among the k best.
    gallery_features: a tensor, or the path of an .npy file [N, E] (float16 or float32) that need not fit in memory.
    exclude: per query a gallery index to leave out, or -1. k is clipped to N, or to N - 1 if anything is excluded.
    Memory grows with `chunk`, the gallery rows held at a time, not with N. Raises FileNotFoundError, and ValueError for
    an unusable file, shapes that do not fit, features that are not finite (as float32) and k < 1.
    """
    shape, read = _open_gallery(gallery_features)
    q, n, exclude = len(query_features), shape[0], [-1] * len(query_features) if exclude is None else list(exclude)
    if query_features.dim() != 2 or query_features.shape[1:] != shape[1:] or len(exclude) != q:
        raise ValueError(f"top_k needs [Q, E], [N, E] and Q exclusions, got {list(query_features.shape)}, "
                         f"{list(shape)} and {len(exclude)}")
    exclude = torch.tensor([int(place) for place in exclude], dtype=torch.int64)
    k = min(k, n - bool((exclude >= 0).any()))
    if k < 1:
        raise ValueError(f"top_k has nothing to return: k clipped to {k} for a gallery of {n}")
    _largest(query_features)
    if q == 0:
        return torch.empty(0, k, dtype=torch.int64)
    blocks = zip(query_features.cpu().split(1024), exclude.split(1024), strict=True)  # bounds [Q, chunk] for any Q
    return torch.cat([_top_k(query, read, n, k, left_out, chunk) for query, left_out in blocks])


def _top_k(query, read, n, k, exclude, chunk, width=16):
    """`top_k` after its checks, for one block of queries: query [Q, E], exclude [Q], read(start, stop) -> rows."""
    q, e = query.shape
    chunk = min(chunk, n)
    query32, length = query.float().T, query.double().abs().sum(1)  # [E, Q], [Q]
    gallery32, rough = torch.empty(chunk, e), torch.empty(chunk + -chunk % width, q)  # reused: new memory is slow
    best, place = torch.full((q, k), -torch.inf), torch.full((q, k), n)  # [Q, k], best first; n: nothing yet
    for start in range(0, n, chunk):
        gallery = read(start, min(start + chunk, n))  # [R, E]
        r = len(gallery)
        gallery32[:r] = gallery
        # |float32 matmul - similarity| <= (E + 4) u |q|_1 max|g|, u = 2^-24: E roundings whatever the order of the sum
        # (Higham 2002, section 3.1), 4 of inputs, similarity, `least`; 1.01 for u^2 terms, 2 E tiny for underflow.
        margin = (1.01 * length * _largest(gallery32[:r])).float() * ((e + 4) * 2**-24) + 2 * e * 2**-126  # [Q]
        torch.mm(gallery32[:r], query32, out=rough[:r])
        rough[r:] = -torch.inf
        # Each peak is one item, so the (k + 1)-th peak bounds the k-th best from below, even if one is left out.
        peaks = rough.view(-1, width, q).amax(1)  # [R / width, Q]
        least = best[:, -1]
        if len(peaks) > k:
            least = torch.maximum(least, peaks.topk(k + 1, dim=0).values[-1] - margin)
        least = least - margin  # [Q]
        # "Not below" instead of "at least": where float32 overflows to NaN every item stays a candidate.
        block, owner = (~(peaks < least)).nonzero().T  # [P]
        hit, column = (~(rough.view(-1, width, q)[block, :, owner] < least[owner, None])).nonzero().T  # [C]
        owner, column = owner[hit], block[hit] * width + column  # for each query in gallery order
        keep = (column < r) & (column + start != exclude[owner])
        owner, column = owner[keep], column[keep]
        if len(owner):
            values = torch.cat([best.flatten(), _similarity(query, gallery, owner, column)])  # [Q*k + C]
            places = torch.cat([place.flatten(), column + start])
            owner = torch.cat([torch.arange(q).repeat_interleave(k), owner])
            order, count = _best_first(owner, values), owner.bincount()  # [Q*k + C], [Q]
            order = order[torch.arange(len(order)) - (count.cumsum(0) - count)[owner[order]] < k]  # each query's first k
            best, place = values[order].view(q, k), places[order].view(q, k)
    return place


def _similarity(query, gallery, i, j):
    """query[i] * gallery[j], summed in float64 and rounded to float32: [Q, E], [N, E], [P], [P] -> [P].

    Row by row, so that equal rows have equal values; finite, as -inf means "nothing yet" in `_top_k`.
    """
    limit = torch.finfo(torch.float32).max
    pairs = zip(i.split(512), j.split(512), strict=True)  # 512 rows fit the cache
    return torch.cat([(query[i].double() * gallery[j]).sum(1) for i, j in pairs]).float().clamp(-limit, limit)


def _best_first(owner, values):
    """Order [P] by owner, then best value first; equal ones keep their order (stable, so the last key sorts first)."""
    order = values.sort(descending=True, stable=True).indices
    return order[owner[order].sort(stable=True).indices]


def _largest(features):
    """max |value| as a float; raises ValueError for NaN and infinity."""
    low, high = features.float().aminmax() if features.numel() else torch.zeros(2)
    largest = max(-low.item(), high.item())  # both are NaN if any value is
    if not math.isfinite(largest):
        raise ValueError("features hold NaN or infinity, which cannot be ranked: check the model that made them")
    return largest


def _open_gallery(gallery):
    """A tensor [N, E] or the path of an .npy file -> (its shape, a function (start, stop) -> rows on the CPU)."""
    if isinstance(gallery, torch.Tensor):
        return gallery.shape, lambda start, stop: gallery[start:stop].cpu()
    try:
        head = np.load(gallery, mmap_mode="r")  # only the header: pages of a map that are read would stay in memory
    except FileNotFoundError:
        raise FileNotFoundError(f"{gallery} is missing: save the gallery's features there with numpy.save") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{gallery} is not a whole .npy file ({error}): write it again with numpy.save") from None
    if not (isinstance(head, np.memmap) and head.dtype.str in ("<f2", "<f4") and head.ndim == 2
            and head.flags.c_contiguous):
        raise ValueError(f"{gallery} should hold one float16 or float32 array [N, E] in C order: write it again")
    shape, dtype, offset = head.shape, head.dtype, head.offset

    def read(start, stop):
        rows = np.fromfile(gallery, dtype, (stop - start) * shape[1], offset=offset + start * shape[1] * dtype.itemsize)
        return torch.from_numpy(rows.reshape(stop - start, shape[1]))

    return shape, read


def rank(benchmark, query_features, gallery_features, k=50, chunk=4096):
    """Features [Q, E] in query order and [N, E] in gallery order -> rankings of k names, CIRR's without reference."""
    place = _places(benchmark, query_features, gallery_features)
    exclude = [place[query.reference] for query in benchmark.queries] if benchmark.name == "cirr" else None
    best = top_k(query_features, gallery_features, k, exclude, chunk).tolist()
    return {query.id: [benchmark.gallery[i] for i in row] for query, row in zip(benchmark.queries, best, strict=True)}


@torch.no_grad()
def rank_subsets(benchmark, query_features, gallery_features):
    """CIRR: the five other members of each query's group, best first; arguments and ties as in `rank`."""
    place, rankings = _places(benchmark, query_features, gallery_features), {}
    pairs = [(i, row) for i, query in enumerate(benchmark.queries) for row in sorted(place[name] for name in query.subset)]
    owner, row = torch.tensor(pairs).T  # [5 Q]
    query, gallery = query_features.cpu(), gallery_features.cpu()[row]  # [Q, E], [5 Q, E]
    _largest(query), _largest(gallery)
    for p in _best_first(owner, _similarity(query, gallery, owner, torch.arange(len(row)))).tolist():
        rankings.setdefault(benchmark.queries[pairs[p][0]].id, []).append(benchmark.gallery[pairs[p][1]])
    return rankings


def _places(benchmark, query_features, gallery_features):
    """dict name -> row of the gallery, once the features fit the benchmark."""
    rows, wanted = [len(query_features), len(gallery_features)], [len(benchmark.queries), len(benchmark.gallery)]
    if rows != wanted:
        raise ValueError(f"features are for {rows} queries and images, {benchmark.name} {benchmark.split} has {wanted}")
    if query_features.shape[1:] != gallery_features.shape[1:]:
        raise ValueError(f"features of queries and images differ in size: {list(query_features.shape)}, "
                         f"{list(gallery_features.shape)}")
    return {name: i for i, name in enumerate(benchmark.gallery)}


# -------------------------------------------------------------------------------------------------------- metrics
def score(benchmark, rankings, subset_rankings=None):
    """Rankings -> metrics in percent, as in the paper's Tables 2-4.

    CIRR: R@1/5/10/50 and their mean Avg, without the reference; Rs@1/2/3 from `subset_rankings`, or else from the
    members that occur in `rankings`: a target that is absent there ranks last, so top-50 lists give a lower bound.
    FashionIQ: R@10/50. CIRCO: mAP@5/10/25/50 and their mean Avg over all ground truths; R@5/10/25/50 of the target.
    Raises ValueError for a split without targets, a query without ranking and a name that occurs twice in one.
    """
    queries = benchmark.queries
    if not all(query.targets for query in queries):
        raise ValueError(f"{benchmark.name} split {benchmark.split} has no ground truth; write a submission instead")
    lists = _lists(benchmark, rankings)
    if benchmark.name == "fashioniq":
        return {f"R@{k}": _recall(queries, lists, k) for k in (10, 50)}
    if benchmark.name == "cirr":
        result = {f"R@{k}": _recall(queries, lists, k) for k in (1, 5, 10, 50)}
        result["Avg"] = sum(result.values()) / 4
        subsets = _lists(benchmark, rankings if subset_rankings is None else subset_rankings, "recall_subset")
        return result | {f"Rs@{k}": _recall(queries, subsets, k) for k in (1, 2, 3)}
    pairs = list(zip(lists, queries, strict=True))
    result = {f"mAP@{k}": _percent(average_precision(names, query.targets, k) for names, query in pairs)
              for k in (5, 10, 25, 50)}
    average_map = sum(result.values()) / 4
    return result | {f"R@{k}": _recall(queries, lists, k) for k in (5, 10, 25, 50)} | {"Avg": average_map}


def aspect_scores(benchmark, rankings):
    """CIRCO: mAP@10 over the queries of each semantic aspect, as the server reports it; a query may have several."""
    by_aspect = {aspect: [query for query in benchmark.queries if aspect in query.aspects]
                 for aspect in sorted({aspect for query in benchmark.queries for aspect in query.aspects})}
    return {aspect: score(replace(benchmark, queries=queries), rankings)["mAP@10"]
            for aspect, queries in by_aspect.items()}


def score_by_kind(benchmark, rankings, subset_rankings=None):
    """`score` on the queries of each type of modifier -> dict kind -> metrics; {} where the annotations name none."""
    kinds = sorted({query.kind for query in benchmark.queries} - {""})
    return {kind: score(replace(benchmark, queries=[query for query in benchmark.queries if query.kind == kind]),
                        rankings, subset_rankings) for kind in kinds}


def average(results):
    """Mean of each metric over several results: FashionIQ's average row over dress, shirt and toptee."""
    if not results or any(result.keys() != results[0].keys() for result in results):
        raise ValueError("average needs at least one result, and the same metrics in all")
    return {metric: sum(result[metric] for result in results) / len(results) for metric in results[0]}


def average_precision(names, targets, k):
    """AP@K = sum over ranks i <= K that hold a ground truth of precision@i, divided by min(K, ground truths), in 0..1.

    The divisor is CIRCO's: with more truths than K a perfect list still reaches 1.
    """
    hits, total = 0, 0.0
    for i, name in enumerate(names[:k], 1):
        if name in targets:
            hits += 1
            total += hits / i
    return total / min(k, len(targets))


def _recall(queries, lists, k):
    return _percent(query.targets[0] in names[:k] for query, names in zip(queries, lists, strict=True))


def _percent(values):
    values = list(values)
    return 100 * sum(values) / len(values)


def _lists(benchmark, rankings, metric="recall"):
    """The names that count, in query order: CIRR's without the reference, or only the members of the subset."""
    absent = [query.id for query in benchmark.queries if query.id not in rankings]
    if absent:
        raise ValueError(f"{len(absent)} queries have no ranking (first: {', '.join(absent[:3])}): rank every query")
    lists = []
    for query in benchmark.queries:
        names = rankings[query.id]
        if len(set(names)) < len(names):
            raise ValueError(f"the ranking of query {query.id} holds a name twice: rank each image once")
        if metric == "recall_subset":
            names = [name for name in names if name in query.subset]
        elif benchmark.name == "cirr":
            names = [name for name in names if name != query.reference]
        lists.append(names)
    return lists


# ----------------------------------------------------------------------------------------------- prediction files
def predictions(benchmark, rankings, metric="recall"):
    """Rankings -> the JSON document that the test server wants, as a dict; a longer ranking is cut.

    CIRR: {"version": "rc2", "metric": metric, pairid: names}, 50 names without the reference for "recall", 3 of the
    group for "recall_subset". CIRCO: {id: 50 ids as ints}. FashionIQ: {category: {id: 50 names}}; join the three
    categories with `|`. Raises ValueError for a ranking that is too short, besides those of `score`.
    """
    _check_metric(benchmark, metric)
    room, document = len(benchmark.gallery) - (benchmark.name == "cirr"), {}
    for query, names in zip(benchmark.queries, _lists(benchmark, rankings, metric), strict=True):
        wanted = min(SUBMITTED[metric], len(query.subset) if metric == "recall_subset" else room)
        if len(names) < wanted:
            raise ValueError(f"the ranking of query {query.id} has {len(names)} names and {metric} needs {wanted}: "
                             "rank with a larger k")
        document[query.id] = names[:SUBMITTED[metric]]
    if benchmark.name == "cirr":
        return {"version": "rc2", "metric": metric} | document
    if benchmark.name == "fashioniq":
        return {benchmark.category: document}
    return {key: [int(name) for name in names] for key, names in document.items()}


def write_predictions(path, document):
    """Write a document of `predictions` at once: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist: create it, or choose another file name")
    with replacing(path) as file:
        file.write(json.dumps(document, separators=(",", ":")).encode())  # CIRR's limit is 5 MB


def read_predictions(path, benchmark, metric="recall"):
    """A prediction file in the format of `predictions` -> rankings; nothing is dropped or cut.

    Raises FileNotFoundError, and ValueError for another metric, version or category than asked for, a missing or
    unexpected query, and a list that is empty, repeats a name or holds one that is not in the gallery (CIRCO without
    gallery: not a COCO id; recall_subset: not in the group).
    """
    _check_metric(benchmark, metric)
    path = Path(path)
    document = _read_json(path, dict)
    if benchmark.name == "cirr":
        for key, wanted in (("version", "rc2"), ("metric", metric)):
            if document.pop(key, None) != wanted:
                raise ValueError(f'{path}: "{key}" should be "{wanted}": pass the file made for this metric and split')
    if benchmark.name == "fashioniq":
        document = _get(document, benchmark.category, dict, f"{path}")
    ids = {query.id for query in benchmark.queries}
    for problem, keys in (("missing", ids - document.keys()), ("not in this split", document.keys() - ids)):
        if keys:
            raise ValueError(f"{path}: {len(keys)} queries are {problem} (first: {', '.join(sorted(keys)[:3])}): "
                             f"predict {benchmark.name} {benchmark.split} whole")
    gallery = set(benchmark.gallery)
    return {query.id: _read_names(document[query.id], f"{path}, query {query.id}", benchmark,
                                  set(query.subset) if metric == "recall_subset" else gallery)
            for query in benchmark.queries}


def _read_names(names, where, benchmark, allowed):
    convert = _coco_name if benchmark.name == "circo" else _plain_name
    names = [convert(name, where) for name in _typed(names, list, where)]
    unknown = [name for name in names if allowed and name not in allowed]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r:.80} is not among the images to rank: predict names of this split")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{where}: the list {'repeats a name' if names else 'is empty'}: rank each image once")
    return names


def _check_metric(benchmark, metric):
    if metric not in SUBMITTED or (metric == "recall_subset" and benchmark.name != "cirr"):
        raise ValueError(f"unknown metric {metric!r}: use recall, or for CIRR also recall_subset")
