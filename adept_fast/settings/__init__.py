"""Settings: declaration, checks, and parsing of YAML and key=value."""
