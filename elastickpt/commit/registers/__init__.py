"""A run's registers and epochs: which attempts are commits, and which commits count, whoever writes. [RUN-1..54]"""
