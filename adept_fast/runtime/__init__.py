"""What a run stands on: files, processes, progress, provenance."""
