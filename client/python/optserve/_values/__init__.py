"""What users pass: arrays and settings, checked and described."""
