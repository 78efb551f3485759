"""Every bad input ends within ten seconds in one line that names it, and nothing is written.

The suite runs every third case of `config`, every second of `input` and `options`, and every fifth of `ckpt` and
`lora`. All run if the environment variable CORPUS is set, or with `python tests/corpus/run.py`.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from corpus import ALL, AREAS, Bench, describe

EVERY = {"config": 3, "input": 2, "options": 2, "ckpt": 5, "lora": 5}
CHOSEN = [case.id for area, cases in AREAS.items() for case in cases[:: 1 if os.environ.get("CORPUS") else EVERY[area]]]


@pytest.fixture(scope="module")
def judged(request, tiny, tmp_path_factory):
    """What came of each case that this session has selected, as a future: two run at a time."""
    bench = Bench(tmp_path_factory.mktemp("corpus"), tiny)
    selected = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(bench.judge, ALL[name]) for name in selected}
        yield futures
        for future in futures.values():
            future.result()
    assert bench.strays() == []  # nothing was written outside of the cases' own folders
    bench.close()


def test_the_ids_differ():
    assert len(ALL) == sum(map(len, AREAS.values()))
    assert len(CHOSEN) >= 300


@pytest.mark.parametrize("name", CHOSEN)
def test_a_bad_input_costs_a_line(judged, name):
    outcome, wrong = judged[name].result()
    assert not wrong, describe(ALL[name], outcome, wrong)
