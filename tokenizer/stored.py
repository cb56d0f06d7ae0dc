"""Where stored models and codes are, before anything of them is read. No torch, see runtime/command.py."""

from __future__ import annotations

from pathlib import Path

RELEASED = Path(__file__).parent / "pretrained"  # a folder for each released model


def require_weights(weights: str) -> None:
    """ValueError: neither "auto" nor a name of a set."""
    if weights not in ("auto", "model", "ema"):
        raise ValueError(f"weights={weights!r} must be 'auto', 'model' or 'ema'")


def require_stored(path: str | Path, weights: str, what: str) -> Path:
    """The path. FileNotFoundError: nothing is there. ValueError: see `require_weights`."""
    require_weights(weights)
    if not Path(path).exists():
        known = RELEASED / Path(path).name
        hint = f"; the released one is in {known}" if known.parent != Path(path).parent and known.is_dir() else ""
        raise FileNotFoundError(f"no {what} at {path}{hint}")
    return Path(path)


def require_code_folder(path: Path) -> None:
    """ValueError: it is none."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder of codes; autoregressive/extract_codes.py makes one")
