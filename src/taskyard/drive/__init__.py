"""Driving one run, from the claim of its lease to the clean-up of its sandbox."""
