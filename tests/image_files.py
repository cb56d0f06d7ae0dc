"""Small pictures, folders and archives that the image tests write."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tokenizer.image_readers import ImageSource


def picture(seed: int, width: int = 20, height: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def pixels(source: ImageSource) -> list[np.ndarray]:
    return [np.array(source.read(i)) for i in range(len(source))]


# names whose order differs between naive sorting of whole paths and torchvision's folder by folder
TREE = {
    name: encoded(picture(i), "JPEG" if name.lower().endswith("jpeg") else "PNG")
    for i, name in enumerate(
        ["b/10.png", "b/9.png", "a-b/x.JPEG", "a/z.png", "a/sub/1.png", "a/sub-1/0.png", "a/Z.png", "b/deep/er/q.png"]
    )
}
NO_IMAGES = {"a/notes.txt": b"text", "README.md": b"text", "__MACOSX/a/._z.png": b"junk", "a/._z.png": b"junk"}
