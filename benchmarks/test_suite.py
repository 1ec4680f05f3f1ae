"""The benchmark suite: ``make bench``, or ``make bench BENCH_ARGS=--quick``."""

from __future__ import annotations

import pytest
from cases import Case, select
from measure import measure, summary


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cases = select(option("device"), quick=option("quick"), named=option("cases"))
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.mark.timeout(1800)
def test_case(case: Case, journal, drive, benchmark, request) -> None:
    if journal.out_of_time:
        pytest.skip(f"--stop-after {journal.stop_after:g} s are over")
    total = len(request.session.items)
    number = request.session.items.index(request.node) + 1
    journal.say(f"[{number}/{total}] {case.name}")
    record = measure(case, journal.device, journal.effort, drive=drive, log=journal.say)
    journal.add(record)
    benchmark.extra_info.update(
        {line["name"]: line["ratio_to_ours"] for line in record["contenders"]}
    )
    journal.say(f"  = {summary(record)}")
