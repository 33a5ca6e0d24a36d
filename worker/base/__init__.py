"""What every wing uses: texts, progress, clocks, waiting for blocking work."""
