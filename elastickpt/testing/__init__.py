"""What authors of stores run: the suite that all stores pass, and stores that record, fail, tear and crash; beside them the
harness of forked ranks that this project's tests and tools share."""
