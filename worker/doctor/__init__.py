"""`python -m worker doctor`: the volume as it is, each finding with what to do. Touches the disk, starts processes.

Only a child process touches the volume. What waits for a network file system whose server is gone cannot be interrupted, and
the process it belongs to cannot even be killed (seen on MooseFS: state D until the server is back), so threads alone would
leave this command hanging at its end. The child runs the checks in threads and says what each found; this process prints it,
and leaves the child behind where it must.
"""

from worker.doctor.command import PROBLEM_FOUND, run
from worker.doctor.findings import Deadlines, Finding, Severity, Subject
from worker.doctor.probe import Probe

__all__ = ["PROBLEM_FOUND", "Deadlines", "Finding", "Probe", "Severity", "Subject", "run"]
