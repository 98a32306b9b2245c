"""Read a batch: its labels and groups, what a reference sees of it, and which samples of it are kept."""
