"""One update of AdamW."""
