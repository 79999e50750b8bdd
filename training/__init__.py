"""From flags to files: everything around the update that works without a process group.

config/       what can be set: flags, command line, YAML, stages, weights of loss terms
schedule/     where the run is, and what follows from that: plan, learning rate, policies, exact sums
checkpoints/  how it gets to the disk and back
control/      how it is started, steered and ended
records/      what it writes down, and how that is read from outside
diagnosis/    what is wrong with it: rules, alerts, plots, report, the machine
run/          putting one together: its directory, resume, optimizer, averages, micro-batch
"""
