"""Fine-tuning of a whole encoder on labelled videos."""
