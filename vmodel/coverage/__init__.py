"""Which code of a kernel and of its modules a guest has executed."""
