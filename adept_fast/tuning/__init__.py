"""Stage 2: tune the copies, each unit at its own learning rate."""
