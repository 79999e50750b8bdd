"""Whatever a run needs that must work without a process group: settings, schedules, records, the file half of checkpoints."""
