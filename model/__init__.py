"""The checkpoint on disk, streamed: reader, writer, journal; blocks, waves and sites; calibration data; the walk."""
