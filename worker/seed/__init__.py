"""`scripts/seed_volume.py`: fill a volume with models before the first job, mounted or through its S3 API."""
