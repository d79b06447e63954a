"""Files and datasets of text and rows, read one way for calibration, tasks and evaluation."""
