"""Text in, text out: nothing in here opens a connection."""
