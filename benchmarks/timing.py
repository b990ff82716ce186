"""How every system is timed, whatever it is made of."""

import itertools
import statistics
import time

INPUTS = 4  # random inputs on the device that steps take in turn
WARM_UP = 5
RUNS, STEPS, RUN_SECONDS = 3, 20, 0.5  # at least so many steps, and so long, that starting and waiting hardly count
SINGLE_STEPS = 60
PERCENTILES = (50, 90, 95, 99)


def measure(system, batch, before_timing=lambda: None):
    """Times the steps of a system.

    Args:
        system: has `step(i)`, which starts a step on input i; `wait()`, until all that was started has ended;
            `reset_peak()` and `peak_bytes()`, the most device memory that was allocated at once since.
        batch: images a step.
        before_timing: called after compilation and warm-up.

    Returns:
        dict: `ms`, the median of RUNS runs whose steps are waited for at the run's end, a step; `img_s` from it;
        p50 to p99 and `mean` of single steps that are waited for one by one, in ms; `peak_mib` of all of these;
        `first_step_s`, compilation included; `first_step_peak_mib`, which has what tuning by trial takes.

    >>> class Sleep:
    ...     def step(self, i): time.sleep(1e-4)
    ...     def wait(self): pass
    ...     def reset_peak(self): pass
    ...     def peak_bytes(self): return 2**21
    >>> measure(Sleep(), batch=2)["peak_mib"]
    2
    """

    turns = itertools.cycle(range(INPUTS))

    def seconds(steps):
        start = time.perf_counter()
        for i in itertools.islice(turns, steps):
            system.step(i)
        system.wait()
        return time.perf_counter() - start

    first_step_s = seconds(1)
    seconds(WARM_UP)
    first_step_peak = system.peak_bytes()
    before_timing()
    system.reset_peak()
    steps = max(STEPS, round(STEPS * RUN_SECONDS / seconds(STEPS)))
    ms = 1e3 / steps * statistics.median(seconds(steps) for _ in range(RUNS))
    single = sorted(1e3 * seconds(1) for _ in range(SINGLE_STEPS))
    row = {"ms": round(ms, 3), "img_s": round(1e3 * batch / ms, 1)}
    row |= {f"p{p}": round(single[min(len(single) * p // 100, len(single) - 1)], 3) for p in PERCENTILES}
    row |= {"mean": round(statistics.fmean(single), 3), "peak_mib": round(system.peak_bytes() / 2**20)}
    return row | {"first_step_s": round(first_step_s, 1), "first_step_peak_mib": round(first_step_peak / 2**20)}
