"""The teacher's signals on disk: written, read and verified."""
