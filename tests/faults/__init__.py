"""A whole site under random faults: processes killed and stopped, the database cut off, the disk full."""
