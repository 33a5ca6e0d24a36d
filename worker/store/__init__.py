"""Model files on a volume: found, downloaded once by the fleet, checked, sealed."""
