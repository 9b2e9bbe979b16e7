"""The search for faults that reach code which no fault has reached.  docs/exploration.md is the user's page."""
