"""Download the bytes of a file from its source, over HTTP or Xet."""
