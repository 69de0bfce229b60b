"""The event record of a run: append-only, numbered, stored once as text. Log and stream are reads of it."""
