"""What surrounds a run: its command line, its processes, its files."""
