"""An executor for tests of sweeps: one trial after the other, in this process."""

from collections import deque

from kd_utils.sweep.executor import Report, execute_trial


class Serial:
    """An executor that runs one trial after the other, here; `breaks` names trials that fail."""

    def __init__(self, breaks=()):
        self.jobs, self.ran, self.breaks = deque(), [], breaks

    def require_same_view(self, files):
        pass

    def submit(self, job):
        self.jobs.append(job)

    def reports(self):
        job = self.jobs.popleft()
        self.ran.append(job.name)
        if job.name in self.breaks:
            yield Report(job.name, "failed", cause="broken")
        else:
            yield from execute_trial(job, threads=1)

    def cancel(self):
        pass
