"""A stand-in of RunPod as an account sees it: REST API v2, endpoints with their queues, and machines that really run.

    with RunPodStandIn(folder, engine) as runpod:
        environ.update(runpod.environ())           # RUNPOD_API_KEY, and where the APIs are
        ...                                        # what is under test makes volumes, endpoints, Pods, and sends jobs
        runpod.billed()                            # what there is: {"volumes": 1, "pods": 0, "endpoints": 1, "workers": 1}
        runpod.calls                               # every request with its body and its answer, in order

A job that waits at an endpoint starts the project's real worker with the CPU engine (`devkit.control_plane` is its queue), the
endpoint's environment and the network volume's folder. A Pod is a process of the same kind. Without an engine jobs wait.

Faults: `runpod.fault("POST serverless", 502, done=True)`. What an account can lack: `runpod.balance`, `runpod.quota`,
`runpod.images`, `runpod.stock`. `runpod.watch` hears of each request before and after it is carried out.

Bodies are checked against `bodies.py`. `tests/test_up_openapi.py` holds those, and every answer, to RunPod's own OpenAPI where
a copy of it is at hand.
"""

from devkit.runpod.stand_in import Call, RunPodStandIn

__all__ = ["Call", "RunPodStandIn"]
