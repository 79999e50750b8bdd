"""Crashes, full disks, damaged and hostile files, signals: what must never lose or break a run."""
