"""A stand-in of Hugging Face's HTTP interface that the real `huggingface_hub` client talks to. Reads disk, serves loopback.

    with Hub(root) as hub:                      # in this process; root/<org>/<repo>/<path>
        environ["HF_ENDPOINT"] = hub.endpoint
    with hub_process(root) as hub:              # in a process of its own, the same methods over HTTP
    python -m devkit.hub --root DIR --port 0    # prints its endpoint as the first line

Two origins, as in production: the hub (`http://127.0.0.1:A`) answers metadata and redirects weights to the CDN
(`http://localhost:B`) with a signed, expiring address. The CDN needs no token, and every one that reaches it is remembered
(`hub.leaks`). There are no Xet headers, so that clients use plain HTTP, unless a repo is said to be on Xet: the real hf_xet
downloads its files too, from a storage on the CDN's origin.

A folder `<repo>@<revision>` beside `<repo>` is that revision of it; `Hub.commit` makes more. Commit ids follow from content.

Also plain sources: `/files/<path>` (ETag, ranges; on either origin), `/redirect/<path>` (the same by way of the CDN), and
Civitai's `/api/download/models/<id>` and `/api/v1/model-versions/<id>`.

Every request is recorded (`hub.requests`, `hub.bytes_sent`) and goes wrong on demand (`hub.fault`). The same over HTTP, on
either origin: `GET /_control/log`, `GET|POST /_control/faults`, `GET /_control/wait?stalled=N&timeout_s=S` (or `idle=1`), and
`POST /_control/` `reset`, `clear-log`, `clear-faults`, `release`, `expire`, `refuse`, `listen`, `commit`.
"""

from devkit.hub.faults import Fault
from devkit.hub.local import Hub
from devkit.hub.log import Request
from devkit.hub.remote import RemoteHub, hub_process

__all__ = ["Fault", "Hub", "RemoteHub", "Request", "hub_process"]
