"""The protocol of links in every interleaving, and that mistakes in it are found."""

from __future__ import annotations

import attrs
import pytest

from tests.communicators.link_model import Frames, Linking, explore, frames, linking

SAME = ((1, 2), (1, 2))
OTHER = ((1, 2), (1, 3))


@pytest.mark.parametrize(
    "how",
    [
        Linking(),
        Linking(wants=(True, False)),
        Linking(wants=(False, True)),
        Linking(stranger=True),
        Linking(wants=(True, False), leaves=True),
        Linking(wants=(True, False), leaves=True, stranger=True),
    ],
    ids=str,
)
def test_two_ranks_make_one_link(how: Linking) -> None:
    report = explore(linking(how))
    assert report.mistake is None, report
    assert report.states >= 5


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ({"yields": False}, "somebody waits for ever"),
        ({"yields": False, "drops": False}, "somebody waits for ever"),
        ({"remembers": False}, "somebody waits for ever"),
        ({"waits": False}, "a rank fails although the other one is there"),
        ({"proof": False, "stranger": True}, "a stranger got in"),
        ({"wants": (True, False), "leaves": True, "tells": False}, "somebody waits for ever"),
    ],
    ids=str,
)
def test_a_mistake_in_linking_is_found(mistake: dict[str, object], found: str) -> None:
    report = explore(linking(attrs.evolve(Linking(), **mistake)))
    assert report.mistake == found
    assert report.way


@pytest.mark.parametrize(
    "how",
    [
        Frames(),
        Frames(room=3),
        Frames(calls=OTHER),
        Frames(calls=((1,), (1, 2)), may_give_up=True),
        Frames(may_give_up=True),
        Frames(calls=OTHER, may_give_up=True, room=2),
        Frames(calls=((1, 2, 3), (1, 2, 3)), may_give_up=True),
        Frames(calls=((1, 2), (1,)), closes=True, room=2),
        Frames(calls=((1, 2), (1,)), closes=True, dies=True, room=3),
        Frames(calls=SAME, closes=True, room=2),
        Frames(calls=SAME, dies=True, room=2),
    ],
    ids=str,
)
def test_every_call_ends_with_its_own_data(how: Frames) -> None:
    report = explore(frames(how))
    assert report.mistake is None, report
    assert report.states > 5


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ({"both": False}, "somebody waits for ever"),
        ({"tags": False, "calls": OTHER}, "a call takes the data of another one"),
        ({"tags": False, "may_give_up": True, "ends": False}, "a call takes the data of another one"),
        ({"may_give_up": True, "tells": False}, "somebody waits for ever"),
        ({"may_give_up": True, "delivers": False, "room": 2}, "what was sent before the end does not arrive"),
        ({"calls": ((1, 2), (1,)), "closes": True, "looks": False}, "a rank that closed in order is taken for a dead one"),
        ({"calls": SAME, "closes": True, "first": True, "room": 2}, "a call that both have made ends by the goodbye"),
        ({"calls": SAME, "closes": True, "halfway": True, "room": 2}, "a call that both have made ends by the goodbye"),
    ],
    ids=str,
)
def test_a_mistake_with_frames_is_found(mistake: dict[str, object], found: str) -> None:
    report = explore(frames(attrs.evolve(Frames(), **mistake)))
    assert report.mistake == found
    assert report.way
