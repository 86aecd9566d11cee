"""What befalls files: bytes that change, structure that changes, and what stands in a file's place. All drawn from one seeded source."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ODD = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "3", "null", "F32", "I64", "x" * 5000, "\x00", "\ud800", "a\nb", "../../etc/passwd", "/dev/zero", "größe", "<s>", "</s>"),
    *([], {}, [None], [[]], {"a": 1}, [1, 2, 3], ["a"], {"": ""}),
)


def changed(content: bytes, form: str, random: Random) -> tuple[str, bytes]:
    """What was done, and what came of it."""
    structured = STRUCTURED.get(form)
    if structured is None or random.random() < 0.4:
        return bytes_changed(content, random)
    return structured(content, random)


def bytes_changed(content: bytes, random: Random) -> tuple[str, bytes]:
    size = len(content)
    at, length = random.randrange(size + 1), random.choice((1, 2, 8, 40, 1000))
    way = random.choice("cut cut flip flip overwrite insert delete double empty nul bom utf16 latin crlf tail random".split())
    match way:
        case "cut":
            return f"cut at {at}", content[:at]
        case "flip" if size:
            flipped = bytearray(content)
            for _ in range(random.choice((1, 1, 5, 50))):
                flipped[random.randrange(size)] ^= 1 << random.randrange(8)
            return "bits flipped", bytes(flipped)
        case "overwrite":
            return f"{length} bytes at {at} overwritten", content[:at] + random.randbytes(length) + content[at + length :]
        case "insert":
            piece = random.choice((random.randbytes(length), b"\x00" * length, b"\n" * length, b"[" * 5000, b'"', b"{", b"\xff\xfe"))
            return f"{piece[:8]!r}... at {at} inserted", content[:at] + piece + content[at:]
        case "delete":
            return f"{length} bytes at {at} deleted", content[:at] + content[at + length :]
        case "double":
            return "doubled", content + content
        case "nul":
            return "all NUL", b"\x00" * size
        case "bom":
            return "with a byte order mark", b"\xef\xbb\xbf" + content
        case "utf16":
            return "in UTF-16", content.decode("utf-8", "replace").encode("utf-16")
        case "latin":
            return f"an e acute of Latin-1 at {at}", content[:at] + b"\xe9" + content[at:]
        case "crlf":
            return "with carriage returns", content.replace(b"\n", b"\r\n")
        case "tail":
            return "with a tail", content + random.randbytes(length)
        case "random":
            return "random bytes", random.randbytes(length)
    return "empty", b""


def tree_changed(tree: Any, random: Random) -> tuple[str, Any]:
    """A JSON value with a part replaced, removed, renamed, doubled or nested, wherever it lies."""
    tree = json.loads(json.dumps(tree))
    said = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        path, holder, key = _somewhere(tree, random)
        if holder is None:
            return "replaced", random.choice(ODD)
        value = holder[key]
        way = random.choice("odd odd odd remove rename sibling text nest grow shrink negate".split())
        said.append(f"{path} {way}")
        match way:
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[random.choice((f"{key}x", key.upper(), "", "schema", "\ud800"))] = holder.pop(key)
            case "sibling":
                other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
                holder[key], holder[other] = holder[other], holder[key]
            case "text":
                holder[key] = str(value)
            case "nest":
                for _ in range(random.choice((1, 3, 100))):
                    value = [value]
                holder[key] = value
            case "grow" if isinstance(value, list):
                holder[key] = value * random.choice((2, 100)) or [0]
            case "shrink" if isinstance(value, list) and value:
                holder[key] = value[: random.randrange(len(value))]
            case "negate" if isinstance(value, (int, float)):
                holder[key] = -value - 1
            case _:
                holder[key] = random.choice(ODD)
    return ", ".join(said), tree


def _somewhere(tree: Any, random: Random) -> tuple[str, Any, Any]:
    """(path, what holds it, its key there); the upper parts of a tree as often as the lower ones."""
    path, holder, key, value = "", None, None, tree
    while isinstance(value, (dict, list)) and value and (holder is None or random.random() < 0.6):
        holder, key = value, random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        path, value = f"{path}.{key}", holder[key]
    return path[:60], holder, key


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _json(content: bytes, random: Random) -> tuple[str, bytes]:
    if random.random() < 0.1:
        tree = json.loads(content)
        keys = [key for key in tree if f'"{key}":'.encode() in content] if isinstance(tree, dict) else []
        if keys:
            key = random.choice(keys)
            return f"{key} twice", content.replace(f'"{key}":'.encode(), f'"{key}": {json.dumps(random.choice(ODD))}, "{key}":'.encode(), 1)
    said, tree = tree_changed(json.loads(content), random)
    return said, _dumped(tree)


def _lines(content: bytes, random: Random) -> tuple[str, bytes]:
    lines = content.splitlines()
    at = random.randrange(len(lines))
    way = random.choice("change change change remove double blank swap join".split())
    match way:
        case "change":
            said, tree = tree_changed(json.loads(lines[at]), random)
            lines[at] = _dumped(tree)
            way = said
        case "remove":
            del lines[at]
        case "double":
            lines.insert(at, lines[at])
        case "blank":
            lines[at] = random.choice((b"", b" ", b"\t"))
        case "swap":
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case "join":
            lines[at : at + 2] = [b"".join(lines[at : at + 2])]
    return f"line {at + 1}: {way}", b"\n".join(lines) + b"\n"


def _safetensors(content: bytes, random: Random) -> tuple[str, bytes]:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if random.random() < 0.3 and data:
        at = random.randrange(len(data))
        piece = random.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", random.randbytes(4), b"\xff" * 64))
        return f"data at {at} overwritten", content[: 8 + length] + (data[:at] + piece + data[at + len(piece) :])[: len(data)]
    said, tree = tree_changed(json.loads(header), random)
    header = _dumped(tree)
    return f"header: {said}", len(header).to_bytes(8, "little") + header + data


def _yaml(content: bytes, random: Random) -> tuple[str, bytes]:
    import yaml

    said, tree = tree_changed(yaml.safe_load(content), random)
    return said, json.dumps(tree).encode() if random.random() < 0.3 else yaml.dump(tree).encode("utf-8", "surrogatepass")


def _gzip(content: bytes, random: Random) -> tuple[str, bytes]:
    said, inner = changed(gzip.decompress(content), "jsonl", random)
    return f"inside: {said}", gzip.compress(inner)


def _parquet(content: bytes, random: Random) -> tuple[str, bytes]:
    import pyarrow
    from pyarrow import parquet

    rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    column: list[Any] = [row["text"] for row in rows]
    way = random.choice("nulls lists numbers renamed none bytes".split())
    match way:
        case "nulls":
            column[random.randrange(len(column))] = None
        case "lists":
            column = [[text] for text in column]
        case "numbers":
            column = list(range(len(column)))
        case "none":
            column = []
        case "bytes":
            column = [text.encode() + b"\xff" for text in column]
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"body" if way == "renamed" else "text": column}), file)
    return way, file.getvalue()


STRUCTURED: dict[str, Callable[[bytes, Random], tuple[str, bytes]]] = {
    "json": _json,
    "jsonl": _lines,
    "safetensors": _safetensors,
    "yaml": _yaml,
    "gz": _gzip,
    "parquet": _parquet,
}


def replaced(path: Path, random: Random) -> str:
    """Put something else where a file was."""
    path.unlink()
    way = random.choice("nothing pipe device folder loop dangling".split())
    match way:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nowhere")
    return f"{way} in its place"


def rewritten(content: bytes, form: str) -> bytes | None:
    """The same content written in another way, which must be taken; None for a form that has no other."""
    if form == "json":
        return json.dumps(json.loads(content), indent=3, sort_keys=True).encode()
    if form == "jsonl":
        return b"".join(b" " + json.dumps(json.loads(line), sort_keys=True).encode() + b"\t\n" for line in content.splitlines())
    return None


def copied(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
