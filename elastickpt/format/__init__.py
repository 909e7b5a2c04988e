"""What is on disk, as frozen values: boxes, records, names, element types. Nothing here reads, writes or knows a rank."""
