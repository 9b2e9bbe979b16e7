"""Intel VT-d: a remapping unit that a guest drives.  Section numbers are those of the specification, 4.1."""
