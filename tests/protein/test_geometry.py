"""protein/geometry.py against ESM3's numbers (tests/golden), closed forms, biotite, scipy, tmtools, and invariants."""

import math

import biotite.structure as struc
import numpy as np
import pytest
import torch
from places import GOLDEN
from scipy.spatial.transform import Rotation
from tmtools import tm_align

from protein import geometry
from protein.geometry import (
    Frames,
    backbone_dihedrals,
    backbone_frames,
    backbone_rmsd,
    dihedral,
    gram_schmidt,
    kabsch,
    knn_graph,
    lddt,
    place_atom,
    rmsd,
    rotate,
    superpose,
    tm_score,
    valid_residues,
    virtual_cb,
)

NUMBERS = GOLDEN / "esm3_geometry_golden.npz"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def walk(length, seed=0, batch=1):
    """Backbones (batch, length, 3, 3) as crooked as a random walk, but with a protein's bond lengths and angles."""
    torsions = torch.rand(batch, 3 * length, generator=generator(seed), dtype=torch.float64) * 2 * math.pi
    atoms = list(torch.tensor([[0, 0, 0], [1.46, 0, 0], [2.0, 1.4, 0]], dtype=torch.float64).expand(batch, 3, 3)
                 .unbind(1))
    for i in range(3, 3 * length):
        atoms.append(place_atom(*atoms[-3:], (1.33, 1.46, 1.52)[i % 3], (2.03, 2.12, 1.94)[i % 3], torsions[:, i]))
    return torch.stack(atoms, dim=1).view(batch, length, 3, 3).float()


def random_motion(seed=0, scale=20.0):
    return Frames(torch.tensor(Rotation.random(rng=np.random.default_rng(seed)).as_matrix(), dtype=torch.float32),
                  scale * randn(3, seed=seed))


@pytest.fixture(scope="module")
def golden():
    with np.load(NUMBERS) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


# ---------------------------------------------------------------------------------------------------------------------
# frames


@pytest.mark.parametrize("case", "ABE")
def test_frames_are_those_of_esm3(golden, case):
    coords = golden[f"{case}_coords"]
    valid = valid_residues(coords)
    assert torch.equal(valid[0], golden[f"{case}_affine_mask"])
    assert (case == "A") == valid.all().item()
    torch.testing.assert_close(backbone_frames(coords, valid).flat()[0], golden[f"{case}_affine12"], rtol=0, atol=1e-6)


def test_frames_put_the_atoms_where_they_are_defined_to_be():
    coords = walk(20)
    frames = backbone_frames(coords)
    n, ca, c = Frames(frames.rotation.unsqueeze(-3), frames.origin.unsqueeze(-2)).inverse().apply(coords).unbind(-2)
    torch.testing.assert_close(ca, torch.zeros_like(ca), rtol=0, atol=1e-5)
    assert (c[..., 0] < -1.4).all()  # C on the negative x axis
    torch.testing.assert_close(c[..., 1:], torch.zeros_like(c[..., 1:]), rtol=0, atol=1e-5)
    assert (n[..., 1] > 1).all()  # N in the upper half of the xy plane
    torch.testing.assert_close(n[..., 2], torch.zeros_like(n[..., 2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(frames.rotation), torch.ones(1, 20))


def test_frames_move_with_the_structure():
    coords, motion = walk(12), random_motion()
    moved = backbone_frames(motion.apply(coords))
    together = motion.compose(backbone_frames(coords))
    torch.testing.assert_close(moved.rotation, together.rotation, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.origin, together.origin, rtol=0, atol=1e-4)
    points = randn(12, 3)
    torch.testing.assert_close(moved.inverse().apply(moved.apply(points)), points.expand(1, 12, 3), rtol=0, atol=1e-4)
    assert torch.equal(motion.flat(), torch.cat([motion.rotation.flatten(), motion.origin]))


def test_residues_without_coordinates_get_the_mean_frame_or_the_identity():
    coords = walk(6)
    valid = torch.tensor([[True, False, True, True, False, True]])
    for absent in (math.nan, math.inf, 1e30, 0.0):
        frames = backbone_frames(torch.where(valid[..., None, None], coords, absent), valid)
        mean = backbone_frames(coords[valid].mean(0, keepdim=True))
        torch.testing.assert_close(frames.rotation[~valid], mean.rotation.expand(2, 3, 3), rtol=0, atol=1e-5)
        torch.testing.assert_close(frames.origin[~valid], mean.origin.expand(2, 3), rtol=0, atol=1e-5)
    none = backbone_frames(torch.full((2, 4, 3, 3), math.nan), torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(none.rotation, torch.eye(3).expand(2, 4, 3, 3))
    assert torch.equal(none.origin, torch.zeros(2, 4, 3))


def test_gram_schmidt_is_finite_for_vectors_without_a_plane():
    for x_axis, xy_plane in ((torch.zeros(3), torch.zeros(3)), (torch.ones(3), 2 * torch.ones(3))):
        x_axis.requires_grad_()
        rotation = gram_schmidt(x_axis, xy_plane)
        rotation.sum().backward()
        assert rotation.isfinite().all()
        assert x_axis.grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e6, -2e6])
def test_one_wrong_number_makes_a_residue_invalid(value):
    coords = walk(4)
    for atom in range(3):
        for axis in range(3):
            wrong = coords.clone()
            wrong[0, 2, atom, axis] = value
            assert valid_residues(wrong).tolist() == [[True, True, False, True]]
    sides = torch.cat([coords, torch.full((1, 4, 2, 3), math.nan)], dim=2)  # O and CB do not count
    assert valid_residues(sides).all()
    mask = torch.tensor([[True, False, True, True]])
    assert torch.equal(valid_residues(sides, mask), mask)


# ---------------------------------------------------------------------------------------------------------------------
# neighbours


@pytest.mark.parametrize("case", "ABE")
def test_neighbours_are_those_of_esm3(golden, case):
    coords, expected = golden[f"{case}_coords"], golden[f"{case}_knn_edges"].long()
    valid = valid_residues(coords)
    index, near = (x[0] for x in knn_graph(coords[:, :, 1], valid))
    both = valid[0][:, None] & valid[0][expected]
    assert torch.equal(near, both)
    assert torch.equal(index[near], expected[near])
    # Elsewhere ESM3's distance is |i - j|, which it leaves to sort's whim to order when equal.
    rows = torch.arange(64)[:, None]
    assert torch.equal((index - rows).abs()[~near], (expected - rows).abs()[~near])
    assert (case == "A") == near.all().item()


def brute_force_neighbours(ca, valid, present, k):
    """The definition, pair by pair."""
    chosen, near = [], []
    for i in range(len(ca)):
        keys = []
        for j in range(len(ca)):
            both = bool(valid[i] and valid[j] and present[i] and present[j])
            if i == j:
                key = (0, 0.0)
            elif not (present[i] and present[j]):
                key = (3, 0.0)
            elif both:
                key = (1, float((ca[i] - ca[j]).square().sum().sqrt()))
            else:
                key = (2, abs(i - j))
            keys.append((*key, j, both))
        keys = sorted(keys)[:k]
        chosen.append([key[2] for key in keys])
        near.append([key[3] for key in keys])
    return torch.tensor(chosen), torch.tensor(near)


@pytest.mark.parametrize("k", [1, 5, 16, 40])
def test_neighbours_by_the_definition(k, monkeypatch):
    length = 30
    ca = 10 * randn(2, length, 3, seed=1)
    ca[:, 7] = ca[:, 6]  # two in one place
    valid = torch.rand(2, length, generator=generator(2)) < 0.7
    valid[:, 6:8] = True
    present = torch.arange(length) < torch.tensor([[30], [22]])
    holes = torch.where((valid & present)[..., None], ca, math.nan)
    for pairs in (2**24, 2 * length * 7, 1):  # at once, seven rows at a time, one row at a time
        monkeypatch.setattr(geometry, "_PAIRS_AT_ONCE", pairs)
        index, near = knn_graph(holes, valid & present, k, present)
        assert index.shape == near.shape == (2, length, min(k, length))
        for b in range(2):
            expected_index, expected_near = brute_force_neighbours(ca[b], valid[b], present[b], k)
            assert torch.equal(index[b], expected_index)
            assert torch.equal(near[b], expected_near)


def test_neighbours_do_not_depend_on_padding_or_motion():
    ca = walk(40, seed=5)[:, :, 1]
    valid = torch.ones(1, 40, dtype=torch.bool)
    valid[0, [3, 20]] = False
    index, near = knn_graph(ca, valid)
    padded = torch.cat([ca, 1e3 * randn(1, 25, 3)], dim=1)  # garbage that calls itself valid
    for said_valid in (True, False):
        flags = torch.cat([valid, torch.full((1, 25), said_valid)], dim=1)
        more_index, more_near = knn_graph(padded, flags, present=torch.arange(65)[None] < 40)
        assert torch.equal(more_index[:, :40], index)
        assert torch.equal(more_near[:, :40], near)
        assert not more_near[:, 40:].any()
    moved_index, _ = knn_graph(random_motion().apply(ca), valid)
    assert torch.equal(moved_index, index)


def test_far_apart_is_still_nearer_than_unknown():
    ca = torch.tensor([[[-9e5, 0, 0], [9e5, 9e5, 9e5], [0, 0, 0]]])
    index, near = knn_graph(ca, torch.tensor([[True, True, False]]), 3)
    assert index[0, 0].tolist() == [0, 1, 2]
    assert near[0, 0].tolist() == [True, True, False]


def test_neighbours_refuse_what_does_not_fit():
    ca, valid = randn(1, 5, 3), torch.ones(1, 5, dtype=torch.bool)
    for wrong in (lambda: knn_graph(ca, valid[:, :4]), lambda: knn_graph(ca, valid.float()),
                  lambda: knn_graph(ca[0], valid[0]), lambda: knn_graph(ca, valid, 0),
                  lambda: knn_graph(ca, valid, present=valid[:, :4])):
        with pytest.raises(ValueError, match=r"\(.*5.*\)"):
            wrong()


# ---------------------------------------------------------------------------------------------------------------------
# dihedrals and the placement of atoms


def test_dihedral_signs():
    a, b, c = torch.eye(3)[0], torch.zeros(3), torch.eye(3)[2]
    for angle in (-3.0, -1.0, 0.0, 0.5, 3.0):
        d = torch.tensor([math.cos(angle), math.sin(angle), 1.0])
        assert dihedral(a, b, c, d).item() == pytest.approx(angle, abs=1e-6)  # clockwise seen along b-c: positive
        assert dihedral(d, c, b, a).item() == pytest.approx(angle, abs=1e-6)
        mirror = torch.tensor([1, -1, 1])
        assert dihedral(a * mirror, b, c, d * mirror).item() == pytest.approx(-angle, abs=1e-6)


def test_dihedrals_are_those_of_biotite():
    coords = walk(25, seed=3)
    atoms = struc.AtomArray(75)
    atoms.coord = coords[0].reshape(75, 3).numpy()
    atoms.res_id = np.repeat(np.arange(25), 3)
    atoms.atom_name = np.tile(["N", "CA", "C"], 25)
    atoms.res_name[:] = "ALA"
    atoms.chain_id[:] = "A"
    expected = np.stack(struc.dihedral_backbone(atoms), axis=-1)
    ours = backbone_dihedrals(coords)[0].numpy()
    np.testing.assert_array_equal(np.isnan(expected), np.isnan(ours))
    assert np.isnan(expected).sum() == 3
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_dihedrals_are_nan_beside_a_hole_only():
    coords = walk(6)
    coords[0, 3] = math.nan
    holes = backbone_dihedrals(coords)[0].isnan()
    assert holes.tolist() == [[True, False, False], [False, False, False], [False, True, True], [True, True, True],
                              [True, False, False], [False, True, True]]


def test_placed_atoms_have_the_length_angle_and_torsion_asked_for():
    a, b, c = (randn(50, 3, seed=seed).double() for seed in range(3))
    length, angle, torsion = (torch.rand(50, generator=generator(seed), dtype=torch.float64) for seed in range(3))
    angle, torsion = 0.3 + 2.5 * angle, math.pi * (2 * torsion - 1)
    d = place_atom(a, b, c, length, angle, torsion)
    assert d.dtype == torch.float64
    torch.testing.assert_close((d - c).norm(dim=-1), length)
    cosine = torch.nn.functional.cosine_similarity(b - c, d - c, dim=-1)
    torch.testing.assert_close(cosine, angle.cos())
    torch.testing.assert_close(dihedral(a, b, c, d), torsion)


def test_virtual_cb_is_at_its_bond_length_and_on_the_left_hand_side():
    coords = walk(30, seed=8)
    n, ca, c = coords.unbind(-2)
    cb = virtual_cb(coords)
    torch.testing.assert_close((cb - ca).norm(dim=-1), torch.full((1, 30), 1.522))
    cosine = torch.nn.functional.cosine_similarity(n - ca, cb - ca, dim=-1)
    torch.testing.assert_close(cosine, torch.full((1, 30), math.cos(1.927)))
    # L-amino acids: seen from hydrogen, opposite to the other three, CO, R (CB) and N follow clockwise.
    torch.testing.assert_close(dihedral(c, n, ca, cb), torch.full((1, 30), -2.143), rtol=0, atol=1e-5)
    handedness = torch.linalg.det(torch.stack([n - ca, c - ca, cb - ca], dim=-2))
    assert (handedness > 0).all()
    batch = walk(9, batch=3)  # not mixed up with a batch of three (StructTokenBench's was)
    torch.testing.assert_close(virtual_cb(batch), torch.cat([virtual_cb(row[None]) for row in batch]))


# ---------------------------------------------------------------------------------------------------------------------
# superposition


def test_kabsch_finds_the_motion_back():
    points = 10 * randn(2, 4, 30, 3)
    motion = random_motion(seed=4)
    found = kabsch(points, motion.apply(points), torch.ones(2, 4, 30, dtype=torch.bool))
    torch.testing.assert_close(found.rotation, motion.rotation.expand(2, 4, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.origin, motion.origin.expand(2, 4, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", [0.1, 3.0, 100.0])
def test_rmsd_is_that_of_scipy(noise):
    x, mask = 10 * randn(5, 20, 3), torch.rand(5, 20, generator=generator(1)) < 0.6
    y = random_motion().apply(x) + noise * randn(5, 20, 3, seed=2)
    values = rmsd(x, y, mask)
    for i in range(5):
        a, b = (points[i][mask[i]].double().numpy() for points in (x, y))
        _, rssd = Rotation.align_vectors(b - b.mean(0), a - a.mean(0))
        assert values[i].item() == pytest.approx(rssd / math.sqrt(len(a)), rel=1e-5)
    moved = superpose(x, y, mask)
    by_hand = ((moved - y).square().sum(-1) * mask).sum(-1).div(mask.sum(-1)).sqrt()
    torch.testing.assert_close(by_hand, values, rtol=1e-4, atol=1e-4)


def test_a_mirror_image_is_not_alike_to_rmsd_but_is_to_lddt():
    coords = walk(60, seed=7)
    mirror = coords * torch.tensor([1, 1, -1])
    mask = torch.ones(1, 60, dtype=torch.bool)
    assert backbone_rmsd(mirror, coords, mask).item() > 5
    assert torch.linalg.det(kabsch(mirror[:, :, 1], coords[:, :, 1], mask).rotation).item() == pytest.approx(1)
    assert lddt(mirror, coords, mask).item() == 1


def test_kabsch_never_reflects():
    g = generator(0)
    shapes = {"plane": torch.tensor([1.0, 1, 0]), "line": torch.tensor([1.0, 0, 0]), "point": torch.zeros(3),
              "space": torch.ones(3)}
    for scale in shapes.values():
        for count in (1, 2, 3, 4, 12):
            x, y = scale * torch.randn(200, count, 3, generator=g), torch.randn(200, count, 3, generator=g)
            motion = kabsch(x, y, torch.ones(200, count, dtype=torch.bool))
            torch.testing.assert_close(torch.linalg.det(motion.rotation), torch.ones(200))
            product = motion.rotation.double() @ motion.rotation.double().mT
            torch.testing.assert_close(product, torch.eye(3).double().expand(200, 3, 3), rtol=0, atol=1e-6)


def test_no_points_no_motion():
    motion = kabsch(randn(5, 3), randn(5, 3, seed=1), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(motion.rotation, torch.eye(3))
    assert torch.equal(motion.origin, torch.zeros(3))
    assert rmsd(randn(5, 3), randn(5, 3, seed=1), torch.zeros(5, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("distance", [0.0, 1e3, 1e5])
def test_rmsd_far_from_the_origin(distance):
    x = 10 * randn(40, 3).double()
    y = random_motion(scale=0.0).apply(x) + 0.5 * randn(40, 3, seed=1).double()
    mask = torch.ones(40, dtype=torch.bool)
    shift = torch.tensor([distance, -distance, distance])
    here = rmsd(x, y, mask).item()
    assert rmsd(x + shift, y - shift, mask).item() == pytest.approx(here, rel=2e-3 if distance == 1e5 else 1e-4)


def test_rmsd_gradient_is_that_of_finite_differences():
    x, mask = 5 * randn(12, 3), torch.arange(12) != 4
    y = random_motion().apply(x) + randn(12, 3, seed=1)
    x.requires_grad_()
    rmsd(x, y, mask).backward()
    assert torch.equal(x.grad[4], torch.zeros(3))
    step = 1e-2
    for i, axis in ((0, 0), (3, 1), (7, 2), (11, 0)):
        shift = torch.zeros(12, 3)
        shift[i, axis] = step
        difference = (rmsd(x.detach() + shift, y, mask) - rmsd(x.detach() - shift, y, mask)) / (2 * step)
        assert x.grad[i, axis].item() == pytest.approx(difference.item(), abs=2e-4)
    assert x.grad.abs().max() > 0.02


def test_gradient_is_zero_where_there_is_nothing_to_gain():
    x = randn(2, 7, 3).requires_grad_()
    y = x.detach().clone()
    y[1] += randn(7, 3, seed=1)
    for mask in (torch.zeros(2, 7, dtype=torch.bool), torch.tensor([[True], [False]]).expand(2, 7)):
        x.grad = None
        rmsd(x, y, mask).nansum().backward()
        assert x.grad.abs().max() < 1e-3 if mask.any() else not x.grad.any()
        assert x.grad.isfinite().all()


def test_backbone_rmsd_takes_three_atoms_of_each_residue_in_the_mask():
    x, y = 10 * randn(2, 6, 5, 3), 10 * randn(2, 6, 5, 3, seed=1)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    expected = [rmsd(x[b, mask[b], :3].reshape(-1, 3), y[b, mask[b], :3].reshape(-1, 3),
                     torch.ones(3 * int(mask[b].sum()), dtype=torch.bool)) for b in range(2)]
    torch.testing.assert_close(backbone_rmsd(x, y, mask), torch.stack(expected))


# ---------------------------------------------------------------------------------------------------------------------
# similarity


def test_lddt_by_hand():
    target = torch.tensor([[0.0, 0, 0], [4, 0, 0], [8, 0, 0], [30, 0, 0]])[None, :, None]
    predicted = target.clone()
    predicted[0, 2, 0, 0] = 9.2  # two of its distances are off by 1.2: below 2 and 4 only
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert lddt(predicted, target, mask).item() == pytest.approx((4 + 2 + 2) / 12)
    per_residue = lddt(predicted, target, mask, per_residue=True)[0]
    assert per_residue[:3].tolist() == pytest.approx([6 / 8, 6 / 8, 4 / 8])
    assert per_residue[3].isnan()  # no neighbour within 15 Angstrom
    wider = lddt(predicted, target, mask, radius=23.0).item()  # and one more pair, 22 apart
    assert wider == pytest.approx((4 + 2 + 2 + 2) / 16)
    assert lddt(predicted, target, mask & (torch.arange(4) != 2)).item() == 1
    assert lddt(predicted, target, torch.tensor([[True, False, False, True]])).isnan()


def test_lddt_does_not_count_pairs_within_a_residue():
    target = walk(2)
    predicted = target.clone()
    predicted[0, 0, 2] += 1.0  # C of the first residue: three pairs with the second
    errors = (torch.cdist(predicted[0, 0], predicted[0, 1]) - torch.cdist(target[0, 0], target[0, 1])).abs()
    expected = sum((errors < t).double().mean().item() for t in (0.5, 1, 2, 4)) / 4
    assert lddt(predicted, target, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(expected)
    assert expected < 1


@pytest.mark.parametrize("per_residue", [False, True])
def test_lddt_is_that_of_biotite(per_residue, monkeypatch):
    target = walk(40, seed=11)
    predicted = target + randn(1, 40, 3, 3)
    mask = torch.rand(1, 40, generator=generator(3)) < 0.8
    arrays = []
    for coords in (target, predicted):
        kept = coords[mask].reshape(-1, 3).numpy()
        atoms = struc.AtomArray(len(kept))
        atoms.coord = kept
        atoms.res_id = np.repeat(np.arange(int(mask.sum())), 3)
        atoms.res_name[:] = "ALA"
        atoms.chain_id[:] = "A"
        arrays.append(atoms)
    expected = struc.lddt(*arrays, aggregation="residue" if per_residue else "all")
    for pairs in (2**24, 500):
        monkeypatch.setattr(geometry, "_PAIRS_AT_ONCE", pairs)
        ours = lddt(predicted, target, mask, per_residue=per_residue)
        np.testing.assert_allclose(ours[mask] if per_residue else ours[0], expected, atol=1e-6)
    if per_residue:
        assert ours[~mask].isnan().all()


def test_tm_score_of_equal_and_of_half_equal_structures():
    ca = walk(100, seed=2, batch=2)[:, :, 1]
    mask = torch.ones(2, 100, dtype=torch.bool)
    assert tm_score(random_motion().apply(ca), ca, mask).tolist() == pytest.approx([1, 1], abs=1e-5)
    half = ca.clone()
    half[:, 50:] += 1e3
    assert tm_score(half, ca, mask).tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    assert tm_score(half, ca, mask & (torch.arange(100) < 50)).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_tm_score_is_that_of_tmtools_on_the_residues_of_the_mask():
    target = walk(60, seed=2)[:, :, 1]
    predicted = random_motion().apply(target) + 1.5 * randn(1, 60, 3)
    mask = torch.rand(1, 60, generator=generator(4)) < 0.7
    x, y = (points[mask].double().numpy() for points in (predicted, target))
    sequence = "G" * len(x)
    expected = tm_align(x, y, sequence, sequence, [sequence, sequence])
    assert tm_score(predicted, target, mask).item() == pytest.approx(expected.tm_norm_chain2)
    # The score, recomputed from its definition and the motion that TM-align reports.
    d0 = 1.24 * (len(x) - 15) ** (1 / 3) - 1.8
    distance = np.linalg.norm(x @ np.array(expected.u).T + np.array(expected.t) - y, axis=-1)
    assert expected.tm_norm_chain2 == pytest.approx(np.mean(1 / (1 + (distance / d0) ** 2)), abs=1e-4)
    assert 0.3 < expected.tm_norm_chain2 < 0.95


def test_tm_score_keeps_the_correspondence():
    """Free alignment would shift a structure that is off by three residues back into place."""
    helix = walk(80, seed=9)[:, :, 1]
    x, y = helix[:, 3:], helix[:, :-3]
    mask = torch.ones(1, 77, dtype=torch.bool)
    sequence = "A" * 77
    free = tm_align(x[0].double().numpy(), y[0].double().numpy(), sequence, sequence).tm_norm_chain2
    assert free > 0.9
    assert tm_score(x, y, mask).item() < free - 0.2


def test_tm_score_without_enough_residues_or_with_holes():
    ca = walk(10)[:, :, 1]
    few = torch.arange(10)[None] < 2
    assert tm_score(ca, ca, few).isnan().all()
    broken = ca.clone()
    broken[0, 3, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        tm_score(broken, ca, torch.ones(1, 10, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def masked_measures(x, y, mask):
    """Everything differentiable or not that takes a mask, of coords (..., L, 3, 3)."""
    frames = backbone_frames(x, mask)
    return {
        "frames": torch.where(mask[..., None], frames.flat(), 0.0),
        "knn": knn_graph(x[..., 1, :], mask)[0],
        "superposed": torch.where(mask[..., None], superpose(x[..., 1, :], y[..., 1, :], mask), 0.0),
        "rmsd": rmsd(x[..., 1, :], y[..., 1, :], mask),
        "backbone_rmsd": backbone_rmsd(x, y, mask),
        "lddt": lddt(x, y, mask),
        "ca_lddt": lddt(x[..., 1:2, :], y[..., 1:2, :], mask, per_residue=True).nan_to_num(),
        "tm_score": tm_score(x[..., 1, :], y[..., 1, :], mask),
    }


@pytest.mark.parametrize("absent", [math.nan, math.inf, -1e30])
def test_what_is_outside_the_mask_changes_nothing(absent):
    x, mask = walk(30, batch=2), torch.rand(2, 30, generator=generator(5)) < 0.7
    y = x + randn(2, 30, 3, 3)
    results = []
    for value in (0.0, absent):
        inputs = [torch.where(mask[..., None, None], coords, value).requires_grad_() for coords in (x, y)]
        measures = masked_measures(*inputs, mask)
        sum(v.sum() for v in measures.values() if v.requires_grad).backward()
        results.append(measures | {f"gradient {i}": tensor.grad for i, tensor in enumerate(inputs)})
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), key
    for key in ("gradient 0", "gradient 1"):
        assert results[1][key].isfinite().all()
        assert not results[1][key][~mask].any()


def test_padding_and_batching_change_nothing():
    short, long = walk(17, seed=1)[0], walk(30, seed=2)[0]
    batch, mask = torch.zeros(2, 30, 3, 3), torch.arange(30) < torch.tensor([[17], [30]])
    batch[0, :17], batch[1] = short, long
    noise = randn(2, 30, 3, 3)
    together = masked_measures(batch, batch + noise, mask)
    for i, alone in enumerate((short, long)):
        n = len(alone)
        single = masked_measures(alone[None], alone[None] + noise[i : i + 1, :n], mask[i : i + 1, :n])
        for key in ("rmsd", "backbone_rmsd", "lddt", "tm_score"):
            torch.testing.assert_close(single[key][0], together[key][i], rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    x, mask = randn(2, 6, 3), torch.ones(2, 6, dtype=torch.bool)
    for function in (kabsch, superpose, rmsd, tm_score):
        for wrong in ((x, x[:1], mask), (x, x, mask[:, :5]), (x, x, mask.float()), (x[..., :2], x[..., :2], mask)):
            with pytest.raises(ValueError, match="must"):
                function(*wrong)
    with pytest.raises(ValueError, match="two dimensions more than mask"):
        lddt(x, x, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_weights_change_nothing(dtype):
    x = walk(20, batch=2)
    y, mask = x + randn(2, 20, 3, 3), torch.ones(2, 20, dtype=torch.bool)

    def everything():
        motion = kabsch(mobile=x[:, :, 1], target=y[:, :, 1], mask=mask)  # by keyword as well
        return [*masked_measures(x, y, mask).values(), *motion, rotate(motion.rotation[:, None], x[:, :, 1]),
                superpose(x[:, :, 1], y[:, :, 1], mask), virtual_cb(x), backbone_dihedrals(x).nan_to_num()]

    outside = everything()
    with torch.autocast("cpu", dtype=dtype):
        assert (x[0, 0] @ x[0, 0]).dtype == dtype
        inside = everything()
    for a, b in zip(outside, inside, strict=True):
        assert a.dtype in (torch.float32, torch.int64)
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu_with_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x = walk(200, batch=2)
    y, mask = x + randn(2, 200, 3, 3), torch.rand(2, 200, generator=generator(5)) < 0.9
    expected, found = masked_measures(x, y, mask), masked_measures(x.cuda(), y.cuda(), mask.cuda())
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, rtol=1e-5, atol=2e-5, msg=key)
