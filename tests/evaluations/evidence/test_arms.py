"""Arms say what they are, and refuse what would silently do nothing."""

import dataclasses

import pytest
import torch

from evaluations.evidence.arm_quantizers import make_provq
from evaluations.evidence.arms import ARMS, CURRICULA, KINDS, PLANS, Arm
from tokenizer.provq import Curriculum, ProVQ, VectorQuantizer
from tokenizer.provq_codes import FollowingVectorQuantizer


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_builds(name):
    provq = make_provq(ARMS[name], 16, 4, 10, 20)
    assert (provq.num_codes, provq.dim) == (16, 4)


def test_no_two_arms_are_the_same_and_plans_name_arms():
    assert len(set(ARMS.values())) == len(ARMS)
    for plan in PLANS.values():
        assert set(plan) <= set(ARMS)
        assert len(set(plan)) == len(plan)


@pytest.mark.parametrize(("name", "stages"), [
    ("vanilla", (0, 0)), ("soft", (0, 20)), ("warmup", (10, 0)), ("provq", (10, 20)), ("adaptive", (30, 0)),
])
def test_curricula(name, stages):
    provq = make_provq(ARMS[name], 16, 4, 10, 20)
    assert provq.curriculum == Curriculum(*stages)
    assert (provq.adaptive is None) == (name != "adaptive")


def test_an_arm_without_options_is_provq_alone():
    torch.manual_seed(0)
    ours = make_provq(ARMS["provq"], 16, 4, 10, 20)
    torch.manual_seed(0)
    plain = ProVQ(VectorQuantizer(16, 4), Curriculum(10, 20))
    assert type(ours) is ProVQ
    assert type(ours.quantizer) is VectorQuantizer
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_options_reach_the_quantizer():
    quantizer = make_provq(Arm(follow=True, follow_decay=0.5, beta=0.125), 16, 4, 0, 0).quantizer
    assert type(quantizer) is FollowingVectorQuantizer
    assert (quantizer.decay, quantizer.beta) == (0.5, 0.125)
    assert make_provq(Arm("l2"), 16, 4, 0, 0).quantizer.l2_norm
    assert make_provq(Arm("rotation"), 16, 4, 0, 0).quantizer.rotation
    assert make_provq(Arm("ema-restart"), 16, 4, 0, 0).quantizer.restart_below > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"quantizer": "none"}, "need a quantizer of vq, l2"),
    ({"curriculum": "none"}, "a curriculum of vanilla, soft"),
    ({"lr": 0.0}, "lr 0.0 and code_lr_scale 1.0 must be positive"),
    ({"code_lr_scale": -1.0}, "must be positive"),
    ({"quantizer": "fsq", "curriculum": "provq"}, "fsq has no codes that k-means could set"),
    ({"quantizer": "lfq", "recluster": True}, "lfq has no codes"),
    ({"quantizer": "ema", "follow": True}, "follow is for the quantizer vq, not ema"),
    ({"quantizer": "diveq", "restart": True}, "restart is for codes that are trained"),
    ({"quantizer": "ema", "restart": True}, "restart is for codes that are trained"),
    ({"token_mix": True}, "token_mix needs a transition, and curriculum vanilla has none"),
    ({"curriculum": "warmup", "token_mix": True}, "curriculum warmup has none"),
    ({"curriculum": "provq", "from_latents": True}, "from_latents is for codes that start without a warm-up"),
])
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Arm(**options)


def test_an_arm_survives_json():
    arm = Arm(recluster_at=[3, 5], lr=3e-4)
    assert Arm(**dataclasses.asdict(arm)) == arm
    assert hash(Arm(**dataclasses.asdict(arm))) == hash(arm)


def test_kinds_that_claim_a_table_have_one():
    for name, kind in KINDS.items():
        provq = make_provq(Arm(name), 16, 4, 0, 0)
        centroids = torch.nn.functional.normalize(torch.randn(16, 4), dim=1)
        if kind.table:
            provq.quantizer.set_codebook_(centroids)
            torch.testing.assert_close(provq.codebook().detach(), centroids, rtol=1e-5, atol=1e-6)
        else:
            with pytest.raises(NotImplementedError):
                provq.quantizer.set_codebook_(centroids)
    assert set(CURRICULA) == {arm.curriculum for arm in ARMS.values()}
