"""What `yuan doctor` finds out: one line per thing, with the mend where something is broken."""
