"""The demo: text generated on several processes by a sharded model, with a speculative draft of another layout beside it."""
