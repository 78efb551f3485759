"""A short storm of SIGKILLs; `python tests/storm.py --kills 100` is a long one."""

from storm import storm


def test_a_short_storm(tiny, tmp_path):
    """Half a minute on two cores: an SFT, a grid and a comparison, each killed and then let live."""
    assert storm(tmp_path, tiny, kills=6, seed=11) == []
