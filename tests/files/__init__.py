"""Files and folders that are not ours."""
