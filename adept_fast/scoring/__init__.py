"""Stage 1: which layers and units general competence rests on."""
