"""The process of `bone-export`."""
