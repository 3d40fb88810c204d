"""Number formats that are tables, one per file: the numbers, the defaults, and what is special about each."""
