"""The ranks of a job and how they talk: who is there, who left, and questions to all of them, over sockets of their own."""
