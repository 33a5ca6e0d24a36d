"""`scripts/seed_volume.py`: a volume full of models before the first job, mounted or through its S3 API."""
