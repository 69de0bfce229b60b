"""Where repositories live: origins, mirrors, and git on the host."""
