"""Trainings that are killed (SIGKILL) at their n-th write to the disk, and gone on with: a program for test_resume.py.

    python killed_training.py CONFIG.json RUN=3,8,0 ...

trains into RUN once for each number: killed as the third fsync or rename begins, resumed and killed at the eighth, and resumed to
its end. Each is a process of its own, forked off one that has imported everything and started nothing. Prints how each ended:
-9 killed, 0 whole.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import rich.console

from unet_fast import checkpoints, training
from unet_fast.config import TrainConfig


def kill_at(number):
    """End this process, as its `number`-th fsync or rename begins, with no chance to clean up."""
    left = [number]

    def counting(function):
        def counted(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    os.fsync, Path.replace = counting(os.fsync), counting(Path.replace)


def train(out, options):
    training._CHECKPOINT_SECONDS = 0.0  # each evaluation's
    console = rich.console.Console(quiet=True)
    if (out / checkpoints.CONFIG).exists():
        training.train(checkpoints.load_config(out)[0], out, resume=True, console=console)
    else:
        training.train(TrainConfig(**options), out, console=console)


def main(config, *runs):
    options = json.loads(Path(config).read_text())
    for out, kill in ((out, int(kill)) for out, kills in (run.split("=") for run in runs) for kill in kills.split(",")):
        child = os.fork()
        if child == 0:
            try:
                if kill:
                    kill_at(kill)
                train(Path(out), options)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
