"""What users and our own tests may test with: store suite, faults, ranks."""
