"""What authors of stores run: the suite that all stores pass, and stores around theirs that record, fail, tear and crash."""
