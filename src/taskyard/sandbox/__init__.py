"""Sandboxes: where agents run. `provider` holds the interface, `bubblewrap` the provider for one machine."""
