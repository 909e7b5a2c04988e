"""What moves bytes: carries out a write plan, in this process or in a writer process of its own, and reaches no torch."""
