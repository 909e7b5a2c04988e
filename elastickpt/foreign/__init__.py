"""Other libraries' files, read without their code and written as they expect them."""
