"""The form in which a training graph runs: it keeps less for backward."""
