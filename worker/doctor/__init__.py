"""`python -m worker doctor`: examine the volume, and say what to do about each finding. Touches the disk, starts processes.

Only a child process touches the volume. A call that waits for a network file system whose server is gone cannot be interrupted,
and its process cannot even be killed (seen on MooseFS: state D until the server is back). With threads alone this command would
hang at its end. The child runs the checks in threads and reports what each found. This process prints it, and leaves the child
behind if it must.
"""

from worker.doctor.checking import Deadlines, Probe, Subject
from worker.doctor.doctor_command import PROBLEM_FOUND, run
from worker.doctor.findings import Finding, Severity

__all__ = ["PROBLEM_FOUND", "Deadlines", "Finding", "Probe", "Severity", "Subject", "run"]
