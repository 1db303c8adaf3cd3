"""The scale that restores safety at the least cost: candidates applied to one model in memory, and measured."""
