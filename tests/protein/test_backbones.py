"""protein/backbones.py: generated chains have the geometry of proteins, and are the same wherever they are made."""

import subprocess
import sys
from itertools import combinations

import biotite.structure as struc
import numpy as np
import pytest
import torch
from places import ROOT
from scipy.spatial.distance import cdist

from protein import backbones
from protein.backbones import generate_backbones, ideal_backbone
from protein.geometry import backbone_dihedrals, backbone_rmsd
from protein.structure_io import ATOMS, read_structure, write_structure

COUNT = 40


@pytest.fixture(scope="module")
def chains():
    return generate_backbones(COUNT, seed=7)


def atoms_of(chain):
    """biotite's array of N, CA, C, O and CB."""
    residues, columns = np.nonzero(np.isfinite(chain.coords).all(-1))
    atoms = struc.AtomArray(len(residues))
    atoms.coord = chain.coords[residues, columns]
    atoms.res_id = residues
    atoms.atom_name = np.array(ATOMS)[columns]
    atoms.element = np.array([name[0] for name in ATOMS])[columns]
    atoms.res_name[:] = "ALA"
    atoms.chain_id[:] = "A"
    return atoms


def secondary_structure(chain):
    """'a', 'b' and 'c' by biotite's P-SEA, which looks at CAs only."""
    atoms = atoms_of(chain)
    return struc.annotate_sse(atoms[atoms.atom_name == "CA"])


def angle(a, b, c):
    return np.degrees(struc.angle(a, b, c))


def test_chains_are_complete_and_named(chains):
    for index, chain in enumerate(chains):
        assert (chain.name, chain.chain_id) == (f"ideal_7_{index}", "A")
        assert 40 <= len(chain) <= 160
        assert chain.mask.all()
        assert not chain.breaks.any()
        assert chain.residue_numbers.tolist() == list(range(1, len(chain) + 1))
        assert np.isfinite(chain.coords[:, :4]).all()
        has_cb = np.isfinite(chain.coords[:, 4]).all(-1)
        assert has_cb.tolist() == [letter != "G" for letter in chain.sequence]
        assert np.isnan(chain.bfactors).all()
        np.testing.assert_allclose(chain.coords[:, :4].mean((0, 1)), 0, atol=0.5)
        assert set(chain.sequence) <= set("ACDEFGHIKLMNPQRSTVWY")


def test_bonds_and_angles_are_ideal(chains):
    for chain in chains:
        n, ca, c, o, cb = chain.coords.swapaxes(0, 1)
        bonds = ((n, ca, 1.458), (ca, c, 1.525), (c[:-1], n[1:], 1.329), (c, o, 1.231), (ca, cb, 1.522))
        for a, b, length in bonds:
            distance = np.linalg.norm(a - b, axis=-1)
            np.testing.assert_allclose(distance[np.isfinite(distance)], length, atol=2e-3)
        angles = ((n, ca, c, 111.0), (ca[:-1], c[:-1], n[1:], 117.2), (c[:-1], n[1:], ca[1:], 121.7),
                  (ca, c, o, 120.1), (o[:-1], c[:-1], n[1:], 360 - 120.1 - 117.2))
        for *points, degrees in angles:
            np.testing.assert_allclose(angle(*points), degrees, atol=0.3)
        steps = np.linalg.norm(np.diff(ca, axis=0), axis=-1)
        assert abs(steps.mean() - 3.8) < 0.02  # all peptides are trans
        assert steps.min() > 3.7
        n, ca, c, cb = (points[np.isfinite(cb).all(-1)] for points in (n, ca, c, cb))
        assert (np.linalg.det(np.stack([n - ca, c - ca, cb - ca], axis=-2)) > 0).all()  # L-amino acids


def test_torsions_are_those_of_helices_strands_and_loops(chains):
    helices = strands = 0
    for chain in chains:
        phi, psi, omega = np.degrees(backbone_dihedrals(torch.from_numpy(chain.coords)).numpy()).T
        assert (np.abs(omega[:-1]) > 165).all()
        helix = (np.abs(phi + 63) < 8) & (np.abs(psi + 42) < 8)
        strand = (np.abs(phi + 123) < 20) & (np.abs(psi - 116) < 20)
        seen = secondary_structure(chain)
        helices += helix.sum()
        strands += strand.sum()
        assert not (strand & (seen == "a")).any()
        # Ramachandran's empty quarter
        assert not ((phi > 100) & (psi > -150) & (psi < -90)).any()
    assert min(helices, strands) > 0.2 * sum(map(len, chains))


def test_secondary_structure_is_seen_from_the_outside(chains):
    share = np.array([[(secondary_structure(chain) == kind).mean() for kind in "ab"] for chain in chains])
    assert (share.sum(1) > 0.4).all()
    assert ((share[:, 0] > 0.5) & (share[:, 1] < 0.05)).sum() > COUNT / 8  # all helices
    assert ((share[:, 1] > 0.5) & (share[:, 0] < 0.05)).sum() > COUNT / 8  # all strands
    assert (share > 0.1).all(1).sum() > COUNT / 8  # both


def test_hairpins_and_helices_have_their_hydrogen_bonds(chains):
    in_helices = in_sheets = 0
    for chain in chains:
        distance = np.linalg.norm(chain.coords[:, None, 3] - chain.coords[None, :, 0], axis=-1)  # O of i, N of j
        ahead = np.arange(len(chain))[None] - np.arange(len(chain))[:, None]
        bonded = (distance > 2.5) & (distance < 3.4)
        in_helices += (bonded & (ahead == 4)).sum()
        # Pairs of an antiparallel ladder: O of i to N of j and O of j to N of i.
        ladder = bonded & bonded.T & (ahead > 2)
        in_sheets += ladder.sum()
    kinds = [secondary_structure(chain) for chain in chains]
    assert in_helices > 0.7 * sum((kind == "a").sum() for kind in kinds)
    assert in_sheets > 0.1 * sum((kind == "b").sum() for kind in kinds)


def test_nothing_clashes(chains):
    for chain in chains:
        atoms = atoms_of(chain)
        distance = cdist(atoms.coord, atoms.coord)
        apart = np.abs(atoms.res_id[:, None] - atoms.res_id)
        assert distance[apart > 1].min() > 2.59, chain.name
        ca = np.flatnonzero(atoms.atom_name == "CA")
        assert distance[np.ix_(ca, ca)][apart[np.ix_(ca, ca)] > 1].min() > 3.9


def test_chains_are_compact(chains):
    ratios = []
    for chain in chains:
        ca = chain.coords[:, 1]
        gyration = np.sqrt(np.square(ca - ca.mean(0)).sum(-1).mean())
        ratios.append(gyration / (2.2 * len(chain) ** 0.38))  # the denominator: of globular proteins
    assert 0.9 < min(ratios)
    assert np.median(ratios) < 1.3
    assert max(ratios) < 2  # a pair of long helices


def test_sequences_follow_the_structure(chains):
    counts = {kind: np.zeros(26) for kind in "ab+"}
    for chain in chains:
        phi = backbone_dihedrals(torch.from_numpy(chain.coords))[:, 0].numpy()
        for letter, kind, value in zip(chain.sequence, secondary_structure(chain), phi, strict=True):
            if value > 0 or kind in "ab":
                counts["+" if value > 0 else kind][ord(letter) - ord("A")] += 1
    share = {kind: dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", count / count.sum(), strict=True))
             for kind, count in counts.items()}
    assert share["+"]["G"] > 0.5
    assert share["+"]["P"] == 0
    assert share["b"]["V"] > 1.5 * share["a"]["V"]
    assert share["a"]["A"] > 1.4 * share["b"]["A"]


def test_every_chain_is_different(chains):
    assert len({len(chain) for chain in chains}) > COUNT / 3
    assert len({chain.sequence for chain in chains}) == COUNT
    for a, b in combinations(chains[:30], 2):
        n = min(len(a), len(b), 60)
        x, y = (torch.from_numpy(chain.coords[:n]) for chain in (a, b))
        assert backbone_rmsd(x, y, torch.ones(n, dtype=torch.bool)) > 1.0, (a.name, b.name)


def test_a_chain_is_a_function_of_seed_and_index(chains):
    assert [chain.name for chain in generate_backbones(3)] == ["ideal_0_0", "ideal_0_1", "ideal_0_2"]
    state = torch.random.get_rng_state()
    again = ideal_backbone(7, 11)
    assert torch.equal(state, torch.random.get_rng_state())
    assert again.sequence == chains[11].sequence
    np.testing.assert_array_equal(again.coords, chains[11].coords)
    assert ideal_backbone(8, 11).sequence != again.sequence
    # In another process, from a cold start, with other threads.
    program = ("import sys, torch; torch.set_num_threads(2); from protein.backbones import ideal_backbone; "
               "sys.stdout.buffer.write(ideal_backbone(7, 11).coords.tobytes())")
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout
    assert found == again.coords.tobytes()


def test_written_chains_are_read_back(chains, tmp_path):
    chain = chains[5]
    write_structure(tmp_path / f"{chain.name}.pdb", chain)
    (back,) = read_structure(tmp_path / f"{chain.name}.pdb")
    assert (back.name, back.sequence) == (chain.name, chain.sequence)
    np.testing.assert_allclose(back.coords, chain.coords, atol=5.1e-4)


def test_chains_without_room_are_given_up(monkeypatch):
    monkeypatch.setattr(backbones, "_place", lambda *_: None)
    with pytest.raises(RuntimeError, match="no chain without clashes in 100 attempts for seed 1, index 2"):
        ideal_backbone(1, 2)
