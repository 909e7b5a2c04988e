"""What authors of stores run: the suite that all stores pass, and stores that record, fail, tear and crash."""
