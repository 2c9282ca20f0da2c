"""Damage to files, drawn from a generator of fixed seed."""

import io
import random
import warnings
import zipfile
from collections.abc import Callable
from typing import Any


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits anywhere."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_the_header(data: bytes, rng: random.Random) -> bytes:
    """One bit near the beginning or the end, where formats keep their tables."""
    changed = bytearray(data)
    place = rng.randrange(min(4000, len(data)))
    changed[rng.choice([place, len(data) - 1 - place])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zero_run(data: bytes, rng: random.Random) -> bytes:
    """A run of zeros, as after a crash of the file system."""
    start = rng.randrange(len(data))
    length = min(rng.choice([1, 16, 512, 4096, 65536]), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 8, 512, 4096]) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A piece that is there twice, or the whole file."""
    start = rng.randrange(len(data))
    return (
        data[: start + rng.choice([1, 8, 512, 4096, len(data)])] + data[start if rng.random() < 0.8 else 0 :]
    )


def rewrite_records(data: bytes, rng: random.Random) -> bytes:
    """A zip archive packed anew, checksums right: compressed, a record missing, twice, cut or longer."""
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    change = rng.choice(["none", "missing", "twice", "cut", "longer"])
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w", method) as packed:
        names = source.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = source.read(name)
            if name == chosen and change == "missing":
                continue
            if name == chosen and change == "cut":
                content = content[: rng.randrange(len(content) + 1)]
            if name == chosen and change == "longer":
                content += bytes(rng.choice([1, 4, 64]))
            packed.writestr(name, content)
        if change == "twice":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the double name
                packed.writestr(chosen, source.read(rng.choice(names)))
    return target.getvalue()


ANY: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip_bits, flip_in_the_header, flip_in_the_header, truncate, zero_run, cut_out, repeat),
)
ZIP = (*ANY, rewrite_records, rewrite_records)


# -- trees of plain values, as metadata and configs are

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 10**12, 10**400, 0.5, -0.0, 1e300, float("inf"), float("nan")),
    *("", "x", "0", "\x1b[31mred\x1b[0m", "a" * 5000, "../../etc/passwd", "\ud800", "resnet18"),
    *([], {}, [[]], [None], [1, 2, 3], ["x"], {"x": 1}, [10**9] * 4, [1] * 10000),
)


def change_tree(tree: object, rng: random.Random) -> object:
    """A copy with one value replaced, removed, doubled or put beside it."""
    if rng.random() < 0.03:
        return rng.choice(VALUES)
    if isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        copy = dict(tree)
        return _changed(copy, key, tree[key], rng)
    if isinstance(tree, list) and tree:
        copy_of_list = list(tree)
        return _changed(copy_of_list, rng.randrange(len(tree)), tree, rng)
    return rng.choice(VALUES)


def _changed(copy: object, key: object, value: object, rng: random.Random) -> object:
    what = rng.random()
    if isinstance(copy, list):
        assert isinstance(key, int)
        if what < 0.1:
            del copy[key]
        elif what < 0.2:
            copy.insert(key, rng.choice(VALUES))
        else:
            copy[key] = change_tree(copy[key], rng)
        return copy
    assert isinstance(copy, dict)
    if what < 0.1:
        del copy[key]
    elif what < 0.15:
        copy[rng.choice(["", "x", "path", "__class__"])] = rng.choice(VALUES)
    else:
        copy[key] = change_tree(value, rng)
    return copy
