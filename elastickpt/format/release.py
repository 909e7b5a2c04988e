"""The release that writes: goes into every manifest."""

RELEASE = "0.1.0"
