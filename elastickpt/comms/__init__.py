"""How the ranks of a job agree: rounds over sockets of their own, never a collective of the training job."""
