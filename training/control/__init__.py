"""How a run is started, steered and ended: lock, signals and control.json, watchdog, process."""
