"""What is on disk, as frozen values: boxes, records, names, element types. Nothing here does I/O or knows a rank."""
