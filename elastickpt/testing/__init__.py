"""What a store's author runs: the suite that all stores pass, and stores that record, fail, tear and crash."""
