"""Images by number: files in folders, or members of tar shards as img2dataset writes them.

    images = find_images("cc3m/", "cache")     # every image below the folder and in the .tar files there
    len(images), images.name(7), images.open(7)

The list is a table on disk of 40 bytes and a name for each image, of which a process reads what it needs: three million
images take no more memory than three hundred.
"""

import hashlib
import io
import os
import shutil
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from plumbing.command import ignore_signals
from plumbing.files import check_folder, clear, complete, explained, locked

warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities in files that it reads all the same, two lines for each


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_image(name, file=None):
    """A path, or a name and an open file -> a decoded PIL image, of an animation the first frame.

    Raises ValueError, one sentence, if it is not readable. Beyond 179 million pixels, PIL's limit, it is not even decoded.
    """
    try:
        image = Image.open(file or name)
        image.load()
        return image
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such image; check the data set with `python evaluate.py check`") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged data
        empty = file.getbuffer().nbytes == 0 if file else os.path.isfile(name) and os.path.getsize(name) == 0
        reason = "is empty" if empty else f"cannot be read as an image ({' '.join(str(error).split())})"
        raise ValueError(f"{name}: {reason}; replace or remove the file") from None


class Rows:
    """Rows of an .npy file [N, ...], read and written one by one: of a mapped file, all that was seen would stay in memory."""

    def __init__(self, path):
        try:
            header = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # numpy reports damaged files in many ways
            raise ValueError(f"{path}: is damaged; delete its folder, it is then computed again") from None
        self.path, self.shape, self.dtype, self.offset = Path(path), header.shape, header.dtype, header.offset

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """A list of M row numbers -> [M, ...]."""
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for row, i in zip(out, index, strict=True):
                file.seek(self.offset + int(i) * row.nbytes)
                if file.readinto(row) != row.nbytes:
                    raise ValueError(f"{self.path}: ends before row {i}; delete its folder, it is then computed again")
        return out

    def write(self, index, values):
        """Put values [M, ...] into the rows `index`, which is in ascending order."""
        with open(self.path, "r+b") as file:
            for i, row in zip(index, values.astype(self.dtype), strict=True):
                file.seek(self.offset + i * row.nbytes)
                file.write(np.ascontiguousarray(row))

    def __array__(self, dtype=None, copy=None):
        return np.load(self.path).astype(dtype or self.dtype, copy=False)


class ImageList:
    """A sequence of images. names: bytes of all names, one after the other. table: Rows or int64 [N, 5], for each image where its
    name begins and ends, the number of its shard (-1: a file of its own), and where it begins there and its size in bytes.
    key tells lists of other files, and of files that have changed since, apart.
    """

    def __init__(self, names, table, shards, key):
        self.names, self.table, self.shards, self.key = names, table, shards, key

    def __len__(self):
        return len(self.table)

    def _find(self, i):
        begin, end, *place = self.table[[i]][0].tolist()
        if isinstance(self.names, bytes):
            return os.fsdecode(self.names[begin:end]), *place
        with open(self.names, "rb") as file:
            file.seek(begin)
            return os.fsdecode(file.read(end - begin)), *place

    def name(self, i):
        """The path of image i; of a member of a shard the shard's path, "/", its name there."""
        return self._find(i)[0]

    def open(self, i):
        """Image i, decoded. Raises ValueError, one sentence, if it is damaged or no longer there."""
        name, shard, begin, size = self._find(i)
        if shard < 0:
            return open_image(name)
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(begin)
                data = file.read(size)
        except OSError as error:
            raise ValueError(f"{self.shards[shard]}: cannot be read ({error.strerror}); restore the shard") from None
        return open_image(name, io.BytesIO(data))


def list_images(paths):
    """A list of paths -> ImageList, in memory: for galleries."""
    names = [os.fsencode(path) for path in paths]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    table = np.zeros((len(names), 5), np.int64)
    table[:, 0], table[:, 1], table[:, 2] = np.append(0, ends[:-1]), ends, -1
    digest = hashlib.sha256()
    for path in paths:
        digest.update(identity(path))
    return ImageList(b"".join(names), table, [], digest.hexdigest())


def find_images(folder, cache):
    """Every image below `folder`, members of its .tar files included, in a fixed order -> ImageList.

    The list is kept below `cache` until a name, a size or a time of change differs. Raises ValueError for a folder that does
    not exist or holds fewer than two images, and for a damaged shard.
    """
    _require_folder(folder)
    check_folder(cache)
    digest, shards = hashlib.sha256(), []
    for path in walk(folder):
        digest.update(identity(path))
        if path.endswith(".tar"):
            shards.append(path)
    kept = Path(cache) / f"images-{digest.hexdigest()[:16]}"
    if not kept.is_dir():
        draft = kept.with_name(f"{kept.name}.tmp")
        with locked(draft):
            try:
                clear(draft)  # of what a killed process left
                if not kept.is_dir():  # another process may have made it while this one waited
                    with explained(draft):
                        _write_list(folder, shards, draft)
                    complete(draft, kept)
            except BaseException:
                clear(draft)
                raise
    return ImageList(kept / "names", Rows(kept / "table.npy"), shards, digest.hexdigest())


def _require_folder(folder):
    if Path(folder).is_file():
        raise ValueError(f"{folder}: is a file; give the folder that holds it, or a folder of images, with --images")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder; give a folder of images with --images")


def count_files(folder):
    """What lies below `folder` -> {suffix: number of images or shards}, {suffix: number of other files}, paths of empty images.

    Suffixes are in small letters. Raises ValueError for a folder that does not exist or cannot be searched.
    """
    _require_folder(folder)
    taken, others, empty = Counter(), Counter(), []
    for path in tqdm(walk(folder, all_files=True), desc="looking", unit=" files", disable=None, leave=False):
        suffix = os.path.splitext(path)[1].lower()
        if not _is_taken(path):
            others[suffix or "no suffix"] += 1
            continue
        taken[suffix] += 1
        if suffix != ".tar" and os.path.isfile(path) and os.path.getsize(path) == 0:
            empty.append(path)
    return taken, others, empty


def _is_taken(path):
    return path.lower().endswith(SUFFIXES) or path.endswith(".tar")


def walk(folder, all_files=False):
    """Paths of images and shards, or of all files, folder by folder; a folder that links lead to twice is visited once."""
    seen = set()

    def fail(error):
        raise ValueError(f"{error.filename}: cannot be searched for images ({error.strerror}); mend it, or move it away")

    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        stat = os.stat(parent)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()
        for name in sorted(files):
            if all_files or _is_taken(name):
                yield os.path.join(parent, name)


def identity(path):
    """What tells a file from another and from itself as it was before a change."""
    try:
        stat = os.stat(path)
        return os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
    except OSError:
        return os.fsencode(path) + b"\0missing\n"


def _write_list(folder, shards, out):
    """The files names and table.npy of an ImageList, written as they come: no list of all of them is ever in memory."""
    with open(out / "names", "wb") as names, open(out / "table", "wb") as table:
        count, number = 0, {path: i for i, path in enumerate(shards)}
        for path in tqdm(walk(folder), desc="listing images", unit=" files", disable=None, leave=False):
            entries = _members(path) if path in number else [(path, 0, 0)]
            for name, begin, size in entries:
                start = names.tell()
                names.write(os.fsencode(name))
                table.write(np.array([start, names.tell(), number.get(path, -1), begin, size], np.int64).tobytes())
                count += 1
    if count < 2:
        raise ValueError(f"{folder}: holds {count} images, training needs at least two; check --images")
    with open(out / "table.npy", "wb") as file, open(out / "table", "rb") as table:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count, 5)})
        shutil.copyfileobj(table, file)
    (out / "table").unlink()


def _members(shard):
    """(name, first byte, size) of every image in a .tar file; its other members (texts, tables) are passed over."""
    try:
        with tarfile.open(shard, "r:") as tar:
            while member := tar.next():
                if member.isreg() and member.name.lower().endswith(SUFFIXES):
                    yield f"{shard}/{member.name}", member.offset_data, member.size
                tar.members.clear()  # of which tarfile would keep all
            tar.fileobj.seek(tar.offset)
            if len(tar.fileobj.read(512)) < 512:  # where a block of zeros ends a whole file; tarfile does not mind
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard}: is not a whole, uncompressed tar file ({error}); fetch it again or remove it") from None


class Prepared(torch.utils.data.Dataset):
    """Row i -> (i, preprocess(image i)) or, for a damaged image, (i, the reason)."""

    def __init__(self, images, preprocess, rows):
        self.images, self.preprocess, self.rows = images, preprocess, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, j):
        i = self.rows[j]
        try:
            return i, self.preprocess(self.images.open(i))
        except ValueError as error:
            return i, str(error)


def load_images(images, preprocess, batch_size, workers, rows=None, pin_memory=False):
    """In order, batches of (row numbers, their pixels [M, 3, S, S] or None if M = 0, {row: why it is damaged}).

    images: an ImageList; rows: a range of them, by default all.
    """
    data = Prepared(images, preprocess, range(len(images)) if rows is None else rows)
    return torch.utils.data.DataLoader(data, batch_size, num_workers=workers, collate_fn=_sort_out, pin_memory=pin_memory,
                                       worker_init_fn=ignore_signals)  # fmt: skip


def _sort_out(samples):
    good = [(i, pixels) for i, pixels in samples if not isinstance(pixels, str)]
    bad = {i: why for i, why in samples if isinstance(why, str)}
    return [i for i, _ in good], torch.stack([pixels for _, pixels in good]) if good else None, bad


TRAINING_TREE = f"""\
NAME.jpg or {", ".join(SUFFIXES[1:])}, in any sub-folders
00000.tar                                         shards of such images, uncompressed, as img2dataset writes them"""


def check_images(folder, cache_dir, sample=200):
    """A training folder: what train.py would find there. A random sample of its images is decoded, all empty ones are found."""
    print(f"expected below {folder}:\n\n{TRAINING_TREE}\n")
    taken, others, empty = count_files(folder)
    for what, counts in (("images and shards", taken), ("passed over", others)):
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items(), key=lambda pair: -pair[1])[:8])
        print(f"{what}: {sum(counts.values())} files{f' ({kinds})' if kinds else ''}")
    images = find_images(folder, cache_dir)
    rows = sorted(Random(0).sample(range(len(images)), min(sample, len(images))))
    damaged = []
    for i in rows:
        try:
            images.open(i)
        except ValueError as error:
            damaged.append(str(error))
    print(f"{len(images)} images to train on; {len(empty)} are empty; of {len(rows)} that were decoded {len(damaged)} are damaged")
    for why in [*(f"{path}: is empty" for path in empty), *damaged][:5]:
        print(f"  {why}")
    if len(empty) > 0.01 * len(images) or len(damaged) > 0.01 * len(rows):
        raise ValueError(f"{folder}: more than 1 % of the images are damaged; mend them, or train with --skip-bad-images")
