"""What a run needs that works without a process group: settings, schedules, records, the file half of checkpoints."""
