"""Configuration: typed sections (schema), reading them from TOML (load), rules across keys (rules)."""
