"""Files, processes, progress and provenance."""
