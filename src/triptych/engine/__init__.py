"""The training loop: exact steps, schedules, checkpoints, monitors. Names no objective and no model family."""
