"""Attacks on the programs: kills, signals, full disks, damaged files, bad flags, and several processes at once."""
