"""Writing files beside a training that goes on."""

import concurrent.futures


class Background:
    """One job at a time on a thread of its own, to be entered by `with`.

    The next job waits until the last one is done, so at most one job's data are held, and nothing is written after a job that
    failed. An error of a job is raised here, by whatever is called next, or at the end of the `with` block.

    >>> from unet_fast.background import Background
    >>> done = []
    >>> with Background() as background:
    ...     background.submit(done.append, 1)
    ...     background.submit(done.append, 2)
    >>> done
    [1, 2]
    """

    def __init__(self):
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="unet-fast-writer")
        self._job = None

    def submit(self, job, *args):
        """Run `job(*args)` as soon as the last one is done, for which this waits."""
        self.wait()
        self._job = self._executor.submit(job, *args)

    def check(self):
        """Raises the error of the last job if it has failed already; does not wait."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self):
        """Wait until the last job is done, and raise its error if it failed."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            # A job that failed did so before the block's own error, which is kept as context. A user who is in a hurry
            # is told nothing more.
            if error is None or isinstance(error, Exception):
                self.wait()
        finally:
            self._executor.shutdown()
