"""What a run writes down, and how it is read from outside: metrics, sinks, state, what the machine does."""
