"""Model files on a volume: found, downloaded once for all workers, verified, sealed."""
