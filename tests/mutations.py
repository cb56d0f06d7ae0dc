"""Damages a file in one of many ways: its bytes, or the values that its format holds. All draws come from one rng."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import torch

ODD = [None, True, 0, -1, 2, 1.5, 10**9, -(10**9), 2**31, 2**63, 10**30, -(10**30), 1e20, 1e308, float("nan"),
       float("inf"), -float("inf"), "", "x", "nan", "1e400", "\0", "a\nb", "\u2028", "../../etc", "x" * 100_000, [], {},
       [[]], [1], [None], {"a": 1}, ["x", 1.5], [10**9, 10**9]]
ODD_WORDS = ["-1", "0", "99999999999", "-" + "9" * 40, "1e400", "nan", "inf", "1.5", "x", "", "\0", "²", "*", "-", "'",
             '"', ",", "\t", "é", "../x", "9" * 5000, "\x1b[2J", "\r", "\ufeff"]
ODD_DTYPES = ["<f2", "<f8", ">i4", "<i8", "|u1", "|b1", "<c8", "|O", "<M8[s]", "|V8", "<U3", "|S0", "x",
              "[('a', '<f4')]"]


class Canary:
    """Unpickling one makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Plain:
    """A class that no reader expects."""


def damage(path: Path, rng, canary: Path, values=None) -> str:
    """Change a file in place -> what was done. canary: a file that must not appear. values: what changes values of
    a format that only the kind knows.
    """
    values = values or _values_of(path)
    roll = rng.random()
    if roll < 0.04:
        return _replace(path, rng)
    if roll < 0.08:
        path.write_bytes(pickle.dumps([Canary(canary)], protocol=rng.choice([2, 4])))
        return "a pickle"
    if values is None or roll < 0.4:
        content, done = damage_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
        return done
    return values(path, rng, canary)


def _replace(path, rng):
    kind = rng.choice(["folder", "pipe", "dangling link", "link to itself", "device", "absent"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return kind


def damage_bytes(content, rng):
    """-> bytes, what was done"""
    data, size = bytearray(content), len(content)
    if not size:
        return b"\xff\x00{", "garbage for nothing"
    # Headers and ends matter more than what lies between.
    at = min(rng.choice([rng.randrange(size), rng.randrange(min(size, 256)), size - 1 - rng.randrange(min(size, 256))]),
             size - 1)
    length = rng.choice([1, 4, 100, max(1, size // 3)])
    kind = rng.choice(["flip", "flip", "cut", "zeros", "repeat", "remove", "insert", "ones", "number", "empty",
                       "garbage", "text", "swap", "append"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 3, 30])):
            data[(at + rng.randrange(64)) % size] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind in ("zeros", "ones"):
        part = len(data[at : at + length])
        data[at : at + length] = (b"\0" if kind == "zeros" else b"\xff") * part
    elif kind == "repeat":
        data[at:at] = data[at : at + length] * rng.choice([1, 3])
    elif kind == "remove":
        del data[at : at + length]
    elif kind == "insert":
        data[at:at] = rng.randbytes(length)
    elif kind == "number":  # a length or an offset, perhaps
        data[at : at + 8] = struct.pack(rng.choice("<>") + "q", rng.choice([-1, 2**31, 2**62, 2**40, 0]))[: size - at]
    elif kind == "empty":
        data.clear()
    elif kind == "garbage":
        data[:] = rng.randbytes(min(size, 1000))
    elif kind == "text":
        data[:] = b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n"
    elif kind == "swap":
        half = size // 2
        data[:] = data[half:] + data[:half]
    else:
        data += rng.randbytes(length)
    return bytes(data), f"{kind} at {at} of {size}, {length}"


# -------------------------------------------------------------------------------------------------------------- values


def _places(value, deep=0):
    """(container, key) of all that a tree of dicts and lists holds."""
    if deep < 6:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in list(items)[:200]:
            yield value, key
            yield from _places(item, deep + 1)


def _nested(depth=5000):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def change_value(tree, rng, odd=ODD):
    """Change one value of a tree in place -> what was done."""
    places = list(_places(tree))
    if not places:
        return "nothing to change"
    depth_first = sorted({id(box): box for box, _ in places}.values(), key=lambda box: -len(box))
    box = rng.choice([rng.choice(places)[0], rng.choice(depth_first)])
    if not box:
        return "nothing to change"
    key = rng.choice(list(box) if isinstance(box, dict) else range(len(box)))
    kind = rng.choice(["odd", "odd", "odd", "remove", "rename", "repeat", "wrap", "exchange"])
    shown = f"{kind} {str(key)[:60]!r}"
    if kind == "odd":
        value = rng.choice(odd)
        value = value(rng) if callable(value) else value
        box[key] = value
        return f"{shown} = {repr(value)[:60]}"
    if kind == "remove":
        del box[key]
    elif kind == "rename" and isinstance(box, dict):
        box[rng.choice(["x", "", f"module.{key}", 3, str(key).upper()])] = box.pop(key)
    elif kind == "repeat" and isinstance(box, list):
        box.insert(key, box[key])
    elif kind == "exchange":
        other, its = rng.choice(places)
        box[key] = other[its] if isinstance(other, list) or its in other else None
        if box[key] is box:
            box[key] = None
    else:
        box[key] = {"x": box[key]} if rng.random() < 0.5 else [box[key]]
    return shown


def _json(path, rng, _):
    value = json.loads(path.read_text())
    if rng.random() < 0.1:
        value = rng.choice(ODD)
        done = f"all is {repr(value)[:60]}"
    else:
        done = change_value(value, rng)
    path.write_text(_dump(value, rng))
    return done


def _dump(value, rng):
    text = json.dumps(value, default=str)
    if rng.random() < 0.06:
        deep = "[" * 100_000 + "]" * 100_000
        text = re.sub(r": [^,{\[]+", f": {deep}", text, count=1)
    return text


def _jsonl(path, rng, _):
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    kind = rng.choice(["value"] * 5 + ["remove", "repeat", "cut", "blank", "all"])
    if kind == "value":
        row = json.loads(lines[at])
        kind = change_value(row, rng)
        lines[at] = _dump(row, rng)
    elif kind == "remove":
        del lines[at]
    elif kind == "repeat":
        lines.insert(at, lines[at])
    elif kind == "cut":
        lines[at] = lines[at][: len(lines[at]) // 2]
    else:
        lines[at] = " " if kind == "blank" else json.dumps(rng.choice(ODD))
    path.write_text("\n".join(lines) + "\n")
    return f"line {at}: {kind}"


def damage_text(text, rng):
    """One word of a text, or one line -> text, what was done"""
    words = list(re.finditer(r"[^\s,=\"]+", text))
    kind = rng.choice(["word"] * 5 + ["remove", "repeat", "shift", "exchange", "long"])
    if kind == "word" and words:
        found, other = rng.choice(words), rng.choice(ODD_WORDS)
        if rng.random() < 0.5 and len(other) < len(found[0]):  # columns stay where they are
            other = other.rjust(len(found[0]))
        done = f"{found[0][:40]!r} at {found.start()} = {other[:40]!r}"
        return text[: found.start()] + other + text[found.end() :], done
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    if kind == "remove":
        del lines[at]
    elif kind == "repeat":
        lines[at:at] = [lines[at]] * rng.choice([1, 3])
    elif kind == "shift":
        lines[at] = " " + lines[at]
    elif kind == "exchange":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] += "y" * 50_000
    return "\n".join(lines), f"line {at}: {kind}"


def _text(path, rng, _):
    text, done = damage_text(path.read_text(), rng)
    path.write_text(text)
    return done


# ------------------------------------------------------------------------------------------------------------- formats


def _tensor_or_array(rng):
    """A tensor that no state dict should hold."""
    kind = rng.randrange(12)
    return [lambda: torch.zeros(2), lambda: torch.full((3, 3), float("nan")), lambda: torch.zeros(0),
            lambda: torch.eye(3).to_sparse(), lambda: torch.empty(5, device="meta"), lambda: torch.tensor(7),
            lambda: torch.zeros(3, dtype=torch.complex64), lambda: torch.zeros(1).expand(10**9),
            lambda: torch.full((4,), 2**62), lambda: torch.zeros(2, dtype=torch.bool), lambda: torch.zeros(2).half(),
            lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8)][kind]()


def _spoiled(tensor, rng):
    """The tensor with a number that is none, of another type, shape or kind."""
    if tensor.is_floating_point() and tensor.numel() and rng.random() < 0.4:
        tensor = tensor.clone()
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), 1e38])
        return tensor
    return rng.choice([lambda: tensor.unsqueeze(0), lambda: tensor.flatten()[:1], lambda: tensor.to(torch.int8),
                       lambda: tensor.to(torch.complex64), lambda: tensor.to("meta"), lambda: tensor.double(),
                       lambda: tensor.to_sparse() if tensor.dim() else tensor, lambda: tensor.tolist(),
                       lambda: tensor.expand(1000, *tensor.shape),
                       lambda: tensor.t() if tensor.dim() == 2 else tensor])()


def _checkpoint(path, rng, canary):
    state = torch.load(path, weights_only=False)
    kind = rng.choice(["value"] * 5 + ["tensor"] * 4 + ["shell", "canary", "class", "packed"])
    if kind == "value":
        done = change_value(state, rng, [*ODD, *[_tensor_or_array] * 20])
    elif kind == "tensor":
        found = [(box, key) for box, key in _places(state) if isinstance(box[key], torch.Tensor)]
        box, key = rng.choice(found)
        box[key] = _spoiled(box[key], rng)
        done = f"tensor {key} = {repr(box[key])[:60]}"
    elif kind == "shell":
        key = rng.choice(list(state))
        state = rng.choice([state[key], [state], {"state_dict": state}, {"model": state}, {3: state}, None, "x", {}])
        done = f"another shell around or instead of {key}"
    elif kind in ("canary", "class"):
        box, key = rng.choice(list(_places(state)))
        box[key] = Canary(canary) if kind == "canary" else Plain()
        done = f"{kind} as {str(key)[:60]}"
    else:
        done = "compressed records"
    torch.save(state, path)
    if kind == "packed":
        _repack(path, zipfile.ZIP_DEFLATED)
    return done


def _repack(path, method, change=len):
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _damaged_npy(content, rng, canary):
    """-> bytes of an .npy file, what was done"""
    kind = rng.choice(["header", "header", "array", "array", "pickle", "bytes"])
    if kind == "pickle":
        return content[:6] + _npy_bytes(np.array([Canary(canary), None], dtype=object))[6:], "an array of objects"
    if kind == "bytes":
        return damage_bytes(content, rng)
    array = np.load(io.BytesIO(content))
    if kind == "header":
        shape = list(array.shape) or [1]
        if rng.random() < 0.6:
            shape[rng.randrange(len(shape))] = rng.choice([-1, 0, 1, 2**31, 2**40, 2**63, 10**30, 1.5, "x", None, True])
        header = {"descr": rng.choice([array.dtype.str, rng.choice(ODD_DTYPES)]),
                  "fortran_order": rng.choice([False, False, True, "x"]),
                  "shape": rng.choice([tuple(shape), shape[0], ()])}
        lies = ["(" * 3000, "{'descr'", "__import__('os')", "-" * 9000]
        text = repr(header) if rng.random() < 0.85 else rng.choice(lies)
        data = text.encode().ljust(117) + b"\n"
        done = text[:100]
        return content[:8] + struct.pack("<H", len(data)) + data + array.tobytes(), f"header {done}"
    options = [lambda: array[:-1] if array.ndim else array, lambda: array[None], lambda: array.astype(str),
               lambda: np.asfortranarray(array), lambda: array.ravel(), lambda: np.zeros(0), lambda: np.array(["x"]),
               lambda: np.repeat(array, 2, 0) if array.ndim else array, lambda: array[::-1] if array.ndim else array]
    if array.dtype.kind in "iuf":
        spoiled = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        if spoiled.size:
            spoiled.flat[rng.randrange(spoiled.size)] = rng.choice(
                [np.nan, np.inf, 1e300, -1] if array.dtype.kind == "f" else [-1, 2**31, 2**62, 70_000, -(2**63)])
        options += [lambda: spoiled, lambda: spoiled.astype(array.dtype), lambda: array.astype(np.float16),
                    lambda: array.astype(np.int64)] * 2
    with np.errstate(all="ignore"):
        changed = rng.choice(options)()
    return _npy_bytes(changed), f"array {changed.dtype} {changed.shape} for {array.dtype} {array.shape}"


def _npy(path, rng, canary):
    content, done = _damaged_npy(path.read_bytes(), rng, canary)
    path.write_bytes(content)
    return done


def _npz(path, rng, canary):
    said = []

    def change(members):
        name = rng.choice(list(members))
        kind = rng.choice(["array"] * 6 + ["remove", "rename", "exchange"])
        if kind == "remove":
            del members[name]
        elif kind == "rename":
            members[rng.choice(["x.npy", "x", "../x.npy"])] = members.pop(name)
        elif kind == "exchange":
            other = rng.choice(list(members))
            members[name], members[other] = members[other], members[name]
        else:
            members[name], kind = _damaged_npy(members[name], rng, canary)
        said.append(f"{name}: {kind}")

    _repack(path, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]), change)
    return said[0]


def _zip(path, rng, _):
    """A field of its directory: offsets, lengths, methods, flags, names."""
    data = bytearray(path.read_bytes())
    entries = [found.start() for found in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06", data)]
    at = rng.choice(entries)
    field = at + rng.randrange(4, 46)
    data[field : field + 2] = struct.pack("<H", rng.choice([0, 1, 8, 9, 12, 99, 0xFFFF, 0x7FFF]))
    path.write_bytes(data[: max(len(data), field)])
    return f"two bytes at {field}, {field - at} from the mark at {at}"


def _tar(path, rng, _):
    """A field of a header, whose checksum then is right again."""
    data = bytearray(path.read_bytes())
    blocks = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(blocks)
    start, length = rng.choice([(0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (257, 8), (345, 155)])
    value = rng.choice([b"", b"9" * length, b"7" * length, b"-1", b"\xff" * length, b"\x80" + b"\xff" * (length - 1),
                        b"../../x.png", b"/etc/x.png", b"x", b"L", b"1", b"2", b"S", b"K", b"0"])
    data[at + start : at + start + length] = value[:length].ljust(length, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    return f"header at {at}, field at {start} = {value[:20]!r}"


def _safetensors(path, rng, _):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if rng.random() < 0.2:
        lie = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63])
        path.write_bytes(struct.pack("<Q", lie) + content[8:])
        return f"length of the header {lie}"
    if rng.random() < 0.3:
        data = bytearray(content)
        at = 8 + size + rng.randrange(max(1, len(data) - 8 - size - 4))
        data[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38]))
        path.write_bytes(data)
        return f"odd number at {at}"
    done = change_value(header, rng)
    text = json.dumps(header, default=str).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"header: {done}"


def _bcif(path, rng, _):
    value = msgpack.unpackb(path.read_bytes())
    odd = [item for item in ODD if not (isinstance(item, int) and abs(item) >= 2**63)]
    done = change_value(value, rng, [*odd, b"", b"\xff" * 7, b"x" * 1000])
    path.write_bytes(msgpack.packb(value, default=str))
    return done


def _gz(path, rng, canary):
    inner = path.with_suffix("")
    inner.write_bytes(gzip.decompress(path.read_bytes()))
    done = (_values_of(inner) or _bytes)(inner, rng, canary)
    path.write_bytes(gzip.compress(inner.read_bytes()))
    inner.unlink()
    return done


def _bytes(path, rng, _):
    content, done = damage_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return done


_FORMATS = {".json": _json, ".jsonl": _jsonl, ".txt": _text, ".csv": _text, ".fasta": _text, ".pdb": _text,
            ".cif": _text, ".bcif": _bcif, ".gz": _gz, ".npy": _npy, ".npz": _npz, ".zip": _zip, ".tar": _tar,
            ".safetensors": _safetensors, ".pt": _checkpoint, ".pth": _checkpoint}


def _values_of(path):
    """What damages values of this kind of file, None where only bytes can be."""
    if path.suffix == ".pt":
        return None if _is_script(path) else _checkpoint
    return _FORMATS.get(path.suffix)


def _is_script(path):
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
