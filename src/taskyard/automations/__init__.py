"""Task automations: schedules that start runs of a task of their own."""
