"""Weights that a run begins with, --init-from: those of a trained model, under a new optimizer and at step 0.

    other = opened(path, load_tokenizer)
    load_tokenizer_weights(model, other, path, keep_codes=False)   # k-means is about to place the codes
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from tokenizer.quantizer_config import QuantizerConfig
from tokenizer.runtime.config import diff, flag_name, to_dict
from tokenizer.weights import check_state_dict

Model = TypeVar("Model")

_CODES = "quantize.quantizer."
# Settings that weights fit whatever they are: of training, or of the size of pictures.
_FREE = frozenset({"dropout_p", "image_size", "rotation", "commit_loss_beta", "codebook_ema_decay",
                   "codebook_restart_below"})
_OF_CODES = frozenset({"quantizer", "codebook_size", "codebook_follow"})  # what else only codes that stay depend on


def opened(path: str, load: Callable[[str], Model]) -> Model:
    """load(path). ValueError, starting with --init-from: what it raises of a path that is not what it should be."""
    try:
        return load(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--init-from: {error}") from error


def require_alike(
    given: Mapping[str, Any], own: Mapping[str, Any], free: Collection[str], path: str, fix: str,
    called: Callable[[str], str] = flag_name,
) -> None:
    """ValueError names every setting, but for free ones, that differs: given, of the weights in path; own, of the run.

    fix: what to do then. called: a setting's name for the user.
    """
    found = [f"{called(name)} {there} there, {here} here"
             for name, there, here in diff(given, own) if name not in free]
    if found:
        raise ValueError(f"--init-from {path}: its weights do not fit this run ({'; '.join(found)}); {fix}")


def load_tokenizer_weights(model: Any, other: Any, path: str, *, keep_codes: bool) -> None:
    """Encoder, decoder and, if keep_codes, the quantizer of `other` into model. Both are models with a `quantize` and a
    config; step and curriculum of model stay.

    ValueError: settings or shapes that differ, each named; codes to keep of a tokenizer that has none yet.
    """
    own, given = to_dict(model.config), to_dict(other.config)
    fix = "give its settings, or other weights"
    if keep_codes:
        fix += ", or place new codes: a --warmup-steps above 0, or --codebook-init kmeans"
        if not other.quantize.has_codebook:
            raise ValueError(f"--init-from {path} is still in its warm-up: it has no codes to keep. Place some: a "
                             "--warmup-steps above 0, or --codebook-init kmeans")
    require_alike(given, own, _FREE if keep_codes else _FREE | _OF_CODES, path, fix)
    mine, theirs = model.state_dict(), other.state_dict()

    def taken(key: str) -> bool:
        return not key.startswith("quantize.") or (keep_codes and key.startswith(_CODES))

    weights = {key: value for key, value in theirs.items() if taken(key)}
    check_state_dict(weights, {key: value for key, value in mine.items() if taken(key)}, f"--init-from {path}")
    model.load_state_dict(mine | weights)


assert _FREE | _OF_CODES > set(QuantizerConfig.__dataclass_fields__) - {"codebook_embed_dim", "codebook_l2_norm"}
