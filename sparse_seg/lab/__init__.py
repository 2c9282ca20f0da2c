"""Experiments: each folder runs networks and reports what came out; `report` draws and never runs any."""
