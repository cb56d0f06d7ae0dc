"""Small protein chains for tests: alpha helices with some noise, so that every residue is a little different."""

import numpy as np

from protein.structure_io import Chain, write_structure

ANGLES = {"N": (1.55, -28.3, -0.87), "CA": (2.28, 0.0, 0.0), "C": (1.68, 26.6, 1.11), "O": (2.03, 20.0, 2.3),
          "CB": (3.3, -20.0, -0.6)}  # radius, degrees, height: in Angstrom on the helix's axis


def helix(name="1abc", length=12, *, chain_id="A", seed=0, start=1, numbers=None, codes=None, sequence=None):
    """float32 coordinates, all atoms there. numbers: of the residues, by default start, start + 1, ..."""
    rng = np.random.default_rng(seed)
    i = np.arange(length)
    coords = np.empty((length, 5, 3))
    for atom, (radius, degrees, height) in enumerate(ANGLES.values()):
        angle = np.deg2rad(100 * i + degrees)
        coords[:, atom] = np.stack([radius * np.cos(angle), radius * np.sin(angle), 1.5 * i + height], axis=-1)
    coords += rng.normal(scale=0.15, size=coords.shape)
    letters = sequence or "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length))
    return Chain(
        name=name, chain_id=chain_id, sequence=letters, coords=coords.round(3).astype(np.float32),
        residue_numbers=np.array(numbers if numbers is not None else start + i, dtype=np.int64),
        insertion_codes=tuple(codes or [""] * length), bfactors=rng.uniform(5, 60, length).round(2).astype(np.float32),
    )


def write_helix(folder, name="1abc", length=12, suffix=".pdb", **options):
    """Writes folder/NAME.pdb -> the chain as it is read back, but for rounding."""
    folder.mkdir(parents=True, exist_ok=True)
    chain = helix(name, length, **options)
    write_structure(folder / f"{name}{suffix}", chain)
    return chain
