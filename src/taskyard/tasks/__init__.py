"""Tasks: what is to be done. Their runs are in `taskyard.runs`."""
