"""Where the run is, and what follows from that: plan, learning rate, policies, exact sums."""
