"""What is wrong with a run or a machine: rules, alerts, plots, the report, the checks before the start."""
