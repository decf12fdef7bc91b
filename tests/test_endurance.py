"""kill -9 at random moments, also during a save.

A training always goes on, and ends as if nothing had been.
"""

from experiments import endurance


def test_twenty_kills():
    result = endurance.run(endurance.Config(kills=20, repetitions=0))
    assert {kill.kind for kill in result.kills} == set(endurance.KINDS)
    assert len(result.kills) == 20
    assert sum(kill.unfinished for kill in result.kills) >= 2  # some were in the middle of a save
    assert set(result.digests) == {result.expected}
    assert result.left == []
