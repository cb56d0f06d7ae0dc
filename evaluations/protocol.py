"""What two evaluation reports must have in common to be compared.

Most disagreements about published numbers are about protocol: another reference set, another crop, another extractor.
So each report carries its protocol as a dict, and an id of everything in it but what was measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

MEASURED = ("samples", "reference_name", "id", "warnings")  # may differ between comparable reports


def protocol_id(protocol: Mapping[str, Any]) -> str:
    """12 hex digits over all but MEASURED. protocol: JSON values only (TypeError otherwise)."""
    fixed = {key: value for key, value in protocol.items() if key not in MEASURED}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Dotted names of what keeps two reports from being compared; empty: they may be."""
    return sorted(_differences(first, second, ""))


def _differences(first: Any, second: Any, name: str) -> list[str]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = (first.keys() | second.keys()) - (set() if name else set(MEASURED))
        below = name + "." if name else ""
        return [d for key in keys for d in _differences(first.get(key), second.get(key), f"{below}{key}")]
    return [] if first == second else [name]
