"""What a training loop needs beside the model: optimizer and schedule, progress, logs, resuming."""
