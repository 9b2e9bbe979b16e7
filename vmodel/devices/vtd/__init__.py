"""Intel VT-d: a remapping unit that a guest drives.  Section numbers refer to the specification, revision 4.1."""
