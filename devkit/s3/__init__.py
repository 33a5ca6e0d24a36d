"""A stand-in of an object store that the real boto3 talks to: moto's server in a process of its own. Starts one process.

    with S3Server() as server:
        bucket = server.bucket("results")          # makes the bucket; a boto3 client is in server.client
        server.client.put_object(Bucket=bucket, Key="a", Body=b"")
        server.reset()                              # forgets every bucket and object

A program under test gets `server.endpoint_url`, `server.region`, `server.access_key_id` and `server.secret_access_key`.
`devkit.s3.proxy` stands before it with the manners of RunPod's volumes.
"""

from devkit.s3.proxy import RunPodProxy
from devkit.s3.server import S3Server

__all__ = ["RunPodProxy", "S3Server"]
