"""Taskyard: a self-hosted server that runs coding-agent tasks in locked sandboxes."""

__version__ = "0.1.0"
