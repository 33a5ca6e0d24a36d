"""Helpers that every folder uses: text, progress, clock, volume."""
