"""Which evaluation reports may be compared."""

import copy

import pytest

from evaluations.protocol import differences, protocol_id

PROTOCOL = {
    "task": "generation", "reference": {"sha256": "ab", "count": 3}, "reference_name": "a.npz",
    "samples": {"name": "s", "count": 2}, "crop": "none", "warnings": [], "id": "x",
}


@pytest.mark.parametrize("changes", [
    {"samples": {"name": "t"}}, {"reference_name": "b"}, {"warnings": ["few"]}, {"id": 1},
])
def test_what_was_measured_may_differ(changes):
    other = PROTOCOL | changes
    assert protocol_id(other) == protocol_id(PROTOCOL)
    assert differences(PROTOCOL, other) == []


def test_all_else_may_not():
    other = copy.deepcopy(PROTOCOL)
    other["reference"]["count"] = 4
    other["crop"] = "center"
    other["extra"] = None
    assert differences(PROTOCOL, other) == ["crop", "reference.count"]
    assert protocol_id(other) != protocol_id(PROTOCOL)
    for key in ("task", "reference", "crop"):
        assert protocol_id({k: v for k, v in PROTOCOL.items() if k != key}) != protocol_id(PROTOCOL)


def test_order_of_keys_does_not_matter():
    assert protocol_id(dict(reversed(PROTOCOL.items()))) == protocol_id(PROTOCOL)


def test_a_name_below_reference_is_no_exception():
    first, second = ({"reference": {"samples": n}} for n in (1, 2))
    assert differences(first, second) == ["reference.samples"]
