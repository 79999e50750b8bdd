"""What the outside can do to a run: dead hosts, signals, and what else goes wrong; the long lane is `-m slow`."""
