"""Which rank holds, writes and reads which elements: integers in, values out. Nothing here does I/O or knows torch."""
