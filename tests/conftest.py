"""Every test starts as a program in a terminal does, also where the suite runs in the background of a shell."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # such a shell has Ctrl-C ignored, which children inherit
