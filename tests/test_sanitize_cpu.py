"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over random problems; see sanitize_cpu.py."""

import shutil

import pytest
import sanitize_cpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ with libasan and libubsan"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return sanitize_cpu.build(tmp_path_factory.mktemp("sanitized"))


def test_random_problems_are_right_and_touch_nothing_but_their_arrays(program):
    done = sanitize_cpu.run(program, cases=2000, seed=0)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith("2000 cases")
    assert done.stdout.endswith("; 0 failed\n") and not done.stderr
