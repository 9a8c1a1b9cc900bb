"""Images by number: files in folders, or members of tar shards, as img2dataset writes them."""

import hashlib
import io
import os
import tarfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from plumbing.command import ignore_signals
from plumbing.files import check_folder, drafted, explained

warnings.filterwarnings("ignore", module=r"PIL\.")  # PIL warns about files it can still read
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # no EPS: PIL would run Ghostscript
LEFT_OVER = {  # in lower case: what macOS, NAS boxes and Windows leave in folders, beside .* files
    "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
    "system volume information", "thumbs.db", "desktop.ini"}
DELETE = "delete its folder, then it is computed again"
SKIP = "fix or remove them, or let train.py skip them with --skip-bad-images"


def open_image(name, file=None):
    """A path, or a name and a BytesIO -> a decoded PIL image, of an animation the first frame.

    ValueError if it is damaged, of another format than FORMATS whatever its suffix, or beyond PIL's
    limit of 179 million pixels.
    """
    try:
        image = Image.open(file or name, formats=FORMATS)
        image.load()
        return image
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such image; run python evaluate.py check") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged data
        why = " ".join(_problem(name, file, error).split())
        raise ValueError(f"{name}: {why}; replace or remove the file") from None


def _problem(name, file, error):
    """Why PIL cannot read an image, in words that its user can act on."""
    try:
        with file or open(name, "rb") as opened:
            opened.seek(0)
            head = opened.read(200)
    except OSError:  # a folder, or a file that may not be read
        head = b"?"
    problems = {
        "is empty": not head,
        "is a web page (HTML or XML)": head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"),
        "is a git-lfs pointer (`git lfs pull` fetches the image)": head.startswith(b"version http"),
        "is HEIC, AVIF or a video (convert it to JPEG)": head[4:8] == b"ftyp",
        f"exceeds the limit of {2 * Image.MAX_IMAGE_PIXELS} pixels":
            isinstance(error, Image.DecompressionBombError),
        "cannot be read as an image (image file is truncated)": "truncated" in str(error),
        f"cannot be read as an image (it is none of {', '.join(FORMATS)})":
            isinstance(error, UnidentifiedImageError),
    }
    default = f"cannot be read as an image ({error})"
    return next((words for words, found in problems.items() if found), default)


class Rows:
    """Rows of an .npy file [N, ...], read when asked for and not kept in memory."""

    def __init__(self, path):
        try:
            header = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # numpy reports damaged files in many ways
            raise ValueError(f"{path}: is damaged; {DELETE}") from None
        self.path, self.offset = Path(path), header.offset  # bytes before row 0
        self.shape, self.dtype = header.shape, header.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """A list of M row numbers -> [M, ...]."""
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for row, i in zip(out, index, strict=True):
                file.seek(self.offset + int(i) * row.nbytes)
                if file.readinto(row) < row.nbytes:
                    raise ValueError(f"{self.path}: ends before row {i}; {DELETE}")
        return out

    def __array__(self, dtype=None, copy=None):
        return np.load(self.path).astype(dtype or self.dtype, copy=False)


class ImageList:
    """A sequence of images. key: the same only for the same files, unchanged.

    hidden: how many members of shards are passed over.
    names: a list of paths; or a file of all names, and table int64 [N, 5]: where in it each begins
    and ends, the number of the shard or -1, the image's first byte there and its size.
    """

    def __init__(self, names, key, table=None, shards=(), hidden=0):
        self.names, self.key, self.table, self.shards = names, key, table, shards
        self.hidden = hidden

    def __len__(self):
        return len(self.names if self.table is None else self.table)

    def _find(self, i):
        if self.table is None:
            return self.names[i], -1, 0, 0
        begin, end, *place = self.table[[i]][0].tolist()
        with open(self.names, "rb") as file:
            file.seek(begin)
            return os.fsdecode(file.read(end - begin)), *place

    def name(self, i):
        return self._find(i)[0]

    def open(self, i):
        name, shard, begin, size = self._find(i)
        if shard < 0:
            return open_image(name)
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(begin)
                return open_image(name, io.BytesIO(file.read(size)))
        except OSError as error:
            raise ValueError(f"{self.shards[shard]}: cannot be read ({error.strerror}); "
                             "restore the shard") from None


def list_images(paths):
    key = hashlib.sha256(b"".join(map(identity, paths))).hexdigest()
    return ImageList([os.fspath(path) for path in paths], key)


def find_images(folder, cache):
    """Every image below `folder`, also in .tar files, in a fixed order -> ImageList.

    The list is kept below `cache` until a file changes. ValueError for fewer than two images.
    """
    check_folder(cache)
    digest, shards = hashlib.sha256(), []
    for path in walk(folder):
        digest.update(identity(path))
        shards += [path] if path.endswith(".tar") else []
    key = digest.hexdigest()
    # earlier versions listed hidden members of shards: their lists have no -2
    stored = Path(cache) / f"images-{key[:16]}{'-2' * bool(shards)}"
    if not stored.is_dir():
        with drafted(stored) as draft, explained(stored):
            if draft:
                _write_list(folder, shards, draft)
    hidden = int((stored / "hidden").read_text()) if shards else 0
    key += f" without {hidden}" * bool(hidden)
    return ImageList(stored / "names", key, Rows(stored / "table.npy"), shards, hidden)


def is_image(name):
    return name.lower().endswith(SUFFIXES)


def is_left_over(path):
    """Is a part of this path, seen from the folder that the user named, hidden or in LEFT_OVER?"""
    parts = Path(path).parts
    return any(part.startswith(".") and part != ".." or part.lower() in LEFT_OVER for part in parts)


def is_listed(path):
    return (is_image(path) or path.endswith(".tar")) and not is_left_over(path)


def walk(folder, all_files=False):
    """Yield paths of images and shards, or of all files; links are followed, cycles cut."""
    if not os.path.isdir(folder):
        problem = "is a file" if os.path.exists(folder) else "there is no such folder"
        raise ValueError(f"{folder}: {problem}; give a folder of images with --images")

    def fail(error):
        if not is_left_over(os.path.relpath(error.filename, folder)):
            raise ValueError(f"{error.filename}: cannot be searched for images ({error.strerror}); "
                             "fix its permissions or move it")

    seen = set()
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        stat = os.stat(parent)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if all_files or not is_left_over(name))
        for name in sorted(files):
            if all_files or is_listed(name):
                yield os.path.join(parent, name)


def identity(path):
    """Bytes that differ where path, size or time of change do."""
    try:
        stat = os.stat(path)
        return os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
    except OSError:
        return os.fsencode(path) + b"\0missing\n"


def _write_list(folder, shards, out):
    """Write names and table of an ImageList, which may not fit into memory."""
    numbers, hidden = {path: i for i, path in enumerate(shards)}, 0
    with open(out / "names", "wb") as names, open(out / "table", "wb") as table:
        for path in tqdm(walk(folder), "listing images", unit=" files", disable=None, leave=False):
            for name, begin, size in _members(path) if path in numbers else [(path, 0, 0)]:
                if is_left_over(name[len(path) :]):
                    hidden += 1
                    continue
                start = names.tell()
                names.write(os.fsencode(name))
                row = start, names.tell(), numbers.get(path, -1), begin, size
                table.write(np.array(row, np.int64).tobytes())
        count = table.tell() // 40
    if count < 2:
        raise ValueError(f"{folder}: holds {count} images, training needs two; check --images")
    np.save(out / "table.npy", np.memmap(out / "table", np.int64, "r", shape=(count, 5)))
    (out / "table").unlink()
    (out / "hidden").write_text(str(hidden))


def _members(shard):
    """Yield (name, first byte, size) of every image in a .tar file."""
    try:
        with tarfile.open(shard, "r:") as tar:
            while member := tar.next():
                if member.isreg() and is_image(member.name):
                    yield f"{shard}/{member.name}", member.offset_data, member.size
                tar.members.clear()  # tarfile would keep them all
            tar.fileobj.seek(tar.offset)
            if len(end := tar.fileobj.read()) < 512 or any(end):  # zeros, unchecked by tarfile
                raise tarfile.ReadError("its end is missing or not the end")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard}: is not a whole, uncompressed tar file ({error}); download it "
                         "again or remove it") from None


def load_images(images, preprocess, batch_size, workers, rows=None, pin_memory=False):
    """Yield batches of rows of an ImageList, by default all, read by worker processes.

    A batch: M row numbers, pixels [M, 3, S, S] (None if M = 0), {row: why it is damaged}.
    """
    rows, read = range(len(images)) if rows is None else rows, partial(_read, images, preprocess)
    options = dict(num_workers=workers, worker_init_fn=ignore_signals, pin_memory=pin_memory)
    return torch.utils.data.DataLoader(rows, batch_size, collate_fn=read, **options)


def _read(images, preprocess, rows):
    pixels, damaged = {}, {}
    for i in rows:
        try:
            pixels[i] = preprocess(images.open(i))
        except ValueError as error:
            damaged[i] = str(error)
    return list(pixels), torch.stack(list(pixels.values())) if pixels else None, damaged


def decode_sample(images, count, workers):
    """Decode `count` images of an ImageList, drawn with a fixed seed, and print what is damaged.

    -> the numbers of decoded and of damaged ones.
    """
    rows, damaged = sorted(Random(0).sample(range(len(images)), min(count, len(images)))), {}
    batches = load_images(images, _no_pixels, 8, workers, rows)
    bar = dict(unit="img", unit_scale=8, disable=None, leave=False)
    for _, _, bad in tqdm(batches, "decoding", **bar):
        damaged |= bad
    print(f"  {len(rows)} of {len(images)} decoded, {len(damaged)} damaged")
    reasons = Counter(why.removeprefix(f"{images.name(i)}: ").split(";")[0]
                      for i, why in damaged.items())
    for reason, number in reasons.most_common():
        print(f"  {number}: {reason}")
    for why in list(damaged.values())[:5]:
        print(f"  {why}")
    return len(rows), len(damaged)


def _no_pixels(image):
    return torch.empty(0)


def check_images(folder, cache_dir, decode=200, workers=0):
    """Print what train.py would find in a folder, and decode a sample of it.

    ValueError for over 1 % damaged.
    """
    print(f"expected below {folder}:\n\nNAME.jpg or {', '.join(SUFFIXES[1:])}, in any sub-folders\n"
          f"{'00000.tar':50}shards of such images, uncompressed, as img2dataset writes them\n")
    counts, empty = {"images and shards": Counter(), "passed over": Counter()}, []
    for path in tqdm(walk(folder, True), "looking", unit=" files", disable=None, leave=False):
        below, suffix = os.path.relpath(path, folder), os.path.splitext(path)[1].lower()
        listed = is_listed(below)
        kind = "hidden or left by the system" if is_left_over(below) else suffix or "no suffix"
        counts["images and shards" if listed else "passed over"][kind] += 1
        if listed and is_image(path) and os.path.isfile(path):
            empty += [] if os.path.getsize(path) else [path]
    for what, kinds in counts.items():
        listed = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(8))
        print(f"{what}: {kinds.total()} files{f' ({listed})' if listed else ''}")
    images = find_images(folder, cache_dir)
    if images.hidden:
        print(f"passed over in shards: {images.hidden} hidden or left by the system")
    print(f"{len(images)} images to train on, {len(empty)} of them empty")
    for path in empty[:5]:
        print(f"  {path}: is empty")
    decoded, damaged = decode_sample(images, decode, workers)
    if len(empty) > 0.01 * len(images) or damaged > 0.01 * decoded:
        raise ValueError(f"{folder}: more than 1 % of the images are damaged; {SKIP}")
