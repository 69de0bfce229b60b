"""Sandbox environments: network access and secret variables that a run can be given."""
