"""The command line `ckpt-convert`: what people type, what they read, and what scripts may rely on."""
