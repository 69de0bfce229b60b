"""Agents: which program speaks for an adapter, how it is installed, and the ACP connection to it."""
