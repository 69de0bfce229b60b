"""The mailbox of a run: what users ask of its agent, numbered, durable, in order."""
