"""The `taskyard` command. Modules are imported where they are used, so that it starts at once."""
