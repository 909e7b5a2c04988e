"""The release that writes: goes into every manifest."""

RELEASE = "0.1.0"
CONVERTER = "ckpt-convert"  # in the versions of a manifest: a conversion made the checkpoint, no job [UCF-120]
